"""`FidelityMonitor`: whether a shadow follows its live model, and when to compare them."""

import logging
import math

import torch
from torch import Tensor, nn

from tlens_callback.probes import ProbeBatch
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.fidelity import Fidelity, FidelityError, compare, mismatch

logger = logging.getLogger("tlens_callback")


class FidelityMonitor:
    """Compares shadow and live model when a run begins, after its first update, and when asked to.

    Under a warm-up, or in half precision, the first updates may move less than rounding: then it is
    due again, at distances that double, until one has told.

    Attributes:
        checks: step -> fidelity, where it was computed.
    """

    def __init__(self) -> None:
        self.checks: dict[int, Fidelity] = {}
        self._first: Fidelity | None = None
        self._first_step = 0
        self._next: int | None = None
        self._reference: Tensor | None = None

    def start(self, model: nn.Module, shadow: Shadow, batch: ProbeBatch, *, step: int) -> Fidelity:
        """The first comparison of a run.

        Raises:
            ValueError: for probes that do not run through both, or logits that are not finite.
            FidelityError: where the shadow is not the model.
        """
        try:
            fidelity, self._reference = compare(model, shadow, batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"The probes do not run through the {type(model).__name__} and its shadow: "
                f"{error} TransformerLens's bridge may not support this kind of model."
            ) from error
        if not math.isfinite(fidelity.scale):
            raise ValueError(
                "The live model's logits on the probes are not finite, so there is nothing to "
                "observe. Check its weights and its precision."
            )
        if not fidelity.close:
            raise FidelityError(mismatch(model, fidelity))
        self._first, self._first_step, self._next = fidelity, step, step + 1
        self.checks[step] = fidelity
        return fidelity

    def due(self, step: int) -> bool:
        """Whether no update has told yet, and it is time to look again."""
        return self._next is not None and step >= self._next

    def check(
        self, model: nn.Module, shadow: Shadow, batch: ProbeBatch, *, step: int
    ) -> Fidelity | None:
        """A later comparison; None where the live model's logits are not finite.

        Raises:
            FidelityError: where the shadow is not the model, or not the model of now.
        """
        assert self._first is not None
        fidelity, logits = compare(model, shadow, batch, reference=self._reference)
        told = fidelity.telling(self._first)
        if self._next is not None:
            self._next = None if told else step + max(1, step - self._first_step)
        if not math.isfinite(fidelity.scale):
            logger.warning("tlens: the live model's logits are not finite at step %d.", step)
            return None
        self.checks[step] = fidelity
        if not fidelity.close or fidelity.stale(self._first):
            raise FidelityError(mismatch(model, fidelity, stale=fidelity.close))
        if told:
            # A later update may be small beside all that came before it.
            self._reference = logits
        return fidelity

    def end(self) -> None:
        """Frees what later comparisons would need."""
        self._reference = None
