"""Takes parts of a reading, and names them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from tlens_callback.reading import TOKEN_AXES, Reading

_LETTERS = {"layer": "L", "head": "H"}


def stands_for_text(reading: Reading) -> bool:
    """Whether its numbers only stand for its texts: token ids and the like."""
    return reading.unit == "index" and reading.texts is not None


def check_one_instrument(readings: Sequence[Reading]) -> None:
    """Raises ValueError where the readings are of several instruments."""
    if len(instruments := {r.instrument for r in readings}) > 1:
        raise ValueError(f"A picture or table shows one instrument, but got {sorted(instruments)}.")


def take(reading: Reading, at: Mapping[str, int]) -> Reading:
    """Gives the part of a reading at these indices, without their axes."""
    index = tuple(at.get(axis, slice(None)) for axis in reading.axes)
    axes = tuple(axis for axis in reading.axes if axis not in at)
    return replace(
        reading,
        values=reading.values[index],
        axes=axes,
        labels={axis: names for axis, names in reading.labels.items() if axis in axes},
        texts=None if reading.texts is None else reading.texts[index],
    )


def farthest_from_zero(values: np.ndarray, axis: int, n: int) -> np.ndarray:
    """Joins each `n` values along an axis to one: the one farthest from zero, or, if there is one,
    the one that is not a number."""
    if n == 1:
        return values
    fill = [(0, 0)] * values.ndim
    fill[axis] = (0, -values.shape[axis] % n)
    values = np.moveaxis(np.pad(values, fill), axis, -1)
    parts = [values[..., i::n] for i in range(n)]
    high = reduce(np.maximum, parts)
    if not (values >= 0).all():
        low = reduce(np.minimum, parts)
        # What is not a number fails the comparison, and is the smallest, too.
        high = np.where(high >= -low, high, low)
    return np.moveaxis(high, -1, axis)


def place(reading: Reading, at: Mapping[str, int]) -> str:
    """Names the place of a value: "L5H1", "layer 5, pos 3 ' the'"."""
    if all(axis in _LETTERS and axis not in reading.labels for axis in at):
        return "".join(f"{_LETTERS[axis]}{i}" for axis, i in at.items())
    return ", ".join(f"{axis} {_name(reading, axis, i)}" for axis, i in at.items())


def _name(reading: Reading, axis: str, i: int) -> str:
    labels = reading.labels.get(axis)
    if labels is None:
        return str(i)
    return f"{i} {labels[i]!r}" if axis in TOKEN_AXES else labels[i]
