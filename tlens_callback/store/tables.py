"""Makes the long table of a store: one row for every number of its readings."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tlens_callback.reading import TOKEN_AXES, Reading

NAMES = ("key", "instrument", "measure", "probe", "unit")
"""The columns of `long_frame` that say which reading a number belongs to."""

TEXT = "str" if pd.array(["", None], dtype="str").isna().any() else "object"
"""The type of a column of texts, of which some can be missing; "str" of pandas 2 would make a
missing one the text "None"."""

_RESERVED = {*NAMES, "value", "text", "step"}


def axis_column(axis: str) -> str:
    """Returns the name of the column for an axis: the axis's name, or "<axis>_index" if a column
    of that name exists already."""
    return f"{axis}_index" if axis in _RESERVED else axis


def long_frame(readings: Sequence[Reading]) -> pd.DataFrame:
    """Returns all numbers of the readings as a table, one number per row.

    Columns: key, instrument, measure, probe (missing if a reading is not of one probe), unit, as
    categories; one Int32 column per axis, missing if a reading does not have the axis; value,
    float32; text, as categories, missing if a reading has no texts. An axis is counted from 0. But
    if its labels are whole numbers and it is not made of tokens (a selection of layers, block
    lengths), the labels are used. The axes "key", "probe" and others that are columns already
    become "key_index", "probe_index", ...
    """
    readings = list(readings)
    sizes = np.array([r.values.size for r in readings], dtype=int)
    frame: dict[str, object] = {}
    for name in NAMES:
        codes, categories = pd.factorize(np.array([getattr(r, name) for r in readings], object))
        categories = pd.Index(categories, dtype=TEXT)
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
    frame["text"] = pd.Categorical.from_codes(codes, pd.Index(categories, dtype=TEXT))
    return pd.DataFrame(frame)


def numbering(reading: Reading, axis: str) -> np.ndarray:
    """Returns the whole number of each index of an axis: its label if that is one, else itself."""
    if is_numbered(reading, axis):
        return np.array([int(name) for name in reading.labels[axis]], np.int32)
    return np.arange(reading.values.shape[reading.axes.index(axis)], dtype=np.int32)


def is_numbered(reading: Reading, axis: str) -> bool:
    """Whether the labels of an axis are whole numbers, all different."""
    names = reading.labels.get(axis, ())
    whole = all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names)
    return axis not in TOKEN_AXES and whole and 0 < len({int(name) for name in names}) == len(names)
