"""Reads the attention pattern of every head, and its change since the first observation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.parts.baseline import first_value, probes_suffix
from tlens_callback.instruments.parts.selection import (
    attention_layers,
    block_rows,
    checked_selection,
    layer_labels,
    pattern_hook,
    plain_rows,
    rows_named,
)
from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken


@dataclass(frozen=True)
class AttentionPatterns:
    """Reads the attention pattern of every head in every layer, for chosen probes.

    `pattern[layer, head, query, key]` is the softmax output: how much of the query token's
    attention goes to the key token. Each row of keys sums to one (to less if the model has
    attention sinks of its own), and keys after the query have zero. With grouped key-value heads
    there is one pattern per query head. Padding is cut off.

    Args:
        probes: names of the probes to show. Default: every probe that is not a repeated block, and
            the first of the longest repeated blocks, on which an induction head shows as an
            off-diagonal stripe.
        layers: layers to show. Default: all.

    Keys:
        attention_patterns/pattern/<probe>: [layer, head, query, key], probability, 0..1

    Reads:
        blocks.{layer}.attn.hook_pattern

    Cost:
        layers * n_heads * length^2 per probe.

    Source:
        Vaswani et al. 2017, section 3.2.

    Raises:
        ValueError: an empty or repeated selection; from `taps`, an unknown probe or layer.
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
    name: str = "attention_patterns"

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))
        object.__setattr__(self, "layers", checked_selection(self.layers, "layers"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """One reduction for each layer: the chosen rows, cropped to their tokens, end to end."""
        rows = [(row, batch.lengths[row]) for row in self._rows(batch)]

        def crop(pattern: Float[Tensor, "probe head query key"]) -> Float[Tensor, " entry"]:
            # Concatenated: no view keeps the whole pattern alive, and only one tensor is moved.
            return torch.cat([pattern[row, :, :n, :n].flatten() for row, n in rows])

        return {pattern_hook(layer): crop for layer in self._layers(shadow)}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterable[Reading]:
        """Yields one reading for each probe, with all layers and heads."""
        layers, rows = self._layers(shadow), self._rows(batch)
        labels = layer_labels(layers, shadow)
        flat: list[Any] = [taken[pattern_hook(i)] for i in layers]
        start = 0
        for row in rows:
            n = batch.lengths[row]
            size = shadow.n_heads * n * n
            # One probe after another, and read-only, which spares two copies of all patterns.
            shape = shadow.n_heads, n, n
            values = np.stack([part[start : start + size].view(shape).numpy() for part in flat])
            values.setflags(write=False)
            start += size
            yield Reading(
                key=f"{self.name}/pattern/{batch.probes[row].name}",
                values=values,
                axes=("layer", "head", "query", "key"),
                unit="probability",
                labels={**labels, "query": batch.labels[row], "key": batch.labels[row]},
                limits=(0.0, 1.0),
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


@dataclass(frozen=True)
class PatternChange(AttentionPatterns):
    """Reads the attention pattern of every head minus its pattern at the first observation.

    `pattern[layer, head, query, key]` is A - A0, positive where the head attends more than it did.
    A row of keys sums to zero (or to what the model's own attention sinks lost). Exactly 0 at the
    first observation. Padding is cut off.

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

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """One reduction for each layer: the chosen rows, cropped to their tokens, end to end."""
        names = probes_suffix(batch, self._rows(batch))

        def change(hook: str, crop: Callable[[Tensor], Any]) -> Reduce:
            def minus_first(
                pattern: Float[Tensor, "probe head query key"],
            ) -> Float[Tensor, " entry"]:
                now = crop(pattern)
                return now.float() - first_value(self.baseline, hook + names, now).float()

            return minus_first

        return {hook: change(hook, crop) for hook, crop in super().taps(shadow, batch).items()}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
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
