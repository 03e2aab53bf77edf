# /// script
# dependencies = ["tlens-callback"]
# ///
"""A sink of one's own: every number of a run in one CSV file, a row per reading and step.

It is passed in a list beside the package's own sinks, and the file can be read while the run goes
on: `pandas.read_csv("numbers.csv").pivot(index="step", columns="key", values="value")`.

    python examples/own_sink.py

    python examples/own_sink.py --steps 20 --file numbers.csv
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tlens_callback import Probe, Reading, Tracer, fast

COLUMNS = ("step", "key", "value", "unit")


class CsvSink:
    """Appends the numbers of each observation to one CSV file: step, key, value, unit.

    What the trainer logged since the observation before arrives as one reading with an axis
    "update", labelled with the steps; each of its values becomes a row of its own step. Everything
    else that has axes is passed over.

    A step that is not greater than the last one begins again from there: the rows from it on are
    removed first. So a resumed run goes on with its file, and one that begins at step 0 empties it.

    Args:
        path: of the file; it and its folder are made at the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._last: int | None = None  # None: what the file holds is not known

    def __str__(self) -> str:
        return f"numbers in {self.path}"

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        if self._last is None or step <= self._last:
            self._keep_before(step)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            for reading in readings:
                if not reading.axes:
                    rows.writerow((step, reading.key, float(reading.values), reading.unit))
                elif reading.axes == ("update",):
                    for at, value in zip(reading.labels["update"], reading.values, strict=True):
                        rows.writerow((at, reading.key, float(value), reading.unit))
        self._last = step

    def close(self) -> None:
        """Forgets the last step, so that a `write` after it looks at the file anew."""
        self._last = None

    def _keep_before(self, step: int) -> None:
        rows: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                # The last row of a process that was killed may be cut short.
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == len(COLUMNS)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_name(self.path.name + ".new")
        with whole.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *(row for row in rows if int(row[0]) < step)])
        whole.replace(self.path)  # at once, so that no kill leaves half a file


def main() -> None:
    """Trains a tiny model in a plain loop, and prints the loss on a probe from the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--file", default="runs/own_sink/numbers.csv")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    sink = CsvSink(arguments.file)
    probes = [Probe("count", list(range(20)))]
    with Tracer(model, None, probes, instruments=fast(), sinks=[sink], every_n_steps=10) as tracer:
        for _ in range(arguments.steps):
            tokens = (torch.randint(64, (8, 1)) + torch.arange(32)) % 64
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tracer.step(loss=loss.item())

    print(sink)
    with open(sink.path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["key"] == "token_loss/mean/count":
                print(f"step {row['step']:>2}: {float(row['value']):.3f} {row['unit']}")


if __name__ == "__main__":
    main()
