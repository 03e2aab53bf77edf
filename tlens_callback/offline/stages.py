"""Looking at saved models one after another, with the parts that watch a training run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn
from tqdm import tqdm

from tlens_callback.checkpoints import Checkpoint, Loader
from tlens_callback.interfaces import Instrument, Sink
from tlens_callback.meaning import Description, Meaning, Needs, described
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.run.observer import Observer
from tlens_callback.run.printing import print_lines
from tlens_callback.run.settings import Settings
from tlens_callback.shadow import Shadow

Logged = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A checkpoint, and the training step that its readings are put at.

    Attributes:
        name: what a person calls it; None: where it is.
        logged: what the trainer had logged by then, or what reads it when its turn comes.
    """

    step: int
    checkpoint: Checkpoint
    name: str | None = None
    logged: Logged | Callable[[], Logged] = ()


_CHECKPOINT = Description(title="Checkpoint", group="Training", others=Meaning(of_run=True))


def name_reading(name: str) -> Reading:
    """`checkpoint/name`, with the name as its text."""
    return Reading(
        key="checkpoint/name",
        values=np.asarray(0.0),
        unit="path",
        texts=np.asarray(name),
        description=_CHECKPOINT,
    )


@dataclass(frozen=True)
class CheckpointName:
    """Which checkpoint a step shows.

    Keys:
        checkpoint/name: [], path; the name is its text.
    """

    description: ClassVar[Description] = _CHECKPOINT

    name: str = "checkpoint"
    now: list[str] = field(default_factory=list)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Any]:
        """Nothing of the pass."""
        return {}

    def read(self, taken: Any, shadow: Shadow, batch: ProbeBatch) -> Iterator[Reading]:
        """The name."""
        yield name_reading(self.now[-1])


def with_what_is_there(instruments: Sequence[Instrument], there: Needs) -> list[Instrument]:
    """The instruments without those optional ones that need something else than is there."""
    return [
        one
        for one in instruments
        if not (described(one).needs & ~there and getattr(one, "optional", False))
    ]


def look_at(
    stages: Sequence[Stage],
    loader: Loader,
    arguments: Settings,
    sinks: Sequence[Sink],
    *,
    tokenizer: Any = None,
    memory: Path | None = None,
    progress: str | None = None,
    leave_out: Callable[[Stage, Exception], None] | None = None,
    seen: Callable[[Observer, Stage], None] | None = None,
) -> Observer:
    """Observes each stage in turn, as if a training run had come by there, and closes the sinks.

    The first is what later ones are compared with, and the shadow is compared with the model at
    each. No two models are in memory at a time. `arguments.prompts` are given.

    Args:
        memory: goes on from a file that `Observer.remember` wrote after an earlier stage.
        progress: names a progress bar over the stages, on a terminal.
        leave_out: is told of a stage that cannot be loaded, and why; the others go on. None raises.
        seen: is told of a stage when all of it is written.

    Raises:
        ValueError: as `TLensCallback` does at the start, and as `Loader.load`.
        FidelityError: where the shadow is not the model.
    """
    named = CheckpointName()
    observer = Observer(arguments, sinks)
    observer.instruments.append(named)
    logged: list[Mapping[str, Any]] = []

    def load(stage: Stage) -> nn.Module | None:
        """The first model; later ones go to the observer at once, so that none is held here."""
        if not observer.steps:
            return loader.load(stage.checkpoint)
        if observer.watching and loader.fits(stage.checkpoint):
            loader.load(stage.checkpoint)
        else:
            observer.exchange(partial(loader.load, stage.checkpoint))

    def look(stage: Stage, last: bool) -> bool:
        """Whether to go on."""
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
        # Where a state was lost, the rows come with the next one.
        logged[:] = rows if len(rows) > len(logged) else logged
        if first is not None:
            observer.start(
                first,
                tokenizer,
                lambda shadow: arguments.completed(arguments.prompts or [], shadow),
                step=stage.step,
                memory=memory,
                logged=logged,
                earlier=True,
                last=last,
            )
        else:
            observer.after_update(stage.step, observe=True, last=last, check=True)
        if seen is not None and observer.watching:
            observer.writer.drain()
            seen(observer, stage)
        return observer.watching

    try:
        bar = tqdm(stages, desc=progress, disable=None if progress else True, leave=False)
        for i, stage in enumerate(bar):
            if not look(stage, i == len(stages) - 1):
                break
    finally:
        observer.close()
    return observer
