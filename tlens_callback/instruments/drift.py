"""What has moved since the first observation: attention patterns and activations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.attention import AttentionPatterns
from tlens_callback.instruments.parts.distance import (
    cka_distance,
    cosine_distance,
    js_terms,
    relative_distance,
    with_sink,
)
from tlens_callback.instruments.parts.first import first_seen, of_probes
from tlens_callback.instruments.parts.selection import (
    after_first,
    attention_layers,
    layer_labels,
    pattern_hook,
    picked,
    plain_rows,
    rows_named,
)
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken

PARTS = {"resid": "hook_resid_post", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
"""The streams of a layer, and the end of their hook's name."""

MOST = 64
"""Tokens that CKA compares, evenly spaced where there are more: its cost is their square."""


@dataclass(frozen=True)
class AttentionDrift:
    """How far each head's attention has moved from where it was at the first observation.

    With p = A[q, :] a row of a head's pattern now, p0 the same row at the first observation and
    m = (p + p0) / 2:

    - js: mean over the queries q >= 1 of the probe (query 0 has one key) of the Jensen-Shannon
      divergence JS(p, p0) = 1/2 sum_k p log2(p / m) + 1/2 sum_k p0 log2(p0 / m); over several
      probes, the mean of theirs. 0 where the head looks where it did, 1 where it looks at other
      tokens only.
    - max, mean: over the heads of all layers, of js.

    Exactly 0 at the first observation. Padding is cut off. Keys outside a sliding window have no
    attention at either time and add nothing. In a model with attention sinks of its own (GPT-OSS)
    a row sums to less than one; what is missing is what the sink takes, and counts as one more
    key.

    Args:
        probes: names of the probes to compare. Default: every probe of two tokens or more that is
            no repeated block; the blocks where there are no others.

    Keys:
        attention_drift/js: [layer, head], bits, 0..1
        attention_drift/js/<probe>: [layer, head], bits, 0..1
        attention_drift/max: [], bits, 0..1
        attention_drift/mean: [], bits, 0..1

    Reads:
        blocks.{layer}.attn.hook_pattern

    Cost:
        layers * n_heads per probe; keeps the first patterns on the device, layers * n_heads *
        (length - 1) * length numbers of the model's precision per probe.

    Source:
        Lin 1991 (the divergence); Clark et al. 2019, section 6 (between heads); Hao et al. 2020
        (between a model and its fine-tune).

    Raises:
        ValueError: an empty or repeated selection; from `taps`, a probe that is not there or has
            one token.
    """

    probes: Sequence[str] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "attention_drift"

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", picked(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """One reduction a layer: [probe, head]."""
        rows = [(row, batch.lengths[row]) for row in _rows(self, batch)]
        names = of_probes(batch, [row for row, _ in rows])

        def drift(hook: str) -> Reduce:
            sinks = _has_sinks(shadow, hook)

            def js(pattern: Float[Tensor, "probe head query key"]) -> Float[Tensor, "row head"]:
                cut = [pattern[row, :, 1:n, :n] for row, n in rows]
                if sinks:
                    cut = [with_sink(p.float()) for p in cut]
                now = torch.cat([p.flatten(1) for p in cut], 1)
                first = first_seen(self.memory, hook + names, now)
                shares = js_terms(now.float(), first.float()).split([p[0].numel() for p in cut], 1)
                # Query 0 is cut off; a probe has length - 1 others.
                means = [share.sum(1) / (n - 1) for share, (_, n) in zip(shares, rows, strict=True)]
                return torch.stack(means).clamp(0, 1)

            return js

        layers = attention_layers(shadow, type(self).__name__)
        return {pattern_hook(i): drift(pattern_hook(i)) for i in layers}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """The mean over the probes, each probe, and two numbers."""
        labels = layer_labels(attention_layers(shadow, type(self).__name__), shadow)
        js = torch.stack(list(taken.values()), 1).numpy()  # type: ignore[arg-type]
        rows = _rows(self, batch)
        keys = ["js", *(f"js/{batch.probes[row].name}" for row in rows)]
        for key, values in zip(keys, [js.mean(0), *js], strict=True):
            yield Reading(
                key=f"{self.name}/{key}",
                values=values,
                axes=("layer", "head"),
                unit="bits",
                labels=labels,
                limits=(0.0, 1.0),
            )
        for measure, value in (("max", js.mean(0).max()), ("mean", js.mean())):
            key = f"{self.name}/{measure}"
            yield Reading(key=key, values=np.array(value), unit="bits", limits=(0.0, 1.0))


@dataclass(frozen=True)
class ActivationDrift:
    """How far the activations of each layer have moved since the first observation, and in which
    of its parts.

    With h a token's activation now and h0 the same token's at the first observation, over all
    tokens of the chosen probes without the first of each, which often has massive activations:

    - cosine: mean over the tokens of 1 - h . h0 / (|h| |h0|). Computed as half the squared
      distance of the normalised vectors, which is exactly 0 for equal ones and keeps its digits
      where they are nearly equal; a zero vector counts as at 1/2 from any other.
    - relative: mean over the tokens of |h - h0| / |h0|.
    - cka: 1 - CKA(H, H0) of the two [token, d_model] matrices, linear and centred, by the unbiased
      estimator of HSIC: with n tokens, G the Gram matrix H H^T with 0 on its diagonal, r its row
      sums, s its sum, and u[i, j] = G[i, j] - (r[i] + r[j]) / (n-2) + s / ((n-1)(n-2)) off the
      diagonal, CKA = sum(u * u0) / (|u| |u0|). Computed as half the squared distance of u / |u| and
      u0 / |u0|. Blind to rotations, to shifts and to one common scale of all tokens; about 1 for
      unrelated activations. The biased estimator would show the less drift the fewer the tokens:
      with fewer than d_model its CKA is near 1 for unrelated ones too. Of more than 64 tokens,
      64 evenly spaced ones. Where all tokens have one activation (one token over and over, in a
      model without learned positions) it compares nothing but their rounding.

    The parts: "resid" is the residual stream behind the layer, "attn" and "mlp" what its attention
    and its MLP add to it. All are exactly 0 at the first observation.

    Args:
        probes: names of the probes to compare. Default: every probe of two tokens or more that is
            no repeated block; the blocks where there are no others.

    Keys:
        activation_drift/cosine: [layer, part], cosine distance, 0..2
        activation_drift/relative: [layer, part], fraction, 0..inf; inf where an h0 is zero
        activation_drift/cka: [layer, part], CKA distance, 0..2; from four tokens on, the first of
            each probe not counted

    Reads:
        blocks.{layer}.hook_resid_post, blocks.{layer}.hook_attn_out, blocks.{layer}.hook_mlp_out;
        the latter two where all layers have them

    Cost:
        9 * layers; keeps the first activations on the device, layers * 3 * tokens * d_model
        numbers of the model's precision. CKA takes two products of tokens^2 * d_model in float64
        for each layer and part, of 64 tokens at most.

    Source:
        Kornblith et al. 2019 (CKA); Song et al. 2012 (unbiased HSIC); Murphy et al.
        2024 (why unbiased).

    Raises:
        ValueError: an empty or repeated selection; from `taps`, a probe that is not there or has
            one token.
    """

    probes: Sequence[str] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "activation_drift"

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", picked(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """One reduction a layer and part: [measure]."""
        rows = _rows(self, batch)
        names = of_probes(batch, rows)
        row, pos = after_first(batch, rows)
        some = torch.linspace(0, len(row) - 1, min(len(row), MOST)).round().long().to(row.device)

        def drift(hook: str) -> Reduce:
            def measures(h: Float[Tensor, "probe pos d_model"]) -> Float[Tensor, " measure"]:
                now = h[row, pos]
                first = first_seen(self.memory, hook + names, now).float()
                now = now.float()
                far = [cosine_distance(now, first).mean(), relative_distance(now, first).mean()]
                if len(now) > 3:
                    far.append(cka_distance(now[some], first[some]).float())
                return torch.stack(far)

            return measures

        return {hook: drift(hook) for hooks in _parts(shadow).values() for hook in hooks}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """One matrix a measure."""
        parts = _parts(shadow)
        values = np.stack([[taken[hook].numpy() for hook in hooks] for hooks in parts.values()])  # type: ignore[union-attr]
        kinds = (
            ("cosine", "cosine distance", (0.0, 2.0)),
            ("relative", "fraction", None),
            ("cka", "CKA distance", (0.0, 2.0)),
        )
        for i, (measure, unit, limits) in enumerate(kinds[: values.shape[2]]):
            yield Reading(
                key=f"{self.name}/{measure}",
                values=values[:, :, i].T,
                axes=("layer", "part"),
                unit=unit,
                labels={"part": list(parts)},
                limits=limits,
            )


@dataclass(frozen=True)
class PatternChange(AttentionPatterns):
    """The attention pattern of every head minus its pattern at the first observation.

    `pattern[layer, head, query, key]` is A - A0, positive where the head looks more than it did;
    a row of keys sums to zero (or to what the model's own attention sinks lost). Exactly 0 at the
    first observation. Padding is cut off.

    Args:
        probes: names of the probes to show. Default: every probe that is no repeated block; the
            blocks where there are no others.
        layers: layers to show. Default: all.

    Keys:
        pattern_change/pattern/<probe>: [layer, head, query, key], probability, -1..1

    Reads:
        blocks.{layer}.attn.hook_pattern

    Cost:
        layers * n_heads * length^2 per probe; keeps as many numbers, of the model's precision, on
        the device.

    Source:
        Vaswani et al. 2017, section 3.2 (the pattern).

    Raises:
        ValueError: an empty or repeated selection; from `taps`, a probe or layer that is not there.
    """

    memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "pattern_change"

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """One reduction a layer: the chosen rows, cropped to their tokens and laid end to end."""
        names = of_probes(batch, self._rows(batch))

        def change(hook: str, crop: Callable[[Tensor], Any]) -> Reduce:
            def minus_first(
                pattern: Float[Tensor, "probe head query key"],
            ) -> Float[Tensor, " entry"]:
                now = crop(pattern)
                return now.float() - first_seen(self.memory, hook + names, now).float()

            return minus_first

        return {hook: change(hook, crop) for hook, crop in super().taps(shadow, batch).items()}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """One reading a probe, all layers and heads in it."""
        for reading in super().read(taken, shadow, batch):
            yield replace(reading, limits=(-1.0, 1.0))

    def _rows(self, batch: ProbeBatch) -> list[int]:
        if self.probes is not None:
            return rows_named(batch, self.probes)
        return plain_rows(batch) or list(range(len(batch.probes)))


def _rows(drift: AttentionDrift | ActivationDrift, batch: ProbeBatch) -> list[int]:
    """The rows to compare; each has a token beside its first."""
    if drift.probes is None:
        plain = [i for i in plain_rows(batch) if batch.lengths[i] > 1]
        rows = plain or [i for i, n in enumerate(batch.lengths) if n > 1]
    else:
        rows = rows_named(batch, drift.probes)
    short = [batch.probes[i].name for i in rows if batch.lengths[i] < 2]
    if short or not rows:
        raise ValueError(
            f"{type(drift).__name__} leaves the first token of the probes out, and "
            f"{repr(short[0]) if short else 'each of them'} has no other. Give a longer one."
        )
    return rows


def _has_sinks(shadow: Shadow, hook: str) -> bool:
    """Whether a layer's attention has sinks of its own: then its rows sum to less than one."""
    layer: Any = shadow.bridge.blocks[int(hook.split(".")[1])]
    return getattr(layer.attn.original_component, "sinks", None) is not None


def _parts(shadow: Shadow) -> dict[str, list[str]]:
    """Part -> its hook in every layer, of the parts that all layers have."""
    hooks = {
        part: [f"blocks.{i}.{end}" for i in range(shadow.n_layers)] for part, end in PARTS.items()
    }
    return {part: own for part, own in hooks.items() if set(own) <= set(shadow.hooks)}
