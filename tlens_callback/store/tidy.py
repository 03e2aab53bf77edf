"""Makes a pandas table of one reading at several steps."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tlens_callback.reading import TOKEN_AXES, Reading
from tlens_callback.store.tables import TEXT, axis_column, numbering


def tidy(steps: Sequence[int], readings: Sequence[Reading]) -> pd.DataFrame:
    """Returns one row per number of a reading, at one or more steps; `Store.frame` explains the
    columns."""
    sizes = [reading.values.size for reading in readings]
    key = pd.Index([readings[0].key], dtype=TEXT)
    frame: dict[str, object] = {
        "step": np.repeat(np.array(steps, np.int64), sizes),
        "key": pd.Categorical.from_codes(np.zeros(sum(sizes), np.int8), key),
    }
    for axis in readings[0].axes:
        numbers = [_spread(numbering(r, axis), r, axis) for r in readings]
        frame[axis_column(axis)] = np.concatenate(numbers)
        if any(_has_names(r, axis) for r in readings):
            frame[f"{axis}_name"] = _names(readings, axis)
    frame["value"] = np.concatenate([r.values.ravel() for r in readings])
    if any(r.texts is not None for r in readings):
        texts = [np.full(r.values.size, None) if r.texts is None else r.texts for r in readings]
        frame["text"] = pd.Categorical(np.concatenate([t.ravel().astype(object) for t in texts]))
    return pd.DataFrame(frame, copy=False)


def _spread(along: np.ndarray, reading: Reading, axis: str) -> np.ndarray:
    """Repeats what an axis has at each index, so that every number of the reading has its own."""
    shape = [-1 if name == axis else 1 for name in reading.axes]
    return np.broadcast_to(along.reshape(shape), reading.values.shape).ravel()


def _has_names(reading: Reading, axis: str) -> bool:
    """Whether an axis has labels that say more than their numbers do."""
    labels = reading.labels.get(axis, ())
    numbers = numbering(reading, axis)
    return bool(labels) and (axis in TOKEN_AXES or any(map(_says_more, labels, numbers)))


def _says_more(label: str, number: int) -> bool:
    return label != str(number)


def _names(readings: Sequence[Reading], axis: str) -> pd.Categorical:
    """Returns the label of each number; a label has the same code at all steps."""
    labels = [reading.labels.get(axis, ()) for reading in readings]
    known = {name: i for i, name in enumerate(dict.fromkeys(n for of in labels for n in of))}
    kind = np.int16 if len(known) < 2**15 else np.int32
    codes = []
    for of, reading in zip(labels, readings, strict=True):
        size = reading.values.shape[reading.axes.index(axis)]
        along = np.array([known[name] for name in of] or [-1] * size, kind)
        codes.append(_spread(along, reading, axis))
    return pd.Categorical.from_codes(np.concatenate(codes), pd.Index(list(known), dtype=TEXT))
