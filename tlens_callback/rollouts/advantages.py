"""Computes advantages from rewards, as TRL's trainers do it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_EPS = 1e-4
"""TRL adds it to each standard deviation that it divides by."""


def advantages(
    rewards: Float[Tensor, "rollout function"],
    weights: Float[Tensor, " function"],
    size: int,
    args: Any,
) -> Float[Tensor, " rollout"]:
    """How much better each rollout is than its group, by the settings of a trainer.

    With r the weighted sum of a rollout's rewards, over those that are not NaN; mean and standard
    deviation (with n - 1) of its group of n:

    - GRPO: (r - mean) / (sd + 1e-4); with `scale_rewards="batch"` sd is that of all r, with "none"
      nothing is divided. With `multi_objective_aggregation="normalize_then_sum"` each function's
      rewards are standardised in their group, summed with the weights, and standardised in the
      batch.
    - RLOO: r minus the mean of the others of the group, with r clipped to `reward_clip_range`;
      standardised in the batch with `normalize_advantages`. Its penalty of beta times the KL
      divergence, which belongs to r, is not known here.

    A rollout without any reward has 0, and so has one of a group without spread.

    Args:
        size: so many rollouts in turn are a group.
        args: the trainer's; what is not set in them is as in GRPO.

    Source:
        trl.GRPOTrainer and trl.RLOOTrainer, `_generate_and_score_completions` (TRL 1.16).
    """
    n = size
    total = weighted(rewards, weights)
    if hasattr(args, "reward_clip_range"):
        if args.reward_clip_range:
            total = total.clamp(*args.reward_clip_range)
        groups = total.view(-1, n)
        others = (~groups.isnan()).sum(1, keepdim=True) - 1
        found = (groups - (groups.nansum(1, keepdim=True) - groups) / others).flatten()
        if args.normalize_advantages:
            found = _standardised(found[None])[0]
    elif getattr(args, "multi_objective_aggregation", "") == "normalize_then_sum":
        each = _standardised(rewards.view(-1, n, rewards.shape[1]).transpose(1, 2))
        total = weighted(each.transpose(1, 2).flatten(0, 1), weights)
        found = _standardised(total[None])[0]
    else:
        groups = total.view(-1, n)
        found = groups - groups.nanmean(1, keepdim=True)
        match getattr(args, "scale_rewards", "group"):
            case "group" | True:
                found = _standardised(groups)
            case "batch":
                found = found / (_sd(total[None])[0] + _EPS)
        found = found.flatten()
    return found.nan_to_num(0.0)


def weighted(
    rewards: Float[Tensor, "rollout function"], weights: Float[Tensor, " function"]
) -> Float[Tensor, " rollout"]:
    """The weighted sum of a rollout's rewards, without those that are NaN; NaN if all are."""
    total = (rewards * weights).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


def _standardised(values: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    return (values - values.nanmean(-1, keepdim=True)) / (_sd(values) + _EPS)


def _sd(values: Float[Tensor, "... n"]) -> Float[Tensor, "... 1"]:
    known = (~values.isnan()).sum(-1, keepdim=True)
    squares = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return torch.where(known > 1, squares / (known - 1).clamp(min=1), 0).sqrt()
