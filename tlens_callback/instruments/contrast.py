"""Finds the directions and neurons that separate texts with a feature from texts without it."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.auroc import auroc, percentile_95, shuffled
from tlens_callback.instruments.parts.baseline import first_value
from tlens_callback.instruments.parts.distance import cosine_distance
from tlens_callback.instruments.parts.selection import (
    index_or_nan,
    layer_labels,
    neuron_hook,
    neuron_layers,
    resid_hook,
    similar_lengths,
)
from tlens_callback.interfaces import TokenFeatures
from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import Probe, ProbeBatch, token_ids
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken

TOKENS = 2048
"""Tokens in one forward pass, with padding; a longer text has a pass of its own."""


@dataclass(frozen=True)
class Contrast:
    """Measures how the model separates texts with a feature (a language, a style) from others.

    For each text and layer, h is the mean of the residual stream after the layer over the text's
    tokens, except the first, which often has massive activations; a is the mean of the MLP's
    neurons over the same tokens. In each set every n-th text is held out; the others are used to
    fit.

    - direction d: mean of h over the fitted texts with the feature, minus the mean over those
      without it.
    - auroc: of h . d on the held-out texts: the share of pairs of a text with the feature and one
      without in which the former has the larger value; ties count half. 0.5 is chance; below it
      the direction points the wrong way.
    - chance: 95th percentile of the auroc of the same h . d under 1000 random labellings of the
      held-out texts: the smallest number that at least 95 % of them do not exceed. An auroc means
      something only above it. With very few texts chance is 1, and no auroc is above it. The
      labellings are the same at each observation and do not touch the global random state.
    - best, best_chance: the largest auroc of all layers, and its chance level: the same percentile
      of the largest auroc of all layers under each labelling. Compare best with best_chance: the
      best of many layers is high by chance more often than a single layer.
    - cosine: between d and the layer's d at the first observation; exactly 1 there.
    - norm: |d| over the mean norm of the residual stream, which is averaged over a text's tokens
      except the first, over each set's fitted texts, and over the two sets.
    - neuron: the k neurons of largest absolute difference, largest first. The difference is the
      mean of a over the fitted texts with the feature, minus the mean over those without it.
    - difference: this difference; held_out_difference: that of the same neurons on the held-out
      texts, which had no part in choosing them.

    Args:
        having: texts with the feature, each in a form for `Probe`: text, chat messages, token ids.
        without: texts without it, as similar as possible in everything else, also in length.
        held_out: share of each set that is held out, spread evenly over its order.
        k: neurons per layer.
        every: measure at every n-th observation.

    Keys:
        contrast/auroc: [layer], probability, 0..1
        contrast/chance: [layer], probability, 0..1
        contrast/best: [], probability, 0..1
        contrast/best_chance: [], probability, 0..1
        contrast/cosine: [layer], cosine, -1..1
        contrast/norm: [layer], fraction, 0..2
        contrast/neuron: [layer, rank], index, 0..d_mlp-1; only layers with neurons, not with
            experts, as for the next two
        contrast/difference: [layer, rank], activation, -inf..inf
        contrast/held_out_difference: [layer, rank], activation, -inf..inf

    Reads:
        blocks.{layer}.hook_resid_post and blocks.{layer}.mlp.hook_post, in forward passes of its
        own

    Cost:
        One forward pass of all texts, in batches of 2048 tokens. During it, 2 * texts * layers *
        d_model float32 numbers are on the device; layers * d_model are kept, which are the first
        directions. layers * (4 + 3 * k) and held-out texts * layers numbers leave the device.

    Source:
        Arditi et al. 2024, section 2.3 (difference of means); Mann & Whitney 1947 (auroc).

    Raises:
        ValueError: fewer than four texts in a set, or fewer than two to fit or to hold out; a text
            given twice; k or every < 1; from `read`, a text of one token, one longer than the
            model's context, or more neurons than a layer has.
    """

    description: ClassVar[Description] = Description(
        title="Texts with a feature against texts without it",
        group="Neurons and features",
        measures={
            "auroc": Meaning(
                title="How well each layer tells the texts apart",
                axes=("layer",),
                headline=True,
                better="higher",
            ),
            "chance": Meaning(title="Chance level of telling the texts apart", axes=("layer",)),
            "best": Meaning(
                title="How well the best layer tells the texts apart",
                axes=(),
                headline=True,
                better="higher",
            ),
            "best_chance": Meaning(
                title="Chance level of telling the texts apart", axes=(), headline=True
            ),
            "cosine": Meaning(
                title="Direction, compared with the start", axes=("layer",), of_run=True
            ),
            "norm": Meaning(title="Size of the difference between the texts", axes=("layer",)),
            "neuron": Meaning(
                title="Neurons that tell the texts apart", axes=("layer", "rank"), headline=True
            ),
            "difference": Meaning(
                title="Difference in these neurons' activations", axes=("layer", "rank")
            ),
            "held_out_difference": Meaning(
                title="The neurons' difference on held-out texts", axes=("layer", "rank")
            ),
        },
    )

    having: Sequence[Any]
    without: Sequence[Any]
    held_out: float = 0.5
    k: int = 10
    every: int = 10
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "contrast"

    def __post_init__(self) -> None:
        demand_numbers(self, k=1, every=1)
        for which in ("having", "without"):
            given = getattr(self, which)
            if isinstance(given, str):
                raise ValueError(f"{which}={given!r} is one text; give a list of several.")
            texts = tuple(Probe(f"{which}[{i}]", x).content for i, x in enumerate(given))
            object.__setattr__(self, which, texts)
            held = sum(self._held_out(len(texts)))
            if min(held, len(texts) - held) < 2:
                raise ValueError(
                    f"Contrast has {len(texts)} texts in {which!r}, of which held_out="
                    f"{self.held_out} leaves {len(texts) - held} to fit a direction and {held} to "
                    f"test it on. Both need at least two, and better ten. Give more texts."
                )
        every_text = [*self.having, *self.without]
        if twice := [text for i, text in enumerate(every_text) if text in every_text[:i]]:
            raise ValueError(
                f"The text {twice[0]!r} is in Contrast's sets twice: it would be used to fit and "
                f"to test, or both have the feature and lack it. Give each text once."
            )

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Returns no reductions: the texts go through forward passes of their own."""
        return {}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Runs the texts, and compares the two sets layer by layer."""
        has = np.arange(len(self.having) + len(self.without)) < len(self.having)
        held = np.array([*self._held_out(len(self.having)), *self._held_out(len(self.without))])
        # [group, text]: having and without, fitting; having and without, held out.
        groups = np.stack([has & ~held, ~has & ~held, has & held, ~has & held])
        weight = torch.tensor(groups / groups.sum(1, keepdims=True), dtype=torch.float32)
        resid, norm, neurons = self._means(shadow, batch, weight.to(shadow.device))
        fit = weight[:2].to(shadow.device)[:, None, :, None]  # [group, layer, text, d_model]
        direction = (fit[0] * resid).sum(1) - (fit[1] * resid).sum(1)  # [layer, d_model]
        first = first_value(self.baseline, self._kept_as, direction)
        scale = (norm * fit[..., 0]).sum((0, 2)) / 2
        # Products and sums, not matmuls: a trainer may have switched those to TF32.
        along = (resid * direction[:, None]).sum(2)[:, torch.tensor(held, device=resid.device)]
        scores, labels = along.double().cpu().numpy(), has[held]
        real = auroc(scores, labels[None])[:, 0]
        null = auroc(scores, shuffled(labels))
        by_layer = {
            "auroc": (real, "probability", (0.0, 1.0)),
            "chance": (percentile_95(null), "probability", (0.0, 1.0)),
            "best": (real.max(), "probability", (0.0, 1.0)),
            "best_chance": (percentile_95(null.max(0)), "probability", (0.0, 1.0)),
            "cosine": (_to_numpy(1 - cosine_distance(direction, first)), "cosine", (-1.0, 1.0)),
            "norm": (_to_numpy(direction.norm(dim=1) / scale), "fraction", (0.0, 2.0)),
        }
        for measure, (values, unit, limits) in by_layer.items():
            yield Reading(
                key=f"{self.name}/{measure}",
                values=np.asarray(values),
                axes=("layer",)[: np.ndim(values)],
                unit=unit,
                limits=limits,
            )
        if neurons:
            columns = [torch.stack(column) for column in zip(*neurons.values(), strict=True)]
            for measure, values in zip(
                ("neuron", "difference", "held_out_difference"), columns, strict=True
            ):
                yield Reading(
                    key=f"{self.name}/{measure}",
                    values=_to_numpy(values),
                    axes=("layer", "rank"),
                    unit="index" if measure == "neuron" else "activation",
                    labels=layer_labels(list(neurons), shadow),
                )

    def token_features(self, shadow: Shadow) -> Iterator[TokenFeatures]:
        """The projection h . d / |d| of a token's residual stream after each layer, with d of the
        first observation; none before it."""
        first = self.baseline.get(self._kept_as)
        if first is None:
            return
        for layer, d in enumerate(first):
            along = d / d.norm()
            yield TokenFeatures(resid_hook(layer), partial(_along, along), [f"L{layer}"])

    @property
    def _kept_as(self) -> str:
        texts = zlib.crc32(repr((self.having, self.without, self.held_out)).encode())
        return f"direction of {texts}"

    def _held_out(self, n: int) -> list[bool]:
        """Which of n texts are held out: floor(n * held_out) of them, spread evenly."""
        # The small number corrects binary rounding: 10 * 0.7 is 6.999...
        upto = [int(i * self.held_out + 1e-9) for i in range(n + 1)]
        return [upto[i] < upto[i + 1] for i in range(n)]

    def _means(
        self, shadow: Shadow, batch: ProbeBatch, weight: Float[Tensor, "group text"]
    ) -> tuple[
        Float[Tensor, "layer text d_model"],
        Float[Tensor, "layer text"],
        dict[int, tuple[Tensor, Tensor, Tensor]],
    ]:
        """Returns the mean residual stream of each text, its mean norm, and each layer's neurons.

        Of a layer with neurons: the k neurons that differ most, by how much, and by how much on
        the held-out texts.
        """
        texts = self._encoded(batch)
        layers = neuron_layers(shadow)
        shape = (shadow.n_layers, len(texts), shadow.d_model)
        resid = torch.empty(shape, dtype=torch.float32, device=weight.device)
        norm = torch.empty(shape[:2], dtype=torch.float32, device=weight.device)
        sums: dict[int, Tensor] = {}
        # Without the tokenizer, which token ids do not need and encoding would copy.
        bare = replace(batch, tokenizer=None)
        for part in similar_lengths([len(probe.content) for probe in texts], TOKENS):
            some = bare.beside([texts[i] for i in part])
            at = torch.tensor(part, device=weight.device)
            counted = some.mask.clone()
            counted[:, 0] = False
            taps: dict[str, Reduce] = {
                resid_hook(i): _mean_and_norm(counted) for i in range(shadow.n_layers)
            }
            taps |= {neuron_hook(i): _group_sums(counted, weight[:, at]) for i in layers}
            got: dict[str, Any] = shadow.run(some, [taps])[0]
            for i in range(shadow.n_layers):
                resid[i, at], norm[i, at] = got[resid_hook(i)]
            for i in layers:
                sums[i] = sums[i] + got[neuron_hook(i)] if i in sums else got[neuron_hook(i)]
        return resid, norm, {i: self._top_neurons(i, of_layer) for i, of_layer in sums.items()}

    def _top_neurons(
        self, layer: int, means: Float[Tensor, "group neuron"]
    ) -> tuple[Float[Tensor, " rank"], Float[Tensor, " rank"], Float[Tensor, " rank"]]:
        if self.k > means.shape[1]:
            raise ValueError(
                f"Contrast(k={self.k}): layer {layer} has {means.shape[1]} neurons. Lower k."
            )
        difference = means[0] - means[1]
        index = difference.abs().topk(self.k).indices
        shown = difference[index]
        return index_or_nan(index, shown), shown, (means[2] - means[3])[index]

    def _encoded(self, batch: ProbeBatch) -> list[Probe]:
        """Returns the texts as token ids, first `having`, then `without`."""
        probes = []
        for which in ("having", "without"):
            for i, content in enumerate(getattr(self, which)):
                name = f"{which}[{i}]"
                probe = Probe(name, content)
                ids = token_ids(probe, batch.tokenizer, batch.vocab_size, bos=batch.bos)
                if len(ids) < 2:
                    raise ValueError(
                        f"Contrast leaves the first token of each text out, and {name} has no "
                        f"other token: {content!r}. Give a longer text."
                    )
                probes.append(Probe(name, ids))
        return probes


def _mean_and_norm(counted: Bool[Tensor, "text pos"]) -> Reduce:
    def reduce(
        resid: Float[Tensor, "text pos d_model"],
    ) -> tuple[Float[Tensor, "text d_model"], Float[Tensor, " text"]]:
        h = resid.float()
        return _mean(h, counted), _mean(h.norm(dim=2, keepdim=True), counted)[:, 0]

    return reduce


def _group_sums(counted: Bool[Tensor, "text pos"], weight: Float[Tensor, "group text"]) -> Reduce:
    def reduce(post: Float[Tensor, "text pos neuron"]) -> Float[Tensor, "group neuron"]:
        return (weight[:, :, None] * _mean(post.float(), counted)).sum(1)

    return reduce


def _mean(
    values: Float[Tensor, "text pos unit"], counted: Bool[Tensor, "text pos"]
) -> Float[Tensor, "text unit"]:
    return values.masked_fill(~counted[:, :, None], 0).sum(1) / counted.sum(1, keepdim=True)


def _along(
    direction: Float[Tensor, " d_model"], resid: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token 1"]:
    return (resid * direction).sum(1, keepdim=True)


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
