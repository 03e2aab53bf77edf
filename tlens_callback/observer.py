"""`Observer`: one training run watched. Knows when a look failed; knows nothing of a trainer."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tlens_callback.fidelity import Fidelity, FidelityError, compare
from tlens_callback.interfaces import Instrument, Sink
from tlens_callback.memory import check, keep, marks, memories, recall
from tlens_callback.observe import observe
from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow
from tlens_callback.terminal import mismatch, print_lines
from tlens_callback.watch import Watch

logger = logging.getLogger("tlens_callback")

OnError = Literal["warn", "raise"]


class Observer:
    """Shadow, probes, instruments and sinks of one run, with one policy for what goes wrong.

    What a user can get wrong raises in `start`; an `optional` instrument that has nothing to
    measure in this model is left out with a line. Later an instrument or a sink that raises is
    reported once and set aside; a shadow that fails or drifts ends the watching. With
    `on_error="raise"` everything raises.

    Args:
        watch: what raises events; None: nothing does.

    Keys:
        fidelity/max_abs_diff, fidelity/kl, fidelity/top1_agreement: where they were computed; see
            `Fidelity`.
        cost/seconds: [], seconds on the training thread since the reading before, with the
            writing of that observation; they add up to all that was spent before this reading.
        cost/share: [], fraction of the time since the start that was spent here.

    Attributes:
        model, shadow: what is watched, and how; None before `start` and after the end.
        batch: the encoded probes.
        seconds: spent on the training thread so far, everything included.
        steps: the observed steps.
        checks: step -> fidelity, where it was computed.
    """

    def __init__(
        self,
        instruments: Sequence[Instrument],
        sinks: Sequence[Sink],
        *,
        watch: Watch | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        on_error: OnError = "warn",
    ) -> None:
        self.instruments, self.sinks = list(instruments), list(sinks)
        self.watch = watch
        self.device, self.dtype, self.on_error = device, dtype, on_error
        self.shadow: Shadow | None = None
        self.model: nn.Module | None = None
        self.batch: ProbeBatch | None = None
        self.steps: list[int] = []
        self.checks: dict[int, Fidelity] = {}
        self.seconds = 0.0
        self.extra_bytes = 0
        self._accounted = 0.0
        self._began = self._entered = time.perf_counter()
        self._first: Fidelity | None = None
        self._first_step = 0
        self._reference: Tensor | None = None
        self._next_check: int | None = None
        self._looks = 0
        self._watched: tuple[int, dict[str, Tensor]] = (-1, {})

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
        memory: Path | None = None,
        run: str = "",
        training: Callable[[int], list[list[int]]] | None = None,
    ) -> None:
        """Builds the shadow, encodes the probes, checks fidelity and observes for the first time.

        Starting again on the same model (a batch size being searched for) keeps the shadow.

        Args:
            memory, run: a file that `remember` wrote, where a run is resumed, and what that was
                given; None for a new one.
            training: see `ProbeBatch`.

        Raises:
            ValueError: for a model, probe, instrument or hook that cannot work.
            FidelityError: where the shadow is not the model.
        """
        with self._clock():
            if self.shadow is not None and self.model is model:
                self.shadow.sync()
            else:
                self._began = self._entered
                self.shadow = Shadow(model, device=self.device, dtype=self.dtype)
                self.model = model
                self.batch = ProbeBatch.encode(
                    probes(self.shadow),
                    tokenizer,
                    vocab_size=self.shadow.vocab_size,
                    context=self.shadow.context,
                    device=self.shadow.device,
                    training=training,
                )
            assert self.batch is not None
            self._looks = 0
            remembered = memories([*self.instruments, self.watch])
            for own in remembered.values():
                own.clear()
            recalled = frozenset()
            if memory is not None:
                about = marks(self.batch, self.shadow.dtype, run)
                recalled = recall(memory, remembered, about, self.shadow.device)
            fidelity, self._reference = self._first_comparison(model)
            if not math.isfinite(fidelity.scale):
                raise ValueError(
                    "The live model's logits on the probes are not finite, so there is nothing to "
                    "observe. Check its weights and its precision."
                )
            if not fidelity.close:
                raise FidelityError(mismatch(model, fidelity))
            self._first, self._first_step, self._next_check = fidelity, step, step + 1
            self.checks[step] = fidelity
            self._look(step, fidelity, last=False)
            check(remembered)
            for name, own in remembered.items():
                if recalled and own and name not in recalled:
                    logger.warning(
                        "tlens: the run that is resumed kept nothing of %r, which measures changes "
                        "from here on.",
                        name,
                    )

    def remember(self, path: Path, *, step: int, run: str = "") -> None:
        """Keeps in a file what the instruments compare later observations with.

        Args:
            run: what tells this training run, as far as it has come, from others.
        """
        if self.batch is None or self.shadow is None:
            return
        with self._clock():
            try:
                about = marks(self.batch, self.shadow.dtype, run)
                of = memories([*self.instruments, self.watch])
                # Resuming observes this step anew, and the store writes it anew: with its events.
                if self.watch is not None and self._watched[0] == step:
                    of[self.watch.name] = self._watched[1]
                keep(path, of, about)
            except Exception as error:
                if self.on_error == "raise":
                    raise
                logger.warning("tlens: %s could not be written: %s", path, error)

    def _first_comparison(self, model: nn.Module) -> tuple[Fidelity, Tensor]:
        assert self.shadow is not None and self.batch is not None
        try:
            return compare(model, self.shadow, self.batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"The probes do not run through the {type(model).__name__} and its shadow: "
                f"{error} TransformerLens's bridge may not support this kind of model."
            ) from error

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
                if observe or last:
                    self._look(step, fidelity, last=last)
                elif fidelity is not None:
                    self._write(fidelity.readings(), step)
            except Exception as error:
                if self.on_error == "raise":
                    raise
                if self.watch is not None and isinstance(error, FidelityError):
                    self._write(self.watch.breach(error), step)
                self._let_go()
                logger.warning(
                    "tlens: observing failed (%s: %s). Watching ends here; training goes on.",
                    type(error).__name__,
                    error,
                    exc_info=None if isinstance(error, FidelityError) else error,
                )

    def close(self) -> None:
        """Closes the sinks and frees the shadow. May be called twice."""
        with self._clock():
            try:
                for sink in list(self.sinks):
                    self._guard(sink, sink.close)
            finally:
                self._let_go()

    def _let_go(self) -> None:
        if self.shadow is not None:
            self.extra_bytes = self.shadow.extra_bytes
            self.shadow.release()
        self.shadow = self.model = self._reference = None

    def _check(self, step: int) -> Fidelity | None:
        """Fidelity against the live model as it is now; None where its logits are not finite."""
        assert self.shadow and self.model and self.batch and self._first
        fidelity, _ = compare(self.model, self.shadow, self.batch, reference=self._reference)
        if not math.isfinite(fidelity.scale):
            logger.warning("tlens: the live model's logits are not finite at step %d.", step)
            return None
        self.checks[step] = fidelity
        if self._next_check is not None:
            # Under a warm-up, or in half precision, the first steps may move less than rounding.
            told = fidelity.telling(self._first)
            self._next_check = None if told else step + max(1, step - self._first_step)
        if not fidelity.close or fidelity.stale(self._first):
            raise FidelityError(mismatch(self.model, fidelity, stale=fidelity.close))
        return fidelity

    def _look(self, step: int, fidelity: Fidelity | None, *, last: bool) -> None:
        assert self.shadow is not None and self.batch is not None
        due = [i for i in self.instruments if last or self._looks % getattr(i, "every", 1) == 0]
        self._looks += 1

        first = step == self._first_step

        def failed(instrument: Instrument, error: Exception) -> None:
            optional = first and getattr(instrument, "optional", False)
            unfit = optional and isinstance(error, ValueError)
            # At the start an instrument's failure is the user's to mend: a hook that is not there.
            if not unfit and (self.on_error == "raise" or (first and not optional)):
                error.add_note(f"(raised by the instrument {instrument.name!r})")
                raise error
            self.instruments = [i for i in self.instruments if i is not instrument]
            if unfit:
                print_lines([f"tlens: without {instrument.name}: {error}"])
            else:
                self._report(f"instrument {instrument.name!r}", error)

        readings = observe(self.shadow, self.batch, due, on_error=failed)
        if fidelity is not None:
            readings += fidelity.readings()
        spent = self.seconds + time.perf_counter() - self._entered
        since, self._accounted = spent - self._accounted, spent
        readings += [
            Reading(key="cost/seconds", values=np.asarray(since), unit="seconds"),
            Reading(key="cost/share", values=np.asarray(self._share(spent)), unit="fraction"),
        ]
        readings += self._events(readings, step, strict=self.on_error == "raise" or first)
        if step not in self.steps:
            self.steps.append(step)
        self._write(readings, step)

    def _events(self, readings: Sequence[Reading], step: int, *, strict: bool) -> list[Reading]:
        """What the watch makes of an observation; its events are printed."""
        if self.watch is None:
            return []
        self._watched = step, dict(self.watch.memory)
        try:
            found = self.watch.look(readings)
        except Exception as error:
            if strict:
                raise
            self.watch = None
            self._report("the watch", error)
            return []
        for reading in found:
            if reading.texts is not None:
                print_lines([f"tlens: step {step}: {event}" for event in reading.texts.tolist()])
        return found

    @property
    def share(self) -> float:
        """`seconds` as a share of the time since the start."""
        return self._share(self.seconds)

    def _share(self, spent: float) -> float:
        return min(1.0, spent / (time.perf_counter() - self._began))

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

    @contextmanager
    def _clock(self) -> Iterator[None]:
        self._entered = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - self._entered
