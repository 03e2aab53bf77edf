"""Checks what a user selects from a batch, and turns it into rows, layers and hook points."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.probes import ProbeBatch
from tlens_callback.shadow import Shadow, Stack, Taken
from tlens_callback.shadow.stacks import as_tuple


def checked_selection(values: Iterable[object] | None, what: str) -> tuple[object, ...] | None:
    """Returns a selection as a tuple; None stays None and means the default.

    Raises:
        ValueError: for a string instead of a list of strings, an empty list, or an item twice.
    """
    if values is None:
        return None
    if isinstance(values, str):
        raise ValueError(f"{what}={values!r} is one string; give a list: {what}=[{values!r}].")
    chosen = tuple(values)
    if not chosen:
        raise ValueError(f"{what}={chosen} selects nothing; leave it out for the default.")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{what}={list(chosen)} names something twice.")
    return chosen


def index_or_nan(
    index: Int[Tensor, "..."], chosen_by: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Returns the index as a number, or NaN if the value that it was chosen by is NaN.

    Then any other index might have been chosen.
    """
    return index.float().masked_fill(chosen_by.isnan(), torch.nan)


def rows_named(batch: ProbeBatch, names: Iterable[str]) -> list[int]:
    """Returns the rows of the probes with these names, in the given order.

    Raises:
        ValueError: for a name that no probe has.
    """
    row = {probe.name: i for i, probe in enumerate(batch.probes)}
    names = list(names)
    if unknown := [name for name in names if name not in row]:
        raise ValueError(f"There is no probe {unknown[0]!r}; the probes are {list(row)}.")
    return [row[name] for name in names]


def chosen_rows(batch: ProbeBatch, names: Iterable[str] | None) -> list[int]:
    """Returns the rows of the probes with these names; for None, all that are not repeated blocks.

    Raises:
        ValueError: for a name that no probe has.
    """
    return plain_rows(batch) if names is None else rows_named(batch, names)


def plain_rows(batch: ProbeBatch) -> list[int]:
    """Returns the rows that are not repeated blocks."""
    return [i for i, probe in enumerate(batch.probes) if probe.block is None]


def block_rows(batch: ProbeBatch) -> dict[int, list[int]]:
    """Returns block length -> the rows of repeated blocks of that length; lengths ascending."""
    rows: dict[int, list[int]] = {}
    for i, probe in enumerate(batch.probes):
        if probe.block is not None:
            rows.setdefault(probe.block, []).append(i)
    return dict(sorted(rows.items()))


def demand_blocks(batch: ProbeBatch, name: str) -> dict[int, list[int]]:
    """Returns `block_rows`, which must not be empty.

    Raises:
        ValueError: if there are none; `name` is the instrument that needs them.
    """
    blocks = block_rows(batch)
    if not blocks:
        raise ValueError(
            f"{name} needs repeated random blocks, and there are none among the probes. Add some "
            f"of several lengths, such as Probe.repeated('repeat-8', block=8, times=6) and "
            f"Probe.repeated('repeat-24', block=24)."
        )
    return blocks


def tokens_after_first(batch: ProbeBatch, rows: Sequence[int]) -> tuple[int, ...]:
    """Returns the places, in the flattened batch, of every token of these rows except the first of
    each; those of the first row come first."""
    return tuple(place(batch, row, pos) for row in rows for pos in range(1, batch.lengths[row]))


def last_tokens(batch: ProbeBatch, rows: Sequence[int]) -> tuple[int, ...]:
    """Returns the place, in the flattened batch, of the last token of each of these rows."""
    return tuple(place(batch, row, batch.lengths[row] - 1) for row in rows)


def place(batch: ProbeBatch, row: int, pos: int) -> int:
    """Returns the place of a token in the flattened batch, [probe * pos]."""
    return row * batch.tokens.shape[1] + pos


def attention_layers(shadow: Shadow, name: str) -> list[int]:
    """Returns the layers that have attention patterns; in a hybrid model not all do.

    Raises:
        ValueError: if no layer has any; `name` is the instrument that needs them.
    """
    layers = shadow.attention_layers
    if not layers:
        raise ValueError(
            f"{name}: no layer of this model has attention patterns that TransformerLens's bridge "
            f"shows; leave the instrument out."
        )
    return layers


def pattern_hook(layer: int) -> str:
    """Name of the hook point of attention patterns, [probe, head, query, key]."""
    return f"blocks.{layer}.attn.hook_pattern"


def resid_hook(layer: int) -> str:
    """Name of the hook point of the residual stream after the layer, [probe, pos, d_model]."""
    return f"blocks.{layer}.hook_resid_post"


def z_hook(layer: int) -> str:
    """Name of the hook point of each head's input to W_O, [probe, pos, head, d_head]."""
    return f"blocks.{layer}.attn.hook_z"


def mlp_norm_hook(layer: int) -> str:
    """Name of the hook point of the scale of the norm after the MLP, if any, [probe, pos, 1]."""
    return f"blocks.{layer}.ln2_post.hook_scale"


def of_layers(taken: Mapping[Any, Taken], end: str) -> dict[int, tuple[Tensor, ...]]:
    """Returns layer -> what the stacks of this hook point gave for it, one tensor for each part."""
    return {
        layer: tuple(part[at] for part in as_tuple(value))
        for key, value in taken.items()
        if isinstance(key, Stack) and key.end == end
        for at, layer in enumerate(key.layers)
    }


def alike(layers: Iterable[int], size: Callable[[int], int]) -> list[tuple[int, ...]]:
    """Returns the layers in groups of equal size, which can be stacked."""
    groups: dict[int, tuple[int, ...]] = {}
    for layer in layers:
        groups[size(layer)] = (*groups.get(size(layer), ()), layer)
    return list(groups.values())


def neuron_layers(shadow: Shadow) -> list[int]:
    """Returns the layers whose MLP has neurons.

    In a mixture-of-experts layer the bridge's hook_post is the layer's output.
    """
    hooks = shadow.hooks
    return [
        i
        for i in range(shadow.n_layers)
        if neuron_hook(i) in hooks
        and hooks[neuron_hook(i)] is not hooks.get(f"blocks.{i}.mlp.hook_out")
    ]


def neuron_hook(layer: int) -> str:
    """Name of the hook point of neuron activations, [probe, pos, neuron]."""
    return f"blocks.{layer}.mlp.hook_post"


def similar_lengths(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Groups texts of similar length, by their numbers, into batches of at most `tokens` tokens
    with padding; a longer text has a batch of its own."""
    parts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if parts and (len(parts[-1]) + 1) * lengths[i] <= tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def layer_labels(layers: Sequence[int], shadow: Shadow) -> dict[str, list[str]]:
    """Returns labels for the layers, if they are not all layers of the model in order."""
    return (
        {} if list(layers) == list(range(shadow.n_layers)) else {"layer": [str(i) for i in layers]}
    )
