"""Measures how far attention has moved since the first observation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.parts.baseline import first_value, probes_suffix, rows_to_compare
from tlens_callback.instruments.parts.distance import js_terms, with_sink
from tlens_callback.instruments.parts.selection import (
    attention_layers,
    checked_selection,
    layer_labels,
    pattern_hook,
)
from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken


@dataclass(frozen=True)
class AttentionDrift:
    """Measures how far each head's attention has moved since the first observation.

    Let p = A[q, :] be a row of a head's pattern now, p0 the same row at the first observation, and
    m = (p + p0) / 2:

    - js: mean over the queries q >= 1 of the probe (query 0 has one key) of the Jensen-Shannon
      divergence JS(p, p0) = 1/2 sum_k p log2(p / m) + 1/2 sum_k p0 log2(p0 / m); for several
      probes, the mean over them. 0 if the head attends as before, 1 if it attends only to tokens
      that it did not attend to before.
    - max, mean: maximum and mean of js over the heads of all layers.

    Exactly 0 at the first observation. Padding is cut off. Keys outside a sliding window have no
    attention at either time and add nothing. In a model with attention sinks of its own (GPT-OSS)
    a row sums to less than one; the rest goes to the sink, which counts as one more key.

    Args:
        probes: names of the probes to compare. Default: every probe of two tokens or more that is
            not a repeated block; if there are none, the repeated blocks.

    Keys:
        attention_drift/js: [layer, head], bits, 0..1
        attention_drift/js/<probe>: [layer, head], bits, 0..1
        attention_drift/max: [], bits, 0..1
        attention_drift/mean: [], bits, 0..1

    Reads:
        blocks.{layer}.attn.hook_pattern

    Cost:
        layers * n_heads per probe; keeps the first patterns on the device, layers * n_heads *
        (length - 1) * length numbers per probe in the model's precision.

    Source:
        Lin 1991 (the divergence); Clark et al. 2019, section 6 (between heads); Hao et al. 2020
        (between a model and its fine-tune).

    Raises:
        ValueError: an empty or repeated selection; from `taps`, a probe that is unknown or has
            one token.
    """

    description: ClassVar[Description] = Description(
        title="Attention: change since the start",
        group="Heads",
        needs=Needs.EARLIER,
        measures={
            "js": Meaning(
                title="Change in attention",
                axes=("layer", "head"),
                headline=True,
                of_run=True,
                quantity=Quantity.ATTENTION_CHANGE,
            ),
            "max": Meaning(
                title="Change in attention, largest and mean",
                axes=(),
                headline=True,
                of_run=True,
            ),
            "mean": Meaning(
                title="Change in attention, largest and mean", axes=(), headline=True, of_run=True
            ),
        },
    )

    probes: Sequence[str] | None = None
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "attention_drift"

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """One reduction for each layer: [probe, head]."""
        rows = [
            (row, batch.lengths[row])
            for row in rows_to_compare(type(self).__name__, self.probes, batch)
        ]
        names = probes_suffix(batch, [row for row, _ in rows])

        def drift(hook: str) -> Reduce:
            sinks = _has_sinks(shadow, hook)

            def js(pattern: Float[Tensor, "probe head query key"]) -> Float[Tensor, "row head"]:
                cut = [pattern[row, :, 1:n, :n] for row, n in rows]
                if sinks:
                    cut = [with_sink(p.float()) for p in cut]
                now = torch.cat([p.flatten(1) for p in cut], 1)
                first = first_value(self.baseline, hook + names, now)
                return _js(now, first, [p.shape[1:] for p in cut])

            return js

        layers = attention_layers(shadow, type(self).__name__)
        return {pattern_hook(i): drift(pattern_hook(i)) for i in layers}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields a matrix for the mean over the probes and for each probe, and two numbers."""
        labels = layer_labels(attention_layers(shadow, type(self).__name__), shadow)
        js = torch.stack(list(taken.values()), 1).numpy()  # type: ignore[arg-type]
        rows = rows_to_compare(type(self).__name__, self.probes, batch)
        yield from self._readings([batch.probes[row].name for row in rows], js, labels)

    def between(
        self, first: Mapping[str, Reading], last: Mapping[str, Reading]
    ) -> Iterator[Reading]:
        """Yields the drift from `first` to `last`, from the patterns that both contain.

        It uses the probes on which the drift was measured, or all probes if it was not measured.
        Stored patterns are float16, with a relative error of 2**-12: js is off by 2**-11 bits at
        worst, usually by less than 3e-5.
        """
        patterns = {
            reading.probe: (last[key].values, reading.values, reading.labels)
            for key, reading in first.items()
            if reading.meaning.quantity is Quantity.ATTENTION
            and key in last
            and reading.probe is not None
            and reading.values.shape[-1] > 1
        }
        own = {r.probe for r in (*first.values(), *last.values()) if r.instrument == self.name}
        probes = [name for name in patterns if name in own] or list(patterns)
        if not probes:
            return
        js = np.stack([_js_of_patterns(*patterns[name][:2]) for name in probes])
        layers = {axis: n for axis, n in patterns[probes[0]][2].items() if axis == "layer"}
        yield from self._readings(probes, js, layers)

    def _readings(
        self,
        probes: Sequence[str],
        js: Float[np.ndarray, "probe layer head"],
        labels: Mapping[str, Sequence[str]],
    ) -> Iterator[Reading]:
        mean = js.mean(0)
        for key, values in zip(["js", *(f"js/{n}" for n in probes)], [mean, *js], strict=True):
            yield Reading(
                key=f"{self.name}/{key}",
                values=values,
                axes=("layer", "head"),
                unit="bits",
                labels=labels,
                limits=(0.0, 1.0),
            )
        for measure, value in (("max", mean.max()), ("mean", js.mean())):
            key = f"{self.name}/{measure}"
            yield Reading(key=key, values=np.array(value), unit="bits", limits=(0.0, 1.0))


def _js(
    now: Float[Tensor, "head entry"],
    first: Float[Tensor, "head entry"],
    shapes: Sequence[Sequence[int]],
) -> Float[Tensor, "row head"]:
    """Returns the mean divergence over the queries of each pattern.

    Args:
        now, first: the patterns of one layer, flattened and concatenated.
        shapes: number of queries and of keys of each pattern.
    """
    shares = js_terms(now.float(), first.float()).split([prod(shape) for shape in shapes], 1)
    means = [share.sum(1) / shape[0] for share, shape in zip(shares, shapes, strict=True)]
    return torch.stack(means).clamp(0, 1)


def _js_of_patterns(
    now: Float[np.ndarray, "layer head query key"], first: Float[np.ndarray, "layer head query key"]
) -> Float[np.ndarray, "layer head"]:
    """Returns `_js` of one probe's whole patterns, leaving out query 0."""
    found = []
    for layers in zip(now, first, strict=True):
        both = [torch.from_numpy(np.array(heads[:, 1:])) for heads in layers]
        # The model has attention sinks of its own if a row lacks more than rounding explains.
        if min(float(heads.sum(-1).min()) for heads in both) < 1 - 2**-7:
            both = [with_sink(heads) for heads in both]
        one, other = both
        js = _js(one.flatten(1), other.flatten(1), [one.shape[1:]])
        found.append(js[0].numpy())
    return np.stack(found)


def _has_sinks(shadow: Shadow, hook: str) -> bool:
    """Returns whether a layer's attention has sinks of its own: its rows sum to less than one."""
    layer: Any = shadow.bridge.blocks[int(hook.split(".")[1])]
    return getattr(layer.attn.original_component, "sinks", None) is not None
