"""Chooses what the sinks for W&B, trackio and TensorBoard show, and under which keys."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from tlens_callback.reading import Reading
from tlens_callback.render import (
    axis_table,
    is_curve,
    is_matrix,
    is_mosaic,
    is_ranked,
    mosaic,
    neuron_table,
)
from tlens_callback.render.plain import number
from tlens_callback.render.score_panels import curves_as_rows, score_panels
from tlens_callback.render.scores_png import score_picture
from tlens_callback.sinks.rollouts import about_rollouts, rollout_table

STEP = "train/global_step"
"""The key under which the Hugging Face trainer logs its step in each row: the x axis."""

_MOST_ENTRIES = 1_000
_MOST_ROWS = 100


class HasPage(Protocol):
    """A `LocalSink`, as the sinks that log its page know it."""

    def page(self) -> Path:
        """Packs the store's page into one HTML file, unless the file is up to date."""
        ...


def check_store(store: HasPage | None) -> None:
    """Raises ValueError where `store` is something else than a `LocalSink`."""
    if store is not None and not callable(getattr(store, "page", None)):
        raise ValueError(f"store must be a LocalSink, which has a page, but got {store!r}.")


class Keys:
    """Gives each key of a run a name of its own, under which a sink logs it: `<name>/<key>`.

    A character that is not a letter, digit, space or `_ - + =` becomes "_", and a part between two
    slashes is cut to 160 bytes, so that every back end and file system takes the name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._names: dict[str, str] = {}

    def __call__(self, key: str) -> str:
        if key not in self._names:
            parts = [re.sub(r"[^\w +=-]", "_", part).encode()[:160] for part in key.split("/")]
            named = base = f"{self._name}/" + "/".join(p.decode(errors="ignore") for p in parts)
            more = 2
            while named in self._names.values():
                named, more = f"{base}_{more}", more + 1
            self._names[key] = named
        return self._names[key]


def without_trainer_logs(readings: Sequence[Reading]) -> list[Reading]:
    """Leaves out what the trainer has logged itself."""
    return [reading for reading in readings if "update" not in reading.axes]


def scalars(readings: Sequence[Reading]) -> list[Reading]:
    """Chooses the readings that are one number; but not an id that stands for a text, such as a
    checkpoint's name."""
    return [reading for reading in readings if not reading.axes and reading.texts is None]


def by_instrument(readings: Sequence[Reading]) -> dict[str, list[Reading]]:
    """Groups readings by their instrument."""
    found: dict[str, list[Reading]] = {}
    for reading in readings:
        found.setdefault(reading.instrument, []).append(reading)
    return found


def matrices(readings: Sequence[Reading]) -> Iterator[tuple[str, list[Reading]]]:
    """Gives key and readings of each figure of matrices: one for each instrument and pair of axes.

    The keys are <instrument>/heads for ("layer", "head"), <instrument>/experts for ("layer",
    "expert"), <instrument>/by_<axis> for ("layer", <axis>), and <instrument>/feature_by_<axis> for
    ("feature", <axis>).
    """
    for own in by_instrument(readings).values():
        found = [reading for reading in own if is_matrix(reading)]
        for axes in dict.fromkeys(reading.axes for reading in found):
            yield _key(own, figure_name(*axes)), [r for r in found if r.axes == axes]


def curves(readings: Sequence[Reading]) -> Iterator[tuple[str, list[Reading]]]:
    """Gives <instrument>/by_layer and the ("layer",) readings of each instrument."""
    for own in by_instrument(readings).values():
        if found := [reading for reading in own if is_curve(reading)]:
            yield _key(own, "by_layer"), found


def tables(
    readings: Sequence[Reading], step: int
) -> Iterator[tuple[str, list[Reading], Callable[[], pd.DataFrame]]]:
    """Gives the key of each table, the readings in it, and a function that makes it.

    The keys are <instrument>/table for its ("layer", "rank", ...) readings,
    <instrument>/<axis>_rank_table for those of another axis and "rank", and
    <instrument>/<axis>_table for those of one axis that are not curves and have at most 1000
    entries. The table of rollouts, <instrument>/rollout_table, has all that is known of a rollout.
    """
    for own in by_instrument(readings).values():
        for axis in dict.fromkeys(reading.axes[0] for reading in own if is_ranked(reading)):
            ranked = [r for r in own if is_ranked(r) and r.axes[0] == axis]
            yield _key(own, table_name(axis, "rank")), ranked, partial(neuron_table, own, axis)
        lists = [r for r in own if r.values.ndim == 1 and not is_curve(r)]
        lists = [r for r in lists if 0 < r.values.size <= _MOST_ENTRIES]
        for axis in dict.fromkeys(reading.axes[0] for reading in lists):
            listed = [r for r in lists if r.axes == (axis,)]
            make = partial(axis_table, lists, axis)
            if about_rollouts(listed):
                make = partial(rollout_table, step, own)
            yield _key(own, table_name(axis)), listed, make


def pictures(readings: Sequence[Reading], step: int) -> Iterator[tuple[str, bytes]]:
    """Draws key and PNG of each picture, for back ends without figures: attention patterns,
    `matrices` and `curves`."""
    for reading in readings:
        if is_mosaic(reading):
            yield reading.key, mosaic(reading, step=step)
    for key, own in matrices(readings):
        if score_panels(own, with_ids=False):
            yield key, score_picture(own, step=step)
    for key, own in curves(readings):
        yield key, score_picture(curves_as_rows(own), step=step)


def histograms(readings: Sequence[Reading]) -> Iterator[tuple[str, np.ndarray]]:
    """Gives key and finite values, float64, of each ("layer", "head") reading, without spreads."""
    heads = [reading for reading in readings if reading.axes == ("layer", "head")]
    for panel in score_panels(heads, with_ids=False):
        reading = panel.reading
        # The width of a range of large float32 may be infinite.
        finite = reading.values[np.isfinite(reading.values)].astype(float)
        if finite.size:
            yield reading.key, finite


def top_rows(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    """Keeps the rows of the lowest ranks where a table has more rows than `most`.

    The lowest rank is always kept, with up to 1000 rows. A table without ranks keeps its first
    rows.
    """
    if len(frame) <= most:
        return frame
    if "rank" not in frame:
        return frame.iloc[:most]
    ranks = frame["rank"].nunique()
    lowest = frame.loc[frame["rank"] < max(1, most * ranks // len(frame))]
    return lowest.iloc[: max(most, _MOST_ENTRIES)]


def cells(frame: pd.DataFrame) -> dict[str, list[object]]:
    """Gives the values of each column as Python's own types.

    A float32 becomes the shortest decimal that reads back as the same. What is missing, NaN and
    infinity become None.
    """
    found: dict[str, list[object]] = {}
    for name in frame.columns:
        column = frame[name]
        if column.dtype.kind == "f":
            found[str(name)] = [number(value) for value in column.to_numpy(np.float32)]
        else:
            gaps = column.isna().to_numpy(dtype=bool)
            values = column.astype(object)
            found[str(name)] = [None if gap else v for v, gap in zip(values, gaps, strict=True)]
    return found


def excerpt(frame: pd.DataFrame, most: int = _MOST_ROWS) -> dict[str, list[object]]:
    """Gives the `cells` of about 100 `top_rows`, without the column "probe" where it is empty."""
    if "probe" in frame and frame["probe"].isna().to_numpy(dtype=bool).all():
        frame = frame.drop(columns="probe")
    return cells(top_rows(frame, most))


def events(readings: Sequence[Reading]) -> Iterator[tuple[str, str]]:
    """Gives every entry of the ("event",) readings: its sentence in one line, its key and value."""
    for reading in readings:
        if reading.axes != ("event",):
            continue
        sentences = reading.labels.get("event")
        if sentences is None:
            sentences = () if reading.texts is None else reading.texts.tolist()
        for sentence, value in zip(sentences, reading.values, strict=False):
            about = f"{reading.key} {value:.4g}" if np.isfinite(value) else reading.key
            yield " ".join(sentence.split()), about


def _key(own: Sequence[Reading], name: str) -> str:
    """Makes the key `<instrument>/<name>` for several readings of an instrument together, with "_2"
    where one of them has that key itself."""
    key = f"{own[0].instrument}/{name}"
    return f"{key}_2" if any(reading.key == key for reading in own) else key


def figure_name(down: str, across: str) -> str:
    """The second segment of the key of a figure of matrices with these axes."""
    if down == "layer":
        return f"{across}s" if across in ("head", "expert") else f"by_{across}"
    return f"{down}_by_{across}"


def table_name(axis: str, *then: str) -> str:
    """The second segment of the key of a table whose rows go along these axes."""
    if then:
        return "table" if axis == "layer" else f"{axis}_rank_table"
    return f"{axis}_table"
