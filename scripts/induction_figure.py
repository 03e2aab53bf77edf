"""Draws docs/induction.png from two runs of examples/induction.py.

    python examples/induction.py
    python examples/induction.py --layers 1 --output-dir runs/induction-1
    python scripts/induction_figure.py
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tlens_callback import read_store

INDUCTION, PREVIOUS, LOSS, QUIET = "#c8472b", "#2a6f97", "#3c3c3c", "#8a8a8a"


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
    plt.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans", "axes.linewidth": 0.8})
    figure, left = plt.subplots(figsize=(8, 4), dpi=200, layout="constrained")
    right = left.twinx()

    steps, induction = score(run, "induction")
    _, previous = score(run, "previous")
    turn = steps[(induction > 0.1) & (induction < 0.8)]
    left.axvspan(turn.min() - 5, turn.max() + 5, color="#f1ece3", zorder=0)

    for path, width, dashes in ((run, 2.2, "solid"), (control, 1.4, (0, (4, 2)))):
        right.plot(*loss(path), color=LOSS, linewidth=0.6 * width, linestyle=dashes)
        left.plot(*score(path, "previous"), color=PREVIOUS, linewidth=width, linestyle=dashes)
        left.plot(*score(path, "induction"), color=INDUCTION, linewidth=width, linestyle=dashes)

    last = steps[-1]
    end = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "clip_on": False}
    left.annotate("induction", (last, induction[-1]), color=INDUCTION, weight="bold", **end)
    left.annotate("previous token", (last, previous[-1]), color=PREVIOUS, weight="bold", **end)
    right.annotate("loss", (last, loss(run)[1][-1]), color=LOSS, weight="bold", **end)
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
