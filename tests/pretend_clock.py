"""A clock on which time passes only where a test lets it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from tests.training import Constant
from tlens_callback.run import cost


class Clock(TrainerCallback):
    """What a run's cost is measured with.

    Args:
        train: seconds of a step.
        look: seconds of an observation, of the instrument `watched`.
    """

    def __init__(self, train: float, look: float) -> None:
        self.now, self.train, self.look = 0.0, train, look
        self.watched = Takes(self)

    @contextmanager
    def ticks(self) -> Iterator[None]:
        """Stands for the real clock inside the `with` block."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: self.now))
            yield

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.now += self.train


class Takes(Constant):
    """An instrument that takes its time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("takes")
        self.clock = clock

    def read(self, taken, shadow, batch):
        self.clock.now += self.clock.look
        return super().read(taken, shadow, batch)
