"""Defines `Instrument` and `Sink`, the two interfaces that a user may implement."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tlens_callback.reading import Reading

if TYPE_CHECKING:
    from torch import Tensor

    from tlens_callback.probes import ProbeBatch
    from tlens_callback.shadow import Shadow, Taken, Taps


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Numbers of each token that can be read from one activation: features, projections.

    Attributes:
        hook: hook point of the activation, [probe, pos, ...]; its heads are concatenated.
        encode: [token, width], float32 on the shadow's device -> [token, feature], of each token
            by itself.
        names: of the features, each different, without "/".
        shown: indices of those that are of interest whatever they do.
        fixed: whether a feature stays the same one over the run; if not, nothing is said of it over
            several observations.

    Raises:
        ValueError: for names that are given twice, empty or with "/", or `shown` beyond them.
    """

    hook: str
    encode: "Callable[[Tensor], Tensor]"
    names: Sequence[str]
    shown: Sequence[int] = ()
    fixed: bool = True

    def __post_init__(self) -> None:
        texts = all(isinstance(name, str) and name for name in self.names)
        if not self.names or not texts or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"TokenFeatures at {self.hook!r} needs a name for each feature, a text of its own."
            )
        if not all(0 <= i < len(self.names) for i in self.shown):
            raise ValueError(
                f"TokenFeatures at {self.hook!r}: shown={list(self.shown)} has to be indices of "
                f"its {len(self.names)} names."
            )
        if wrong := [name for name in self.names if "/" in name]:
            raise ValueError(f"TokenFeatures at {self.hook!r}: {wrong[0]!r} has a slash in it.")


@runtime_checkable
class Instrument(Protocol):
    """Measures something at every observation, from a forward pass that all instruments share.

    An instrument may also have these attributes:

    - `every: int`: it is asked at every n-th observation, counted from the first of the run, and at
      the last one. This is for instruments that run forward passes of their own.
    - `baseline: dict[str, Tensor]`: what it keeps from earlier observations to compare with, by any
      names. It is emptied when a run starts, saved with every checkpoint, and restored on the
      shadow's device when a run is resumed from one.
    - `optional: bool`: if it is true and the instrument raises `ValueError` at the first
      observation, because the model has nothing for it to measure, it is left out and a printed
      line says why. If it is false, the error stops the training before it begins. The instruments
      of `fast()` are optional.
    - `description: Description`, on the class: what its readings mean, for everything that shows or
      compares them; see `tlens_callback.meaning`.
    - `between(first, last) -> Iterable[Reading]`: computes those of its readings that compare with
      the first observation of a run. `first` and `last` are key -> reading of any two observations;
      `first` takes the place of the first observation. It is used to compare two runs.
    - `token_features(shadow) -> Iterable[TokenFeatures]`: what can be read at any token. Where
      rollouts are looked at, these features are read at the sampled tokens, too. It is asked before
      the first observation, too, and may return nothing then.
    """

    @property
    def name(self) -> str:
        """The first segment of all its keys."""
        ...

    def taps(self, shadow: "Shadow", batch: "ProbeBatch") -> "Taps":
        """Returns the hook points that the instrument needs, each with its reduction.

        It is called at each observation, before the forward pass. Besides TransformerLens's names
        (`blocks.0.attn.hook_pattern`) there are two names for the model's output: `logits`,
        [probe, pos, vocab], and `last_logits`, [probe, vocab] at each probe's last token. In place
        of a name there may be a `Stack`: one hook point of several layers, which are reduced
        together; its `Unembedded` reads the logits that its residual streams would give.
        An instrument that reads only weights returns an empty mapping. An activation without a
        probe axis (router outputs) arrives in the shape that the model gives it.
        """
        ...

    def read(
        self, taken: "Mapping[Any, Taken]", shadow: "Shadow", batch: "ProbeBatch"
    ) -> Iterable[Reading]:
        """Turns what the reductions returned into readings; `taken` has the names and the order of
        `taps`."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Writes the readings of each observation somewhere.

    Its methods are called one at a time from one thread. With `writing="inline"` that is the
    training thread, else a thread of its own. A call has a copy of the training thread's
    contextvars context, so what it sets there is gone at the next call. If a call takes more than a
    minute while others wait, the sink is given up.

    A sink may have two more methods:

    - `begin(about: Mapping[str, Any])`: called on the training thread before the first observation
      of a training is written, with what is known of the run. `about["run"]` identifies it: a text
      that stays the same where the run is resumed from a checkpoint. `about["trial"]`, in a
      hyperparameter search only, has the trial's name and parameters.
    - `before_finish(wait: Callable[[], None])`: called on the training thread, before anything is
      written. The sink keeps `wait` and calls it when somebody else is about to finish the run that
      it logs to; `wait` returns once everything up to then is written. `wait` may be called from
      any thread at any time; on the thread of the sinks it does nothing, and it never raises.
    """

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Writes one observation; `step` is the trainer's global step."""
        ...

    def close(self) -> None:
        """Ends the writing: called at the end of training. It may be called twice, and `write` may
        follow it."""
        ...
