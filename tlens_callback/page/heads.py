"""Ranks heads, to choose whose patterns to keep when those of all would take too much room."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from tlens_callback.reading import Reading

Head = tuple[str, str]
"""A head: the label of its layer and its own label, or their numbers if there are no labels."""

Scores = dict[Head, float]

HEAD_AXES = ("layer", "head")


def heads_of(
    axes: Sequence[str], shape: Sequence[int], labels: Mapping[str, Sequence[str]]
) -> list[Head]:
    """Returns the heads of a ("layer", "head") reading or of attention patterns, in the order of
    the values; no heads for other readings."""
    if tuple(axes[:2]) != HEAD_AXES or len(axes) not in (2, 4):
        return []
    layers, heads = (
        labels.get(axis) or [str(i) for i in range(size)]
        for axis, size in zip(HEAD_AXES, shape, strict=False)
    )
    return [(layer, head) for layer in layers for head in heads]


def is_score(axes: Sequence[str], unit: str) -> bool:
    """Whether a reading has one probability for each head."""
    return tuple(axes) == HEAD_AXES and unit == "probability"


def keep_largest(scores: Scores, reading: Reading) -> None:
    """Raises each head's entry of `scores` to the reading's value if that is larger."""
    at = heads_of(reading.axes, reading.values.shape, reading.labels)
    for head, value in zip(at, reading.values.ravel().tolist(), strict=True):
        if value > scores.get(head, -np.inf):
            scores[head] = value


def interleave(rankings: Iterable[Scores]) -> list[Head]:
    """Returns the first head of each ranking, then the second of each, ...; each head once."""
    orders = [sorted(scores, key=scores.__getitem__, reverse=True) for scores in rankings]
    rows = zip_longest(*orders)
    return list(dict.fromkeys(head for row in rows for head in row if head is not None))
