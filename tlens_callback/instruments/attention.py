"""Reads the attention pattern of every head, and its change since the first observation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.baseline import FirstLayers
from tlens_callback.instruments.parts.selection import (
    attention_layers,
    block_rows,
    checked_selection,
    layer_labels,
    plain_rows,
    rows_named,
)
from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow, Stack, Taken, Taps


@dataclass(frozen=True)
class AttentionPatterns:
    """Reads the attention pattern of every head in every layer, for chosen probes.

    `pattern[layer, head, query, key]` is the softmax output: how much of the query token's
    attention goes to the key token. Each row of keys sums to one (to less if the model has
    attention sinks of its own), and keys after the query have zero. With grouped key-value heads
    there is one pattern per query head. Padding is cut off.

    Patterns of more than `most` values are pooled: with blocks of s tokens, the value for the query
    block Q and the key block K is the mean over q in Q of the sum over k in K of pattern[q, k].
    Rows still sum to one. s is the smallest number with which there are at most `most` values; a
    line says it when the run begins.

    Args:
        probes: names of the probes to show. Default: every probe that is not a repeated block, and
            the first of the longest repeated blocks, on which an induction head shows as an
            off-diagonal stripe.
        layers: layers to show. Default: all.
        most: values of all patterns of a probe, above which they are pooled. With the default,
            whole patterns are shown of 249 tokens in SmolLM2-135M, of 128 in Llama-3-8B, and of 57
            in Llama-3-70B.

    Keys:
        attention_patterns/pattern/<probe>: [layer, head, query, key], probability, 0..1

    Reads:
        blocks.{layer}.attn.hook_pattern

    Cost:
        layers * n_heads * length^2 per probe, at most `most`.

    Source:
        Vaswani et al. 2017, section 3.2.

    Raises:
        ValueError: most < 1; an empty or repeated selection; from `taps`, an unknown probe or
            layer.
    """

    description: ClassVar[Description] = Description(
        title="Attention",
        group="Pictures",
        measures={
            "pattern": Meaning(
                title="Attention",
                axes=("layer", "head", "query", "key"),
                headline=True,
                quantity=Quantity.ATTENTION,
            ),
        },
    )

    probes: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    most: int = 2**24
    name: str = "attention_patterns"

    def __post_init__(self) -> None:
        demand_numbers(self, most=1)
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))
        object.__setattr__(self, "layers", checked_selection(self.layers, "layers"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One reduction of all layers: each chosen row, cropped to its tokens, or pooled."""
        rows = self._rows(batch)
        sizes = [(batch.lengths[row], self._block(shadow, batch.lengths[row])) for row in rows]

        def crop(
            pattern: Float[Tensor, "layer row head query key"], part: slice
        ) -> tuple[Tensor, ...]:
            return tuple(
                # A copy: no view keeps the whole pattern alive.
                own.clone() if block == 1 else _pooled(own, block)
                for i, (n, block) in enumerate(sizes)
                for own in (pattern[:, i, :, :n, :n],)
            )

        return {Stack("attn.hook_pattern", tuple(self._layers(shadow)), tuple(rows)): crop}

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterable[Reading]:
        """Yields one reading for each probe, with all layers and heads."""
        labels = layer_labels(self._layers(shadow), shadow)
        (patterns,) = taken.values()
        for row, pattern in zip(self._rows(batch), patterns, strict=True):
            block = self._block(shadow, batch.lengths[row])
            tokens = _block_names(batch.labels[row], block)
            yield Reading(
                key=f"{self.name}/pattern/{batch.probes[row].name}",
                values=pattern.numpy(),
                axes=("layer", "head", "query", "key"),
                unit="probability",
                labels={**labels, "query": tokens, "key": tokens},
                limits=(0.0, 1.0),
            )

    def pooled(self, shadow: Shadow, batch: ProbeBatch) -> dict[str, int]:
        """Probe -> how many tokens its patterns are pooled by, for those that are pooled."""
        blocks = {
            batch.probes[row].name: self._block(shadow, batch.lengths[row])
            for row in self._rows(batch)
        }
        return {probe: block for probe, block in blocks.items() if block > 1}

    def _block(self, shadow: Shadow, length: int) -> int:
        heads = len(self._layers(shadow)) * shadow.n_heads
        return next(
            s
            for s in range(1, length + 1)
            if heads * (-(-length // s)) ** 2 <= self.most or s == length
        )

    def _layers(self, shadow: Shadow) -> list[int]:
        with_patterns = attention_layers(shadow, type(self).__name__)
        layers = with_patterns if self.layers is None else self.layers
        if outside := [layer for layer in layers if not 0 <= layer < shadow.n_layers]:
            raise ValueError(
                f"{type(self).__name__}: there is no layer {outside[0]}; "
                f"the model's layers are 0 to {shadow.n_layers - 1}."
            )
        if without := [layer for layer in layers if layer not in with_patterns]:
            raise ValueError(
                f"{type(self).__name__}: layer {without[0]} has no attention patterns; "
                f"only layers {with_patterns} have them."
            )
        return list(layers)

    def _rows(self, batch: ProbeBatch) -> list[int]:
        if self.probes is not None:
            return rows_named(batch, self.probes)
        blocks = block_rows(batch)
        return plain_rows(batch) + (blocks[max(blocks)][:1] if blocks else [])


def _pooled(
    pattern: Float[Tensor, "layer head query key"], block: int
) -> Float[Tensor, "layer head query_block key_block"]:
    """Returns the attention from each block of queries to each block of keys."""
    n = pattern.shape[-1]
    blocks = -(-n // block)
    room = blocks * block - n
    padded = torch.nn.functional.pad(pattern.float(), (0, room, 0, room))
    sums = padded.unflatten(3, (blocks, block)).sum(4).unflatten(2, (blocks, block)).sum(3)
    sums[:, :, :-1] /= block
    sums[:, :, -1] /= block - room
    return sums


def _block_names(labels: Sequence[str], block: int) -> Sequence[str]:
    """Names each block of tokens by its first and its last."""
    if block == 1:
        return labels
    blocks = [labels[i : i + block] for i in range(0, len(labels), block)]
    return [names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}" for names in blocks]


@dataclass(frozen=True)
class PatternChange(AttentionPatterns):
    """Reads the attention pattern of every head minus its pattern at the first observation.

    `pattern[layer, head, query, key]` is A - A0, positive where the head attends more than it did.
    A row of keys sums to zero (or to what the model's own attention sinks lost). Exactly 0 at the
    first observation. Padding is cut off, and large patterns are pooled as by `AttentionPatterns`.

    Args:
        probes: names of the probes to show. Default: every probe that is not a repeated block; if
            there are none, the repeated blocks.
        layers: layers to show. Default: all.

    Keys:
        pattern_change/pattern/<probe>: [layer, head, query, key], probability, -1..1

    Reads:
        blocks.{layer}.attn.hook_pattern

    Cost:
        layers * n_heads * length^2 per probe; keeps as many numbers, in the model's precision, on
        the device.

    Source:
        Vaswani et al. 2017, section 3.2 (the pattern).

    Raises:
        ValueError: an empty or repeated selection; from `taps`, an unknown probe or layer.
    """

    description: ClassVar[Description] = Description(
        title="Attention: change of each pattern",
        group="Pictures",
        needs=Needs.EARLIER,
        measures={
            "pattern": Meaning(
                title="Change in attention",
                axes=("layer", "head", "query", "key"),
                headline=True,
                of_run=True,
            ),
        },
    )

    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "pattern_change"

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One reduction of all layers: each chosen row, cropped to its tokens, or pooled."""
        stack: Stack
        crop: Any
        ((stack, crop),) = super().taps(shadow, batch).items()
        keys = [f"{stack.layers} of {batch.probes[row].name}" for row in self._rows(batch)]
        firsts = [FirstLayers(self.baseline, key, len(stack.layers)) for key in keys]

        def change(pattern: Tensor, part: slice) -> tuple[Tensor, ...]:
            return tuple(
                now.float() - first.of(now, part).float()
                for now, first in zip(crop(pattern, part), firsts, strict=True)
            )

        return {stack: change}

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields one reading for each probe, with all layers and heads."""
        for reading in super().read(taken, shadow, batch):
            yield replace(reading, limits=(-1.0, 1.0))

    def between(
        self, first: Mapping[str, Reading], last: Mapping[str, Reading]
    ) -> Iterator[Reading]:
        """Yields the change from `first` to `last`, from the patterns that both contain."""
        patterns = {
            reading.probe: (key, reading)
            for key, reading in first.items()
            if reading.meaning.quantity is Quantity.ATTENTION
        }
        for reading in last.values():
            if reading.instrument == self.name and reading.probe in patterns:
                key, before = patterns[reading.probe]
                if key in last and before.values.shape == reading.values.shape:
                    yield replace(reading, values=last[key].values - before.values)

    def _rows(self, batch: ProbeBatch) -> list[int]:
        if self.probes is not None:
            return rows_named(batch, self.probes)
        return plain_rows(batch) or list(range(len(batch.probes)))
