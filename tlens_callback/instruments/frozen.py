"""Checks whether frozen weights have changed."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.meaning import Description, Meaning, Needs
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken
from tlens_callback.shadow.sources import Weight

_STEP = -7046029254386353131
"""The odd number nearest to 2^64 divided by the golden ratio, as a signed number."""

_ALARM = (
    "frozen weights of the base model have changed since the start: something writes to weights "
    "that should not be trained"
)

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class FrozenWeights:
    """Counts the frozen weights whose bits have changed since the first observation.

    Frozen are the live model's own parameters with requires_grad False: the base weights under
    adapters, but not the adapters themselves. A checksum of each weight's bits is compared with
    that at the first observation at which the weight was frozen. Let x[r, c] be the bits of an
    entry of a weight's matrix (leading dimensions flattened) as a signed integer, g the odd number
    nearest to 2^64 divided by the golden ratio, and m_i = 1 + 2 i g mod 2^64. The checksum is the
    two numbers

        sum_r m_r (sum_c x[r, c]),  sum_c m_c (sum_r x[r, c])  mod 2^64.

    One changed entry always changes the first number, since m_r is odd. Two exchanged entries of up
    to 32 bits change the first number or, within a row, the second. A change that keeps the sum of
    every row and of every column is not seen; any other change is missed with a chance of about
    2^-64. NaN and -0 are compared by their bits like other numbers.

    Layers may be trained in turns (LISA, gradual unfreezing), also between two observations. Once
    a weight that was frozen has been seen to be trained, the weights of the same name in all layers
    are no longer watched.

    Training that merges and unmerges adapters (vLLM during GRPO) changes the base weights by
    rounding, which is counted here. While adapters are merged into base weights, these count as
    changed.

    Args:
        every: measure at every n-th observation.

    Keys:
        frozen_weights/changed: [], count, 0..watched
        frozen_weights/watched: [], count, 0..number of parameters
        frozen_weights/first_changed: [rank], index, -1..number of parameters - 1; the first five
            of the changed weights, in the order of the modules, -1 where there are fewer; the
            texts are their names

    Reads:
        The live model's parameters; no activations.

    Cost:
        Every frozen weight is read twice; 2 integers for each leave the device.

    Source:
        This project.

    Raises:
        ValueError: every < 1.
    """

    description: ClassVar[Description] = Description(
        title="Frozen weights",
        group="Weights",
        needs=Needs.EARLIER | Needs.TRAINING,
        measures={
            "changed": Meaning(
                title="Frozen weights that have changed",
                axes=(),
                headline=True,
                of_run=True,
                better="lower",
                alarm=_ALARM,
            ),
            "watched": Meaning(title="Number of frozen weights watched", axes=(), of_run=True),
            "first_changed": Meaning(
                title="Frozen weights that have changed", axes=("rank",), of_run=True
            ),
        },
    )

    every: int = 10
    name: str = "frozen_weights"
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        demand_numbers(self, every=1)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Returns no reductions: this instrument reads weights alone."""
        return {}

    @torch.no_grad()
    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields two counts, and the names of the first changed weights."""
        weights = shadow.mirror.weights()
        # Adapters may separate tied weights, which are one parameter of the live model.
        first_at: dict[int, int] = {}
        for i, weight in enumerate(weights):
            first_at.setdefault(id(weight.live), i)
        names = self._always_frozen([weights[i] for i in first_at.values()])
        frozen = [i for i in first_at.values() if weights[i].name in names]
        changed = []
        if frozen:
            here = shadow.device  # The live model may be spread over several devices.
            sums = torch.stack([checksum(weights[i].live.detach()).to(here) for i in frozen])
            for i, now in zip(frozen, sums, strict=True):
                self.baseline.setdefault(weights[i].name, now)
            first = torch.stack([self.baseline[weights[i].name] for i in frozen])
            differ = (sums.to(first.device) != first).any(1).tolist()
            changed = [i for i, other in zip(frozen, differ, strict=True) if other]
        shown = [*changed[:5], *[-1] * (5 - len(changed))]
        yield self._count("changed", len(changed))
        yield self._count("watched", len(frozen))
        yield Reading(
            key=f"{self.name}/first_changed",
            values=np.array(shown),
            axes=("rank",),
            unit="index",
            texts=np.array(["" if i < 0 else weights[i].name for i in shown]),
        )

    def _always_frozen(self, weights: Sequence[Weight]) -> set[str]:
        """Returns the names of the weights that are frozen and not among those trained in turns."""
        in_turns = "trained in turns: "
        for weight in weights:
            if weight.live.requires_grad and weight.name in self.baseline:
                self.baseline[in_turns + _in_all_layers(weight.name)] = torch.tensor(True)
        return {
            weight.name
            for weight in weights
            if not weight.live.requires_grad
            and in_turns + _in_all_layers(weight.name) not in self.baseline
        }

    def _count(self, measure: str, number: int) -> Reading:
        return Reading(key=f"{self.name}/{measure}", values=np.array(number), unit="count")


def _in_all_layers(name: str) -> str:
    """Returns the name that this weight has in every layer."""
    return re.sub(r"\d+", "*", name)


def checksum(weight: Float[Tensor, "..."]) -> Int[Tensor, "2"]:
    """Returns two numbers that depend on every bit of the weight and on the bit's place."""
    bits = weight.contiguous().view(_BITS[weight.element_size()])
    bits = bits.reshape(-1, bits.shape[-1]) if bits.ndim else bits.reshape(1, 1)
    columns = torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
    rows = []
    # In pieces, because a sum in int64 first copies everything to int64.
    for piece in bits.split(max(1, 2**20 // bits.shape[1])):
        rows.append(piece.sum(1, dtype=torch.int64))
        columns += piece.sum(0, dtype=torch.int64)
    return torch.stack([_hash(torch.cat(rows)), _hash(columns)])


def _hash(x: Int[Tensor, " n"]) -> Int[Tensor, ""]:
    """Returns sum_i (1 + 2 i g) x_i; integers wrap around."""
    at = torch.arange(len(x), device=x.device)
    return (x * (1 + at * _STEP * 2)).sum()
