"""Looking at saved models one after another, with the parts that watch a training run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tlens_callback.arguments import Arguments
from tlens_callback.checkpoints import Checkpoint, Loader
from tlens_callback.interfaces import Sink
from tlens_callback.observer import Observer
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow


@dataclass(frozen=True)
class Stage:
    """A checkpoint, and the training step that its readings are put at.

    Attributes:
        name: what a person calls it; None: where it is.
        logged: what the trainer had logged by then.
    """

    step: int
    checkpoint: Checkpoint
    name: str | None = None
    logged: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class CheckpointName:
    """Which checkpoint a step shows.

    Keys:
        checkpoint/name: [], path; the name is its text.
    """

    name: str = "checkpoint"
    now: list[str] = field(default_factory=list)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Any]:
        """Nothing of the pass."""
        return {}

    def read(self, taken: Any, shadow: Shadow, batch: ProbeBatch) -> Iterator[Reading]:
        """The name."""
        yield Reading(
            key=f"{self.name}/name",
            values=np.asarray(0.0),
            unit="path",
            texts=np.asarray(self.now[-1]),
        )


def look_at(
    stages: Iterable[Stage],
    loader: Loader,
    arguments: Arguments,
    sinks: Sequence[Sink],
    *,
    tokenizer: Any = None,
) -> Observer:
    """Observes each stage in turn, as if a training run had come by there, and closes the sinks.

    The first is what later ones are compared with. `arguments.probes` are given.

    Raises:
        ValueError: as `TLensCallback` does at the start, and as `Loader.load`.
        FidelityError: where the shadow is not the model.
    """
    stages = list(stages)
    named = CheckpointName()
    observer = arguments.observer(sinks)
    observer.instruments.append(named)
    logged: list[Mapping[str, Any]] = []
    try:
        for i, stage in enumerate(stages):
            named.now[:] = [stage.name or stage.checkpoint.path]
            logged[:] = stage.logged
            if i == 0:
                model = loader.load(stage.checkpoint)
                observer.start(
                    model,
                    tokenizer,
                    lambda shadow: arguments.completed(arguments.probes or [], shadow),
                    step=stage.step,
                    logged=logged,
                )
                continue
            if loader.fits(stage.checkpoint):
                loader.load(stage.checkpoint)
            else:
                observer.exchange(partial(loader.load, stage.checkpoint))
            observer.after_update(stage.step, observe=True, last=i == len(stages) - 1)
    finally:
        observer.close()
    return observer
