"""Reads from a TRL trainer's own buffers what only they have, and checks all of it."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NEEDED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


@dataclass(frozen=True, eq=False)
class Buffered:
    """What a trainer has of one rollout.

    Attributes:
        prompt: token ids.
        advantage: with which it trains.
        trained: for each token of the completion, whether it counts in the loss.
        sampled_with: for each token, the log probability that vLLM sampled it with; None: unknown.
    """

    prompt: list[int]
    advantage: float
    trained: list[bool]
    sampled_with: list[float] | None


def buffered(
    trainer: Any,
    ids: Sequence[Sequence[int]],
    size: int,
    *,
    prompts: Sequence[Sequence[int]],
    near: Sequence[float],
) -> list[Buffered] | None:
    """Finds each completion of the latest generation in `trainer._buffered_inputs`.

    TRL 1.16 keeps there, shuffled, what it trains on: the exact ids of prompts, the advantages over
    all processes, which tokens count, and what vLLM sampled with. It is no public attribute, so it
    counts only if it has what it had there, and each row's completion is one of `ids`.

    Args:
        ids: the token ids of completions, `size` of each group in turn.
        prompts: token ids of their prompts as far as one knows, to tell groups apart of which all
            completions are the same.
        near: their advantages as far as one knows, to tell equal completions of a group apart.

    Returns:
        One for each of `ids`; None if anything is not as expected.
    """
    rows = _rows(trainer)
    if rows is None or len(rows["completion_ids"]) != len(ids):
        return None
    pad = _pad(trainer)
    completions = [_stripped(row, pad) for row in rows["completion_ids"].tolist()]
    masks = rows["prompt_mask"].bool()
    exact = [p[m].tolist() for p, m in zip(rows["prompt_ids"], masks, strict=True)]
    gains = rows["advantages"].tolist()
    wanted = [_stripped(list(one), pad) for one in ids]
    of_prompt: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, prompt in enumerate(exact):
        of_prompt[tuple(prompt)].append(row)
    found: dict[int, int] = {}
    # Two places of one prompt in a batch are one here, and hold the rows of both groups.
    for start in range(0, len(ids), size):
        group = Counter(wanted[start : start + size])
        fits = [p for p, of in of_prompt.items() if not group - Counter(completions[r] for r in of)]
        if len(fits) > 1:
            fits = [p for p in fits if p == tuple(prompts[start])]
        if not fits:
            return None
        left = of_prompt[fits[0]]
        for i in range(start, min(start + size, len(ids))):
            alike = [row for row in left if completions[row] == wanted[i]]
            row = min(alike, key=lambda row: abs(gains[row] - near[i]))
            left.remove(row)
            found[i] = row
    counted = rows["completion_mask"].bool() & rows.get("tool_mask", torch.tensor(True)).bool()
    sampled = rows.get("sampling_per_token_logps")
    return [
        Buffered(
            exact[row],
            gains[row],
            counted[row, : len(ids[i])].tolist(),
            None if sampled is None else sampled[row, : len(ids[i])].tolist(),
        )
        for i, row in sorted(found.items())
    ]


def _rows(trainer: Any) -> dict[str, Tensor] | None:
    """The buffer's batches put together, on the CPU; None if they are not what they should be."""
    batches = getattr(trainer, "_buffered_inputs", None)
    if not isinstance(batches, list) or not all(isinstance(one, dict) for one in batches):
        return None
    found: dict[str, Tensor] = {}
    for name in (*_NEEDED, "tool_mask", "sampling_per_token_logps"):
        parts = [one.get(name) for one in batches]
        if all(isinstance(part, Tensor) for part in parts) and parts:
            if len({part.shape[1:] for part in parts}) != 1:
                return None
            found[name] = torch.cat([part.detach().cpu() for part in parts])
    shapes = {name: found[name].shape for name in found}
    if any(name not in found for name in _NEEDED) or found["advantages"].ndim != 1:
        return None
    same = [{n for n in found if n.startswith("prompt")}, {*found} - {"advantages"}]
    same[1] -= same[0]
    if any(len({shapes[name] for name in names}) != 1 for names in same):
        return None
    sizes = {len(found[name]) for name in found}
    return found if len(sizes) == 1 and found["prompt_ids"].ndim == 2 else None


def _pad(trainer: Any) -> int | None:
    tokenizer = trainer.processing_class
    return getattr(getattr(tokenizer, "tokenizer", tokenizer), "pad_token_id", None)


def _stripped(ids: list[int], pad: int | None) -> tuple[int, ...]:
    """Without the padding at the end; where it is also the token that ends a text, without this."""
    end = len(ids)
    while end and ids[end - 1] == pad:
        end -= 1
    return tuple(ids[:end])
