"""Tells what winners have more than losers, and whether chance would do the same."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

AT_ONCE = 2**22
"""Sums over permutations that are computed at a time."""

_MOST = 2**26
"""Sums over permutations that are computed at most."""

_FAR = 2.0
"""Standard deviations from which on it is counted how far all numbers go by chance."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """How much more winners have of each number than losers.

    Attributes:
        value: [number], in the number's unit.
        p: [number], two-sided, under permutations of the advantages inside their groups.
        q: [number], the smallest false discovery rate at which it is a discovery.
        length: [number], correlation with the length of the rollout inside the groups.
        z: [number], value over its standard deviation under permutations; NaN without spread.
    """

    value: Float[Tensor, " number"]
    p: Float[Tensor, " number"]
    q: Float[Tensor, " number"]
    length: Float[Tensor, " number"]
    z: Float[Tensor, " number"]


def contrast(
    numbers: Float[Tensor, "rollout number"],
    advantage: Float[Tensor, " rollout"],
    group: Int[Tensor, " rollout"],
    length: Float[Tensor, " rollout"],
    *,
    permutations: int,
    seed: int,
) -> Contrast:
    """Compares winners with losers, inside groups that have spread.

    With f_i a number of rollout i and A_i its advantage minus the mean of its group:

    - value c = sum_i A_i f_i / sum_i |A_i|: how much more an average winner has than an average
      loser, times one half (winners and losers each have half of the weight).
    - p: the share of permutations of A inside the groups in which |c| is as large, with the
      observed one among them: (1 + b) / (1 + permutations). It is exact where the rollouts of a
      group are exchangeable.
    - q: Benjamini and Hochberg over all numbers given. So many small p-values would need millions
      of permutations; here the p-value of a number is the share of all |z| as large as its own, in
      all permutations of all numbers, with z = c over its standard deviation under permutations:
      sum_i |A_i| times it, squared, is sum_g S_g(A) S_g(f) / (n_g - 1), with S_g the sum of squares
      around the mean of a group of n_g. So q is the expected number of false discoveries at the
      threshold |z| over the number of discoveries there.
    - length: correlation of f with the length of the rollouts, both minus the mean of the group.

    Without spread value is NaN, p and q are 1. No random number of the training is drawn.

    Args:
        permutations: their number; fewer if the numbers are more than 2^26 / permutations.
        seed: of the permutations.

    Source:
        Fisher 1935 (permutation test); Benjamini and Hochberg 1995; Tusher et al. 2001
        (permutations of all numbers together).
    """
    f, a = _centred(numbers.double(), group), _centred(advantage.double()[:, None], group)[:, 0]
    weight = a.abs().sum()
    long = _centred(length.double()[:, None], group)[:, 0]
    norms = f.square().sum(0) * long.square().sum()
    length_of = (long @ f / norms.sqrt()).masked_fill(norms == 0, 0)
    # Rounding gives a number that is the same in all rollouts a little variance.
    known = f.abs().amax(0) > 1e-6 * numbers.double().abs().amax(0)
    value = a @ f / weight
    p, q = torch.ones_like(value), torch.ones_like(value)
    # A number that is the same in all rollouts is no evidence of anything.
    scores = torch.where(value.isnan(), value, 0)
    if weight > 0 and known.any():
        f = f[:, known]
        z = f / _variance(a, f, group).sqrt()
        scores[known] = a @ z
        permutations = max(1, min(permutations, _MOST // f.shape[1]))
        p[known], pooled = _permuted(z, a, group, permutations, seed)
        every = torch.ones_like(value)
        every[known] = pooled
        q = false_discovery_rates(every)
    return Contrast(value, p, q, length_of, scores)


def tails(of: Contrast) -> Float[Tensor, " number"]:
    """The z of the normal distribution that has the contrast's p, with the contrast's sign."""
    size = 2**0.5 * torch.special.erfinv(1 - of.p)
    return (size * of.value.sign()).nan_to_num()


def over_observations(
    sums: Float[Tensor, " number"],
    of_tails: Float[Tensor, " number"],
    n: Float[Tensor, " number"],
) -> tuple[Float[Tensor, " number"], Float[Tensor, " number"]]:
    """Puts the contrasts of n observations together, whose z add up to `sums`, and whose `tails`
    to `of_tails`.

    Returns z = sum / sqrt(n), and q, the false discovery rate over all numbers, from the normal
    distribution. What the trainer samples next does not depend on how the advantages of this
    observation would have fallen by chance, so that the z of a number without a difference have
    mean 0 and variance 1, whatever came before, and their sum is nearly normal after many
    observations. After few it is not, where a number differs in one or two rollouts only, as a rare
    feature does: its z is large more often than a normal one. The tails are large as often as
    their p says. So the p-value is the larger one of the two sums'. NaN and 1 where n is 0.

    Source:
        Stouffer 1949 (sum of z-scores).
    """
    z = sums / n.sqrt()
    both = torch.stack([z, of_tails / n.sqrt()])
    p = torch.special.erfc(both.abs() / 2**0.5).amax(0)
    return z, false_discovery_rates(p.nan_to_num(1.0))


def false_discovery_rates(p: Float[Tensor, " number"]) -> Float[Tensor, " number"]:
    """For each p-value the smallest false discovery rate at which it is a discovery.

    q_(i) = min over j >= i of p_(j) n / j, in the order of p. Source: Benjamini, Hochberg 1995.
    """
    n = len(p)
    order = p.argsort()
    ranks = torch.arange(1, n + 1, device=p.device, dtype=p.dtype)
    steps = (p[order] * n / ranks).flip(0).cummin(0).values.flip(0).clamp(max=1)
    return torch.empty_like(p).scatter(0, order, steps)


def _permuted(
    z: Float[Tensor, "rollout number"],
    a: Float[Tensor, " rollout"],
    group: Int[Tensor, " rollout"],
    permutations: int,
    seed: int,
) -> tuple[Float[Tensor, " number"], Float[Tensor, " number"]]:
    """The p-values of each number by itself, and by all numbers together."""
    draw, given = np.random.default_rng(seed), a.float().cpu().numpy()
    z, a = z.float(), a.float()
    # Sums that differ by rounding alone are equal.
    observed = (a @ z).abs() * (1 - 1e-5)
    ranked = observed.sort().values
    far = int((ranked < _FAR).sum())
    least = ranked[far] if far < len(ranked) else torch.inf
    reached = torch.zeros_like(observed)
    beyond = torch.zeros(len(ranked) + 1, dtype=torch.int64, device=z.device)
    groups = [own.cpu().numpy() for own in _groups(group)]
    at_once = max(1, AT_ONCE // z.shape[1])
    for start in range(0, permutations, at_once):
        n = min(at_once, permutations - start)
        shuffled = np.tile(given, (n, 1))
        for own in groups:
            shuffled[:, own] = draw.permuted(shuffled[:, own], axis=1)
        sums = (torch.from_numpy(shuffled).to(z.device) @ z).abs_()
        reached += (sums >= observed).sum(0)
        # How many of the observed ones each sum reaches.
        places = torch.searchsorted(ranked, sums[sums >= least], right=True)
        beyond += torch.bincount(places, minlength=len(beyond))
    single = (1 + reached) / (1 + permutations)
    # Sums that reach at least the number at this rank, and the observed ones that do.
    as_large = beyond.flip(0).cumsum(0).flip(0)[1:]
    own = torch.arange(len(ranked), 0, -1, device=z.device)
    pooled = (as_large + own) / ((1 + permutations) * len(ranked))
    back = observed.argsort().argsort()
    return single.double(), torch.where(back < far, single, pooled[back]).double()


def _variance(
    a: Float[Tensor, " rollout"], f: Float[Tensor, "rollout number"], group: Int[Tensor, " rollout"]
) -> Float[Tensor, " number"]:
    """That of sum_i A_i f_i under permutations inside the groups."""
    found = f.new_zeros(f.shape[1])
    for own in _groups(group):
        if (n := int(own.sum())) > 1:
            found += a[own].square().sum() * f[own].square().sum(0) / (n - 1)
    # A number that differs only in groups without spread never differs from chance.
    return found.masked_fill(found == 0, torch.inf)


def _centred(
    values: Float[Tensor, "rollout number"], group: Int[Tensor, " rollout"]
) -> Float[Tensor, "rollout number"]:
    found = values.clone()
    for own in _groups(group):
        found[own] -= values[own].mean(0)
    return found


def _groups(group: Int[Tensor, " rollout"]) -> list[Bool[Tensor, " rollout"]]:
    return [group == one for one in group.unique()]
