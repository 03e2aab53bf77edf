"""`Seen`: what was seen of some rollouts, in their order."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.selection import layer_labels
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.rollouts.features import Features
from tlens_callback.rollouts.inside import Part
from tlens_callback.rollouts.meanings import CURVES, LAYER_UNITS, ROLLOUT_MEASURES, TOKEN_MEASURES
from tlens_callback.rollouts.rollout import Rollout
from tlens_callback.shadow import Shadow

NAME = "rollouts"
"""First segment of the keys."""


@dataclass(eq=False)
class Seen:
    """What was seen of some rollouts.

    Attributes:
        rollouts: in the order in which they are shown.
        sizes: [rollout], how many tokens of each completion were looked at.
        tokens: measure -> [token], those of all rollouts in turn.
        order: [token], where each token of the passes, in their order, is among those.
        inside: measure -> [rollout, ...], of heads, MLPs, neurons and features.
        attention: number of a rollout -> [layer, head, key].
        features: those of instruments; None: there are none.
        moved: "gained", "lost" -> ids of the tokens of some positions, and by how much.
        dead, truncated: shares of all groups and of all rollouts of the generation; None: nothing
            was sampled.
        age: updates since they were sampled; None: not known.
        names: of the reward functions.
    """

    rollouts: Sequence[Rollout]
    sizes: list[int]
    tokens: dict[str, Float[Tensor, " token"]]
    order: Int[Tensor, " token"]
    inside: dict[str, Tensor]
    attention: dict[int, Tensor] = field(default_factory=dict)
    features: Features | None = None
    moved: dict[str, tuple[Tensor, Tensor]] | None = None
    dead: float | None = None
    truncated: float | None = None
    age: int | None = None
    names: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Rollout],
        parts: Sequence[Part],
        tokens: Mapping[str, Tensor],
        inside: Sequence[Mapping[str, Tensor]],
    ) -> "Seen":
        """Puts what the parts gave into the order of the rollouts."""
        which = [i for part in parts for i in part.which]
        sizes_of = dict(zip(which, [n for part in parts for n in part.sizes], strict=True))
        sizes = [sizes_of[i] for i in range(len(rollouts))]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        order = torch.from_numpy(
            np.concatenate([np.arange(starts[i], starts[i + 1]) for i in which])
        )
        back = order.argsort()
        rows = torch.tensor(which).argsort()
        return cls(
            rollouts,
            sizes,
            {name: value[back] for name, value in tokens.items()},
            order,
            {name: torch.cat([one[name] for one in inside])[rows] for name in inside[0]},
        )

    @property
    def back(self) -> Int[Tensor, " token"]:
        """[token], where each token is in the order of the passes."""
        return self.order.argsort()

    @property
    def advantage(self) -> Float[Tensor, " rollout"]:
        """The advantage of each rollout."""
        return torch.tensor([one.advantage for one in self.rollouts], dtype=torch.float32)

    def sums(self, measure: str) -> Float[Tensor, " rollout"]:
        """Sums a measure over the tokens of each rollout."""
        return torch.stack([one.sum() for one in self.tokens[measure].split(self.sizes)])

    def means(self, measure: str) -> Float[Tensor, " rollout"]:
        """The mean of a measure over the tokens of each rollout."""
        return self.sums(measure) / torch.tensor(self.sizes)

    def of_tokens(self) -> Iterator[Reading]:
        """Yields the measures of each token."""
        for name, (_, unit) in TOKEN_MEASURES.items():
            if name in self.tokens:
                limits = {"js": (0.0, math.log(2)), "trained": (0.0, 1.0)}.get(name)
                yield self.row_reading(name, self.tokens[name].numpy(), unit, limits)

    def of_rollouts(self, measures: Mapping[str, Tensor]) -> Iterator[Reading]:
        """Yields measures of each rollout."""
        for name, values in measures.items():
            unit = ROLLOUT_MEASURES[name.split("/")[0]][1]
            limits = (0.0, 1.0) if name == "truncated" else None
            labels = {"rollout": self.labels}
            yield reading(name, values.numpy(), ("rollout",), unit, labels, limits)

    def curve(self, name: str, value: float | Tensor) -> Reading:
        """The reading of one number of the observation."""
        return reading(name, np.array(float(value)), (), CURVES[name][1])

    @property
    def labels(self) -> list[str]:
        """Names of the rollouts."""
        return [one.name for one in self.rollouts]

    def row_reading(
        self,
        name: str,
        values: np.ndarray,
        unit: str,
        limits: tuple[float, float] | None = None,
        texts: Sequence[str] | None = None,
    ) -> Reading:
        """A reading of [rollout, pos]: NaN and no text where a rollout has no token."""
        rows = np.full((len(self.sizes), max(self.sizes)), np.nan, np.float32)
        real = np.arange(rows.shape[1]) < np.array(self.sizes)[:, None]
        rows[real] = values
        words = None
        if texts is not None:
            words = np.full(rows.shape, "", np.asarray(texts).dtype)
            words[real] = texts
        return reading(
            name, rows, ("rollout", "pos"), unit, {"rollout": self.labels}, limits, words
        )

    def written(self, batch: ProbeBatch) -> Iterator[Reading]:
        """Yields the tokens of completions and prompts, as ids and texts."""
        ids = [
            i for one, n in zip(self.rollouts, self.sizes, strict=True) for i in one.completion[:n]
        ]
        name = {i: batch.token_text(i) for i in {*ids}}
        yield self.row_reading("token", np.array(ids), "index", None, [name[i] for i in ids])
        groups = list(dict.fromkeys((one.group, one.prompt) for one in self.rollouts))
        width = max(len(prompt) for _, prompt in groups)
        rows = np.full((len(groups), width), np.nan, np.float32)
        words = np.full(rows.shape, "", object)
        for row, (_, prompt) in enumerate(groups):
            rows[row, : len(prompt)] = prompt
            words[row, : len(prompt)] = [batch.token_text(i) for i in prompt]
        labels = {"group": [str(group + 1) for group, _ in groups]}
        yield reading(
            "prompt", rows, ("group", "pos"), "index", labels, None, words.astype(np.str_)
        )


def layers_of(name: str, shadow: Shadow) -> dict[str, list[str]]:
    """Labels of the layers that have this measure, if not all have."""
    whole = name in ("direct", *LAYER_UNITS)
    layers = range(shadow.n_layers) if whole else shadow.attention_layers
    return dict(layer_labels(list(layers), shadow))


def reading(
    name: str,
    values: np.ndarray,
    axes: tuple[str, ...],
    unit: str,
    labels: Mapping[str, Sequence[str]] | None = None,
    limits: tuple[float, float] | None = None,
    texts: np.ndarray | None = None,
) -> Reading:
    """A reading of rollouts."""
    return Reading(
        key=f"{NAME}/{name}",
        values=values,
        axes=axes,
        unit=unit,
        labels=labels or {},
        limits=limits,
        texts=texts,
    )
