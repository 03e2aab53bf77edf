"""Compares the model's predictions with those of its base, position by position."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.distance import js_terms
from tlens_callback.instruments.parts.unembed import CHUNK, unembed
from tlens_callback.shadow import Shadow

_HELD = 4 * CHUNK
"""How many logits of the base are held at a time. The adapters are left out once for each such
piece, because final norm and head may have adapters too."""


@dataclass(frozen=True, eq=False)
class Compared:
    """What has become of the predictions at some positions.

    Attributes:
        numbers: log_ratio, js, entropy, base_entropy, rank, base_rank and kl, as in `TokenChange`.
        gained, lost: [position, k], ids of the tokens whose ln p - ln p0 is largest, or smallest.
        gained_by, lost_by: [position, k], the sizes of these differences.
    """

    numbers: Float[np.ndarray, "measure position"]
    gained: Int[np.ndarray, "position k"]
    gained_by: Float[np.ndarray, "position k"]
    lost: Int[np.ndarray, "position k"]
    lost_by: Float[np.ndarray, "position k"]


@torch.no_grad()
def compare(
    shadow: Shadow,
    now: Float[Tensor, "position d_model"],
    base: Float[Tensor, "position d_model"],
    following: Int[Tensor, " position"],
    k: int,
) -> Compared:
    """Unembeds the last layer's residual stream of the model and of its base, and compares.

    Args:
        now, base: the residual stream after the last layer, of the model and of its base.
        following: the token that comes next at each position.
        k: how many tokens are gained and lost at each position.
    """
    at_once, held = (max(1, size // shadow.vocab_size) for size in (CHUNK, _HELD))
    parts: list[tuple[Tensor, ...]] = []
    for some, some_base, true in _together(held, now, base, following):
        with shadow.without_adapters():
            # In the same pieces as below: equal weights then give equal bits.
            before = torch.cat([unembed(shadow, few) for few in some_base.split(at_once)])
        for few, few_before, few_true in _together(at_once, some, before, true):
            parts.append(_compare(unembed(shadow, few), few_before, few_true, k))
    return Compared(*(torch.cat(part, -1 if i == 0 else 0).cpu().numpy()
                      for i, part in enumerate(zip(*parts, strict=True))))  # fmt: skip


def most_frequent(
    tokens: Int[np.ndarray, "position k"], sizes: Float[np.ndarray, "position k"], k: int
) -> tuple[Float[np.ndarray, " rank"], Float[np.ndarray, " rank"]]:
    """Returns the k tokens that are at most positions, and at what share of them.

    A token whose size is not above 0 does not count. Of equal shares, the larger sum of the sizes
    comes first. Tokens are NaN where there are no more; both are NaN if any size is.
    """
    token, share = np.full(k, np.nan), np.zeros(k)
    if np.isnan(sizes).any():
        return token, np.full(k, np.nan)
    counted = sizes > 0
    found, which = np.unique(tokens[counted], return_inverse=True)
    counts = np.bincount(which, minlength=len(found))
    sums = np.bincount(which, weights=sizes[counted], minlength=len(found))
    order = np.lexsort((-sums, -counts))[:k]
    token[: len(order)] = found[order]
    share[: len(order)] = counts[order] / len(tokens)
    return token, share


def _together(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _compare(
    logits: Float[Tensor, "position vocab"],
    base: Float[Tensor, "position vocab"],
    following: Int[Tensor, " position"],
    k: int,
) -> tuple[Tensor, ...]:
    """Returns the fields of `Compared`."""
    true = following[:, None]
    ln_p, ln_p0 = logits.log_softmax(-1), base.log_softmax(-1)
    p, p0 = ln_p.exp(), ln_p0.exp()
    # A token that never comes, for either, has ln p = -inf.
    moved = torch.where(ln_p == ln_p0, 0, ln_p - ln_p0)
    numbers = [
        moved.gather(1, true)[:, 0],
        js_terms(p, p0).sum(-1) * math.log(2),
        torch.special.entr(p).sum(-1),
        torch.special.entr(p0).sum(-1),
        _rank(ln_p, true),
        _rank(ln_p0, true),
        torch.where(p > 0, p * moved, p).sum(-1).clamp(min=0),
    ]
    gained, lost = moved.topk(k), moved.topk(k, largest=False)
    return torch.stack(numbers), gained.indices, gained.values, lost.indices, -lost.values


def _rank(
    ln_p: Float[Tensor, "position vocab"], true: Int[Tensor, "position 1"]
) -> Float[Tensor, " position"]:
    """Returns how many tokens are likelier than the true one; NaN where that is not known."""
    own = ln_p.gather(1, true)
    return torch.where(own[:, 0].isnan(), torch.nan, (ln_p > own).sum(1).float())
