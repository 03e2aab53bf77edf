"""Chooses what the sinks for W&B, trackio and TensorBoard show of rollouts."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from tlens_callback.meaning import Quantity
from tlens_callback.reading import Reading
from tlens_callback.store.rollouts import rollout_frames

TEXTS = ("prompt", "completion")
"""The columns with texts in the table of rollouts; missing if no texts are kept."""

_SHOWN = (Quantity.CONTRAST, Quantity.CONTRAST_Q)


def about_rollouts(readings: Sequence[Reading]) -> bool:
    """Whether some of these readings say which rollouts there are."""
    return any(reading.meaning.quantity is Quantity.ROLLOUT_GROUP for reading in readings)


def overview(readings: Sequence[Reading]) -> list[Reading]:
    """Leaves out what only the store and the page have of rollouts.

    Of an instrument that compares winners with losers, the matrices of heads are left out that are
    neither a contrast of the observation nor its false discovery rate: five more of each contrast.
    """
    comparing = {r.instrument for r in readings if r.meaning.quantity is Quantity.CONTRAST}
    return [
        reading
        for reading in readings
        if reading.instrument not in comparing
        or reading.axes != ("layer", "head")
        or (reading.meaning.quantity in _SHOWN and "_run" not in reading.measure)
    ]


def rollout_table(step: int, readings: Sequence[Reading]) -> pd.DataFrame:
    """Makes a table with a row for each rollout; `Store.rollouts` explains its columns.

    Features are left out, since each step shows others, and W&B's table keeps its first columns.
    """
    frames = rollout_frames(step, [reading for reading in readings if reading.probe is None])
    assert frames is not None, "about_rollouts"
    return frames[0]


def best_and_worst(
    step: int, readings: Sequence[Reading]
) -> Iterator[tuple[int, str, pd.DataFrame]]:
    """Gives number and prompt of each group, and its best and its worst rollout, by advantage.

    Of a group whose advantages are all the same it gives the first one only, and of one whose
    advantages are not known none. Nothing is given if no texts are kept.
    """
    if not about_rollouts(readings):
        return
    frame = rollout_table(step, readings)
    gains = [r for r in readings if r.meaning.quantity is Quantity.ROLLOUT_ADVANTAGE]
    if not gains or not frame.columns.isin(TEXTS).sum() == len(TEXTS):
        return
    for number, group in frame.groupby("group", sort=False):
        gain = group[gains[0].measure].to_numpy()
        if np.isfinite(gain).all():
            places = list(dict.fromkeys([int(gain.argmax()), int(gain.argmin())]))
            yield int(str(number)), str(group["prompt"].iloc[0]), group.iloc[places]
