"""The readings that say which role a head plays, and how widely it attends."""

from collections.abc import Iterable, Sequence

import numpy as np

from tlens_callback.meaning import Meaning, Quantity
from tlens_callback.reading import Reading

_AXES: dict[Quantity | None, Sequence[tuple[str, ...]]] = {
    Quantity.HEAD_ROLE: (("layer", "head"), ("block", "layer", "head")),
    Quantity.HEAD_ENTROPY: (("layer", "head"),),
}


def of_heads(readings: Iterable[Reading]) -> list[Reading]:
    """Returns the readings of roles and entropy that have the axes of their quantity."""
    return [one for one in readings if one.axes in _AXES.get(one.meaning.quantity, ())]


def first_of_each(readings: Iterable[Reading]) -> list[Reading]:
    """Returns the first reading of each role, and of entropy: a role that several instruments, or
    several probes, have is counted once."""
    first: dict[tuple[Quantity | None, str], Reading] = {}
    for reading in readings:
        first.setdefault(role_of(reading.meaning), reading)
    return list(first.values())


def role_of(meaning: Meaning) -> tuple[Quantity | None, str]:
    """Returns what tells the readings of one role from those of another, and from entropy."""
    return meaning.quantity, meaning.role


def lowest_over_blocks(reading: Reading) -> np.ndarray:
    """Returns [layer, head]: each head's lowest score over the block lengths, if there are
    several."""
    return reading.values.min(0) if reading.axes[0] == "block" else reading.values
