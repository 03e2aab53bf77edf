"""Measures how far attention has moved since the first observation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.baseline import FirstLayers, probes_suffix, rows_to_compare
from tlens_callback.instruments.parts.distance import js_terms
from tlens_callback.instruments.parts.selection import (
    attention_layers,
    checked_selection,
    layer_labels,
)
from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow, Stack, Taken, Taps
from tlens_callback.shadow.stacks import StackReduce

QUERIES = 128
"""At most this many rows of a probe's pattern are compared."""


@dataclass(frozen=True)
class AttentionDrift:
    """Measures how far each head's attention has moved since the first observation.

    Let p = A[q, :] be a row of a head's pattern now, p0 the same row at the first observation, and
    m = (p + p0) / 2:

    - js: mean over the queries q >= 1 of the probe (query 0 has one key; of more than 128, evenly
      spaced ones are taken) of the Jensen-Shannon divergence JS(p, p0) =
      1/2 sum_k p log2(p / m) + 1/2 sum_k p0 log2(p0 / m); for several probes, the mean over them. 0
      if the head attends as before, 1 if it attends only to tokens that it did not attend to
      before.
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
        layers * n_heads per probe; keeps the compared rows of the first patterns on the device,
        without later tokens: layers * n_heads * length^2 / 2 numbers per probe in the model's
        precision, and for probes of more than 129 tokens layers * n_heads * length * 64.

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

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One reduction of all layers: [layer, probe, head]."""
        rows = rows_to_compare(type(self).__name__, self.probes, batch)
        queries = [_queries(batch.lengths[row]) for row in rows]
        width, of = batch.tokens.shape[1], probes_suffix(batch, rows)
        entries = batch.once(
            ("entries", *rows),
            lambda: [_entries(q, width).to(batch.tokens.device) for q in queries],
        )

        def drift(layers: tuple[int, ...], sinks: bool) -> StackReduce:
            first = FirstLayers(self.baseline, f"{layers}{of}", len(layers))

            def js(
                pattern: Float[Tensor, "layer row head query key"], part: slice
            ) -> Float[Tensor, "layer row head"]:
                flat = pattern.flatten(3)
                found = [flat[:, i].index_select(2, at) for i, at in enumerate(entries)]
                if sinks:
                    rest = (1 - pattern.float().sum(-1)).clamp(min=0)
                    found += [rest[:, i][..., q] for i, q in enumerate(queries)]
                now = torch.cat(found, 2)
                return _js(now, first.of(now, part), [part.shape[2] for part in found], queries)

            return js

        return {
            Stack("attn.hook_pattern", layers, rows=tuple(rows)): drift(layers, sinks)
            for sinks, layers in self._layers(shadow).items()
        }

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields a matrix for the mean over the probes and for each probe, and two numbers."""
        layers = attention_layers(shadow, type(self).__name__)
        order = np.argsort([i for some in self._layers(shadow).values() for i in some])
        found: Any = list(taken.values())
        js = torch.cat(found).numpy()[order].swapaxes(0, 1)
        rows = rows_to_compare(type(self).__name__, self.probes, batch)
        names = [batch.probes[row].name for row in rows]
        yield from self._readings(names, js, layer_labels(layers, shadow))

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

    def _layers(self, shadow: Shadow) -> dict[bool, tuple[int, ...]]:
        """The layers whose attention has no sinks of its own, and those where it has."""
        of: dict[bool, tuple[int, ...]] = {}
        for layer in attention_layers(shadow, type(self).__name__):
            sinks = _has_sinks(shadow, layer)
            of[sinks] = (*of.get(sinks, ()), layer)
        return of

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


def _queries(length: int) -> list[int]:
    """Returns the queries of a probe that are compared: at most `QUERIES`, evenly spaced."""
    n = min(length - 1, QUERIES)
    return [1 + round(i * (length - 2) / max(1, n - 1)) for i in range(n)]


def _entries(queries: Sequence[int], width: int) -> Int[Tensor, " entry"]:
    """Returns the places of these queries' keys in a flattened pattern, without later tokens."""
    return torch.tensor([q * width + k for q in queries for k in range(q + 1)])


def _js(
    now: Float[Tensor, "*layers head entry"],
    first: Float[Tensor, "*layers head entry"],
    sizes: Sequence[int],
    queries: Sequence[Sequence[int]],
) -> Float[Tensor, "*layers row head"]:
    """Returns the mean divergence over the queries of each pattern.

    Args:
        now, first: the patterns' entries, end to end; where there are sinks, then those.
        sizes: number of entries of each pattern, and of its sinks.
        queries: those that are compared, of each pattern.
    """
    shares = js_terms(now.float(), first.float()).split(list(sizes), -1)
    sums = [share.sum(-1) for share in shares]
    found = []
    for i, of in enumerate(queries):
        total = sums[i] + sums[i + len(queries)] if len(sums) > len(queries) else sums[i]
        found.append(total / len(of))
    return torch.stack(found, -2).clamp(0, 1)


def _js_of_patterns(
    now: Float[np.ndarray, "layer head query key"], first: Float[np.ndarray, "layer head query key"]
) -> Float[np.ndarray, "layer head"]:
    """Returns `_js` of one probe's whole patterns."""
    queries = _queries(now.shape[2])
    at = _entries(queries, now.shape[3])
    found = []
    for layers in zip(now, first, strict=True):
        both = [torch.from_numpy(np.array(heads)) for heads in layers]
        parts = [[heads.flatten(1)[:, at]] for heads in both]
        rests = [1 - heads[:, queries].float().sum(-1) for heads in both]
        # The model has attention sinks of its own if a row lacks more than rounding explains.
        if max(float(rest.max()) for rest in rests) > 2**-7:
            for part, rest in zip(parts, rests, strict=True):
                part.append(rest.clamp(min=0).to(part[0].dtype))
        sizes = [part.shape[1] for part in parts[0]]
        one, other = (torch.cat(part, 1) for part in parts)
        found.append(_js(one, other, sizes, [queries])[0].numpy())
    return np.stack(found)


def _has_sinks(shadow: Shadow, layer: int) -> bool:
    """Returns whether a layer's attention has sinks of its own: its rows sum to less than one."""
    attn: Any = shadow.bridge.blocks[layer].attn  # type: ignore[index]
    return getattr(attn.original_component, "sinks", None) is not None
