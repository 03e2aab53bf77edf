"""Makes tables of the rollouts of an observation."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from tlens_callback.meaning import Quantity
from tlens_callback.reading import Reading, legible
from tlens_callback.store.tables import TEXT

_WHOLE, _TOKEN = ("rollout",), ("rollout", "pos")


def rollout_frames(
    step: int, readings: Iterable[Reading]
) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Returns a row per rollout, and one per sampled token; `Store.rollouts` explains the columns.

    None if none of the readings is about rollouts.
    """
    found = list(readings)
    groups = _of(found, Quantity.ROLLOUT_GROUP)
    if groups is None:
        return None
    found = [one for one in found if one.instrument == groups.instrument]
    token, prompt = _of(found, Quantity.ROLLOUT_TOKEN), _of(found, Quantity.ROLLOUT_PROMPT)
    rewards = _of(found, Quantity.ROLLOUT_REWARD)
    names = np.array(groups.labels["rollout"])
    group = groups.values.astype(np.int32)
    whole: dict[str, object] = {
        "step": np.full(len(names), step, np.int64),
        "rollout": pd.array(names, dtype=TEXT),
        "group": group + 1 if prompt is None else _numbers(prompt)[group],
    }
    if prompt is not None and prompt.texts is not None:
        whole["prompt"] = pd.array(np.array(_joined(prompt.texts))[group], dtype=TEXT)
    if token is not None and token.texts is not None:
        whole["completion"] = pd.array(_joined(token.texts), dtype=TEXT)
    for one in found:
        if one.axes == _WHOLE and one is not groups:
            whole[_column(one)] = one.values
    if rewards is not None:
        for i, name in enumerate(rewards.labels["function"]):
            whole[f"reward_{name}"] = rewards.values[:, i]
    measures = [one for one in found if one.axes == _TOKEN and one is not token]
    shown = [*measures, *filter(None, [token])]
    if not shown:
        return pd.DataFrame(whole), pd.DataFrame({"step": [], "rollout": [], "pos": []})
    real = ~np.isnan(shown[-1].values)
    for one in measures:
        real |= ~np.isnan(one.values)
    row, pos = np.nonzero(real)
    each: dict[str, object] = {
        "step": np.full(len(row), step, np.int64),
        "rollout": pd.Categorical.from_codes(row, pd.Index(names, dtype=TEXT)),
        "pos": pos.astype(np.int32),
    }
    if token is not None:
        each["token_id"] = token.values[real].astype(np.int64)
        if token.texts is not None:
            each["token"] = pd.Categorical(token.texts[real].astype(object))
    for one in measures:
        each[_column(one)] = one.values[real]
    return pd.DataFrame(whole), pd.DataFrame(each)


def _of(readings: Iterable[Reading], quantity: Quantity) -> Reading | None:
    return next((one for one in readings if one.meaning.quantity is quantity), None)


def _column(reading: Reading) -> str:
    """The key without its instrument: "entropy", or "feature/contrast L5"."""
    return reading.key.removeprefix(f"{reading.instrument}/")


def _numbers(prompt: Reading) -> np.ndarray:
    return np.array([int(label) for label in prompt.labels["group"]], np.int32)


def _joined(texts: np.ndarray) -> list[str]:
    return ["".join(legible(row.tolist())) for row in texts]
