"""Which heads to show where the patterns of all would be too much."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from tlens_callback.reading import Reading

Place = tuple[str, str]
"""A head by its layer's and its own label; a number where there are none."""

Scores = dict[Place, float]

HEADS = ("layer", "head")


def places(
    axes: Sequence[str], shape: Sequence[int], labels: Mapping[str, Sequence[str]]
) -> list[Place]:
    """The heads of a reading by layer and head, or of its patterns, in the order of its values;
    empty for others."""
    if tuple(axes[:2]) != HEADS or len(axes) not in (2, 4):
        return []
    layers, heads = (
        labels.get(axis) or [str(i) for i in range(size)]
        for axis, size in zip(HEADS, shape, strict=False)
    )
    return [(layer, head) for layer in layers for head in heads]


def is_score(axes: Sequence[str], unit: str) -> bool:
    """Whether a reading is a probability of each head."""
    return tuple(axes) == HEADS and unit == "probability"


def take_largest(scores: Scores, reading: Reading) -> None:
    """Puts the reading's values into `scores` where they are larger than what is there."""
    at = places(reading.axes, reading.values.shape, reading.labels)
    for place, value in zip(at, reading.values.ravel().tolist(), strict=True):
        if value > scores.get(place, -np.inf):
            scores[place] = value


def in_turn(rankings: Iterable[Scores]) -> list[Place]:
    """The first of each ranking, then the second of each, ...; each head once."""
    orders = [sorted(scores, key=scores.__getitem__, reverse=True) for scores in rankings]
    rows = zip_longest(*orders)
    return list(dict.fromkeys(place for row in rows for place in row if place is not None))
