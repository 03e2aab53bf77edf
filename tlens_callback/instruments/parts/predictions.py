"""Compares what the model predicts at each position with what its base predicts there."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.shadow import Shadow
from tlens_callback.shadow.unembed import CHUNK, IN_CACHE, unembed


@dataclass(frozen=True, eq=False)
class Compared:
    """What has become of the predictions at some positions.

    Attributes:
        numbers: measure -> [position]; see `compare`.
        gained, lost: [position, k], ids of the tokens whose ln p - ln p0 is largest, or smallest.
        gained_by, lost_by: [position, k], the sizes of these differences.
    """

    numbers: dict[str, Float[Tensor, " position"]]
    gained: Int[Tensor, "position k"]
    gained_by: Float[Tensor, "position k"]
    lost: Int[Tensor, "position k"]
    lost_by: Float[Tensor, "position k"]


@torch.no_grad()
def compare(
    shadow: Shadow,
    now: Float[Tensor, "position d_model"],
    base: Float[Tensor, "position d_model"] | None,
    following: Int[Tensor, " position"],
    *,
    base_shadow: Shadow | None = None,
    temperature: float = 1.0,
    k: int = 0,
    every: int = 1,
) -> Compared:
    """Unembeds the last layer's residual stream of the model and of its base, and compares.

    Let z be the logits divided by the temperature, p = softmax(z), z0 and p0 those of the base, and
    y the token that follows:

    - logp = ln p(y), base_logp = ln p0(y), log_ratio = logp - base_logp
    - entropy = -sum p ln p; base_entropy likewise
    - js = entropy of (p + p0) / 2, minus the mean of the two entropies; at most ln 2
    - kl = sum p (ln p - ln p0)
    - rank, base_rank: how many tokens are likelier than y; NaN where that is not known

    Equal residual streams and weights give exactly no difference.

    Args:
        now, base: the residual stream after the last layer, of the model and of its base; None:
            there is no base, and nothing of it is returned.
        following: the token that comes next at each position.
        base_shadow: of the base, if it is another model; None: it is the model without adapters.
        temperature: with which it was sampled.
        k: how many tokens are gained and lost, at each position of which `every` is a divisor.
    """
    at_once, inner = (max(1, size // shadow.vocab_size) for size in (CHUNK, IN_CACHE))
    outside = nullcontext if base_shadow is not None else _base_of(shadow, base)
    found: list[dict[str, Tensor]] = []
    moved: list[tuple[Tensor, ...]] = []
    for start in range(0, len(following), at_once):
        some = slice(start, start + at_once)
        z, z0 = unembed(shadow, now[some]).div_(temperature), None
        if base is not None:
            with outside():
                z0 = unembed(base_shadow or shadow, base[some]).div_(temperature)
        for at in range(0, len(z), inner):
            here = slice(at, at + inner)
            before = None if z0 is None else z0[here]
            numbers, change = _compared(z[here], before, following[some][here])
            found.append(numbers)
            # A view of what was computed at these positions.
            ranked = change[-(start + at) % every :: every] if change is not None else z[:0]
            if k and len(ranked):
                gained, lost = ranked.topk(k), ranked.topk(k, largest=False)
                moved.append((gained.indices, gained.values, lost.indices, -lost.values))
    none = following.new_empty(0, k), now.new_empty(0, k)
    parts = [torch.cat(part) for part in zip(*moved, strict=True)] or [*none, *none]
    return Compared({name: torch.cat([one[name] for one in found]) for name in found[0]}, *parts)


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


def _base_of(shadow: Shadow, base: Tensor | None) -> Callable[[], AbstractContextManager[None]]:
    """Where the base's norm and head are: if they are the model's own, nothing is brought."""
    if base is None or not len(base):
        return nullcontext
    own = unembed(shadow, base[:1])
    with shadow.without_adapters():
        same = torch.equal(own, unembed(shadow, base[:1]))
    return nullcontext if same else shadow.without_adapters


def _compared(
    z: Float[Tensor, "position vocab"],
    z0: Float[Tensor, "position vocab"] | None,
    following: Int[Tensor, " position"],
) -> tuple[dict[str, Float[Tensor, " position"]], Float[Tensor, "position vocab"] | None]:
    """The measures, and ln p - ln p0 of all tokens."""
    log, p, found = _predicted(z, following, "")
    if z0 is None:
        return found, None
    log0, p0, of_base = _predicted(z0, following, "base_")
    found |= of_base
    found["log_ratio"] = found["logp"] - found["base_logp"]
    change = log.sub_(log0)
    found["kl"] = torch.linalg.vecdot(p, change).clamp(min=0)
    entropy = (found["entropy"] + found["base_entropy"]) / 2
    js = torch.special.entr(p.add_(p0).div_(2)).sum(1) - entropy
    # The entropies are computed in two ways, which differ by rounding: 1e-6.
    found["js"] = torch.where((z == z0).all(1), 0, js.clamp_(min=0))
    return found, change


def _predicted(
    z: Float[Tensor, "position vocab"], following: Int[Tensor, " position"], of: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    own = z.gather(1, following[:, None])
    log = z.log_softmax(1)
    p = log.exp()
    logp = log.gather(1, following[:, None])[:, 0]
    # A token that never comes has p = 0, and p ln p = 0.
    log.clamp_(min=torch.finfo(log.dtype).min)
    rank = torch.where(own[:, 0].isnan(), torch.nan, (z > own).sum(1).float())
    entropy = -torch.linalg.vecdot(p, log)
    return log, p, {f"{of}logp": logp, f"{of}entropy": entropy, f"{of}rank": rank}
