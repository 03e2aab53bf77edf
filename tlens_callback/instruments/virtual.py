"""Composes the attention of pairs of heads: a later head attends through an earlier one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.selection import (
    attention_layers,
    block_rows,
    demand_blocks,
)
from tlens_callback.meaning import Description, Meaning, Needs
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow, Stack, Taken, Taps


@dataclass(frozen=True)
class VirtualHeads:
    """Scores where a head attends through a head of an earlier layer, on repeated random blocks.

    A head h2 of layer l2 that reads what a head h1 of an earlier layer l1 has written attends,
    through it, by C = A[l2,h2] @ A[l1,h1], C[q, k] = sum_m A[l2,h2][q, m] * A[l1,h1][m, k]. On
    `[BOS, r_1..r_S, r_1..r_S, ...]`, with BOS at position 0, S the block length and T the number
    of tokens:

    - lag: the d of the largest mean over q > d of C[q, q-d]; lag_mass: that mean. Key 0, the sink,
      is left out, and so are lags that fewer than half of the queries 1..T-1 have
      (d <= (T-1) // 2). It is averaged over the sequences of one block length and then over the
      block lengths, each time over those that have the lag, as `HeadScores` does for A.
    - induction: mean over q = S+1..2S of C[q, q-S+1], averaged over the sequences of one block
      length; minimum over the block lengths.
    - lag_gain, induction_gain: the control. It is the pair's score minus that of the better of the
      two heads alone: lag_mass minus the larger of both heads' means at the pair's lag; induction
      minus the larger of both heads' own, for each block length, before the minimum. An induction
      head after a head that attends to its own token has a high composed score but no gain, and is
      no virtual head.

    The pairs are ranked by gain, twice: `lag*` are those of largest lag_gain, `induction*` those
    of largest induction_gain. A pattern shows where information could come from, not whether the
    two heads' value circuits pass it on.

    Only the strongest heads of the model are composed (all heads, if there are no more): those of
    largest mean over q > S of max over 1 <= k < q of A[q, k], averaged over sequences and lengths
    as above. This is attention to one earlier place that is not the sink. If these heads form
    fewer than k pairs in different layers, the remaining ranks are 0 and have no name.

    Args:
        k: pairs in each list; fewer if the model has fewer.
        strongest: heads to compose; time grows with its square, memory in proportion.

    Keys:
        virtual_heads/lag_pair: [rank], index, 0..heads^2-1; later * heads + earlier, where a head
            has the number layer * n_heads + head and heads = layers * n_heads; the texts are names
            such as L1H2*L0H3, later head first. With more than 4096 heads float32 cannot hold the
            index exactly: use the texts
        virtual_heads/lag: [rank], tokens, 0..(T-1)//2
        virtual_heads/lag_mass: [rank], probability, 0..1
        virtual_heads/lag_gain: [rank], probability, -1..1
        virtual_heads/induction_pair: [rank], index, 0..heads^2-1; like lag_pair
        virtual_heads/induction: [rank], probability, 0..1
        virtual_heads/induction_gain: [rank], probability, -1..1
        virtual_heads/max_lag_gain: [], probability, -1..1; maximum over all composed pairs
        virtual_heads/max_induction: [], probability, 0..1; maximum over all composed pairs, virtual
            or not
        virtual_heads/max_induction_gain: [], probability, -1..1; maximum over all composed pairs

    Reads:
        blocks.{layer}.attn.hook_pattern, rows of repeated blocks only

    Cost:
        strongest * (1 + 5 * strongest). Until the last layer has run, the strongest heads' patterns
        on the repeated blocks stay on the device in float32, at the end twice. The computation is
        strongest^2 * sequences * 3/8 T^3 products, rounded to TF32 if a trainer has switched
        float32 matmuls to it.

    Source:
        Elhage et al. 2021 (virtual attention heads); Olsson et al. 2022 (induction).

    Raises:
        ValueError: k < 1 or strongest < 2; from `taps`, if no probe is a repeated block, or if
            fewer than two layers of the model have attention patterns.
    """

    description: ClassVar[Description] = Description(
        title="Pairs of heads that look together",
        group="Heads",
        needs=Needs.BLOCKS,
        measures={
            "lag_pair": Meaning(title="Pairs that look back a fixed distance", axes=("rank",)),
            "lag": Meaning(title="Distance that the pair looks back", axes=("rank",)),
            "lag_mass": Meaning(title="Attention of the pair at its distance", axes=("rank",)),
            "lag_gain": Meaning(
                title="Gain of the pair over its heads, at its distance", axes=("rank",)
            ),
            "induction_pair": Meaning(
                title="Pairs that look where an induction head does", axes=("rank",)
            ),
            "induction": Meaning(title="Induction score of the pair", axes=("rank",)),
            "induction_gain": Meaning(
                title="Gain of the pair over its heads, for induction", axes=("rank",)
            ),
            "max_lag_gain": Meaning(title="Largest gain of a pair at its distance", axes=()),
            "max_induction": Meaning(title="Highest induction score of a pair", axes=()),
            "max_induction_gain": Meaning(
                title="Largest gain of a pair for induction", axes=(), headline=True
            ),
        },
    )

    k: int = 8
    strongest: int = 32
    name: str = "virtual_heads"

    def __post_init__(self) -> None:
        demand_numbers(self, k=1)
        if self.strongest < 2:
            raise ValueError(
                f"VirtualHeads(strongest={self.strongest}) has fewer than two heads to compose; "
                f"give at least 2, such as 32."
            )

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One reduction of all layers; its last call composes the patterns that all have kept."""
        blocks = demand_blocks(batch, type(self).__name__)
        layers = self._layers(shadow)
        lengths = _lengths(batch)
        row = tuple(i for rows in blocks.values() for i in rows)
        per_query, real, per_lag, first_head = batch.once(
            ("virtual heads", *layers, shadow.n_heads),
            lambda: [
                part.to(batch.tokens.device)
                for part in (
                    _per_query(list(blocks), lengths),
                    _not_padding(lengths),
                    _per_lag(lengths),
                    torch.tensor(layers) * shadow.n_heads,
                )
            ],
        )
        strongest = _Strongest(min(self.strongest, len(layers) * shadow.n_heads), per_query)
        width = real.shape[1]

        def keep(
            pattern: Float[Tensor, "layer row head query key"], part: slice
        ) -> tuple[Tensor, ...]:
            strongest.add(pattern[..., :width, :width].float(), first_head[part])
            if part.stop < len(layers):
                return ()
            head, kept = strongest.result(real)
            return head, *_pair_scores(kept, list(blocks), lengths, per_lag)

        return {Stack("attn.hook_pattern", tuple(layers), rows=row): keep}

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields two lists of pairs, and numbers over all pairs."""
        layers, heads = self._layers(shadow), shadow.n_heads
        head, lag, *scores = (np.asarray(part) for (*parts,) in taken.values() for part in parts)
        apart = np.subtract.outer(head // heads, head // heads) > 0  # [later, earlier]
        later, earlier = (head[at] for at in np.nonzero(apart))
        pair = later * (shadow.n_layers * heads) + earlier
        names = np.array(
            [
                f"L{a // heads}H{a % heads}*L{b // heads}H{b % heads}"
                for a, b in zip(later, earlier, strict=True)
            ],
            dtype=np.str_,
        )
        lag, mass, mass_gain, induction, gain = (score[apart] for score in (lag, *scores))
        room = min(self.k, heads**2 * len(layers) * (len(layers) - 1) // 2)
        for kind, by, columns in (
            ("lag", mass_gain, {"lag": lag, "lag_mass": mass, "lag_gain": mass_gain}),
            ("induction", gain, {"induction": induction, "induction_gain": gain}),
        ):
            # NaN comes first: it might be the largest.
            first = np.lexsort((pair, -np.nan_to_num(by, nan=np.inf)))[:room]
            unknown, left = np.isnan(by[first]), (0, room - len(first))
            yield Reading(
                key=f"{self.name}/{kind}_pair",
                values=np.pad(np.where(unknown, np.nan, pair[first]), left),
                axes=("rank",),
                unit="index",
                texts=np.pad(np.where(unknown, "", names[first]), left, constant_values=""),
            )
            for measure, values in columns.items():
                yield Reading(
                    key=f"{self.name}/{measure}",
                    values=np.pad(np.where(unknown, np.nan, values[first]), left),
                    axes=("rank",),
                    unit="tokens" if measure == "lag" else "probability",
                    limits=self._limits(measure, batch),
                )
        for measure, values in (
            ("lag_gain", mass_gain),
            ("induction", induction),
            ("induction_gain", gain),
        ):
            yield Reading(
                key=f"{self.name}/max_{measure}",
                values=np.array(values.max() if len(values) else 0.0),
                unit="probability",
                limits=self._limits(measure, batch),
            )

    def _limits(self, measure: str, batch: ProbeBatch) -> tuple[float, float]:
        if measure == "lag":
            return 0.0, float(_longest_lag(_lengths(batch)))
        return (-1.0 if measure.endswith("gain") else 0.0), 1.0

    def _layers(self, shadow: Shadow) -> list[int]:
        layers = attention_layers(shadow, type(self).__name__)
        if len(layers) < 2:
            raise ValueError(
                f"{type(self).__name__} composes heads of different layers, and only one layer of "
                f"this model has attention patterns; leave the instrument out."
            )
        return layers


class _Strongest:
    """Keeps the n heads with most attention to one earlier place, among those added so far."""

    def __init__(self, n: int, per_query: Float[Tensor, "row query"]) -> None:
        width, device = per_query.shape[1], per_query.device
        self._per_query = per_query
        self._strength = per_query.new_full((n + 1,), -1.0)
        self._head = torch.zeros(n + 1, dtype=torch.long, device=device)
        # The last place takes what is not kept, so that the host need not wait for the comparison.
        self._pattern = per_query.new_zeros(n + 1, len(per_query), width, width)

    def add(
        self,
        pattern: Float[Tensor, "layer row head query key"],
        first_head: Int[Tensor, " layer"],
    ) -> None:
        """Adds some layers' heads; those of each layer are numbered from its `first_head`."""
        n, heads = len(self._head) - 1, pattern.shape[2]
        width = pattern.shape[4]
        place = torch.arange(width, device=pattern.device)
        earlier = (place > 0) & (place < place[:, None])
        peak = (pattern * earlier).amax(4)
        strength = (peak * self._per_query[:, None]).sum((1, 3)).flatten()
        new = strength.topk(min(n, len(strength)))
        old = self._strength[:n].topk(len(new.indices), largest=False)
        # Not `new > old`, so that NaN is kept.
        at = torch.where(new.values <= old.values, n, old.indices)
        layer, head = new.indices // heads, new.indices % heads
        self._strength[at] = new.values
        self._head[at] = first_head[layer] + head
        self._pattern[at] = pattern[layer, :, head]

    def result(
        self, real: Bool[Tensor, "row query"]
    ) -> tuple[Int[Tensor, " head"], Float[Tensor, "row head1 query key"]]:
        """Returns the heads' numbers, and their patterns with the identity as one more pattern.

        The patterns are zero at queries that are padding.
        """
        # In the order of the heads, so that how layers were grouped does not show in any bit.
        order = self._head[:-1].argsort()
        alone = torch.eye(real.shape[1], dtype=self._pattern.dtype, device=real.device)
        kept = torch.cat([self._pattern[order], alone.expand_as(self._pattern[:1])])
        return self._head[order], (kept * real[..., None]).transpose(0, 1).contiguous()


def _pair_scores(
    pattern: Float[Tensor, "row head1 query key"],
    blocks: Sequence[int],
    lengths: Sequence[Sequence[int]],
    per_lag: Float[Tensor, "row lag"],
) -> tuple[Real[Tensor, "later earlier"], ...]:
    """Scores each two heads: lag, its mass and gain, induction and its gain.

    No composed pattern is computed: its sum along a diagonal, sum_q C[q, q-d], is the inner product
    of the later pattern and the earlier one, transposed and shifted by d. The last pattern is the
    identity, so that a head composed with it is the head alone.
    """
    width = pattern.shape[3]
    later = pattern.flatten(2)  # [row, head, query * middle]
    earlier = pattern.mT.flatten(2)  # [row, head, key * middle]

    def diagonal_sum(
        lag: int, start: int, stop: int, of: slice = slice(None)
    ) -> Float[Tensor, "row later earlier"]:
        """Sums the composed pattern at this lag over the queries start..stop-1."""
        return torch.bmm(
            later[of, :, start * width : stop * width],
            earlier[of, :, (start - lag) * width : (stop - lag) * width].mT,
        )

    every_lag = torch.stack([diagonal_sum(d, d + 1, width) for d in range(per_lag.shape[1])])
    by_lag = (every_lag * per_lag.T[:, :, None, None]).sum(1)
    both, own = _together_and_alone(by_lag)
    mass, lag = both.max(0)
    mass_gain = mass - own.gather(0, lag[None])[0]
    stops = np.cumsum([len(of) for of in lengths]).tolist()
    by_block = torch.stack(
        [
            diagonal_sum(block - 1, block + 1, 2 * block + 1, slice(stop - len(of), stop)).mean(0)
            / block
            for block, of, stop in zip(blocks, lengths, stops, strict=True)
        ]
    )
    both, own = _together_and_alone(by_block)
    return lag, mass, mass_gain, both.amin(0), (both - own).amin(0)


def _together_and_alone(
    with_alone: Float[Tensor, "place later1 earlier1"],
) -> tuple[Float[Tensor, "place later earlier"], Float[Tensor, "place later earlier"]]:
    """Returns the score of two heads together, and the larger of their scores alone."""
    together = with_alone[:, :-1, :-1]
    return together, torch.maximum(with_alone[:, :-1, -1:], with_alone[:, -1:, :-1])


def _lengths(batch: ProbeBatch) -> list[list[int]]:
    """Returns for each block length the numbers of tokens of its sequences."""
    return [[batch.lengths[i] for i in rows] for rows in block_rows(batch).values()]


def _longest_lag(lengths: Sequence[Sequence[int]]) -> int:
    return (max(map(max, lengths)) - 1) // 2


def _not_padding(lengths: Sequence[Sequence[int]]) -> Bool[Tensor, "row query"]:
    """Returns which queries are not padding."""
    each = torch.tensor([length for of in lengths for length in of])
    return torch.arange(int(each.max())) < each[:, None]


def _per_query(
    blocks: Sequence[int], lengths: Sequence[Sequence[int]]
) -> Float[Tensor, "row query"]:
    """Returns weights for the mean over queries q > S, a length's sequences, and the lengths."""
    each = [(block, len(of)) for block, of in zip(blocks, lengths, strict=True) for _ in of]
    block, sequences = torch.tensor(each)[:, :, None].unbind(1)
    real = _not_padding(lengths)
    counted = real & (torch.arange(real.shape[1]) > block)
    return counted.float() / counted.sum(1, keepdim=True) / sequences / len(blocks)


def _per_lag(lengths: Sequence[Sequence[int]]) -> Float[Tensor, "row lag"]:
    """Returns weights for the mean over each lag's queries, the sequences and the block lengths.

    Only sequences and block lengths that have the lag count."""
    lags = torch.arange(_longest_lag(lengths) + 1)
    blocks = []
    for of in lengths:
        length = torch.tensor(of)[:, None]
        has = lags <= (length - 1) // 2
        blocks.append(has.float() / (length - 1 - lags).clamp(min=1) / has.sum(0).clamp(min=1))
    return torch.cat(blocks) / torch.stack([block.sum(0) > 0 for block in blocks]).sum(0)
