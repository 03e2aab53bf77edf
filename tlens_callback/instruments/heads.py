"""Scores the roles of each head by its attention on repeated random blocks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from tlens_callback.instruments.parts.selection import (
    attention_layers,
    block_rows,
    demand_blocks,
    layer_labels,
)
from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow, Stack, Taken, Taps

Pairs = list[tuple[int, int]]

_TITLES = {
    "previous": "Attention to the token before",
    "current": "Attention to the token itself",
    "duplicate": "Attention to the same token, one block before",
    "induction": "Attention to what followed the same token",
    "induction_diagonal": "Attention to what followed the same token, along the diagonal",
    "prefix_matching": "Attention to what followed any earlier occurrence of the token",
    "sink": "Attention to the first token",
    "entropy": "Entropy of the attention",
    "lag": "Distance that the head looks back",
    "lag_mass": "Attention at the distance that the head looks back",
}

_ROLES = {role: role for role in ("previous", "duplicate", "induction")} | {
    "induction_diagonal": "induction"
}
"""Measure -> the role of a head with a high score."""

_EITHER = ("induction", "induction_diagonal")  # `strict` chooses which of the two is measured


def _meanings() -> dict[str, Meaning]:
    axes, found = ("layer", "head"), {}
    for measure, title in _TITLES.items():
        role, sometimes = _ROLES.get(measure, ""), measure in _EITHER
        quantity = Quantity.HEAD_ENTROPY if measure == "entropy" else None
        found |= {
            measure: Meaning(
                title=title,
                axes=axes,
                headline=bool(role),
                quantity=quantity,
                role=role,
                sometimes=sometimes,
            ),
            # One block length is not enough: a positional copy scores high at a single length.
            f"{measure}_by_block": Meaning(
                title=f"{title}, by block length",
                axes=("block", *axes),
                quantity=Quantity.HEAD_ROLE if role else None,
                role=role,
                seen_in="its attention pattern" if role else "",
                # Uniform attention has 0.1, a head that makes induction possible often 0.3.
                sharpness=2 / 3 if role == "previous" else 1.0,
                sometimes=sometimes,
            ),
            f"{measure}_spread": Meaning(title=f"{title}: spread", axes=axes, sometimes=sometimes),
        }
    for measure in (*_ROLES, "prefix_matching"):
        found[f"max_{measure}"] = Meaning(
            title="Strongest head in each role",
            axes=(),
            headline=measure not in ("duplicate", "prefix_matching"),
            sometimes=measure in _EITHER,
        )
    return found | {
        "sink_share": Meaning(title="Share of heads on the first token", axes=(), headline=True),
        "min_entropy": Meaning(title="Entropy of the most focused head", axes=()),
        "mean_entropy": Meaning(title="Entropy of attention", axes=(), headline=True),
    }


@dataclass(frozen=True)
class HeadScores:
    """Scores each head in known roles (previous token, induction and others) on repeated blocks.

    Let A[q, k] be a head's pattern on `[BOS, r_1..r_S, r_1..r_S, ...]`, with BOS at position 0, S
    the block length and T the number of tokens. A mean is over all q for which the places exist:

    - previous: mean over q >= 1 of A[q, q-1].
    - current: mean over q of A[q, q].
    - duplicate: mean over q > S of A[q, q-S].
    - induction: mean over q = S+1..2S of A[q, q-S+1].
    - prefix_matching: mean over q > S of the sum over earlier repeats of
      A[q, previous occurrence of q's token + 1]; with two repeats it equals induction.
    - sink: mean over q of A[q, 0].
    - entropy: mean over q >= 1 of -sum_k A ln A / ln(q+1); one-hot 0, uniform 1.
    - lag: the d of the largest mean over q > d of A[q, q-d]; lag_mass: that mean. Key 0, the
      sink, is left out, and so are lags that fewer than half of the queries 1..T-1 have
      (d <= (T-1) // 2). A head that copies from a fixed distance keeps its lag while S changes.

    Each is averaged first over the sequences of one block length and then over the block lengths.
    For lag and lag_mass, A[q, q-d] is averaged in this way, over the sequences that have the lag.

    Args:
        strict: False emits `induction_diagonal` instead of `induction`: the mean over q >= S-1 of
            A[q, q-S+1], the widely used `pattern.diagonal(1-S).mean()`. It also counts the queries
            S-1 (whose key is BOS) and S, which no induction head can match, and the repeats after
            the second.

    Keys:
        head_scores/previous: [layer, head], probability, 0..1
        head_scores/current: [layer, head], probability, 0..1
        head_scores/duplicate: [layer, head], probability, 0..1
        head_scores/induction: [layer, head], probability, 0..1; if strict
        head_scores/induction_diagonal: [layer, head], probability, 0..1; if not strict
        head_scores/prefix_matching: [layer, head], probability, 0..1
        head_scores/sink: [layer, head], probability, 0..1
        head_scores/entropy: [layer, head], fraction, 0..1
        head_scores/lag: [layer, head], tokens, 0..(T-1)//2
        head_scores/lag_mass: [layer, head], probability, 0..1
        head_scores/<measure>_by_block: [block, layer, head], unit of the measure, its range;
            the labels of the blocks are their lengths S, ascending
        head_scores/<measure>_spread: [layer, head], unit of the measure, 0..half of its range;
            standard deviation (divisor n) over the block lengths, or over the sequences if there
            is only one length
        head_scores/max_<measure>: [], probability, 0..1; for previous, duplicate, induction (or
            induction_diagonal) and prefix_matching: maximum over the heads of the minimum over
            the block lengths, since a positional copy scores high at one length only
        head_scores/sink_share: [], fraction, 0..1; share of the heads with sink > 0.3
        head_scores/min_entropy: [], fraction, 0..1; minimum over the heads
        head_scores/mean_entropy: [], fraction, 0..1; mean over the heads

    Reads:
        blocks.{layer}.attn.hook_pattern, rows of repeated blocks only

    Cost:
        layers * n_heads * sequences * (8 + (T-1)//2).

    Source:
        Olsson et al. 2022 (induction, prefix matching); Elhage et al. 2021 (previous token,
        lags); Wang et al. 2022 (duplicate token); Gu et al. 2024 (sink, threshold 0.3);
        Zhai et al. 2023 (entropy).

    Raises:
        ValueError: from `taps`, if no probe is a repeated block.
    """

    description: ClassVar[Description] = Description(
        title="Heads by their roles", group="Heads", needs=Needs.BLOCKS, measures=_meanings()
    )

    strict: bool = True
    name: str = "head_scores"

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One reduction of all layers: [layer, sequence, head, measure], then the lags' means."""
        blocks = demand_blocks(batch, type(self).__name__)
        rows = tuple(row for block in blocks.values() for row in block)
        width = max(batch.lengths[i] for i in rows)
        index, weight, per_query, lag_key, per_lag = batch.once(
            ("head scores", self.strict), lambda: self._constants(batch, rows)
        )

        def score(
            pattern: Float[Tensor, "layer row head query key"], part: slice
        ) -> Float[Tensor, "layer row head score"]:
            a = pattern[..., :width, :width].float()
            at_places = a.flatten(3).gather(3, index[:, None].expand(*a.shape[:3], -1))
            # Twice as fast as torch.special.entr on the CPU, and equal: 0 ln tiny = 0.
            entropy = -(a.clamp(min=torch.finfo(a.dtype).tiny).log_().mul_(a)).sum(4)
            by_lag = a.gather(4, lag_key.expand(*a.shape[:4], -1))
            # Products and sums, not matmuls: a trainer may have switched those to TF32.
            return torch.cat(
                [
                    (at_places[:, :, :, None] * weight[:, None]).sum(4),
                    (entropy * per_query[:, None]).sum(3, keepdim=True),
                    (by_lag * per_lag[:, None]).sum(3),
                ],
                dim=3,
            )

        layers = tuple(attention_layers(shadow, type(self).__name__))
        return {Stack("attn.hook_pattern", layers, rows=rows): score}

    def _constants(self, batch: ProbeBatch, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """What the reductions index and weigh patterns with, on the device."""
        lengths = [batch.lengths[i] for i in rows]
        parts = *self._index_and_weight(batch, rows), _entropy_weights(lengths), *_lags(lengths)
        return tuple(part.to(batch.tokens.device) for part in parts)

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields matrices by layer and head, and scalars over them."""
        blocks = block_rows(batch)
        layers = layer_labels(attention_layers(shadow, type(self).__name__), shadow)
        labels = {"block": [str(block) for block in blocks], **layers}
        stops = np.cumsum([len(rows) for rows in blocks.values()])[:-1]
        stacked: Any
        (stacked,) = taken.values()
        scores = stacked.numpy().transpose(3, 1, 0, 2)  # [measure or lag, sequence, layer, head]
        bounded = [*self._pairs(2, 2), "entropy"]

        minima: dict[str, np.ndarray] = {}
        means: dict[str, np.ndarray] = {}
        for measure, sequence in zip(bounded, scores[: len(bounded)], strict=True):
            block = np.stack([part.mean(0) for part in np.split(sequence, stops)])
            unit = "fraction" if measure == "entropy" else "probability"
            minima[measure], means[measure] = block.min(0), block.mean(0)
            yield from self._matrices(measure, unit, 1.0, labels, sequence, block, block.mean(0))

        # Masked, because short sequences do not have all lags.
        longest = np.array([(batch.lengths[i] - 1) // 2 for rows in blocks.values() for i in rows])
        profile = np.ma.masked_array(scores[len(bounded) :])  # [lag, sequence, layer, head]
        # NaN is kept apart, because a mean over a masked array would mask it.
        no_number = np.isnan(profile.data)
        profile[no_number] = 0
        profile[np.arange(len(profile))[:, None] > longest] = np.ma.masked
        unknown = np.any(no_number & ~np.ma.getmaskarray(profile), axis=0)
        parts = np.split(np.arange(len(longest)), stops)
        block = np.ma.stack([profile[:, part].mean(1) for part in parts], axis=1)
        of_block = np.stack([unknown[part].any(0) for part in parts])
        views = profile, block, block.mean(1)
        unknowns = unknown, of_block, of_block.any(0)

        def known(found: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
            for values, no in zip(found, unknowns, strict=True):
                yield np.where(no, np.float32(np.nan), values)

        yield from self._matrices(
            "lag",
            "tokens",
            float(longest.max()),
            labels,
            *known(view.argmax(0, fill_value=-1) for view in views),
        )
        yield from self._matrices(
            "lag_mass", "probability", 1.0, labels, *known(view.max(0).filled() for view in views)
        )
        for measure in ("previous", "duplicate", self._induction, "prefix_matching"):
            yield self._scalar(f"max_{measure}", minima[measure].max(), "probability")
        sinks = np.where(np.isnan(means["sink"]), np.nan, means["sink"] > 0.3)
        yield self._scalar("sink_share", sinks.mean(), "fraction")
        yield self._scalar("min_entropy", means["entropy"].min(), "fraction")
        yield self._scalar("mean_entropy", means["entropy"].mean(), "fraction")

    @property
    def _induction(self) -> str:
        return "induction" if self.strict else "induction_diagonal"

    def _matrices(
        self,
        measure: str,
        unit: str,
        top: float,
        labels: dict[str, list[str]],
        sequence: Real[np.ndarray, "row layer head"],
        block: Real[np.ndarray, "block layer head"],
        overall: Real[np.ndarray, "layer head"],
    ) -> Iterator[Reading]:
        key, axes = f"{self.name}/{measure}", ("layer", "head")
        limits = (0.0, top)
        layers = {axis: names for axis, names in labels.items() if axis == "layer"}
        yield Reading(key=key, values=overall, axes=axes, unit=unit, labels=layers, limits=limits)
        yield Reading(
            key=f"{key}_by_block",
            values=block,
            axes=("block", *axes),
            unit=unit,
            labels=labels,
            limits=limits,
        )
        yield Reading(
            key=f"{key}_spread",
            values=(block if len(block) > 1 else sequence).std(0),
            axes=axes,
            unit=unit,
            labels=layers,
            limits=(0.0, top / 2),
        )

    def _scalar(self, measure: str, value: np.floating, unit: str) -> Reading:
        key = f"{self.name}/{measure}"
        return Reading(key=key, values=np.array(value), unit=unit, limits=(0.0, 1.0))

    def _pairs(self, block: int, times: int) -> dict[str, Pairs]:
        """Returns the (query, key) places of each measure: their sum is divided by the queries."""
        tokens = 1 + block * times
        later = range(block + 1, tokens)
        second = range(block + 1, 2 * block + 1)
        return {
            "previous": [(q, q - 1) for q in range(1, tokens)],
            "current": [(q, q) for q in range(tokens)],
            "duplicate": [(q, q - block) for q in later],
            self._induction: [(q, q - block + 1) for q in second]
            if self.strict
            else [(q, q - block + 1) for q in range(block - 1, tokens)],
            "prefix_matching": [
                (q, q - back * block + 1) for q in later for back in range(1, (q - 1) // block + 1)
            ],
            "sink": [(q, 0) for q in range(tokens)],
        }

    def _index_and_weight(
        self, batch: ProbeBatch, rows: Sequence[int]
    ) -> tuple[Int[Tensor, "row place"], Float[Tensor, "row measure place"]]:
        """Returns the indices into the flattened pattern that each row needs, and their weights."""
        width = max(batch.lengths[row] for row in rows)
        by_shape: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for row in rows:
            probe = batch.probes[row]
            assert probe.block is not None
            shape = probe.block, probe.times
            if shape in by_shape:
                continue
            measures = list(self._pairs(*shape).values())
            index = torch.tensor([q * width + k for pairs in measures for q, k in pairs])
            weight = torch.zeros(len(index), len(measures), dtype=torch.float32)
            start = 0
            for measure, pairs in enumerate(measures):
                queries = len({q for q, _ in pairs})
                weight[start : start + len(pairs), measure] = 1 / queries
                start += len(pairs)
            by_shape[shape] = index, weight
        each = [by_shape[batch.probes[row].block, batch.probes[row].times] for row in rows]  # type: ignore[index]
        pad = torch.nn.utils.rnn.pad_sequence
        return (
            pad([index for index, _ in each], batch_first=True),
            pad([weight for _, weight in each], batch_first=True).mT.contiguous(),
        )


def _entropy_weights(lengths: list[int]) -> Float[Tensor, "row query"]:
    """Returns 1 / ln(q+1) over the number of queries for the queries 1..T-1; 0 for the others."""
    query = torch.arange(max(lengths))
    length = torch.tensor(lengths)[:, None]
    counted = (query >= 1) & (query < length)
    return counted / (query.float() + 1).log().clamp(min=0.5) / (length - 1)


def _lags(lengths: list[int]) -> tuple[Int[Tensor, "query lag"], Float[Tensor, "row query lag"]]:
    """Returns the key at each lag from each query, and the weights of the mean over queries."""
    query = torch.arange(max(lengths))[:, None]
    lag = torch.arange((max(lengths) - 1) // 2 + 1)
    length = torch.tensor(lengths)[:, None, None]
    counted = (query - lag >= 1) & (query < length)
    weight = counted.float() / (length - 1 - lag).clamp(min=1)
    return (query - lag).clamp(min=0), weight
