"""Forward passes that are not the model's own: activations replaced, layers before one skipped.

Both are context managers around `shadow.logits` or `shadow.run`, and can be combined:

    with edited(shadow, {"blocks.3.attn.hook_z": zero_head}), starting_at(shadow, 3, resid):
        logits = shadow.logits(tokens)
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tlens_callback.shadow import Shadow

Edit = Callable[[Tensor], Tensor]
"""An activation in, what shall stand in its place out; it must not write to what it is given."""


@contextmanager
def edited(shadow: Shadow, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replaces activations at hook points, for the forward passes inside the `with`.

    What listens at an edited hook point, or is added to it inside the `with`, sees the new
    activation.

    Raises:
        ValueError: for a name that is no hook point of this model.
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
    """Begins at a layer: `resid` enters it as `blocks.{layer}.hook_resid_pre`, and the layers
    before it do not run. The tokens of the forward pass still set its batch and its length.
    """
    *before, first = list(shadow.bridge.blocks)[: layer + 1]  # type: ignore[arg-type]
    blocks: list[nn.Module] = [*before, first]
    enter, in_tuples = first.forward, _in_tuples(shadow) if before else False

    def entering(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert hidden.shape == resid.shape, (hidden.shape, resid.shape)
        return enter(resid, *args, **kwargs)

    def skipping(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if in_tuples else hidden

    try:
        for block in before:
            vars(block)["forward"] = skipping
        vars(first)["forward"] = entering
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _in_tuples(shadow: Shadow) -> bool:
    """Whether the model's layers return their output in a tuple (GPT-J's do)."""
    first: Any = shadow.bridge.blocks[0]
    if first not in _KNOWN:
        found: list[Any] = []
        handle = first.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            shadow.logits(torch.zeros(1, 1, dtype=torch.long, device=shadow.device))
        finally:
            handle.remove()
        _KNOWN[first] = isinstance(found[0], tuple)
    return _KNOWN[first]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _replacing(edit: Edit) -> Callable[..., Tensor]:
    def replace(value: Tensor, hook: Any) -> Tensor:
        del hook
        return edit(value)

    return replace
