"""Measures how many entries of each weight training has moved."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.module_grid import ModuleGrid
from tlens_callback.meaning import Description, Meaning, Needs
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken
from tlens_callback.shadow.sources import Weight


@dataclass(frozen=True)
class UpdateSparsity:
    """Measures the share of the entries of each weight that training has not moved.

    share = #{i : |w_i - w_i(first observation)| < tolerance} / #{i}, in float32, for the effective
    weights, into which adapters are merged. all is the same share over all entries of all these
    weights. Both are 1 at the first observation. The weights are the shadow's, in its precision: in
    bfloat16 a change smaller than half the distance of neighbouring numbers (0.4 % of the weight)
    moves nothing, even if it comes from an adapter in float32. An entry that is NaN, then or now,
    counts as moved.

    Weights that training cannot change (frozen, and without a trained adapter) are left out: they
    would only dilute the share. With a tuner other than plain LoRA, a layer's bias is assumed to
    change with its weight. A tied weight counts once.

    By default a sample of each weight's entries is followed. It is drawn evenly with replacement
    and is the same at every observation: the standard error of a share p is
    sqrt(p (1 - p) / sample), at most 0.008 for 4096. Smaller weights are followed whole. In `all`,
    each weight's share is weighted by its number of entries.

    Args:
        tolerance: an entry that has changed by at least this much has moved.
        sample: entries to follow of each weight; None follows all, and keeps a copy of all.

    Keys:
        update_sparsity/share: [layer, module], fraction, 0..1; for weights that all layers have,
            with biases and norms
        update_sparsity/share_elsewhere: [weight], fraction, 0..1; for all others (embeddings)
        update_sparsity/all: [], fraction, 0..1

    Reads:
        The shadow's weights; no activations.

    Cost:
        One float per weight. `sample` entries per weight are kept in memory and beside checkpoints;
        their places are kept in memory.

    Source:
        Mukherjee et al. 2025, section 3 (update sparsity, tolerance 1e-5).

    Raises:
        ValueError: tolerance <= 0 or sample < 1; from `taps`, if training changes no weight; from
            `read`, if the first observation was of a model with other weights.
    """

    description: ClassVar[Description] = Description(
        title="Weights that training has not moved",
        group="Weights",
        needs=Needs.EARLIER | Needs.SAME_WEIGHTS,
        measures={
            "share": Meaning(
                title="Share of the weights that have not moved",
                axes=("layer", "module"),
                of_run=True,
            ),
            "share_elsewhere": Meaning(
                sometimes=True,
                title="Share of the weights that have not moved, outside the layers",
                axes=("weight",),
                of_run=True,
            ),
            "all": Meaning(
                title="Share of all weights that have not moved",
                axes=(),
                headline=True,
                of_run=True,
            ),
        },
    )

    tolerance: float = 1e-5
    sample: int | None = 4096
    name: str = "update_sparsity"
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _drawn: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        demand_numbers(self)
        if not self.tolerance > 0:
            raise ValueError(
                f"UpdateSparsity(tolerance={self.tolerance}): every entry would count as moved; "
                f"give a small positive number, such as 1e-5."
            )
        if self.sample is not None and self.sample < 1:
            raise ValueError(
                f"UpdateSparsity(sample={self.sample}) follows nothing; give a number of entries "
                f"such as 4096, or None for all."
            )

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Returns no reductions: this instrument reads weights alone."""
        if not any(weight.trained for weight in shadow.mirror.weights()):
            raise ValueError(
                f"{type(self).__name__}: no weight of this model is trained, so none can move. "
                f"Leave the instrument out."
            )
        return {}

    @torch.no_grad()
    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields a matrix by layer and module, and one number over all weights."""
        weights = list(shadow.mirror.weights())
        followed = [i for i, weight in enumerate(weights) if weight.trained]
        if self.sample is None:
            shares = self._shares_of_all(shadow, [weights[i] for i in followed])
        else:
            shares = self._shares_of_samples(shadow, weights, self.sample)[followed]
        share = shares.double().cpu().numpy()
        # A module's weight is called by the module's own name.
        names = [weights[i].name.removesuffix(".weight") for i in followed]
        grid = ModuleGrid.of(names, shadow.layers_path)
        unit, limits = "fraction", (0.0, 1.0)
        yield from grid.readings(f"{self.name}/share", share, shadow, unit=unit, limits=limits)
        sizes = [weights[i].value.numel() for i in followed]
        total = np.average(share, weights=sizes)
        yield Reading(key=f"{self.name}/all", values=total, unit=unit, limits=limits)

    def _shares_of_all(self, shadow: Shadow, weights: list[Weight]) -> Float[Tensor, " weight"]:
        shares = []
        for layer, of_layer in itertools.groupby(weights, lambda weight: weight.layer):
            with shadow.layer(layer):
                shares += [self._share(weight) for weight in of_layer]
        return torch.stack(shares)

    def _share(self, weight: Weight) -> Float[Tensor, ""]:
        now, key = weight.value, f"first/{weight.name}"
        if key not in self.baseline:
            self.baseline[key] = now.clone()
        first = self.baseline[key]
        if first.shape != now.shape:
            raise ValueError(_other_model_error(weight.name))
        # In pieces, so that the differences take little memory beside the weight.
        pieces = zip(now.flatten().split(2**24), first.flatten().split(2**24), strict=True)
        still = [((a.float() - b.float()).abs() < self.tolerance).sum() for a, b in pieces]
        return torch.stack(still).sum().float() / now.numel()

    def _shares_of_samples(
        self, shadow: Shadow, weights: list[Weight], sample: int
    ) -> Float[Tensor, " weight"]:
        # From every weight, so that the sample does not depend on which ones are trained.
        sizes = [weight.value.numel() for weight in weights]
        device = weights[0].value.device
        about = f"{sizes} {device}"
        if about not in self._drawn:
            self._drawn.clear()
            self._drawn[about] = _draw_entries(sizes, sample).to(device)
        entries = []
        of_weights = zip(weights, sizes, self._drawn[about], strict=True)
        for layer, of_layer in itertools.groupby(of_weights, lambda of: of[0].layer):
            with shadow.layer(layer):
                for weight, size, drawn in of_layer:
                    value = weight.value
                    some = value.flatten() if size <= sample else _entries(value, drawn)
                    entries.append(some.to(torch.float32, copy=True))
        now = torch.cat(entries)
        if "first" not in self.baseline:
            self.baseline["first"] = now
        first = self.baseline["first"]
        if first.shape != now.shape:
            raise ValueError(_other_model_error(f"{len(weights)} weights"))
        still = ((now - first).abs() < self.tolerance).cpu().numpy()
        lengths = np.minimum(sizes, sample)
        counts = np.add.reduceat(still, np.cumsum(lengths) - lengths, dtype=np.int64)
        return torch.from_numpy(counts / lengths)


def _draw_entries(sizes: list[int], sample: int) -> Int[Tensor, "weight sample"]:
    """Draws entries of each weight evenly; the same entries for the same sizes."""
    generator = torch.Generator().manual_seed(0)
    # The range is so much larger than any weight that the remainder is evenly distributed.
    drawn = torch.randint(2**62, (len(sizes), sample), generator=generator)
    return drawn % torch.tensor(sizes)[:, None]


def _entries(weight: Tensor, drawn: Int[Tensor, " sample"]) -> Float[Tensor, " sample"]:
    # A third of the time of `take` on a CPU; flattening a non-contiguous weight would copy it.
    return weight.view(-1).index_select(0, drawn) if weight.is_contiguous() else weight.take(drawn)


def _other_model_error(what: str) -> str:
    return (
        f"UpdateSparsity saw another shape at its first observation than {what} has now: that was "
        f"another model. Give each run its own instrument, or resume with the model it began with."
    )
