"""Measures how far activations have moved since the first observation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.parts.baseline import (
    FirstLayers,
    probes_suffix,
    rows_to_compare,
)
from tlens_callback.instruments.parts.distance import cka_distance, distances, unit_gram
from tlens_callback.instruments.parts.selection import checked_selection, tokens_after_first
from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow, Stack, Taken, Taps

PARTS = {"resid": "hook_resid_post", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
"""Name of a part of a layer -> how the name of its hook point ends."""

TOKENS, CKA_TOKENS = 256, 64
"""At most this many tokens are compared, whose first activations are kept, and by CKA, the cost of
which grows with their square. Of more tokens, evenly spaced ones are taken."""


@dataclass(frozen=True)
class ActivationDrift:
    """Measures how far each layer's activations have moved since the first observation, by part.

    Let h be a token's activation now and h0 that of the same token at the first observation. All
    tokens of the chosen probes count except the first of each, which often has massive
    activations:

    - cosine: mean over the tokens of 1 - h . h0 / (|h| |h0|). Computed as half the squared
      distance of the normalised vectors, which is exactly 0 for equal vectors and loses no digits
      for nearly equal ones. A zero vector is at distance 1/2 from any other.
    - relative: mean over the tokens of |h - h0| / |h0|.
    - cka: 1 - CKA(H, H0) of the two [token, d_model] matrices, linear and centred, by the unbiased
      estimator of HSIC: with n tokens, G the Gram matrix H H^T with 0 on its diagonal, r its row
      sums, s its sum, and u[i, j] = G[i, j] - (r[i] + r[j]) / (n-2) + s / ((n-1)(n-2)) off the
      diagonal, CKA = sum(u * u0) / (|u| |u0|). Computed as half the squared distance of u / |u| and
      u0 / |u0|. Blind to rotations, to shifts and to one common scale of all tokens; about 1 for
      unrelated activations. The biased estimator would hide drift where there are few tokens:
      with fewer tokens than d_model, its CKA is near 1 for unrelated activations too. If there are
      more than 64 tokens, 64 evenly spaced ones are used. If all tokens have the same activation
      (one token repeated, in a model without learned positions), only rounding is compared.

    The parts: "resid" is the residual stream after the layer, "attn" and "mlp" are what its
    attention and its MLP add to it. All values are exactly 0 at the first observation.

    Args:
        probes: names of the probes to compare. Default: every probe of two tokens or more that is
            not a repeated block; if there are none, the repeated blocks.

    Keys:
        activation_drift/cosine: [layer, part], cosine distance, 0..2
        activation_drift/relative: [layer, part], fraction, 0..inf; inf where an h0 is zero
        activation_drift/cka: [layer, part], CKA distance, 0..2; if there are at least four tokens,
            not counting the first of each probe

    Reads:
        blocks.{layer}.hook_resid_post, blocks.{layer}.hook_attn_out, blocks.{layer}.hook_mlp_out;
        the last two only if all layers have them

    Cost:
        9 * layers; keeps the first activations on the device, layers * 3 * tokens * d_model
        numbers of the model's precision. CKA takes two products of tokens^2 * d_model in float64
        for each layer and part, for at most 64 tokens.

    Source:
        Kornblith et al. 2019 (CKA); Song et al. 2012 (unbiased HSIC); Murphy et al.
        2024 (why unbiased).

    Raises:
        ValueError: an empty or repeated selection; from `taps`, a probe that is unknown or has
            one token.
    """

    description: ClassVar[Description] = Description(
        title="Activations: change since the start",
        group="Changes",
        needs=Needs.EARLIER,
        measures={
            "cosine": Meaning(
                title="Change in the direction of activations",
                axes=("layer", "part"),
                headline=True,
                of_run=True,
                quantity=Quantity.ACTIVATION_CHANGE,
            ),
            "relative": Meaning(
                title="Change in activations, relative to their size",
                axes=("layer", "part"),
                of_run=True,
            ),
            "cka": Meaning(
                title="Change in activations by CKA", axes=("layer", "part"), of_run=True
            ),
        },
    )

    probes: Sequence[str] | None = None
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "activation_drift"

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One reduction of all layers and parts: [layer, part, measure]."""
        rows = rows_to_compare(type(self).__name__, self.probes, batch)
        tokens = _spread(tokens_after_first(batch, rows), TOKENS)
        of = probes_suffix(batch, rows)
        few = _spread(tuple(range(len(tokens))), CKA_TOKENS)
        some = batch.once(("some", few), lambda: torch.tensor(few, device=batch.tokens.device))

        parts = _parts(shadow)
        first = FirstLayers(self.baseline, f"{parts}{of}", shadow.n_layers)
        first_gram = FirstLayers(self.baseline, f"{parts} gram{of}", shadow.n_layers)

        def drift(
            now: Float[Tensor, "layer part token d_model"], layers: slice
        ) -> Float[Tensor, "layer part measure"]:
            far = [far.mean(2) for far in distances(now, first.of(now, layers))]
            if len(tokens) > 3:
                gram = unit_gram(now[:, :, some])
                far.append(cka_distance(gram, first_gram.of(gram, layers)).float())
            return torch.stack(far, 2)

        ends = tuple(PARTS[part] for part in parts)
        return {Stack(ends, tuple(range(shadow.n_layers)), tokens=tokens): drift}

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields one matrix for each measure."""
        measures: Any
        (measures,) = taken.values()
        values = measures.numpy()
        kinds = (
            ("cosine", "cosine distance", (0.0, 2.0)),
            ("relative", "fraction", None),
            ("cka", "CKA distance", (0.0, 2.0)),
        )
        for i, (measure, unit, limits) in enumerate(kinds[: values.shape[2]]):
            yield Reading(
                key=f"{self.name}/{measure}",
                values=values[:, :, i],
                axes=("layer", "part"),
                unit=unit,
                labels={"part": _parts(shadow)},
                limits=limits,
            )


def _parts(shadow: Shadow) -> list[str]:
    """The parts that all layers have."""
    layers = range(shadow.n_layers)
    return [
        p for p, end in PARTS.items() if all(f"blocks.{i}.{end}" in shadow.hooks for i in layers)
    ]


def _spread(of: tuple[int, ...], n: int) -> tuple[int, ...]:
    """Returns at most n of these, evenly spaced."""
    if len(of) <= n:
        return of
    return tuple(of[round(i * (len(of) - 1) / (n - 1))] for i in range(n))
