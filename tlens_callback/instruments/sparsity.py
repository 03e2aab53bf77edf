"""How many of a model's weights training has moved."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.places import Places
from tlens_callback.meaning import Description, Meaning, Needs
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken
from tlens_callback.shadow.mirror import Weight


@dataclass(frozen=True)
class UpdateSparsity:
    """Share of the entries of each weight that training has not moved.

    share = #{i : |w_i - w_i(first observation)| < tolerance} / #{i}, in float32, of the effective
    weights: under an adapter those with the adapter merged in. all is the same share over all
    entries of all those weights. Both are 1 at the first observation. The weights are the
    shadow's, in its precision: in bfloat16 a step smaller than half the distance of neighbouring
    numbers (0.4 % of the weight) moves nothing, one of an adapter in float32 no more than others.
    What is no number, then or now, counts as moved.

    Weights that training cannot change, frozen and without a trained adapter, are left out: they
    would only dilute the share. Under another tuner than plain LoRA a layer's bias is taken to
    change with its weight. A tied weight counts once.

    By default of each weight a sample of entries is followed, the same at every observation,
    drawn evenly and with replacement: the standard error of a share p is
    sqrt(p (1 - p) / sample), at most 0.008 for 4096. Smaller weights are followed whole. For `all`
    each weight's share counts by its number of entries.

    Args:
        tolerance: how far an entry has to be from where it was, to have moved.
        sample: entries to follow of each weight; None follows all, and keeps a copy of them all.

    Keys:
        update_sparsity/share: [layer, module], fraction, 0..1; of what all layers have, biases and
            norms included
        update_sparsity/share_elsewhere: [weight], fraction, 0..1; of the others (embeddings)
        update_sparsity/all: [], fraction, 0..1

    Reads:
        No activations: the shadow's weights.

    Cost:
        One float per weight; `sample` per weight are kept, in memory and beside checkpoints, and in
        memory their places.

    Source:
        Mukherjee et al. 2025, section 3 (update sparsity, tolerance 1e-5).

    Raises:
        ValueError: tolerance <= 0 or sample < 1; from `taps`, when training changes no weight;
            from `read`, when the baseline is of a model with other weights.
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
        if not self.tolerance > 0:
            raise ValueError(
                f"UpdateSparsity(tolerance={self.tolerance}): no entry is nearer than that to "
                f"where it was; give a small positive number, such as 1e-5."
            )
        if self.sample is not None and self.sample < 1:
            raise ValueError(
                f"UpdateSparsity(sample={self.sample}) follows nothing; give a number of entries "
                f"such as 4096, or None for all."
            )

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """None: it is of weights alone."""
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
        """A matrix by layer and module, and a number over all."""
        weights = shadow.mirror.weights()
        followed = [i for i, weight in enumerate(weights) if weight.trained]
        if self.sample is None:
            shares = torch.stack([self._of_all(weights[i]) for i in followed])
        else:
            shares = self._of_samples(weights, self.sample)[followed]
        share = shares.double().cpu().numpy()
        # A module's weight goes by the module's own name.
        places = Places.of([weights[i].name.removesuffix(".weight") for i in followed])
        unit, limits = "fraction", (0.0, 1.0)
        yield from places.readings(f"{self.name}/share", share, shadow, unit=unit, limits=limits)
        sizes = [weights[i].value.numel() for i in followed]
        total = np.average(share, weights=sizes)
        yield Reading(key=f"{self.name}/all", values=total, unit=unit, limits=limits)

    def _of_all(self, weight: Weight) -> Float[Tensor, ""]:
        now, key = weight.value, f"first/{weight.name}"
        if key not in self.baseline:
            self.baseline[key] = now.clone()
        first = self.baseline[key]
        if first.shape != now.shape:
            raise ValueError(_other_model(weight.name))
        # In pieces, so that the differences take little memory beside the weight.
        pieces = zip(now.flatten().split(2**24), first.flatten().split(2**24), strict=True)
        still = [((a.float() - b.float()).abs() < self.tolerance).sum() for a, b in pieces]
        return torch.stack(still).sum() / now.numel()

    def _of_samples(self, weights: list[Weight], sample: int) -> Float[Tensor, " weight"]:
        # Of every weight, trained or not: what is drawn does not depend on which are trained.
        sizes = [weight.value.numel() for weight in weights]
        device = weights[0].value.device
        about = f"{sizes} {device}"
        if about not in self._drawn:
            self._drawn.clear()
            self._drawn[about] = _draw(sizes, sample).to(device)
        now = torch.cat(
            [
                (
                    weight.value.flatten() if size <= sample else _entries(weight.value, drawn)
                ).float()
                for weight, size, drawn in zip(weights, sizes, self._drawn[about], strict=True)
            ]
        )
        if "first" not in self.baseline:
            self.baseline["first"] = now
        first = self.baseline["first"]
        if first.shape != now.shape:
            raise ValueError(_other_model(f"{len(weights)} weights"))
        still = ((now - first).abs() < self.tolerance).cpu().numpy()
        lengths = np.minimum(sizes, sample)
        counts = np.add.reduceat(still, np.cumsum(lengths) - lengths, dtype=np.int64)
        return torch.from_numpy(counts / lengths)


def _draw(sizes: list[int], sample: int) -> Int[Tensor, "weight sample"]:
    """Entries of each weight, drawn evenly; the same for the same sizes."""
    generator = torch.Generator().manual_seed(0)
    # From a range so much larger than any weight that the remainder is even.
    drawn = torch.randint(2**62, (len(sizes), sample), generator=generator)
    return drawn % torch.tensor(sizes)[:, None]


def _entries(weight: Tensor, drawn: Int[Tensor, " sample"]) -> Float[Tensor, " sample"]:
    # On a CPU in a third of the time that `take` takes; flattening the others would copy them.
    return weight.view(-1).index_select(0, drawn) if weight.is_contiguous() else weight.take(drawn)


def _other_model(what: str) -> str:
    return (
        f"UpdateSparsity remembers another shape than {what} has now: its baseline is of another "
        f"model. Give each run an instrument of its own, or resume with the model it began with."
    )
