"""Measures each sampled token: how likely it is now, and how likely it was to the base."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.unembed import CHUNK, unembed
from tlens_callback.shadow import Shadow

_IN_CACHE = 2**20
"""Logits that are read at a time, several times over: 4 MiB."""


def token_measures(
    shadow: Shadow,
    now: Float[Tensor, "token d_model"],
    base: Float[Tensor, "token d_model"] | None,
    tokens: Int[Tensor, " token"],
    *,
    temperature: float = 1.0,
) -> dict[str, Float[Tensor, " token"]]:
    """Compares the model with its base at each sampled token.

    Let z be the logits before a token divided by the temperature, p = softmax(z), z0 and p0 those
    of the base, and y the token:

    - logp = ln p(y), logp_base = ln p0(y), change = logp - logp_base
    - entropy = -sum p ln p, entropy_base likewise
    - js = entropy of (p + p0) / 2, minus the mean of the two entropies; at most ln 2
    - kl = sum p (ln p - ln p0)
    - rank, rank_base: how many tokens are likelier

    Args:
        now, base: the residual stream after the last layer where each token was predicted; None:
            there is no base, and nothing of it is returned.
        tokens: ids of the tokens that were sampled.
        temperature: with which they were sampled.

    Source:
        Entropy of the tokens at which reasoning forks: arXiv 2506.01939; Jensen-Shannon divergence:
        2603.22446; signed change: 2603.22117.
    """
    rows = max(1, CHUNK // shadow.vocab_size)
    inner = max(1, _IN_CACHE // shadow.vocab_size)
    outside = _base_of(shadow, base)
    found: list[dict[str, Tensor]] = []
    for start in range(0, len(tokens), rows):
        z = unembed(shadow, now[start : start + rows]).div_(temperature)
        z0 = None
        if base is not None:
            with outside():
                z0 = unembed(shadow, base[start : start + rows]).div_(temperature)
        for at in range(0, len(z), inner):
            here = slice(at, at + inner)
            ids = tokens[start : start + rows][here]
            found.append(_measured(z[here], None if z0 is None else z0[here], ids))
    return {name: torch.cat([one[name] for one in found]) for name in found[0]} if found else {}


def gained_and_lost(
    shadow: Shadow,
    now: Float[Tensor, "token d_model"],
    base: Float[Tensor, "token d_model"],
    *,
    k: int = 10,
    most: int = 256,
) -> tuple[Float[Tensor, " vocab"], Float[Tensor, " vocab"]]:
    """At which share of positions each token is among the k that gained most, and lost most.

    By z - z0, the logits now minus those of the base, at `most` positions evenly among all.
    """
    outside = _base_of(shadow, base)
    at = torch.arange(0, len(now), max(1, -(-len(now) // most)), device=now.device)
    k = min(k, shadow.vocab_size)
    gained = torch.zeros(shadow.vocab_size, dtype=torch.float32, device=now.device)
    lost = gained.clone()
    for rows in at.split(max(1, CHUNK // shadow.vocab_size)):
        z = unembed(shadow, now[rows])
        with outside():
            z -= unembed(shadow, base[rows])
        moved = (z != z[:, :1]).any(1)  # A constant in all logits changes nothing.
        for counts, largest in ((gained, True), (lost, False)):
            top = z[moved].topk(k, dim=1, largest=largest).indices.flatten()
            counts.index_add_(0, top, torch.ones_like(top, dtype=torch.float32))
    return gained / max(1, len(at)), lost / max(1, len(at))


def _base_of(shadow: Shadow, base: Tensor | None) -> Callable[[], AbstractContextManager[None]]:
    """Where the base's unembedding is: where it is the model's own, no weight has to be brought."""
    if base is None:
        return nullcontext
    own = unembed(shadow, base[:1])
    with shadow.without_adapters():
        same = torch.equal(own, unembed(shadow, base[:1]))
    return nullcontext if same else shadow.without_adapters


def _measured(
    z: Float[Tensor, "token vocab"],
    z0: Float[Tensor, "token vocab"] | None,
    ids: Int[Tensor, " token"],
) -> dict[str, Float[Tensor, " token"]]:
    log, p, found = _likely(z, ids, "")
    if z0 is None:
        return found
    log0, p0, of_base = _likely(z0, ids, "_base")
    found |= of_base
    found["change"] = found["logp"] - found["logp_base"]
    found["kl"] = log.sub_(log0).mul_(p).sum(1)
    entropy = (found["entropy"] + found["entropy_base"]) / 2
    js = torch.special.entr(p.add_(p0).div_(2)).sum(1) - entropy
    # The entropies are computed in two ways, which differ by rounding: 1e-6.
    found["js"] = torch.where((z == z0).all(1), 0, js.clamp_(min=0))
    return found


def _likely(
    z: Float[Tensor, "token vocab"], ids: Int[Tensor, " token"], suffix: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    own = z.gather(1, ids[:, None])
    log = z.log_softmax(1)
    p = log.exp()
    return (
        log,
        p,
        {
            f"logp{suffix}": log.gather(1, ids[:, None])[:, 0],
            f"entropy{suffix}": -torch.linalg.vecdot(p, log),
            f"rank{suffix}": (z > own).sum(1).float(),
        },
    )
