"""`Watcher`: what the callback and the tracer have in common."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainingArguments

from tlens_callback.interfaces import Sink
from tlens_callback.probes import Probe
from tlens_callback.probes.builtin import first_rows
from tlens_callback.run.guard import guarded
from tlens_callback.run.observer import Observer
from tlens_callback.run.printing import print_lines, report, warn
from tlens_callback.run.settings import Settings
from tlens_callback.run.terminal import opening
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.ranks import Ranks, has_other_processes, is_first_process
from tlens_callback.sinks.default import active_wandb, outgoing_lines


class Watcher:
    """Has an observer while it watches a run, and chooses the sinks and probes of the run.

    Attributes:
        settings: what is watched and how.
        sinks: where the readings go, including sinks that failed and were set aside.
        observer: None where nothing is watched, as in all processes but the first.
        ranks: the processes of the run; None if this one is alone, or observes alone.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sinks: list[Sink] = settings.sinks_with(list)
        self.observer: Observer | None = None
        self.ranks: Ranks | None = None
        self._joins_wandb = False

    def _new_observer(self, default: Callable[[], Sequence[Sink]]) -> Observer:
        """Makes the observer of a run; `default` gives the default sinks, where they are wanted."""
        self.sinks = self.settings.sinks_with(default)
        self._joins_wandb = self.settings.has_default_sinks
        self.observer = Observer(self.settings, self.sinks, self.ranks)
        return self.observer

    def _meet(self, model: nn.Module, step: int, **more: object) -> None:
        """Begins a run of several processes at this step; every one calls it.

        Args:
            more: what else has to be the same in all of them, so that they come together.
        """
        self.ranks = self.ranks or Ranks.meet(model, self.settings.name)
        if self.ranks is not None:
            self.ranks.begin(model, step)
            self.ranks.demand_alike({"every_n_steps": self.settings.every_n_steps, **more})
        elif is_first_process() and has_other_processes():
            print_lines(
                [
                    "tlens: only rank 0 watches. The others do not know when it observes: their "
                    "collectives wait for it meanwhile, and may time out. Give all of them the "
                    "callback or tracer."
                ]
            )

    def _begin(self, start: Callable[[], None], *, first: bool) -> None:
        """Rank 0, where `first` is true, starts to watch, and the other processes help it."""
        if first:
            with self._leading(fatal=True):
                start()
        elif self.ranks is not None:
            self.ranks.serve()

    def _part(self) -> None:
        """Ends it; every process calls it."""
        ranks, self.ranks = self.ranks, None
        if ranks is not None:
            ranks.close()

    @contextmanager
    def _leading(self, *, fatal: bool) -> Iterator[None]:
        """In rank 0: the other processes help inside the `with` block, if there are any."""
        if self.ranks is None:
            yield
            self._decide()
            return
        with self.ranks.leading(fatal=fatal):
            yield
            self._decide()
            self.ranks.watching = self.observer is not None and self.observer.watching
            self.ranks.next_check = self.observer.next_check if self.observer else None
            self.ranks.next_step = self.observer.budget.next if self.observer else 0

    def _decide(self) -> None:
        if self.observer is not None:
            self.observer.budget.decide()

    def _is_time(self, step: int) -> bool:
        """Whether this step is observed even if it is not the last; the answer of all processes is
        the same."""
        if self.ranks is not None:
            after = self.ranks.next_step
        else:
            after = self.observer.budget.next if self.observer is not None else 0
        return step % self.settings.every_n_steps == 0 and step >= after

    def _after_update(
        self, step: int, *, observe: bool, last: bool = False, hold: bool = False
    ) -> None:
        """Observes, if it is time, after a step of the optimizer; every process calls it.

        Args:
            last, hold: see `Observer.after_update`.
        """
        if self.ranks is not None:
            if not self.ranks.due(step, observe=observe, last=last):
                return
            if observe or last:
                self.ranks.steps.add(step)
        self._together(lambda of: of.after_update(step, observe=observe, last=last, hold=hold))

    def _together(self, act: Callable[[Observer], None]) -> None:
        """The observer of rank 0 acts, and the other processes help; every process calls it."""
        if self.ranks is not None and not self.ranks.first:
            self.ranks.serve()
            return
        with self._leading(fatal=self.settings.on_error == "raise"):
            if self.observer is not None:
                act(self.observer)

    def _lacks(self, step: int) -> bool:
        """Whether this run is watched and this step was not observed."""
        if self.ranks is not None:
            return self.ranks.watching and step not in self.ranks.steps
        return self.observer is not None and step not in self.observer.steps

    def _join_wandb(self) -> None:
        """Adds the active W&B run to the default sinks."""
        if not self._joins_wandb or self.observer is None:
            return
        if (sink := active_wandb(self.sinks, self.settings.name)) is not None:
            self.sinks.append(sink)
            self.observer.writer.add(sink)

    def _join_later_wandb(self) -> None:
        """Does the same for a W&B run that began after the watching; if that fails, the other sinks
        go on."""
        try:
            self._join_wandb()
        except Exception as error:
            if self.settings.on_error == "raise":
                raise
            self._joins_wandb = False
            report("the active W&B run", error)

    def _probes_for(self, shadow: Shadow, data: Any, tokenizer: Any, *, none: str) -> list[Probe]:
        """Returns the probes that were given, or else the first rows of the training data.

        Args:
            none: a warning for where there are neither.
        """
        given = self.settings.prompts
        if given is None:
            rows = first_rows(data, tokenizer, context=shadow.context)
            given = [row for row in rows if shadow.placeholders.isdisjoint(row.content)]
            if not given:
                warn(none)
        return self.settings.completed(given, shadow)

    @guarded
    def _greet(self, args: TrainingArguments | None = None) -> None:
        """Prints the lines with which a run begins; `args` are the trainer's, if there is one."""
        observer = self.observer
        assert observer is not None and observer.batch is not None
        rows = observer.batch.n_plain if self.settings.prompts is None else 0
        texts = observer.looking.look is not None and observer.looking.look.settings.texts
        outgoing = outgoing_lines(observer.sinks, rows=rows, args=args, rollouts=texts)
        print_lines([*opening(observer), *outgoing])
