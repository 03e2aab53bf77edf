"""The two things a user may write: an `Instrument` and a `Sink`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tlens_callback.reading import Reading

if TYPE_CHECKING:
    from tlens_callback.probes import ProbeBatch
    from tlens_callback.shadow import Reduce, Shadow, Taken


@runtime_checkable
class Instrument(Protocol):
    """Measures something at every observation, from a forward pass that all instruments share.

    It may have more attributes:

    - `every: int`: it is asked at every n-th observation, counted from the first of the
      run, and at the last one. For what takes forward passes of its own.
    - `baseline: dict[str, Tensor]`: what it keeps from earlier observations to compare with, by any
      names. It is emptied when a run starts, saved with every checkpoint and back when a run is
      resumed from one, on the shadow's device.
    - `optional: bool`: where the first observation has nothing for it to measure (it raises
      `ValueError`), it is left out with a line that says why. Without it, that ends the training
      before it begins. Those of `fast()` are optional.
    - `description: Description`, of the class: what it says about itself and its readings, for
      whoever shows or compares them; see `tlens_callback.meaning`.
    - `between(first, last) -> Iterable[Reading]`: its readings that compare with the first
      observation of a run, made anew from the readings of any two observations, by key. `first` is
      taken for the first observation. For comparing two runs.
    """

    @property
    def name(self) -> str:
        """First segment of every key it emits."""
        ...

    def taps(self, shadow: "Shadow", batch: "ProbeBatch") -> "Mapping[str, Reduce]":
        """The hook points to listen to, each with its reduction.

        Called anew at each observation, before the forward pass. Besides TransformerLens's names
        (`blocks.0.attn.hook_pattern`) there are two for the model's output: `logits`,
        [probe, pos, vocab], and `last_logits`, [probe, vocab] at each probe's last token.
        An instrument of weights alone returns an empty mapping. An activation that the hook
        point gives without a probe axis (router outputs) arrives as the model has it.
        """
        ...

    def read(
        self, taken: "Mapping[str, Taken]", shadow: "Shadow", batch: "ProbeBatch"
    ) -> Iterable[Reading]:
        """Turns what the reductions returned, under the names of `taps` and in their order,
        into readings."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Takes the readings of each observation somewhere.

    Its methods are called one at a time from one thread, which is not the training's unless
    `writing="inline"`, in the contextvars context that the training thread had; what a call sets
    there is gone at the next. A call of more than a minute, when others wait, is the last.

    It may have one more method:

    - `before_finish(wait: Callable[[], None])`: called on the training thread, before anything is
      written. `wait` returns once everything that was handed over is written; it is to be called
      when somebody else is about to finish the run that this sink logs to. It may be called from
      any thread and at any time, does nothing on the thread of the sinks, and raises nothing.
    """

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Stores or shows one observation; `step` is the trainer's global step."""
        ...

    def close(self) -> None:
        """Called at the end of training; may be called twice, and `write` may follow it."""
        ...
