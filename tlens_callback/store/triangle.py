"""Takes the lower triangle of attention patterns; a causal model has zeros above the diagonal."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def is_pattern(axes: Sequence[str]) -> bool:
    """Whether these are the axes of attention patterns: (..., "query", "key")."""
    return tuple(axes[-2:]) == ("query", "key")


def lower_triangle(values: np.ndarray, axes: Sequence[str]) -> np.ndarray | None:
    """Returns `values[..., rows, columns]` for `rows, columns = numpy.tril_indices(n)`.

    Returns None if they are not patterns [..., n, n], or a value above the diagonal is not 0.
    """
    if not is_pattern(axes) or values.shape[-1] != values.shape[-2]:
        return None
    n = values.shape[-1]
    lower = values.reshape(*values.shape[:-2], n * n).take(_flat_indices(n), axis=-1)
    return lower if np.count_nonzero(lower) == np.count_nonzero(values) else None


@lru_cache(maxsize=64)
def _flat_indices(n: int) -> np.ndarray:
    rows, columns = np.tril_indices(n)
    return rows * n + columns
