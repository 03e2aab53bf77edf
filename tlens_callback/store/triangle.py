"""The lower triangle of attention patterns: all there is of them, where no query looks ahead."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def is_pattern(axes: Sequence[str]) -> bool:
    """Whether these are the axes of attention patterns, by whatever axes they are many."""
    return tuple(axes[-2:]) == ("query", "key")


def lower_triangle(values: np.ndarray, axes: Sequence[str]) -> np.ndarray | None:
    """`values[..., rows, columns]` for `rows, columns = numpy.tril_indices(n)`.

    None where they are no patterns [..., n, n], or anything above the diagonal is not exactly 0.
    """
    if not is_pattern(axes) or values.shape[-1] != values.shape[-2]:
        return None
    n = values.shape[-1]
    lower = values.reshape(*values.shape[:-2], n * n).take(_places(n), axis=-1)
    return lower if np.count_nonzero(lower) == np.count_nonzero(values) else None


@lru_cache(maxsize=64)
def _places(n: int) -> np.ndarray:
    rows, columns = np.tril_indices(n)
    return rows * n + columns
