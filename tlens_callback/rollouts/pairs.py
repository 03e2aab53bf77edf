"""Reads preferences from training data: what is preferred, beside what is not."""

import itertools
from collections.abc import Mapping
from typing import Any

from tlens_callback.rollouts.rollout import Rollout

_NONE = float("nan")


def preferences(dataset: Any, most: int, tokens: int) -> list[Rollout]:
    """Reads the first preferences of tokenised training data as rollouts.

    - Of pairs (TRL's DPOTrainer: prompt_ids, chosen_ids, rejected_ids) the two have one prompt and
      are a group; the advantage of the chosen one is 1, that of the other -1.
    - Of single judgements (KTOTrainer: prompt_ids, completion_ids, label) each has a prompt of its
      own; as many of both kinds as there are, compared all with all.

    Args:
        dataset: rows of the training data, as the trainer tokenises them.
        most: how many rollouts at most.
        tokens: rows with a prompt of so many tokens are left out.

    Returns:
        The rollouts; none if the data has no such columns.
    """
    columns = set(getattr(dataset, "column_names", None) or ())
    if columns >= {"prompt_ids", "chosen_ids", "rejected_ids"}:
        return _pairs(dataset, most // 2, tokens)
    if columns >= {"prompt_ids", "completion_ids", "label"}:
        return _judged(dataset, most // 2, tokens)
    return []


def _pairs(dataset: Any, most: int, tokens: int) -> list[Rollout]:
    fit = (
        row for row in dataset if row["chosen_ids"] and row["rejected_ids"] and _fits(row, tokens)
    )
    return [
        _rollout(row["prompt_ids"], row[f"{kind}_ids"], group, number, 1.0 - 2 * number)
        for group, row in enumerate(itertools.islice(fit, most))
        for number, kind in enumerate(("chosen", "rejected"))
    ]


def _judged(dataset: Any, most: int, tokens: int) -> list[Rollout]:
    kept: dict[bool, list[Mapping[str, Any]]] = {True: [], False: []}
    for row in dataset:
        mine = kept[bool(row["label"])]
        if len(mine) < most and row["completion_ids"] and _fits(row, tokens):
            mine.append(row)
        if min(map(len, kept.values())) >= most:
            break
    both = [*kept[True], *kept[False]] if all(kept.values()) else []
    return [
        _rollout(row["prompt_ids"], row["completion_ids"], i, 0, 1.0 if row["label"] else -1.0, 0)
        for i, row in enumerate(both)
    ]


def _fits(row: Mapping[str, Any], tokens: int) -> bool:
    return 0 < len(row["prompt_ids"]) < tokens


def _rollout(
    prompt: Any, completion: Any, group: int, number: int, gain: float, compared: int | None = None
) -> Rollout:
    return Rollout(
        prompt=tuple(prompt),
        completion=tuple(completion),
        group=group,
        number=number,
        rewards=(),
        reward=_NONE,
        advantage=gain,
        compared=compared,
    )
