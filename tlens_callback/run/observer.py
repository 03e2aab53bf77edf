"""`Observer`: one training run watched. Knows when a look failed; knows nothing of a trainer."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlens_callback.interfaces import Instrument, Sink
from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.run.baselines import baselines, check, keep, marks, recall
from tlens_callback.run.cost import Cost, cost_reading
from tlens_callback.run.fidelity_monitor import FidelityMonitor
from tlens_callback.run.observe import observe
from tlens_callback.run.printing import print_lines
from tlens_callback.run.schedule import Schedule, rare
from tlens_callback.run.settings import Settings
from tlens_callback.run.trainer_logs import TrainerLogs
from tlens_callback.run.writer import Writer, report
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.fidelity import Fidelity, FidelityError

logger = logging.getLogger("tlens_callback")


NO_ROOM = (
    "tlens: there is no room for the shadow and its probes beside the model. Put it elsewhere "
    "(device='cpu'), shorten the probes, or adapt fewer layers."
)


class Observer:
    """Shadow, probes, instruments and sinks of one run, with one policy for what goes wrong.

    What a user can get wrong raises in `start`; an `optional` instrument that has nothing to
    measure in this model is left out with a line. Later an instrument or a sink that raises is
    reported once and set aside; a shadow that fails or drifts ends the watching. With
    `on_error="raise"` everything raises.

    Args:
        settings: what is watched, and how; the probes among them are left to `start`.
        sinks: where the readings go.

    Keys:
        fidelity/max_abs_diff, fidelity/kl, fidelity/top1_agreement: where they were computed; see
            `Fidelity`.
        cost/seconds, cost/share: [], seconds, fraction; of the training thread, see `Cost`.
        cost/dropped: [], count; observations dropped so far, with `writing="drop_old"`.
        trainer/<name>: [update], as logged; see `TrainerLogs`.

    Attributes:
        instruments, watch: those that are not set aside.
        writer: has the sinks.
        model, shadow: what is watched, and how; None before `start` and after the end.
        batch: the encoded probes.
        cost: the time spent on the training thread so far.
        steps: the observed steps.
        checks: step -> fidelity, where it was computed.
    """

    def __init__(self, settings: Settings, sinks: Sequence[Sink]) -> None:
        self.settings = settings
        self.instruments = list(settings.instruments or ())
        self.writer = Writer(sinks, writing=settings.writing, on_error=settings.on_error)
        self.logs = TrainerLogs()
        self.watch = settings.watch or None
        self.shadow: Shadow | None = None
        self.model: nn.Module | None = None
        self.batch: ProbeBatch | None = None
        self.steps: list[int] = []
        self._monitor = FidelityMonitor()
        self.checks = self._monitor.checks
        self.cost = Cost()
        self.extra_bytes = self._first_step = 0
        self._schedule = Schedule()
        self._shape: tuple[int, ...] = ()
        self._watched: tuple[int, dict[str, Tensor]] = (-1, {})

    @property
    def watching(self) -> bool:
        """Whether there is a shadow and nothing has ended the watching."""
        return self.shadow is not None

    @property
    def sinks(self) -> list[Sink]:
        """Those that are not set aside."""
        return self.writer.sinks

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
        logged: Sequence[Mapping[str, Any]] = (),
        earlier: bool = False,
        last: bool = False,
    ) -> None:
        """Builds the shadow, encodes the probes, checks fidelity, observes for the first time and
        writes that.

        Starting again on the same model (a batch size being searched for) keeps the shadow. Where
        it raises, the sinks are closed and there is no shadow.

        Args:
            memory, run: a file that `remember` wrote, where a run is resumed, and what that was
                given; None for a new one.
            training: see `ProbeBatch`.
            logged: what the trainer logs, a list that grows.
            earlier: what was logged up to now belongs to this observation, at whatever step it is.
            last: there will be no other observation.

        Raises:
            ValueError: for a model, probe, instrument or hook that cannot work.
            FidelityError: where the shadow is not the model.
            RuntimeError: where there is no room for it.
        """
        with self._closing_on_error(), self.cost.spending():
            self.writer.release()  # an observation of the try before, with what was logged then
            if self.shadow is not None and self.model is model:
                self.shadow.sync()
            else:
                self.cost.begin()
                self.shadow = Shadow(model, device=self.settings.device, dtype=self.settings.dtype)
                self.model, self._shape = model, _shape(self.shadow)
                self.batch = ProbeBatch.encode(
                    probes(self.shadow),
                    tokenizer,
                    vocab_size=self.shadow.vocab_size,
                    context=self.shadow.context,
                    device=self.shadow.device,
                    training=training,
                )
            assert self.batch is not None
            remembered = baselines([*self.instruments, self.watch])
            own = baselines([self.logs, self._schedule])
            for one in [*remembered.values(), *own.values()]:
                one.clear()
            recalled = frozenset()
            if memory is not None and (remembered or rare(self.instruments) or memory.exists()):
                about = marks(self.batch, self.shadow.dtype, run)
                recalled = recall(memory, {**remembered, **own}, about, self.shadow.device)
            self._schedule.start()
            self.logs.start(logged, step=0 if earlier else step)
            fidelity = self._monitor.start(model, self.shadow, self.batch, step=step)
            self._first_step = step
            self._look(step, fidelity, last=last)
            check(remembered)
            self.writer.drain()
            for name, one in remembered.items():
                if recalled and one and name not in recalled:
                    logger.warning(
                        "tlens: the run that is resumed kept nothing of %r, which measures changes "
                        "from here on.",
                        name,
                    )
        self.cost.beforehand = self.cost.seconds

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with suppress(Exception):
                self.close()
            if isinstance(error, torch.OutOfMemoryError):
                # Not as it is: a search for the batch size would take it for the batch's.
                raise RuntimeError(NO_ROOM) from error
            raise

    def remember(self, path: Path, *, step: int, run: str = "", always: bool = False) -> None:
        """Keeps in a file what the instruments compare later observations with.

        Args:
            step: where what goes on from here begins. If it was observed already, it will be
                observed anew, and the store writes it anew: with its events, and all that was
                logged before it.
            run: what tells this training run, as far as it has come, from others.
            always: there is a file even where nobody remembers a thing.
        """
        if self.batch is None or self.shadow is None:
            return
        with self.cost.spending():
            try:
                about = marks(self.batch, self.shadow.dtype, run)
                of = baselines([*self.instruments, self.watch])
                if self.watch is not None and self._watched[0] == step:
                    of[self.watch.name] = self._watched[1]
                if any(of.values()) or rare(self.instruments) or always:
                    for own in (self.logs, self._schedule):
                        own.remember(step)
                        of[own.name] = own.baseline
                keep(path, of, about)
            except Exception as error:
                if self.settings.on_error == "raise":
                    raise
                logger.warning("tlens: %s could not be written: %s", path, error)

    def after_update(
        self, step: int, *, observe: bool, last: bool, hold: bool = False, check: bool = False
    ) -> None:
        """After the optimizer's step number `step`: checks and observes, where it is time to.

        Args:
            check: checks in any case.
            hold: the readings are handed over by `hand_over`, with what is logged until then.
        """
        if self.shadow is None or self.model is None or self.batch is None:
            return
        check = check or last or self._monitor.due(step)
        if not (check or observe):
            return
        with self.cost.spending():
            try:
                self.shadow.sync()
                fidelity = None
                if check:
                    fidelity = self._monitor.check(self.model, self.shadow, self.batch, step=step)
                if observe or last:
                    self._look(step, fidelity, last=last, hold=hold)
                elif fidelity is not None:
                    self.writer.put(fidelity.readings(), step=step)
            except Exception as error:
                if self.settings.on_error == "raise":
                    raise
                if self.watch is not None and isinstance(error, FidelityError):
                    self.writer.put(self.watch.breach(error), step=step)
                self._let_go()
                logger.warning(
                    "tlens: observing failed (%s: %s). Watching ends here; training goes on.",
                    type(error).__name__,
                    error,
                    exc_info=None if isinstance(error, FidelityError) else error,
                )

    def exchange(self, load: Callable[[], nn.Module]) -> None:
        """Goes on with another model of the same shape; this one is freed before that is loaded.

        Where it raises there is no model, until the next exchange.

        Raises:
            ValueError: for a model of another shape or vocabulary, or one that cannot be shadowed.
        """
        assert self._shape
        if self.shadow is not None:
            self.shadow.release()
        self.shadow = self.model = None
        model = load()
        shadow = Shadow(model, device=self.settings.device, dtype=self.settings.dtype)
        if _shape(shadow) != self._shape:
            raise ValueError(
                f"The models have another shape and cannot be compared head by head: {self._shape} "
                f"and {_shape(shadow)} layers, heads, d_model and tokens."
            )
        self.model, self.shadow = model, shadow

    def hand_over(self) -> None:
        """Ends the holding of an observation."""
        with self.cost.spending():
            self.writer.release()

    def finish(self) -> None:
        """Waits until everything is written, and closes the sinks."""
        with self.cost.spending():
            self.writer.close()

    def close(self) -> None:
        """Writes everything, closes the sinks and frees the shadow. May be called twice."""
        try:
            self.finish()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self.shadow is not None:
            self.extra_bytes = self.shadow.extra_bytes
            self.shadow.release()
        self.shadow = self.model = None
        self._monitor.end()

    def _look(
        self, step: int, fidelity: Fidelity | None, *, last: bool, hold: bool = False
    ) -> None:
        assert self.shadow is not None and self.batch is not None
        due = self._schedule.due(self.instruments, step=step, last=last)
        first = step == self._first_step

        def failed(instrument: Instrument, error: Exception) -> None:
            # A rare instrument's first time may come later, where a run is resumed.
            new = self._schedule.is_new(instrument)
            optional = new and getattr(instrument, "optional", False)
            unfit = optional and isinstance(error, ValueError)
            # At the start an instrument's failure is the user's to mend: a hook that is not there.
            if not unfit and (self.settings.on_error == "raise" or (first and not optional)):
                error.add_note(f"(raised by the instrument {instrument.name!r})")
                raise error
            self.instruments = [i for i in self.instruments if i is not instrument]
            if unfit:
                print_lines([f"tlens: without {instrument.name}: {error}"])
            else:
                report(f"instrument {instrument.name!r}", error)

        readings = observe(self.shadow, self.batch, due, on_error=failed)
        if fidelity is not None:
            readings += fidelity.readings()
        readings += self.cost.readings()
        if self.writer.writing == "drop_old":
            readings.append(cost_reading("dropped", self.writer.dropped, "count"))
        readings += self._events(readings, step, strict=self.settings.on_error == "raise" or first)
        if step not in self.steps:
            self.steps.append(step)
        self.writer.hold(readings, step=step, more=partial(self.logs.take, step))
        if not hold:
            self.writer.release()

    def _events(self, readings: Sequence[Reading], step: int, *, strict: bool) -> list[Reading]:
        """What the watch makes of an observation; its events are printed."""
        if self.watch is None:
            return []
        self._watched = step, dict(self.watch.baseline)
        try:
            found = self.watch.look(readings)
        except Exception as error:
            if strict:
                raise
            self.watch = None
            report("the watch", error)
            return []
        for reading in found:
            if reading.texts is not None:
                print_lines([f"tlens: step {step}: {event}" for event in reading.texts.tolist()])
        return found


def _shape(shadow: Shadow) -> tuple[int, ...]:
    return shadow.n_layers, shadow.n_heads, shadow.d_model, shadow.vocab_size
