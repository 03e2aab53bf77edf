"""`FidelityMonitor`: decides when to compare the shadow with its live model, and does it."""

import math

import torch
from torch import Tensor, nn

from tlens_callback.probes import ProbeBatch
from tlens_callback.run.printing import warn
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.fidelity import (
    Fidelity,
    FidelityError,
    Ran,
    compare,
    mismatch,
    sees_ahead,
)

_STILL = 4
"""Steps after which an update has been due even where a warm-up begins with a rate of 0."""


class FidelityMonitor:
    """Compares shadow and live model when a run begins, after its first update, and when asked to.

    During a warm-up, or in half precision, the first updates may change the logits by less than
    rounding does. The comparison is then repeated, each time after twice as many steps, until an
    update was large enough to show whether the shadow follows it.

    Attributes:
        checks: step -> fidelity, for the steps where it was computed.
        next: the step from which on the comparison is to be repeated, or None.
    """

    def __init__(self) -> None:
        self.checks: dict[int, Fidelity] = {}
        self._first: Fidelity | None = None
        self._first_step = 0
        self.next: int | None = None
        self._said_still = False
        self._reference: Tensor | None = None

    def start(
        self,
        model: nn.Module,
        shadow: Shadow,
        batch: ProbeBatch,
        *,
        step: int,
        ran: Ran | None = None,
    ) -> Fidelity:
        """Makes the first comparison of a run.

        Args:
            ran: see `compare`.

        Raises:
            ValueError: if the probes do not run through both models, logits are not finite, or the
                model is not causal.
            FidelityError: if the shadow does not compute what the model does.
        """
        try:
            fidelity, self._reference = compare(model, shadow, batch, ran=ran)
            ahead = sees_ahead(shadow, batch)
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
        if ahead:
            raise ValueError(
                f"A token of this {type(model).__name__} sees the tokens behind it. Probes run "
                f"from left to right, padded at their end, so their readings would depend on the "
                f"other probes. Only a causal model can be watched."
            )
        self._first, self._first_step, self.next = fidelity, step, step + 1
        self.checks[step] = fidelity
        return fidelity

    def due(self, step: int) -> bool:
        """Whether it is time to compare again, since no update so far was large enough to show."""
        return self.next is not None and step >= self.next

    def check(
        self,
        model: nn.Module,
        shadow: Shadow,
        batch: ProbeBatch,
        *,
        step: int,
        ran: Ran | None = None,
    ) -> Fidelity | None:
        """Makes a later comparison; returns None if the live model's logits are not finite.

        Args:
            ran: see `compare`.

        Raises:
            FidelityError: if the shadow does not compute what the model does, or did not follow the
                last updates.
        """
        assert self._first is not None
        fidelity, logits = compare(model, shadow, batch, reference=self._reference, ran=ran)
        told = fidelity.telling(self._first)
        if self.next is not None:
            self.next = None if told else step + max(1, step - self._first_step)
        if not math.isfinite(fidelity.scale):
            warn("tlens: the live model's logits are not finite at step %d.", step)
            return None
        still = fidelity.moved == 0 and step - self._first_step >= _STILL
        if still and self.next is not None and not self._said_still:
            self._say_still(step)
        self.checks[step] = fidelity
        if not fidelity.close or fidelity.stale(self._first):
            raise FidelityError(mismatch(model, fidelity, stale=fidelity.close))
        if told:
            # The next comparison starts from here: an update may be small beside all earlier ones.
            self._reference = logits
        return fidelity

    def _say_still(self, step: int) -> None:
        self._said_still = True
        warn(
            "tlens: at step %d the model's answers to the probes are still, to the last bit, those "
            "of step %d. Is anything trained? Look at the learning rate and at requires_grad "
            "(PeftModel.from_pretrained loads an adapter frozen without is_trainable=True).",
            step,
            self._first_step,
        )

    def end(self) -> None:
        """Frees the logits that were kept for later comparisons."""
        self._reference = None
