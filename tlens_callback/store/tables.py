"""The long table of a store: every number of its readings in a row of its own."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tlens_callback.reading import TOKEN_AXES, Reading

NAMES = ("key", "instrument", "measure", "probe", "unit")
"""The columns of `long_frame` that say what a number is."""

_RESERVED = {*NAMES, "value", "text", "step"}


def axis_column(axis: str) -> str:
    """The column of `long_frame` that holds an axis: its name, or "key_index" where a column of
    that name says something else."""
    return f"{axis}_index" if axis in _RESERVED else axis


def long_frame(readings: Sequence[Reading]) -> pd.DataFrame:
    """All numbers of the readings, one a row.

    Columns: key, instrument, measure, probe (missing where a reading belongs to no single probe),
    unit, as categories; one Int32 column per axis, missing where a reading lacks the axis; value,
    float32; text, as categories, missing where a reading has no texts. An axis is counted from 0,
    but for one whose labels are whole numbers and that is not made of tokens (a selection of
    layers, block lengths): it has its labels. The axes "key", "probe" and others that are columns
    already become "key_index", "probe_index", ...
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
    texts = np.full(sizes.sum(), None, object)
    for reading, size, end in zip(readings, sizes, ends, strict=True):
        if reading.texts is not None:
            texts[end - size : end] = reading.texts.ravel()
    codes, categories = pd.factorize(texts)
    frame["text"] = pd.Categorical.from_codes(codes, pd.Index(categories, dtype="str"))
    return pd.DataFrame(frame)


def numbering(reading: Reading, axis: str) -> np.ndarray:
    """[index] -> the whole number that stands for it: its label where that is one, or itself."""
    if is_numbered(reading, axis):
        return np.array([int(name) for name in reading.labels[axis]], np.int32)
    return np.arange(reading.values.shape[reading.axes.index(axis)], dtype=np.int32)


def is_numbered(reading: Reading, axis: str) -> bool:
    """Whether the labels are whole numbers, none twice."""
    names = reading.labels.get(axis, ())
    whole = all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names)
    return axis not in TOKEN_AXES and whole and 0 < len({int(name) for name in names}) == len(names)
