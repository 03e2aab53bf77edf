"""Measures the size of the residual stream after each layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.parts.baseline import first_value
from tlens_callback.instruments.parts.selection import plain_rows, tokens_after_first
from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow, Stack, Taken, Taps


@dataclass(frozen=True)
class ResidualNorms:
    """Measures the Euclidean norm of a typical token's residual stream after each layer.

    It uses all tokens of all probes that are not repeated blocks, except the first token of each
    probe, which is often an attention sink with a norm a hundred times that of the others:

    - median, spread: the median and the interquartile range (third quartile minus first) of
      |resid_post|; quantiles are interpolated linearly.
    - ratio: the median divided by that at the first observation of the run; exactly 1 there.

    Nothing is emitted if no such probe has a second token.

    Keys:
        residual_norms/median: [layer], activation, 0..inf
        residual_norms/spread: [layer], activation, 0..inf
        residual_norms/ratio: [layer], ratio, 0..inf

    Reads:
        blocks.{layer}.hook_resid_post, rows of plain probes only

    Cost:
        layers * 3. Keeps one number per layer from the first observation.

    Source:
        Heimersheim & Turner 2023 (norms grow exponentially over the layers); Sun et al. 2024
        (massive activations on the first token).
    """

    description: ClassVar[Description] = Description(
        title="Size of the residual stream",
        group="Changes",
        measures={
            "median": Meaning(title="Size of the residual stream", axes=("layer",)),
            "spread": Meaning(
                title="Spread of the residual stream's size over tokens", axes=("layer",)
            ),
            "ratio": Meaning(
                title="Size of the residual stream, relative to the start",
                axes=("layer",),
                of_run=True,
            ),
        },
    )

    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "residual_norms"

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One reduction of all layers: the three quartiles of each."""
        tokens = tokens_after_first(batch, plain_rows(batch))
        if not tokens:
            return {}
        at = batch.once(
            "quartiles",
            lambda: torch.tensor([0.25, 0.5, 0.75], dtype=torch.float32, device=batch.mask.device),
        )

        def quartiles(
            resid: Float[Tensor, "layer token d_model"], part: slice
        ) -> Float[Tensor, "layer 3"]:
            norms = torch.linalg.vector_norm(resid, dim=2, dtype=torch.float32)
            return norms.quantile(at, dim=1).T

        layers = tuple(range(shadow.n_layers))
        return {Stack("hook_resid_post", layers, tokens=tokens): quartiles}

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields three lines over the layers."""
        if not taken:
            return
        quartiles: Any
        (quartiles,) = taken.values()
        lower, median, upper = quartiles.unbind(1)
        for measure, values, unit in (
            ("median", median, "activation"),
            ("spread", upper - lower, "activation"),
            ("ratio", median / first_value(self.baseline, "median", median), "ratio"),
        ):
            yield Reading(
                key=f"{self.name}/{measure}", values=values.numpy(), axes=("layer",), unit=unit
            )

    def between(
        self, first: Mapping[str, Reading], last: Mapping[str, Reading]
    ) -> Iterator[Reading]:
        """Yields the ratio of `last` to `first`."""
        median, ratio = f"{self.name}/median", f"{self.name}/ratio"
        if median in first and median in last and ratio in last:
            values = last[median].values / first[median].values
            yield replace(last[ratio], values=values)
