"""Measures the loss of each token, and learning in context on repeated blocks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.parts.baseline import changes, first_value
from tlens_callback.instruments.parts.selection import (
    block_rows,
    checked_selection,
    chosen_rows,
    demand_blocks,
    place,
)
from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow, Stack, Taken, Taps, Unembedded
from tlens_callback.shadow.unembed import demand_equal


@dataclass(frozen=True)
class TokenLoss:
    """Measures the loss of every token of a probe, and its change since the first observation.

    - loss[t] = -ln p(token t | tokens 0..t-1), for t = 1..length-1; the first token has none.
    - change[t] = loss[t] - loss[t] at the first observation of the run; exactly 0 there.
    - mean: the mean of loss[t] over t.

    Nothing is emitted for a probe of one token.

    Args:
        probes: names of the probes. Default: every probe that is not a repeated block.

    Keys:
        token_loss/loss/<probe>: [token], nats, 0..inf; labels: the tokens from the second on
        token_loss/change/<probe>: [token], nats, -inf..inf; with the same labels
        token_loss/mean/<probe>: [], nats, 0..inf

    Reads:
        blocks.{layer}.hook_resid_post of the last layer, unembedded

    Cost:
        length - 1 per probe; unembeds as many positions. Keeps as many numbers from the first
        observation.

    Source:
        Shannon 1951 (the loss of each symbol); Olsson et al. 2022 (followed over training).

    Raises:
        ValueError: an empty or repeated selection; from `taps`, an unknown probe; from `read`, a
            family whose output is not its unembedded final norm.
    """

    description: ClassVar[Description] = Description(
        title="Loss by token",
        group="Answers",
        measures={
            "loss": Meaning(
                title="Loss by token",
                axes=("token",),
                headline=True,
                quantity=Quantity.TOKEN_LOSS,
                better="lower",
            ),
            "change": Meaning(
                title="Change in loss by token", axes=("token",), of_run=True, better="lower"
            ),
            "mean": Meaning(
                title="Loss of a probe",
                axes=(),
                headline=True,
                quantity=Quantity.PROBE_LOSS,
                better="lower",
            ),
        },
    )

    probes: Sequence[str] | None = None
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "token_loss"

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One reduction of the last layer: the losses of all probes, end to end."""
        spans = [(row, 1, batch.lengths[row]) for row in self._rows(batch)]
        return _taps(shadow, batch, spans) if spans else {}

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields for each probe a line of losses, a line of changes, and a number."""
        rows = self._rows(batch)
        if not rows:
            return
        losses = _losses(taken, shadow, type(self).__name__)
        each = losses.split([batch.lengths[row] - 1 for row in rows])
        for row, loss in zip(rows, each, strict=True):
            probe = batch.probes[row].name
            change = loss - first_value(self.baseline, probe, loss)
            for measure, values in (("loss", loss), ("change", change)):
                yield Reading(
                    key=f"{self.name}/{measure}/{probe}",
                    values=values.numpy(),
                    axes=("token",),
                    unit="nats",
                    labels={"token": batch.labels[row][1:]},
                )
            yield Reading(key=f"{self.name}/mean/{probe}", values=loss.mean().numpy(), unit="nats")

    def between(
        self, first: Mapping[str, Reading], last: Mapping[str, Reading]
    ) -> Iterator[Reading]:
        """Yields the change from `first` to `last`."""
        return changes(self.name, first, last, {"change": "loss"})

    def _rows(self, batch: ProbeBatch) -> list[int]:
        rows = chosen_rows(batch, self.probes)
        return [row for row in rows if batch.lengths[row] > 1]


@dataclass(frozen=True)
class RepeatLoss:
    """Measures in-context learning: how much a random block's loss falls at its second occurrence.

    On `[BOS, r_1..r_S, r_1..r_S, ...]`, with S the block length, loss(t) = -ln p(token t | tokens
    before it), and BOS at t = 0:

    - first: mean of loss(t) over t = 2..S, which are r_2..r_S in the first block.
    - second: mean of loss(t) over t = S+2..2S, the same tokens in the second block.
    - difference = second - first: negative if the model makes use of the repetition.

    r_1 is left out of both. In the first block it follows BOS, and in the second it follows r_S,
    after which no token has come so far, so that induction cannot predict it. Blocks after the
    second are not used.

    Each is a mean over the sequences of one block length. A model that copies from a fixed
    distance improves at one length and not at the others, which shows in `max_difference`.

    Keys:
        repeat_loss/first: [block], nats, 0..inf; the labels are the block lengths S, ascending
        repeat_loss/second: [block], nats, 0..inf; with the same labels
        repeat_loss/difference: [block], nats, -inf..inf; with the same labels
        repeat_loss/spread: [block], nats, 0..inf; standard deviation (divisor n) of the difference
            over the sequences of one length
        repeat_loss/mean: [], nats, -inf..inf; mean of the difference over the block lengths
        repeat_loss/max_difference: [], nats, -inf..inf; maximum of the difference over the block
            lengths: that of the length with least in-context learning

    Reads:
        blocks.{layer}.hook_resid_post of the last layer, rows of repeated blocks only, unembedded

    Cost:
        2 * (S-1) per sequence; unembeds as many positions.

    Source:
        Olsson et al. 2022 (in-context learning score, there between the 50th and the 500th token).

    Raises:
        ValueError: from `taps`, if no probe is a repeated block; from `read`, a family whose
            output is not its unembedded final norm.
    """

    description: ClassVar[Description] = Description(
        title="Learning in context",
        group="Answers",
        needs=Needs.BLOCKS,
        measures={
            "first": Meaning(title="Loss of a block, first time", axes=("block",)),
            "second": Meaning(
                title="Loss of a block, second time", axes=("block",), better="lower"
            ),
            "difference": Meaning(
                title="Loss of a block, second time minus first",
                axes=("block",),
                better="lower",
            ),
            "spread": Meaning(
                title="Spread of the difference over sequences of one length", axes=("block",)
            ),
            "mean": Meaning(
                title="Loss of a repeated block, second time minus first",
                axes=(),
                headline=True,
                better="lower",
            ),
            "max_difference": Meaning(
                title="Loss of a repeated block, second time minus first, at the worst length",
                axes=(),
                headline=True,
                quantity=Quantity.REPEAT_GAIN,
                better="lower",
            ),
        },
    )

    name: str = "repeat_loss"

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One reduction of the last layer: both blocks' losses for all sequences, end to end."""
        blocks = demand_blocks(batch, type(self).__name__)
        spans = [
            (row, start + 1, start + block)
            for block, rows in blocks.items()
            for row in rows
            for start in (1, block + 1)
        ]
        return _taps(shadow, batch, spans)

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields lines over the block lengths, and two numbers."""
        blocks = block_rows(batch)
        losses = _losses(taken, shadow, type(self).__name__)
        sizes = [2 * (block - 1) * len(rows) for block, rows in blocks.items()]
        means = [
            part.reshape(len(rows), 2, block - 1).mean(2).numpy()
            for part, (block, rows) in zip(losses.split(sizes), blocks.items(), strict=True)
        ]  # per block length, [sequence, which block]
        gains = [mean[:, 1] - mean[:, 0] for mean in means]
        difference = np.array([gain.mean() for gain in gains])
        for measure, values in (
            ("first", np.array([mean[:, 0].mean() for mean in means])),
            ("second", np.array([mean[:, 1].mean() for mean in means])),
            ("difference", difference),
            ("spread", np.array([gain.std() for gain in gains])),
        ):
            yield Reading(
                key=f"{self.name}/{measure}",
                values=values,
                axes=("block",),
                unit="nats",
                labels={"block": [str(block) for block in blocks]},
            )
        yield Reading(key=f"{self.name}/mean", values=difference.mean(), unit="nats")
        yield Reading(key=f"{self.name}/max_difference", values=difference.max(), unit="nats")


Span = tuple[int, int, int]
"""(row, start, stop): the tokens start..stop-1 of a row."""


def _taps(shadow: Shadow, batch: ProbeBatch, spans: Sequence[Span]) -> Taps:
    """Returns a reduction to the losses of the tokens in `spans`, end to end.

    Only the positions before these tokens are unembedded from the last layer's residual stream, so
    that the logits of all other positions are never computed.
    """
    at = tuple(place(batch, row, pos) for row, *span in spans for pos in range(*span))
    true = batch.once(("true", at), lambda: batch.tokens.flatten()[list(at)])

    def losses(
        logits: Float[Tensor, "row vocab"], lse: Float[Tensor, " row"], part: slice
    ) -> Float[Tensor, " row"]:
        return lse - logits.gather(1, true[part, None])[:, 0]

    before = tuple(one - 1 for one in at)
    stack = Stack("hook_resid_post", (shadow.n_layers - 1,), tokens=before)
    return {stack: Unembedded(losses)}


def _losses(taken: Mapping[Any, Taken], shadow: Shadow, name: str) -> Float[Tensor, " loss"]:
    ((losses, off),) = taken.values()
    demand_equal(off, shadow, name)
    return losses
