"""Readings as pandas tables: a row per number, or a row per neuron."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tlens_callback.reading import Reading

NAMES = ("key", "instrument", "measure", "probe", "unit")
"""The columns of `long_frame` that say what a number is."""

_RESERVED = {*NAMES, "value", "step"}
_TOKEN_AXES = {"pos", "query", "key"}


def axis_column(axis: str) -> str:
    """The column of `long_frame` that holds an axis: its name, or "key_index" where a column of
    that name says something else."""
    return f"{axis}_index" if axis in _RESERVED else axis


def long_frame(readings: Sequence[Reading]) -> pd.DataFrame:
    """All numbers of the readings, one a row.

    Columns: key, instrument, measure, probe (missing where a reading belongs to no single probe),
    unit, as categories; one Int32 column per axis, missing where a reading lacks the axis; value,
    float32. An axis is counted from 0, but for one whose labels are whole numbers and that is not
    made of tokens (a selection of layers, block lengths): it has its labels. The axes "key" and
    "probe" become "key_index" and "probe_index".
    """
    readings = list(readings)
    sizes = np.array([r.values.size for r in readings], dtype=int)
    frame: dict[str, object] = {}
    for name in NAMES:
        codes, categories = pd.factorize(np.array([getattr(r, name) for r in readings], object))
        categories = pd.Index(categories, dtype="str")
        frame[name] = pd.Categorical.from_codes(np.repeat(codes, sizes), categories)
    ends = sizes.cumsum()
    for axis in dict.fromkeys(axis for r in readings for axis in r.axes):
        index, missing = np.zeros(sizes.sum(), np.int32), np.ones(sizes.sum(), bool)
        for reading, size, end in zip(readings, sizes, ends, strict=True):
            if axis in reading.axes:
                dim = reading.axes.index(axis)
                shape = [-1 if i == dim else 1 for i in range(reading.values.ndim)]
                column = np.broadcast_to(
                    numbering(reading, axis).reshape(shape), reading.values.shape
                )
                index[end - size : end] = column.ravel()
                missing[end - size : end] = False
        frame[axis_column(axis)] = pd.arrays.IntegerArray(index, missing)
    values = [r.values.ravel() for r in readings]
    frame["value"] = np.concatenate(values) if values else np.zeros(0, np.float32)
    return pd.DataFrame(frame)


def numbering(reading: Reading, axis: str) -> np.ndarray:
    """[index] -> the whole number that stands for it: its label where that is one, or itself."""
    size = reading.values.shape[reading.axes.index(axis)]
    names = reading.labels.get(axis, ())
    if axis not in _TOKEN_AXES and size and all(_whole(name) for name in names) and names:
        return np.array([int(name) for name in names], np.int32)
    return np.arange(size, dtype=np.int32)


def _whole(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 10


def neuron_table(readings: Sequence[Reading]) -> pd.DataFrame:
    """One row per probe, layer and rank, from the readings of one instrument whose axes begin with
    `("layer", "rank")`; others are left out.

    Columns: probe, layer, rank; a column per measure, in order of appearance. A reading with a
    third axis, ("layer", "rank", "pos") say, gives one value along it, and where that is: "token"
    (the label there) and "pos"; with several such measures "<measure>_token" and "<measure>_pos".
    A measure called "peak" says which one; without it, it is the value of largest magnitude. Unit
    "index" becomes a whole number. A probe that lacks a measure has missing values there.

    Raises:
        ValueError: for readings of several instruments, two of one key, or readings of one probe
            that differ in their layers and ranks.
    """
    chosen = [r for r in readings if r.axes[:2] == ("layer", "rank") and r.values.ndim <= 3]
    if len(instruments := {r.instrument for r in chosen}) > 1:
        raise ValueError(f"One table shows one instrument, got {sorted(instruments)}.")
    if len({r.key for r in chosen}) < len(chosen):
        raise ValueError(f"Two readings have one key: {sorted(r.key for r in chosen)}.")
    several = len({r.measure for r in chosen if r.values.ndim == 3}) > 1
    parts = []
    for probe in dict.fromkeys(r.probe for r in chosen):
        of_probe = [r for r in chosen if r.probe == probe]
        layers, ranks = of_probe[0].values.shape[:2]
        numbers = numbering(of_probe[0], "layer")
        columns: dict[str, object] = {
            "probe": pd.array([probe] * (layers * ranks), dtype="str"),
            "layer": numbers.repeat(ranks),
            "rank": np.tile(np.arange(ranks), layers),
        }
        peak = next((r.values.astype(int) for r in of_probe if r.measure == "peak"), None)
        for reading in of_probe:
            grid = numbering(reading, "layer")
            if reading.values.shape[1] != ranks or not np.array_equal(grid, numbers):
                raise ValueError(
                    f"{reading.key!r} and {of_probe[0].key!r} have other layers or ranks, so "
                    f"they make no common rows."
                )
            if reading.measure != "peak":
                columns |= _columns(reading, peak, prefix=f"{reading.measure}_" if several else "")
        parts.append(pd.DataFrame(columns))
    if not parts:
        return pd.DataFrame({"probe": [], "layer": [], "rank": []})
    return pd.concat(parts, ignore_index=True)


def _columns(reading: Reading, peak: np.ndarray | None, *, prefix: str) -> dict[str, object]:
    """One reading's columns, [layer * rank]; `peak` [layer, rank] as in `neuron_table`."""
    values = reading.values
    extra: dict[str, object] = {}
    if values.ndim == 3:
        axis = reading.axes[2]
        labels = reading.labels.get(axis) or [str(i) for i in range(values.shape[2])]
        size = np.where(np.isnan(values), -1, np.abs(values))
        at = size.argmax(2) if peak is None else peak
        values = np.take_along_axis(values, at[..., None], 2)[..., 0]
        extra[f"{prefix}token"] = pd.array([labels[i] for i in at.ravel()], dtype="str")
        extra[f"{prefix}pos"] = at.ravel()
    column: object = values.ravel()
    if reading.unit == "index":
        finite = np.isfinite(values).ravel()
        whole = np.where(finite, values.ravel(), 0).astype(np.int64)
        column = pd.arrays.IntegerArray(whole, ~finite)
    return {reading.measure: column, **extra}
