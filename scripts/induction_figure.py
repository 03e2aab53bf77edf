"""Draws docs/induction.png: the phase change of examples/induction.py, and its control.

    python examples/induction.py
    python examples/induction.py --layers 1 --output-dir runs/induction-1
    python scripts/induction_figure.py

Scores are those of the best head at its worst block length; the control has one layer.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tlens_callback import read_store

INDUCTION, PREVIOUS, LOSS = "#c8472b", "#2a6f97", "#4a4a4a"


def loss(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and training loss, nats a token, of the run's last training."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    steps, values = np.array(points).T
    return steps, values


def score(run: Path, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the best head's score, from the newest store of the run."""
    newest = max(run.glob("tlens*"), key=lambda store: store.stat().st_mtime)
    return read_store(newest).curve(f"head_scores/max_{measure}")


def draw(run: Path, control: Path, out: Path) -> None:
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.linewidth": 0.8})
    figure, scores = plt.subplots(figsize=(8, 4.2), dpi=200, layout="constrained")
    losses = scores.twinx()

    steps, induction = score(run, "induction")
    turning = steps[(induction > 0.1) & (induction < 0.8)]
    if turning.size:
        scores.axvspan(turning.min(), turning.max(), color="#f3eee5", zorder=0)
        scores.text(turning.mean(), 0.97, "phase\nchange", size=10, ha="center", va="top")

    for path, width, dashes in ((run, 2.4, "solid"), (control, 1.4, (0, (4, 2)))):
        losses.plot(*loss(path), color=LOSS, linewidth=0.65 * width, linestyle=dashes)
        scores.plot(*score(path, "previous"), color=PREVIOUS, linewidth=width, linestyle=dashes)
        scores.plot(*score(path, "induction"), color=INDUCTION, linewidth=width, linestyle=dashes)

    def name(axes, text, curve, at, above, colour, **font):
        """Writes a text at this share of the run, and this far above the curve."""
        x = at * steps[-1]
        axes.text(x, np.interp(x, *curve) + above, text, color=colour, ha="center", **font)

    bold, small = {"weight": "bold"}, {"size": 10, "style": "italic"}
    name(scores, "induction", (steps, induction), 0.86, 0.05, INDUCTION, **bold)
    name(scores, "previous token", score(run, "previous"), 0.86, 0.03, PREVIOUS, **bold)
    name(losses, "loss", loss(run), 0.12, -0.55, LOSS, **bold)
    name(losses, "loss, one layer", loss(control), 0.86, -0.4, LOSS, **small)
    name(scores, "scores, one layer", score(control, "induction"), 0.86, 0.03, LOSS, **small)
    scores.set(xlabel="training step", xlim=(0, steps[-1]), ylim=(0, 1))
    scores.set_ylabel("attention score of the best head")
    # A scale on which the loss stays clear of the scores' plateau.
    losses.set(ylim=(0, 7), yticks=range(5))
    losses.set_ylabel("loss, nats per token", y=2 / 7)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/induction"))
    parser.add_argument("--control", type=Path, default=Path("runs/induction-1"))
    parser.add_argument("--out", type=Path, default=Path("docs/induction.png"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(args.run, args.control, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
