"""`Cost`: measures the time that watching takes from the training thread."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tlens_callback.meaning import Description, Meaning
from tlens_callback.reading import Reading

_DESCRIPTION = Description(
    title="What watching costs",
    group="Training",
    measures={
        "share": Meaning(
            title="Share of the time spent on observing",
            axes=(),
            headline=True,
            better="lower",
            of_run=True,
        )
    },
    others=Meaning(of_run=True),
)


def cost_reading(measure: str, value: float, unit: str) -> Reading:
    """Returns the reading `cost/<measure>` of a number."""
    values = np.asarray(value)
    return Reading(key=f"cost/{measure}", values=values, unit=unit, description=_DESCRIPTION)


class Cost:
    """Measures the time that observing takes on the training thread.

    Keys:
        cost/seconds: [], seconds on the training thread since the previous reading. They include
            handing that observation to the sinks and waiting for them, but not what the sinks do on
            their own thread. All readings so far add up to the whole time up to this one.
        cost/share: [], fraction of the time since the start that was spent on observing.

    Attributes:
        seconds: all seconds so far.
        beforehand: the seconds before the first step.
        comparing: of these seconds, those of comparisons of shadow and model after the start.
    """

    def __init__(self) -> None:
        self.seconds = self.beforehand = self.comparing = 0.0
        self._accounted = 0.0
        self._began = self._entered = time.perf_counter()

    def begin(self) -> None:
        """Sets the start of the run to when the current `spending` block was entered."""
        self._began = self._entered

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Counts the time of its block."""
        self._entered = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - self._entered

    @contextmanager
    def comparison(self) -> Iterator[None]:
        """Counts the time of its block, inside a `spending` block, as that of a comparison."""
        entered = time.perf_counter()
        try:
            yield
        finally:
            self.comparing += time.perf_counter() - entered

    def trained(self) -> float:
        """Returns the seconds of training up to now; call it inside a `spending` block."""
        return self._entered - self._began - self.seconds

    @property
    def share(self) -> float:
        """The seconds so far as a share of the time since the start."""
        return self._share(self.seconds)

    def readings(self) -> list[Reading]:
        """Returns the readings of now; call it inside a `spending` block."""
        spent = self.seconds + time.perf_counter() - self._entered
        since, self._accounted = spent - self._accounted, spent
        return [
            cost_reading("seconds", since, "seconds"),
            cost_reading("share", self._share(spent), "fraction"),
        ]

    def _share(self, spent: float) -> float:
        return min(1.0, spent / (time.perf_counter() - self._began))
