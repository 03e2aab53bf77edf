"""`Budget`: observes more rarely where watching would take too much of the training time."""

from math import ceil

import torch
from torch import Tensor

from tlens_callback.run.cost import Cost
from tlens_callback.run.printing import print_lines

_MARGIN = 1.1
"""How many times the steps that are needed the half of a distance must have to take its place, so
that it does not change to and fro."""

_NEVER = 2.0**60
"""No run has so many steps."""


class Budget:
    """Keeps what watching costs below a share of the training time by looking more rarely.

    Observations are at multiples of a distance, `every` * 2^k steps, so that those of two runs are
    at the same steps or at every second, fourth, ... of them. The distance is the shortest one with
    which an observation takes at most the share of the time from one to the next. Both times are
    means since the start. It becomes shorter again only where the half has room to spare. Where
    more than the share was spent so far, multiples are left out until there is room for one more.

    The start is not in the share, since looking more rarely does not make it shorter, and what an
    observation takes is first known after the one at `every` steps. From then on the share, with
    all comparisons of shadow and model and all that is waited for, is below the limit at each
    observation but the last one of the run, as far as an observation takes what the earlier ones
    took.

    Args:
        share: the limit, between 0 and 1; None: there is none.
        every: steps of the shortest distance.
        cost: what was spent.

    Attributes:
        baseline: as an instrument's: the distance, the next step, and what was spent so far.
        next: the step from which on a multiple of `every` is observed.
    """

    name = "cost"

    def __init__(self, share: float | None, every: int, cost: Cost) -> None:
        self.baseline: dict[str, Tensor] = {}
        self.next = 0
        self._share, self._every, self._cost = share, every, cost
        self._distance = every
        self._first = self._step = -1
        self._count = 0
        self._trained_before = self._compared_before = self._trained = 0.0
        self._earlier = [0.0] * 5

    def start(self, step: int) -> None:
        """Starts a run at this step, with the distance in `baseline` if it was resumed; call it
        inside a `spending` block."""
        self._first = self._step = step
        self._count, self._trained, self._distance = 0, 0.0, self._every
        self._trained_before, self._compared_before = self._cost.trained(), self._cost.comparing
        if self._share is None:
            return
        self._earlier = self.baseline["totals"].tolist() if self.baseline else [0.0] * 5
        while self._distance < int(self.baseline.get("distance", 0)):
            self._distance *= 2
        least = max(step + 1, int(self.baseline.get("next", 0)))
        self.next = ceil(least / self._distance) * self._distance

    def observed(self, step: int) -> None:
        """Counts an observation; call it inside its `spending` block."""
        if step != self._step:
            self._step, self._count = step, self._count + 1
            self._trained = self._cost.trained() - self._trained_before

    def decide(self) -> None:
        """Chooses the next step, from what was spent up to now."""
        count, steps, trained, spent, compared = self._totals(self._step, self._trained)
        if self._share is None or not self._count or trained <= 0:
            return
        price, pace = (spent - compared) / count, trained / steps
        # Seconds of training for each second of watching.
        per_second = (1 - self._share) / self._share
        needed = min(per_second * price / pace, _NEVER)
        before = self._distance
        while self._distance < needed:
            self._distance *= 2
        while self._distance > self._every and self._distance / 2 >= _MARGIN * needed:
            self._distance //= 2
        missing = per_second * (spent + price) - trained
        from_step = self._step + min(missing / pace, _NEVER)
        after = self._step // self._distance + 1
        planned, self.next = self.next, max(after, ceil(from_step / self._distance))
        self.next *= self._distance
        if self._distance != before or self.next > max(planned, after * self._distance):
            self._say(price, pace, skips=self.next > after * self._distance)

    def remember(self, step: int) -> None:
        """Sets `baseline` for a run that resumes at `step`; call it inside a `spending` block."""
        if self._share is not None:
            self.baseline["distance"] = torch.tensor(self._distance, dtype=torch.int64)
            self.baseline["next"] = torch.tensor(self.next, dtype=torch.int64)
            totals = self._totals(step, self._cost.trained() - self._trained_before)
            self.baseline["totals"] = torch.tensor(totals, dtype=torch.float32)

    def _totals(self, step: int, trained: float) -> list[float]:
        """Returns observations, steps, and seconds of training, watching and comparisons since the
        start, with those before the run was resumed.

        Args:
            step, trained: up to which step, and the seconds of training from the start to it.
        """
        spent = self._cost.seconds - self._cost.beforehand
        compared = self._cost.comparing - self._compared_before
        now = [self._count, step - self._first, trained, spent, compared]
        return [sum(both) for both in zip(self._earlier, now, strict=True)]

    def _say(self, price: float, pace: float, *, skips: bool) -> None:
        assert self._share is not None
        every, often = self._every, f"every {self._distance} steps"
        then = f"next at step {self.next}, and then {often}" if skips else often
        print_lines(
            [
                f"tlens: an observation takes {_seconds(price)} and {every} steps take "
                f"{_seconds(every * pace)}; to stay below {100 * self._share:g} % of training time "
                f"(budget={self._share:g}), it now looks {then}"
            ]
        )


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
