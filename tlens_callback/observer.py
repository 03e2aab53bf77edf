"""`Observer`: one training run watched. Knows when a look failed; knows nothing of a trainer."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tlens_callback.fidelity import Fidelity, FidelityError, compare
from tlens_callback.interfaces import Instrument, Sink
from tlens_callback.observe import observe
from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow

logger = logging.getLogger("tlens_callback")

OnError = Literal["warn", "raise"]


class Observer:
    """Shadow, probes, instruments and sinks of one run, with one policy for what goes wrong.

    What a user can get wrong raises in `start`. Later an instrument or a sink that raises is
    reported once and set aside; a shadow that fails or drifts ends the watching. With
    `on_error="raise"` everything raises.

    Attributes:
        seconds: spent on the training thread so far, everything included.
        steps: the observed steps.
        checks: step -> fidelity, where it was computed.
    """

    def __init__(
        self,
        instruments: Sequence[Instrument],
        sinks: Sequence[Sink],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        on_error: OnError = "warn",
    ) -> None:
        self.instruments, self.sinks = list(instruments), list(sinks)
        self.device, self.dtype, self.on_error = device, dtype, on_error
        self.shadow: Shadow | None = None
        self.model: nn.Module | None = None
        self.steps: list[int] = []
        self.checks: dict[int, Fidelity] = {}
        self.seconds = 0.0
        self.extra_bytes = 0
        self._reference: Tensor | None = None
        self._next_check: int | None = None

    @property
    def watching(self) -> bool:
        """Whether there is a shadow and nothing has ended the watching."""
        return self.shadow is not None

    def start(
        self,
        model: nn.Module,
        tokenizer: Any,
        probes: Callable[[Shadow], Sequence[Probe]],
        *,
        step: int,
    ) -> None:
        """Builds the shadow, encodes the probes, checks fidelity and observes for the first time.

        Starting again on the same model (a batch size being searched for) keeps the shadow.

        Raises:
            ValueError: for a model, probe, instrument or hook that cannot work.
            FidelityError: where the shadow is not the model.
        """
        with self._clock():
            again = self.shadow is not None and self.model is model
            if not again:
                self.began = time.perf_counter()
                self.shadow = Shadow(model, device=self.device, dtype=self.dtype)
                self.model = model
            shadow = self.shadow
            assert shadow is not None
            self.extra_bytes = shadow.extra_bytes
            if not again:
                self.batch = ProbeBatch.encode(
                    probes(shadow),
                    tokenizer,
                    vocab_size=shadow.vocab_size,
                    context=shadow.context,
                    device=shadow.device,
                )
            shadow.sync()
            fidelity, self._reference = compare(model, shadow, self.batch)
            if not fidelity.close:
                raise FidelityError(_mismatch(model, fidelity))
            self._first = fidelity
            self._next_check = step + 1
            self.checks[step] = fidelity
            self._look(step, fidelity, first=True)

    def after_update(self, step: int, *, observe: bool, last: bool) -> None:
        """After the optimizer's step number `step`: checks and observes, where it is time to."""
        if self.shadow is None or self.model is None:
            return
        check = last or (self._next_check is not None and step >= self._next_check)
        if not (check or observe):
            return
        with self._clock():
            try:
                self.shadow.sync()
                fidelity = self._check(step) if check else None
                if self.shadow is None:
                    return
                if observe or last:
                    self._look(step, fidelity)
                elif fidelity is not None:
                    self._write(fidelity.readings(), step)
            except Exception as error:
                self._end("observing failed", error)

    def close(self) -> None:
        """Closes the sinks and lets go of the shadow and its memory. May be called twice."""
        with self._clock():
            for sink in list(self.sinks):
                self._guard(sink, sink.close)
            self.shadow = self.model = self._reference = None

    def _check(self, step: int) -> Fidelity | None:
        """Fidelity against the live model as it is now, and whether the shadow moved with it."""
        assert self.shadow is not None and self.model is not None
        fidelity, _ = compare(self.model, self.shadow, self.batch, reference=self._reference)
        self.checks[step] = fidelity
        if self._next_check is not None:
            # A warm-up's first step has learning rate 0: look again until the model has moved.
            self._next_check = None if fidelity.moved else step + max(1, step - self.first_step)
        if not fidelity.close or fidelity.stale(self._first):
            stale = fidelity.close
            raise FidelityError(_mismatch(self.model, fidelity, stale=stale))
        return fidelity

    def _look(self, step: int, fidelity: Fidelity | None, *, first: bool = False) -> None:
        assert self.shadow is not None
        if first:
            self.first_step = step
        began = time.perf_counter()

        def failed(instrument: Instrument, error: Exception) -> None:
            self.instruments = [i for i in self.instruments if i is not instrument]
            self._report(f"instrument {instrument.name!r}", error)

        strict = self.on_error == "raise"
        readings = observe(
            self.shadow, self.batch, self.instruments, on_error=None if strict or first else failed
        )
        if fidelity is not None:
            readings += fidelity.readings()
        took = time.perf_counter() - began
        readings += [
            Reading(key="cost/seconds", values=np.asarray(took), unit="seconds"),
            Reading(
                key="cost/share", values=np.asarray(self.share), unit="fraction", limits=(0, 1)
            ),
        ]
        if step not in self.steps:
            self.steps.append(step)
        self._write(readings, step)

    @property
    def share(self) -> float:
        """Share of the time since the start that was spent here."""
        elapsed = time.perf_counter() - self.began
        return min(1.0, self.seconds / elapsed) if elapsed > 0 else math.nan

    def _write(self, readings: Sequence[Reading], step: int) -> None:
        for sink in list(self.sinks):
            self._guard(sink, lambda sink=sink: sink.write(readings, step=step))

    def _guard(self, sink: Sink, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            if self.on_error == "raise":
                raise
            self.sinks.remove(sink)
            self._report(f"sink {type(sink).__name__}", error)

    def _report(self, what: str, error: Exception) -> None:
        logger.warning(
            "tlens: %s raised %s: %s. It is set aside; training goes on.",
            what,
            type(error).__name__,
            error,
            exc_info=error,
        )

    def _end(self, what: str, error: Exception) -> None:
        self.shadow = self.model = self._reference = None
        if self.on_error == "raise":
            raise error
        logger.warning(
            "tlens: %s (%s: %s). Watching ends here; training goes on.",
            what,
            type(error).__name__,
            error,
        )

    @contextmanager
    def _clock(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def summary(self) -> list[str]:
        """Lines for the end of the run: what was seen, where to look, what it cost."""
        if not self.steps:
            return []
        lines = [
            f"tlens: {len(self.steps)} observations of {len(self.batch.probes)} probes in "
            f"{self.seconds:.1f} s, {self.share:.1%} of the run; "
            f"{self.extra_bytes / 2**20:.1f} MiB of weights beside the model's"
        ]
        if self.checks:
            worst = max(self.checks.values(), key=lambda check: check.relative)
            lines.append(f"tlens: shadow against live model, worst of {len(self.checks)}: {worst}")
        lines += [f"tlens: {sink}" for sink in self.sinks]
        return lines


def _mismatch(model: nn.Module, fidelity: Fidelity, *, stale: bool = False) -> str:
    if stale:
        return (
            f"the shadow of {type(model).__name__} did not follow the live model's update: it is "
            f"{fidelity.gap:.1e} logits off where the live model moved {fidelity.moved:.1e}"
        )
    return (
        f"the shadow of {type(model).__name__} is not the live model: {fidelity}; rounding allows "
        f"{fidelity.tolerance[0]:.0e} of the largest logit and KL {fidelity.tolerance[1]:.0e}. "
        f"Its pictures would be of another model. This family or this adapter may not be "
        f"supported by TransformerLens's bridge"
    )


def print_lines(lines: Sequence[str]) -> None:
    """Prints beside a progress bar without breaking it."""
    for line in lines:
        tqdm.write(line)
