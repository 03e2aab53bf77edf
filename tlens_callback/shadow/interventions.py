"""Runs forward passes with replaced activations, or from a later layer on.

`edited` and `starting_at` are context managers around `shadow.logits` or `shadow.run`, and can be
combined:

    with edited(shadow, {"blocks.3.attn.hook_z": zero_head}), starting_at(shadow, 3, resid):
        logits = shadow.logits(tokens)

`captured` and `effects` are built on them: `captured` runs one text unchanged, and `effects`
measures what changes when one of its activations is replaced.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tlens_callback.shadow.shadow import Shadow

TOKENS = 2048
"""Most tokens in one batch of variants, including the text itself.

The memory for attention and logits grows with it. A text that is too long runs with one variant.
"""

Edit = Callable[[Tensor], Tensor]
"""Takes an activation and returns its replacement; it must not write to its argument."""

Change = Callable[[Tensor, Tensor], None]
"""Writes into a copy of an activation, [variant, pos, ...]; also gets the variants' numbers."""

Score = Callable[[Tensor], Tensor]
"""Takes logits [variant, kept, vocab] and returns a few numbers for each: [variant, ...]."""


@contextmanager
def edited(shadow: Shadow, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replaces activations at hook points, for the forward passes inside the `with` block.

    A hook that is added to an edited hook point inside the block sees the new activation; a hook
    that was there before sees the old one.

    Raises:
        ValueError: if a name is no hook point of this model.
    """
    handles = []
    try:
        for name, edit in edits.items():
            point: Any = shadow.hook(name)
            handles.append((point, point.add_hook(_replacing(edit))))
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


@contextmanager
def starting_at(
    shadow: Shadow, layer: int, resid: Float[Tensor, "probe pos d_model"]
) -> Iterator[None]:
    """Starts the forward passes inside the `with` block at a layer, with `resid` as its input.

    `resid` enters as `blocks.{layer}.hook_resid_pre`, and earlier layers do not run. The tokens of
    a forward pass still set its batch size and its length.
    """
    *before, first = list(shadow.bridge.blocks)[: layer + 1]  # type: ignore[arg-type]
    blocks: list[nn.Module] = [*before, first]
    enter, run = first.forward, blocks[0].forward

    def entering(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert hidden.shape == resid.shape, (hidden.shape, resid.shape)
        return enter(resid, *args, **kwargs)

    def skipping(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if blocks[0] not in _IN_TUPLES:  # a layer has to run once to show its return type
            _IN_TUPLES[blocks[0]] = isinstance(run(hidden, *args, **kwargs), tuple)
        return (hidden,) if _IN_TUPLES[blocks[0]] else hidden

    layers = shadow.mirror.layers
    try:
        if layers is not None and blocks[0] in _IN_TUPLES:
            layers.first = layer
        for block in before:
            vars(block)["forward"] = skipping
        vars(first)["forward"] = entering
        yield
    finally:
        if layers is not None:
            layers.first = 0
        for block in blocks:
            vars(block).pop("forward", None)


_IN_TUPLES: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""A model's first layer -> whether its layers return their output in a tuple (GPT-J's do)."""


def captured(
    shadow: Shadow,
    tokens: Int[Tensor, " pos"],
    names: Iterable[str],
    positions: Int[Tensor, " kept"] | None = None,
    *,
    grad: bool = False,
) -> tuple[Float[Tensor, "1 kept vocab"], dict[str, Tensor]]:
    """Runs one text unchanged, and returns the logits and the activations at the hook points.

    The activations are [1, pos, ...].

    Args:
        grad: make the activations nodes of the logits' graph, for `torch.autograd.grad`.

    Raises:
        ValueError: if a name is no hook point of this model.
    """
    got: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        got[name] = value.detach().requires_grad_() if grad and not value.requires_grad else value
        return got[name]

    with edited(shadow, {name: partial(keep, name) for name in names}):
        logits = shadow.logits(tokens[None], positions, grad=grad)
    return logits, got


@dataclass(frozen=True)
class Variants:
    """Variants of a text that differ from it in one activation of one layer.

    Attributes:
        layer: the first layer that the difference affects.
        hook: a hook point of that layer.
        which: number of each variant: a head, a position.
        change: writes the variants with the given numbers into copies of the activation.
    """

    layer: int
    hook: str
    which: Int[Tensor, " variant"]
    change: Change


@torch.no_grad()
def effects(
    shadow: Shadow,
    tokens: Int[Tensor, " pos"],
    variants: Sequence[Variants],
    score: Score,
    *,
    positions: Int[Tensor, " kept"] | None = None,
    rows: int,
) -> tuple[Float[Tensor, "1 ..."], list[Float[Tensor, "variant ..."]]]:
    """Returns a text's score, and for each of `variants` their scores minus the text's.

    One batch takes up to `rows` variants, or fewer if the text is long (`TOKENS`). It may hold
    variants of several layers, and begins at the first of these layers. The text itself is a row
    of each batch, because in half precision the rounding depends on the size of a batch.

    Args:
        score: computes the numbers that are kept of a batch's logits.
        positions: where to take logits. Default: everywhere.
    """
    rows = max(1, min(rows, TOKENS // len(tokens) - 1))
    batches = list(_batches(variants, rows))
    entry = [variants[batch[0][0]].layer for batch in batches]
    logits, resid = captured(shadow, tokens, [_resid(layer) for layer in entry], positions)
    found: list[list[Tensor]] = [[] for _ in variants]
    for layer, batch in zip(entry, batches, strict=True):
        sizes = [1] + [len(part) for _, part in batch]
        many = (sum(sizes), -1, -1)
        changes: dict[str, list[tuple[slice, Tensor, Change]]] = {}
        for (i, part), start in zip(
            batch, itertools.accumulate(sizes[1:], initial=1), strict=False
        ):
            place = slice(start, start + len(part))
            changes.setdefault(variants[i].hook, []).append((place, part, variants[i].change))
        edits = {hook: partial(_written, parts) for hook, parts in changes.items()}
        with starting_at(shadow, layer, resid[_resid(layer)].expand(many)), edited(shadow, edits):
            scores = score(shadow.logits(tokens.expand(many[:2]), positions))
        for (i, _), own in zip(batch, (scores - scores[:1]).split(sizes)[1:], strict=True):
            found[i].append(own)
    return score(logits), [torch.cat(parts) for parts in found]


def demand_heads(z: Float[Tensor, "*batch head d_head"], shadow: Shadow, name: str) -> None:
    """Raises a ValueError if the bridge does not split `hook_z` into the model's heads.

    In a model with a latent for keys and values, the outputs of heads have another width than the
    queries, and the bridge splits `hook_z` across heads (DeepSeek; transformer-lens 4.3.0).

    Raises:
        ValueError: for such a model; `name` is the instrument that needs heads.
    """
    if z.shape[-2] != shadow.n_heads:
        raise ValueError(
            f"{name}: the bridge splits the output of this model's {shadow.n_heads} heads into "
            f"{z.shape[-2]} pieces, so none of them belongs to one head. Leave the instrument out, "
            f"or do not let it look at heads."
        )


def _batches(variants: Sequence[Variants], rows: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Splits the variants, sorted by layer, into batches of up to `rows`.

    A batch is a list of (index in `variants`, numbers of the variants).
    """
    batch, room = [], rows
    for i in sorted(range(len(variants)), key=lambda i: variants[i].layer):
        left = variants[i].which
        while len(left):
            batch.append((i, left[:room]))
            left, room = left[room:], room - len(left[:room])
            if not room:
                yield batch
                batch, room = [], rows
    if batch:
        yield batch


def _written(changes: Sequence[tuple[slice, Tensor, Change]], value: Tensor) -> Tensor:
    value = value.clone()
    for place, which, change in changes:
        change(value[place], which)
    return value


def _resid(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"


def _replacing(edit: Edit) -> Callable[..., Tensor]:
    def replace(value: Tensor, hook: Any) -> Tensor:
        del hook
        return edit(value)

    return replace
