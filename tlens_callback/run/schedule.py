"""Which instruments are asked at an observation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tlens_callback.interfaces import Instrument


def rare(instruments: Sequence[Instrument]) -> bool:
    """Whether some of them are not asked at every observation."""
    return any(getattr(instrument, "every", 1) > 1 for instrument in instruments)


class Schedule:
    """Counts a run's observations, those before it was resumed included.

    Attributes:
        baseline: as an instrument's: how many observations there were.
    """

    name = "checkpoint"

    def __init__(self) -> None:
        self.baseline: dict[str, Tensor] = {}
        self._looks = 0
        self._before = -1, 0
        self._new: set[int] = set()
        self._asked: set[int] = set()

    def start(self) -> None:
        """Goes on from what `baseline` says."""
        self._looks, self._before = int(self.baseline.get("looks", 0)), (-1, 0)
        self._new, self._asked = set(), set()

    def due(self, instruments: Sequence[Instrument], *, step: int, last: bool) -> list[Instrument]:
        """Those to ask now: at the last observation all of them."""
        due = [one for one in instruments if last or self._looks % getattr(one, "every", 1) == 0]
        self._before, self._looks = (step, self._looks), self._looks + 1
        self._new = {id(one) for one in due} - self._asked
        self._asked |= self._new
        return due

    def is_new(self, instrument: Instrument) -> bool:
        """Whether it is asked for the first time since the start."""
        return id(instrument) in self._new

    def remember(self, step: int) -> None:
        """Sets `baseline` for a run that goes on at `step`, and observes it anew if it was."""
        looks = self._before[1] if self._before[0] == step else self._looks
        self.baseline["looks"] = torch.tensor(looks)
