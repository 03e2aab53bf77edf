"""Lets the shadow write: always the likeliest next token."""

import inspect
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from tlens_callback.shadow.shadow import Shadow

UNKNOWN = -1
"""Stands in a text for a token that is not known, because the logits are NaN."""


def end_tokens(shadow: Shadow) -> frozenset[int]:
    """Returns the ids of the tokens at which the live model's own `generate` ends an answer."""
    ids = getattr(shadow.bridge.original_model.generation_config, "eos_token_id", None)
    return frozenset([ids] if isinstance(ids, int) else ids or ())


@torch.no_grad()
def greedy(
    shadow: Shadow, prompts: Sequence[Sequence[int]], most: int, ends: Collection[int]
) -> list[list[int]]:
    """Continues each prompt by the likeliest token, again and again. Draws no random number.

    All prompts go through the same forward passes, padded on the left, if the model can be told
    where the padding is. Otherwise those of one length go together. Keys and values of earlier
    tokens are kept, where the model can keep them.

    Returns:
        For each prompt the tokens after it: at most `most`, and no more than the model's context
        takes. It stops before a token of `ends`, and after the first that is `UNKNOWN`.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in _groups(shadow, [len(prompt) for prompt in prompts], most):
        together = _continue(shadow, [prompts[row] for row in rows], most, ends)
        for row, answer in zip(rows, together, strict=True):
            answers[row] = answer
    return answers


def _groups(shadow: Shadow, lengths: Sequence[int], most: int) -> Iterable[list[int]]:
    """Groups the rows that can share their forward passes."""
    takes = inspect.signature(type(shadow.bridge.original_model).forward).parameters
    # The state of a layer without attention, and positions of images, are not told of padding.
    padding = (
        {"attention_mask", "position_ids"} <= takes.keys()
        and len(shadow.attention_layers) == shadow.n_layers
        and not shadow.placeholders
    )
    if padding and max(lengths, default=0) + most <= (shadow.context or float("inf")):
        return [[*range(len(lengths))]] if lengths else []
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(length, []).append(row)
    return groups.values()


def _continue(
    shadow: Shadow, prompts: Sequence[Sequence[int]], most: int, ends: Collection[int]
) -> list[list[int]]:
    """Continues prompts that share their forward passes."""
    width = max(len(prompt) for prompt in prompts)
    room = most if shadow.context is None else min(most, shadow.context - width)
    padded = any(len(prompt) < width for prompt in prompts)
    model: Any = shadow.bridge.original_model
    takes = inspect.signature(type(model).forward).parameters
    # What a mixture of experts adds to its loss is not asked for; it does not know of the cache.
    wanted = {"logits_to_keep": 1, "output_router_logits": False}
    about: dict[str, Any] = {name: value for name, value in wanted.items() if name in takes}
    rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(rows, device=shadow.device)
    real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    mask = torch.tensor(real, device=shadow.device)
    answers: list[list[int]] = [[] for _ in prompts]
    going, layers = set(range(len(prompts))), shadow.mirror.layers
    shadow.mirror.follow_state()
    passing = nullcontext() if layers is None else layers.passing(grad=False)
    with passing, torch.autocast(shadow.device.type, enabled=False):
        for _ in range(room):
            if padded:
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
                about |= {"attention_mask": mask, "position_ids": positions}
            got = model(tokens, use_cache=True, **about)
            top = got.logits[:, -1].max(-1)
            found = torch.where(top.values.isnan(), UNKNOWN, top.indices)
            for row, token in enumerate(found.tolist()):
                if row in going and token not in ends:
                    answers[row].append(token)
                if token in ends or token == UNKNOWN:
                    going.discard(row)
            if not going:
                break
            after, mask = (
                found.clamp(min=0)[:, None],
                torch.cat([mask, mask.new_ones(len(mask), 1)], 1),
            )
            if (cache := getattr(got, "past_key_values", None)) is None:
                tokens = torch.cat([tokens, after], 1)
            else:
                tokens, about["past_key_values"] = after, cache
    return answers
