"""Chooses what W&B shows of an observation: numbers, pictures, figures, tables and alerts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from tlens_callback.reading import Reading
from tlens_callback.render import is_mosaic, line_figure, mosaic, score_figure
from tlens_callback.render.plain import cut
from tlens_callback.sinks.rollouts import about_rollouts
from tlens_callback.sinks.shown import (
    cells,
    curves,
    events,
    matrices,
    scalars,
    tables,
    top_rows,
)

MOST_NUMBERS = 8
"""Most numbers per instrument and probe from measures that the instrument does not describe."""

_MOST_ROWS = 10_000

_TITLE = 63
"""Characters of an alert's title: W&B asks for fewer than 64."""


@dataclass(frozen=True)
class Medium:
    """Describes a file for W&B; `make` makes a PNG's bytes, a plotly figure or a pandas table.

    The rows of a table that grows are added to those of earlier observations.
    """

    name: str
    kind: Literal["picture", "figure", "table", "growing"]
    make: Callable[[], Any]


def numbers(readings: Sequence[Reading], *, everything: bool) -> tuple[list[Reading], set[str]]:
    """Returns the readings that become curves, and the instruments of which some are left out.

    The curves are the headlines among the numbers, and the first `MOST_NUMBERS` of the numbers that
    their instrument does not describe.
    """
    single = scalars(readings)
    if everything:
        return single, set()
    shown: list[Reading] = []
    counts: dict[tuple[str, str | None], int] = {}
    for reading in single:
        headline = reading.meaning.headline
        if headline is None:
            group = reading.instrument, reading.probe
            counts[group] = counts.get(group, 0) + 1
            headline = counts[group] <= MOST_NUMBERS
        if headline:
            shown.append(reading)
    return shown, {name for (name, _), count in counts.items() if count > MOST_NUMBERS}


def head_numbers(readings: Sequence[Reading], wanted: Sequence[str]) -> dict[str, float]:
    """Returns `heads/<key>/L05H01` -> value, for the ("layer", "head") readings of these keys.

    Layers and heads are padded to the digits of the last one, and to at least two, so that the
    names sort.
    """
    found: dict[str, float] = {}
    for reading in readings:
        if reading.key in wanted and reading.axes == ("layer", "head"):
            layers, heads = (_padded(reading, axis) for axis in reading.axes)
            for layer, row in zip(layers, reading.values.tolist(), strict=True):
                for head, value in zip(heads, row, strict=True):
                    found[f"heads/{reading.key}/L{layer}H{head}"] = value
    return found


def media(
    readings: Sequence[Reading],
    first: Mapping[str, tuple[int, Sequence[Reading]]],
    *,
    step: int,
    everything: bool,
) -> list[Medium]:
    """Lists the files of an observation; none of them is made yet.

    Args:
        first: instrument -> step and lines of the first observation, which are drawn behind the
            lines of this one.
    """

    def lines(own: list[Reading]) -> Any:
        at, behind = first.get(own[0].instrument, (step, ()))
        return line_figure(own, behind if at < step else (), first_name=f"step {at}")

    found = [
        Medium(reading.key, "picture", lambda reading=reading: mosaic(reading, step=step))
        for reading in readings
        if is_mosaic(reading)
    ]
    for name, own in matrices(readings):
        if everything or _may_be_headline(own):
            found.append(Medium(name, "figure", lambda own=own: score_figure(own)))
    for name, own in curves(readings):
        if everything or _may_be_headline(own):
            found.append(Medium(name, "figure", lambda own=own: lines(own)))
    for name, own, make in tables(readings, step):
        if everything or _may_be_headline(own):
            found.append(Medium(name, "growing" if about_rollouts(own) else "table", make))
    return found


def to_wandb(wandb: Any, medium: Medium, path: Path) -> Any:
    """Makes the object that W&B logs for a file; a picture is written as a PNG to this path."""
    shown = medium.make()
    if medium.kind == "figure":
        return wandb.Plotly(shown)
    if medium.kind == "table":
        return _table(wandb, shown)
    # From an array wandb would make a PNG of its own, larger and ten times slower.
    path.write_bytes(shown)
    return wandb.Image(str(path), caption=medium.name)


def _table(wandb: Any, frame: pd.DataFrame) -> Any:
    frame = top_rows(frame, _MOST_ROWS)
    table = empty_table(wandb, frame)
    # Not add_data, which infers the types again for every row: 75 ms for 1350 rows.
    table.data = [list(row) for row in zip(*cells(frame).values(), strict=True)]
    return table


def empty_table(wandb: Any, frame: pd.DataFrame, **settings: Any) -> Any:
    """Makes a table of W&B's with the columns of `frame` and no rows."""
    numbers = frame.select_dtypes("number").columns
    types = [float if name in numbers else str for name in frame.columns]
    return wandb.Table(columns=list(frame.columns), data=[], dtype=types, **settings)


def _may_be_headline(own: Sequence[Reading]) -> bool:
    """Whether at least one of these readings is a headline, or not known to be none."""
    return any(reading.meaning.headline is not False for reading in own)


def _padded(reading: Reading, axis: str) -> list[str]:
    size = reading.values.shape[reading.axes.index(axis)]
    names = reading.labels.get(axis) or [str(i) for i in range(size)]
    digits = max([2, *(len(name) for name in names if name.isdecimal())])
    return [name.zfill(digits) if name.isdecimal() else name for name in names]


def alerts(readings: Sequence[Reading], step: int) -> Iterator[tuple[str, str]]:
    """Yields title and text of every event; all titles are different."""
    titles: set[str] = set()
    for sentence, about in events(readings):
        title, number = cut(f"tlens: {sentence}", _TITLE), 2
        while title in titles:
            end = f" ({number})"
            title, number = cut(f"tlens: {sentence}", _TITLE - len(end)) + end, number + 1
        titles.add(title)
        yield title, f"{sentence}\n{about}, step {step}"
