"""`Rollout`: one completion that a model sampled, and what the trainer makes of it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.probes.encoding import token_ids
from tlens_callback.rollouts.advantages import advantages, weighted
from tlens_callback.rollouts.buffers import buffered
from tlens_callback.rollouts.recorder import Generation, Recorder


@dataclass(frozen=True, eq=False)
class Rollout:
    """One completion that the model sampled.

    Attributes:
        prompt, completion: token ids.
        group: number of the group, of completions to one prompt, among those of its generation.
        number: its number in the group.
        rewards: what each reward function gave, NaN for nothing.
        reward: their weighted sum.
        advantage: how much better it is than its group.
        ended: whether it ends with a token that ends texts; else it was cut off.
        trained: for each token of the completion, whether it counts in the loss.
        sampled_with: for each token, the log probability that another engine sampled it with; None:
            not known.
        compared: number of the set inside which winners are compared with losers; None: the group.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    group: int
    number: int
    rewards: tuple[float, ...]
    reward: float
    advantage: float
    ended: bool = True
    trained: tuple[bool, ...] = ()
    sampled_with: tuple[float, ...] | None = None
    compared: int | None = None

    @property
    def name(self) -> str:
        """Group and number, counted from 1."""
        return f"{self.group + 1}.{self.number + 1}"


def rollouts_of(
    generation: Generation, recorder: Recorder, batch: ProbeBatch, args: Any, model: Any
) -> list[Rollout]:
    """Returns all rollouts of a generation, in the order in which the reward functions saw them.

    Prompts are encoded by the tokenizer of `batch`, advantages computed by the settings of the
    trainer, and both replaced by the trainer's own where it shows them; see `buffered`.

    Raises:
        ValueError: if the prompts cannot be encoded.
    """
    size = _group_size(generation, args)
    names = recorder.names
    rewards = torch.full((len(generation), len(names)), torch.nan, dtype=torch.float32)
    for i, found in generation.rewards.items():
        rewards[:, i] = found
    weights = _weights(recorder, args)
    total = weighted(rewards, weights)
    gains = _advantages(rewards, weights, size, args)
    prompts = _prompts(generation, size, batch)
    exact = None
    if recorder.trainer is not None:
        exact = buffered(
            recorder.trainer, generation.ids, size, prompts=prompts, near=gains.tolist()
        )
    stops = _stops(batch, model)
    found = []
    for i, ids in enumerate(generation.ids):
        ended = bool(ids) and ids[-1] in stops
        own = None if exact is None else exact[i]
        counted = ended or not getattr(args, "mask_truncated_completions", False)
        sampled = own and own.sampled_with
        found.append(
            Rollout(
                prompt=tuple(own.prompt if own else prompts[i]),
                completion=tuple(ids),
                group=i // size,
                number=i % size,
                rewards=tuple(rewards[i].tolist()),
                reward=float(total[i]),
                advantage=own.advantage if own else float(gains[i]),
                ended=ended,
                trained=tuple(own.trained) if own else (counted,) * len(ids),
                sampled_with=tuple(sampled) if sampled else None,
            )
        )
    return found


def chosen(rollouts: Sequence[Rollout], groups: int, most: int, tokens: int) -> list[Rollout]:
    """Chooses whole groups, those with spread first, in the order in which they were sampled.

    Of a group that is too large for its share of `most`, the best, the worst and some evenly
    between them, by advantage.

    Args:
        tokens: groups with a prompt of so many tokens are left out, and so are empty completions.
    """
    of: dict[int, list[Rollout]] = {}
    for one in rollouts:
        if one.completion and 0 < len(one.prompt) < tokens:
            of.setdefault(one.group, []).append(one)
    spread = [group for group in of.values() if len({one.advantage for one in group}) > 1]
    others = [group for group in of.values() if len({one.advantage for one in group}) == 1]
    found: list[Rollout] = []
    kept = [*spread, *others][:groups]
    for at, group in enumerate(kept):
        share = (most - len(found)) // (len(kept) - at)
        ranked = sorted(group, key=lambda one: -one.advantage)
        if len(ranked) > share:
            places = np.linspace(0, len(ranked) - 1, share).round().astype(int).tolist()
            ranked = [ranked[place] for place in places]
        found += sorted(ranked, key=lambda one: one.number)
    return found


def _weights(recorder: Recorder, args: Any) -> Float[Tensor, " function"]:
    given = getattr(recorder.trainer, "reward_weights", None)
    if given is None:
        given = getattr(args, "reward_weights", None)
    if given is None:
        given = [1.0] * len(recorder.names)
    return torch.as_tensor(given, dtype=torch.float32).cpu()


def _group_size(generation: Generation, args: Any) -> int:
    """As the trainer's settings say; else as many as have the first prompt."""
    if (size := getattr(args, "num_generations", None)) is not None:
        return size
    first = generation.prompts[0]
    same = itertools.takewhile(lambda prompt: prompt == first, generation.prompts)
    return sum(1 for _ in same)


def _advantages(
    rewards: Tensor, weights: Tensor, size: int, args: Any
) -> Float[Tensor, " rollout"]:
    """Of several processes each has a part of the batch, and perhaps of a group: unknown then."""
    by_batch = (
        getattr(args, "scale_rewards", "group") == "batch"
        or getattr(args, "multi_objective_aggregation", "") == "normalize_then_sum"
        or getattr(args, "normalize_advantages", False)
    )
    if len(rewards) % size or (by_batch and args.world_size > 1):
        return torch.full((len(rewards),), torch.nan, dtype=torch.float32)
    return advantages(rewards, weights, size, args)


def _prompts(generation: Generation, size: int, batch: ProbeBatch) -> list[list[int]]:
    """The prompts as the tokenizer writes them; those of one group are encoded once."""
    found: list[list[int]] = []
    for i, prompt in enumerate(generation.prompts):
        if i % size and prompt == generation.prompts[i - 1]:
            found.append(found[-1])
        else:
            found.append(
                token_ids(Probe("prompt", prompt), batch.tokenizer, batch.vocab_size)
                if prompt
                else []
            )
    return found


def _stops(batch: ProbeBatch, model: Any) -> set[int]:
    """The tokens that end a text, as TRL counts them: also the padding."""
    config = getattr(model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    many = given if isinstance(given, list | tuple) else [given]
    own = [getattr(batch.tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")]
    return {one for one in (*many, *own) if one is not None}
