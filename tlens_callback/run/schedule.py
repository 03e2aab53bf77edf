"""`Schedule`: decides which instruments are asked at an observation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tlens_callback.interfaces import Instrument


def has_rare(instruments: Sequence[Instrument]) -> bool:
    """Whether some instruments are not asked at every observation."""
    return any(getattr(instrument, "every", 1) > 1 for instrument in instruments)


class Schedule:
    """Counts a run's observations, including those before it was resumed.

    Attributes:
        baseline: as an instrument's: how many observations there were.
    """

    name = "checkpoint"

    def __init__(self) -> None:
        self.baseline: dict[str, Tensor] = {}
        self._n_observations = 0
        self._before_last = -1, 0
        self._new: set[int] = set()
        self._asked: set[int] = set()

    def start(self) -> None:
        """Starts to count where `baseline` says that the run was interrupted, or at 0."""
        self._n_observations, self._before_last = int(self.baseline.get("looks", 0)), (-1, 0)
        self._new, self._asked = set(), set()

    def due(self, instruments: Sequence[Instrument], *, step: int, last: bool) -> list[Instrument]:
        """Returns the instruments to ask now; at the last observation all of them."""
        due = [
            one
            for one in instruments
            if last or self._n_observations % getattr(one, "every", 1) == 0
        ]
        self._before_last, self._n_observations = (
            (step, self._n_observations),
            self._n_observations + 1,
        )
        self._new = {id(one) for one in due} - self._asked
        self._asked |= self._new
        return due

    def is_new(self, instrument: Instrument) -> bool:
        """Whether the instrument is asked for the first time since the start."""
        return id(instrument) in self._new

    def remember(self, step: int) -> None:
        """Sets `baseline` for a run that resumes at `step`; if the step was observed already, it is
        not counted, because the resumed run observes it again."""
        looks = self._before_last[1] if self._before_last[0] == step else self._n_observations
        self.baseline["looks"] = torch.tensor(looks)
