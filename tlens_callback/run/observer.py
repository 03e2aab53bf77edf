"""`Observer`: observes one training run and handles what fails. It does not know the trainer."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlens_callback.interfaces import Instrument, Sink
from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.run import baselines
from tlens_callback.run.budget import Budget
from tlens_callback.run.claims import claim
from tlens_callback.run.constants import Constants
from tlens_callback.run.cost import Cost, cost_reading
from tlens_callback.run.fidelity_monitor import FidelityMonitor
from tlens_callback.run.looking import Looking, Observed
from tlens_callback.run.observe import observe
from tlens_callback.run.printing import print_lines, report, warn
from tlens_callback.run.schedule import Schedule, has_rare
from tlens_callback.run.settings import Settings
from tlens_callback.run.trainer_logs import TrainerLogs, known_later
from tlens_callback.run.writer import Writer
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.fidelity import Fidelity, FidelityError, Ran
from tlens_callback.shadow.ranks import Ranks

NO_ROOM_FOR_SHADOW = (
    "tlens: there is no room for the shadow and its probes in the memory of the model's device. "
    "Put the shadow on another device (device='cpu'), shorten the probes, or adapt fewer layers."
)


class Observer:
    """Observes one run with a shadow, probes, instruments and sinks, and handles what fails.

    A mistake of the user raises in `start`. An `optional` instrument that has nothing to measure in
    this model is left out, and a printed line says so. After the start, an instrument or a sink
    that raises is reported once and not used any more, and if the shadow fails or does not follow
    the model, watching ends. With `on_error="raise"` all errors are raised.

    Args:
        settings: what is watched, and how; its probes are ignored, `start` takes them.
        sinks: where the readings go.
        ranks: the processes of the run, if there are several that help.

    Keys:
        fidelity/max_abs_diff, fidelity/kl, fidelity/top1_agreement: at the steps where they were
            computed; see `Fidelity`.
        cost/seconds, cost/share: [], seconds, fraction; of the training thread, see `Cost`.
        cost/dropped: [], count; observations dropped so far, with `writing="drop_old"`.
        cost/gathers: [], count; of a sharded model: how often processes brought the parameters of
            a layer, or of a module outside of the layers, together since the previous observation.
        trainer/<name>: [update], as logged; see `TrainerLogs`.

    Attributes:
        instruments, watch: those that are still used.
        writer: holds the sinks.
        model, shadow: the live model and its shadow; None before `start` and after the end.
        batch: the encoded probes.
        cost: the time spent on the training thread so far.
        budget: the next step to observe, where what it costs has a limit.
        steps: the observed steps.
        first_bytes: instrument -> bytes of its readings at the first observation.
        checks: step -> fidelity, for the steps where it was computed.
        looking: looks at the rollouts of each observation.
    """

    def __init__(
        self, settings: Settings, sinks: Sequence[Sink], ranks: Ranks | None = None
    ) -> None:
        self.settings = settings
        self.ranks = ranks
        self.instruments = list(settings.instruments or ())
        self.writer = Writer(sinks, writing=settings.writing, on_error=settings.on_error)
        self.logs = TrainerLogs()
        self.watch = settings.watch or None
        self.shadow: Shadow | None = None
        self.model: nn.Module | None = None
        self.batch: ProbeBatch | None = None
        self.steps: list[int] = []
        self.first_bytes: Counter[str] = Counter()
        self._monitor, self.cost = FidelityMonitor(), Cost()
        self.checks = self._monitor.checks
        self.extra_bytes = self._first_step = self._gathers = 0
        self._schedule, self._constants = Schedule(), Constants()
        self.budget = Budget(settings.budget, settings.every_n_steps, self.cost)
        self._model_shape: tuple[int, ...] = ()
        self._run = ""
        self._watch_before: tuple[int, dict[str, Tensor]] = (-1, {})
        self.looking = Looking(settings, ranks)

    @property
    def watching(self) -> bool:
        """Whether there is a shadow, and watching has not ended."""
        return self.shadow is not None

    @property
    def next_check(self) -> int | None:
        """The step from which on shadow and model are to be compared again."""
        return self._monitor.next

    @property
    def sinks(self) -> list[Sink]:
        """The sinks that are still used."""
        return self.writer.sinks

    def start(
        self,
        model: nn.Module,
        tokenizer: Any,
        probes: Callable[[Shadow], Sequence[Probe]],
        *,
        step: int,
        baselines_file: Path | None = None,
        run: str = "",
        about: Mapping[str, Any] | None = None,
        training: Callable[[int], list[list[int]]] | None = None,
        logged: Sequence[Mapping[str, Any]] = (),
        earlier: bool = False,
        last: bool = False,
        dataset: Any = None,
    ) -> None:
        """Builds the shadow, encodes the probes, checks fidelity, and makes and writes the first
        observation.

        Starting again on the same model (a search for a batch size) keeps the shadow. If it raises,
        the sinks are closed and the shadow is freed.

        Args:
            baselines_file, run: for a resumed run, a file that `remember` wrote, and the `run` that
                `remember` was given. None for a new run.
            about: what the sinks are told of the run beside its identity; see `Sink`. None: they
                are told nothing.
            training: see `ProbeBatch`.
            logged: what the trainer logs, a list that grows.
            earlier: everything logged up to now belongs to this observation, whatever its step.
            last: there will be no other observation.
            dataset: the training data, which may have preferences to look at.

        Raises:
            ValueError: for a model, probe, instrument or hook point that cannot work.
            FidelityError: if the shadow does not compute what the model does.
            RuntimeError: if the device has no room for the shadow.
        """
        with self._closing_on_error(), self.cost.spending():
            claim(self, self.instruments)
            self.writer.release()  # an observation of the previous try, with its logs
            if about is not None:
                self._run = self._run or baselines.run_of(baselines_file)
                self.writer.begin({"run": self._run, **about})
            if self.shadow is not None and self.model is model:
                self.shadow.sync()
            else:
                self.cost.begin()
                self.shadow = self._shadow_of(model)
                self.model, self._model_shape = model, self.shadow.sizes
                if (look := self.looking.look) is not None:
                    print_lines(look.announced(model))
                    look.meet(model, dataset, self.shadow, self.instruments)
                self.batch = ProbeBatch.encode(
                    probes(self.shadow),
                    tokenizer,
                    vocab_size=self.shadow.vocab_size,
                    context=self.shadow.context,
                    device=self.shadow.device,
                    training=training,
                    placeholders=self.shadow.placeholders,
                )
            assert self.batch is not None
            held = baselines.of([*self.instruments, self.watch, self.looking.look])
            own = baselines.of([self.logs, self._schedule, self.budget])
            for one in [*held.values(), *own.values()]:
                one.clear()
            recalled, self._constants = frozenset(), Constants()
            wanted = bool(held) or has_rare(self.instruments)
            if baselines_file is not None and (wanted or baselines_file.exists()):
                about = baselines.conditions(self.batch, self.shadow.dtype, run)
                given = (about, self.shadow.device, self._constants)
                recalled = baselines.restore(baselines_file, held | own, *given)
            self._schedule.start()
            self.budget.start(step)
            self.logs.start(logged, step=0 if earlier else step)
            self._first_step = step
            self._observe_now(step, check=self._monitor.start, last=last)
            baselines.demand_tensors(held)
            self._constants.begin(baselines.tensors_of(held))
            if not self.looking.awaits:
                self.writer.drain()
            baselines.say_new(held, recalled)
        self.cost.beforehand = self.cost.seconds

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with suppress(Exception):
                self.close()
            if isinstance(error, torch.OutOfMemoryError):
                # Another kind of error: a search for the batch size would blame the batch for it.
                raise RuntimeError(NO_ROOM_FOR_SHADOW) from error
            raise

    def remember(self, path: Path, *, step: int, run: str = "", shares: bool = False) -> None:
        """Writes to a file what the instruments compare later observations with.

        Args:
            step: the step where a resumed run begins. If it was observed already, the resumed run
                observes and writes it again, with its events and all that was logged before it.
            run: identifies this training run up to this step.
            shares: what never changes goes to a file that the checkpoints of the run share.
        """
        if self.batch is None or self.shadow is None:
            return
        with self.cost.spending():
            try:
                about = baselines.conditions(self.batch, self.shadow.dtype, run)
                held = baselines.of([*self.instruments, self.watch, self.looking.look])
                if self.watch is not None and self._watch_before[0] == step:
                    held[self.watch.name] = self._watch_before[1]
                for own in (self.logs, self._schedule, self.budget):
                    own.remember(step)
                    held[own.name] = own.baseline
                shared = self._constants if shares else None
                baselines.write(path, held, about | {baselines.RUN: self._run}, shared)
            except Exception as error:
                if self.settings.on_error == "raise":
                    raise
                warn("tlens: %s could not be written: %s", path, error)

    def after_update(
        self, step: int, *, observe: bool, last: bool, hold: bool = False, check: bool = False
    ) -> None:
        """Checks and observes, if it is time, after the optimizer's step number `step`.

        Args:
            check: check in any case.
            hold: keep the readings until `hand_over`, and add what is logged until then.
        """
        if self.shadow is None or self.model is None or self.batch is None:
            return
        check = check or last or self._monitor.due(step)
        if not (check or observe):
            return
        with self.cost.spending():
            try:
                self.shadow.sync()
                if observe or last:
                    how = self._monitor.check if check else None
                    self._observe_now(step, check=how, last=last, hold=hold)
                    return
                with self.cost.comparison():
                    given = (self.model, self.shadow, self.batch)
                    fidelity = self._monitor.check(*given, step=step)
                if fidelity is not None:
                    self.writer.put(fidelity.readings(), step=step)
            except Exception as error:
                # Inside a collective the processes cannot part without harm.
                if self.settings.on_error == "raise" or (self.ranks and self.ranks.broken):
                    raise
                if self.watch is not None and isinstance(error, FidelityError):
                    self.writer.put(self.watch.breach(error), step=step)
                self._release_shadow()
                warn(
                    "tlens: observing failed (%s: %s). Watching ends here, and training goes on.",
                    type(error).__name__,
                    error,
                    error=None if isinstance(error, FidelityError) else error,
                )

    def exchange(self, load: Callable[[], nn.Module]) -> None:
        """Replaces the model by another of the same shape, freeing the old one before the new one
        is loaded.

        If it raises, there is no model until the next exchange.

        Raises:
            ValueError: if the new model has another shape or vocabulary, or can have no shadow.
        """
        assert self._model_shape
        if self.shadow is not None:
            self.shadow.release()
        self.shadow = self.model = None
        model = load()
        shadow = self._shadow_of(model)
        if shadow.sizes != self._model_shape:
            raise ValueError(
                f"The models have different shapes and cannot be compared head by head: (layers, "
                f"heads, d_model, tokens) are {self._model_shape} and {shadow.sizes}."
            )
        self.model, self.shadow = model, shadow

    def hand_over(self) -> None:
        """Hands over an observation that was kept with `hold`."""
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
            self._release_shadow()

    def _shadow_of(self, model: nn.Module) -> Shadow:
        of = self.settings
        return Shadow(model, device=of.device, dtype=of.dtype, weights=of.weights, ranks=self.ranks)

    def _release_shadow(self) -> None:
        if self.shadow is not None:
            self.extra_bytes = self.shadow.extra_bytes
            self.shadow.release()
        self.looking.end()
        self.shadow = self.model = None
        self._monitor.end()

    def _observe_now(
        self,
        step: int,
        *,
        check: Callable[..., Fidelity | None] | None,
        last: bool,
        hold: bool = False,
    ) -> None:
        """Makes an observation.

        Args:
            check: the monitor's method that compares the shadow with the model, on what the pass of
                the observation left.
        """
        assert self.shadow is not None and self.batch is not None
        found: list[Fidelity | None] = []
        due = self._schedule.due(self.instruments, step=step, last=last)
        first = step == self._first_step

        def compare(ran: Ran | None) -> None:
            assert check is not None
            # What happens before the first step is counted apart.
            with nullcontext() if first else self.cost.comparison():
                found.append(check(self.model, self.shadow, self.batch, step=step, ran=ran))

        def failed(instrument: Instrument, error: Exception) -> None:
            if self.ranks is not None and self.ranks.broken:
                raise error
            # After resuming, an instrument with an `every` may be asked first at a later step.
            new = self._schedule.is_new(instrument)
            optional = new and getattr(instrument, "optional", False)
            unfit = optional and isinstance(error, ValueError)
            # At the start the user can still mend what fails: a hook point that does not exist.
            if not unfit and (self.settings.on_error == "raise" or (first and not optional)):
                error.add_note(f"(raised by the instrument {instrument.name!r})")
                raise error
            self.instruments = [i for i in self.instruments if i is not instrument]
            if unfit:
                print_lines([f"tlens: {instrument.name} is left out: {error}"])
            else:
                report(f"instrument {instrument.name!r}", error)

        readings = observe(
            self.shadow,
            self.batch,
            due,
            on_error=failed,
            check=compare if check else None,
        )
        for fidelity in filter(None, found):
            readings += fidelity.readings()
        readings += self.cost.readings()
        if self.writer.writing == "drop_old":
            readings.append(cost_reading("dropped", self.writer.dropped, "count"))
        if self.ranks is not None and self.ranks.sharded:
            gathers, self._gathers = self.ranks.gathers - self._gathers, self.ranks.gathers
            readings.append(cost_reading("gathers", gathers, "count"))
        strict = self.settings.on_error == "raise" or first
        readings += self._watch_events(readings, step, strict=strict)
        for reading in readings if not self.steps else ():
            self.first_bytes[reading.instrument] += reading.values.nbytes
        if step not in self.steps:
            self.steps.append(step)
        self.budget.observed(step)
        of = self._observed
        assert of is not None
        self.looking.observed(of, step, last=last)
        more = partial(known_later, self.logs, step, self.looking.readings)
        self.writer.hold(readings, step=step, more=more)
        if not (hold or self.looking.awaits):
            self.writer.release()

    def look_before_update(self, args: Any, step: int) -> None:
        """Looks at the rollouts that were sampled with the weights of `step`, and hands over the
        observation that waits for them, or keeps it for `look_after_update`."""
        with self.cost.spending():
            if self._observed is not None:
                self.looking.before_update(self._observed, args, step)
        if not self.looking.awaits:
            self.hand_over()

    def look_after_update(self) -> None:
        """Looks at the same rollouts after the update, and hands over the observation."""
        with self.cost.spending():
            if self._observed is not None:
                self.looking.after_update(self._observed)
        self.hand_over()

    @property
    def _observed(self) -> Observed | None:
        if self.model is None or self.shadow is None or self.batch is None:
            return None
        return Observed(self.model, self.shadow, self.batch, self.instruments)

    def _watch_events(
        self, readings: Sequence[Reading], step: int, *, strict: bool
    ) -> list[Reading]:
        """Returns the watch's readings for an observation, and prints its events."""
        if self.watch is None:
            return []
        self._watch_before = step, dict(self.watch.baseline)
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
