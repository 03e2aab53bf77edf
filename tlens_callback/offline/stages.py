"""Observes saved models one after another, with the parts that watch a training run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from tlens_callback.checkpoints import Checkpoint, Loader
from tlens_callback.interfaces import Instrument, Sink
from tlens_callback.meaning import Description, Meaning, Needs, described
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.run.observer import Observer
from tlens_callback.run.printing import print_lines
from tlens_callback.run.settings import Settings
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.bar import with_bar

Logged = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A checkpoint, and the training step at which its readings are written.

    Attributes:
        name: the name that a person knows it by; None: its path.
        logged: what the trainer had logged by then, or a function that reads it when it is needed.
    """

    step: int
    checkpoint: Checkpoint
    name: str | None = None
    logged: Logged | Callable[[], Logged] = ()


_CHECKPOINT = Description(title="Checkpoint", group="Training", others=Meaning(of_run=True))


def name_reading(name: str) -> Reading:
    """The reading `checkpoint/name`, with the name as its text."""
    return Reading(
        key="checkpoint/name",
        values=np.asarray(0.0),
        unit="path",
        texts=np.asarray(name),
        description=_CHECKPOINT,
    )


@dataclass(frozen=True)
class CheckpointName:
    """An instrument that reads the name of the observed checkpoint.

    Keys:
        checkpoint/name: [], path; the name is its text.
    """

    description: ClassVar[Description] = _CHECKPOINT

    name: str = "checkpoint"
    now: list[str] = field(default_factory=list)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Any]:
        """Returns no hook points: the name needs nothing from the forward pass."""
        return {}

    def read(self, taken: Any, shadow: Shadow, batch: ProbeBatch) -> Iterator[Reading]:
        """Yields the name of the current checkpoint."""
        yield name_reading(self.now[-1])


def without_unmet_needs(instruments: Sequence[Instrument], available: Needs) -> list[Instrument]:
    """Leaves out each optional instrument that needs something that is not available."""
    return [
        one
        for one in instruments
        if not (described(one).needs & ~available and getattr(one, "optional", False))
    ]


def observe_stages(
    stages: Sequence[Stage],
    loader: Loader,
    arguments: Settings,
    sinks: Sequence[Sink],
    *,
    tokenizer: Any = None,
    baselines_file: Path | None = None,
    progress: str | None = None,
    leave_out: Callable[[Stage, Exception], None] | None = None,
    written: Callable[[Observer, Stage], None] | None = None,
) -> Observer:
    """Observes each stage in turn, as the steps of one training run, and closes the sinks.

    Later stages are compared with the first one, and the shadow is compared with the model at each
    stage. Only one model is in memory at a time. The probes are `arguments.prompts`.

    Args:
        baselines_file: a file that `Observer.remember` wrote after an earlier stage, to
            continue from.
        progress: name of a progress bar over the stages, which is shown on a terminal.
        leave_out: called with a stage that cannot be loaded, and the error; the other stages are
            still observed. None: the error is raised.
        written: called with a stage when all its readings are written.

    Raises:
        ValueError: as `TLensCallback` raises it at the start, and as `Loader.load`.
        FidelityError: if the shadow does not compute what the model computes.
    """
    named = CheckpointName()
    observer = Observer(arguments, sinks)
    observer.instruments.append(named)
    logged: list[Mapping[str, Any]] = []

    def load(stage: Stage) -> nn.Module | None:
        """Returns the first model; hands later ones to the observer, so that none is held here."""
        if not observer.steps:
            return loader.load(stage.checkpoint)
        if observer.watching and loader.fits(stage.checkpoint):
            loader.load(stage.checkpoint)
        else:
            observer.exchange(partial(loader.load, stage.checkpoint))

    def observe_stage(stage: Stage, last: bool) -> bool:
        """Observes a stage, and returns whether the observer is still watching."""
        named.now[:] = [stage.name or stage.checkpoint.path]
        many = f" ({stages.index(stage) + 1} of {len(stages)})" if len(stages) > 1 else ""
        print_lines([f"tlens: loading {named.now[0]}{many}"])
        try:
            rows = stage.logged if isinstance(stage.logged, Sequence) else stage.logged()
            first = load(stage)
        except (ValueError, OSError) as error:
            if leave_out is None:
                raise
            leave_out(stage, error)
            return True
        # A checkpoint without a trainer's state has no rows; the next one has them all.
        logged[:] = rows if len(rows) > len(logged) else logged
        if first is not None:
            observer.start(
                first,
                tokenizer,
                lambda shadow: arguments.completed(arguments.prompts or [], shadow),
                step=stage.step,
                baselines_file=baselines_file,
                logged=logged,
                earlier=True,
                last=last,
            )
        else:
            observer.after_update(stage.step, observe=True, last=last, check=True)
        if written is not None and observer.watching:
            observer.writer.drain()
            written(observer, stage)
        return observer.watching

    try:
        bar = with_bar(stages, desc=progress, disable=None if progress else True, leave=False)
        for i, stage in enumerate(bar):
            if not observe_stage(stage, i == len(stages) - 1):
                break
    finally:
        observer.close()
    return observer
