"""`Looking`: when the rollouts of a run are looked at, and what becomes of an error there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tlens_callback.interfaces import Instrument
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.rollouts import Look
from tlens_callback.run.printing import report, warn
from tlens_callback.run.settings import Settings
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.moved import TrainedSample
from tlens_callback.shadow.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Observed:
    """What a run observes: its model, the model's shadow, the probes, and the instruments."""

    model: nn.Module
    shadow: Shadow
    batch: ProbeBatch
    instruments: Sequence[Instrument]


class Looking:
    """Looks at the rollouts of each observation, which waits for them.

    Attributes:
        look: None where there are no rollouts, and after an error.
        awaits: whether the latest observation waits for its rollouts.
        readings: what the latest observation has of rollouts; they are added to this list.
    """

    def __init__(self, settings: Settings, ranks: Ranks | None) -> None:
        self._settings, self._ranks = settings, ranks
        self.look: Look | None = None
        self.awaits = False
        self.readings: list[Reading] = []
        self._sampled_with: TrainedSample | None = None
        self._said = False

    def observed(self, of: Observed, step: int, *, last: bool) -> None:
        """Begins with the rollouts of an observation: looks at preferences of the training data,
        and waits for what the trainer will sample, unless it is the last observation."""
        self.readings = []
        self.awaits = False

        def begin(look: Look) -> list[Reading]:
            found = look.at_pairs(of.shadow, of.batch, step, of.instruments)
            if look.recorder and not last:
                self._sampled_with = TrainedSample(of.model)
                self.awaits = True
            return found

        self._act(begin)

    def before_update(self, of: Observed, args: Any, step: int) -> None:
        """Looks at the rollouts that were sampled with the weights of `step`."""
        if not self.awaits:
            return

        def see(look: Look) -> list[Reading]:
            assert self._sampled_with is not None
            if self._sampled_with.still(of.model):
                # Who merges adapters to generate leaves the base's weights moved by rounding.
                of.shadow.sync()
                given = (of.shadow, of.batch, of.model, args, step, of.instruments)
                # The trainer may be in a pass of its own, in a lower precision.
                with torch.autocast(of.shadow.device.type, enabled=False):
                    return look.before_update(*given)
            if not self._said:
                warn(
                    "tlens: the rollouts of step %d are not looked at: the weights were changed "
                    "before on_pre_optimizer_step, and are not those that sampled them. If the "
                    "optimizer updates in the backward pass, take another one. This is said once.",
                    step,
                )
            self._said = True
            return []

        self._act(see)
        self.awaits = self.look is not None and self.look.settings.after_update

    def after_update(self, of: Observed) -> None:
        """Looks at the same rollouts after the update, where that is asked for."""

        def see(look: Look) -> list[Reading]:
            of.shadow.sync()
            return look.after_update(of.shadow)

        if self.awaits:
            self._act(see)
        self.awaits = False

    def end(self) -> None:
        """Frees the copy of the model, if there is one."""
        if self.look is not None:
            self.look.base = None

    def _act(self, act: Callable[[Look], Sequence[Reading]]) -> None:
        """Adds what a look gives; if it fails, it is the last."""
        if self.look is None:
            return
        try:
            self.readings += act(self.look)
        except Exception as error:
            if self._settings.on_error == "raise" or (self._ranks and self._ranks.broken):
                raise
            self.look = None
            report("the look at rollouts", error)
