"""Borrows the live model for a forward pass, and gives it back as it was."""

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tlens_callback.shadow.packed import repacks
from tlens_callback.shadow.shards import FSDP1

_IMPLEMENTATION = "_attn_implementation_internal"
"""The attribute of a config that names the attention implementation."""

_CONTAINERS = (dict, list, set, deque)


@contextmanager
def as_inference(
    model: nn.Module, *, eager: bool = False, autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Borrows the live model for a forward pass and leaves it afterwards exactly as it was.

    Every module gets back its training flag (which may differ among them) and all that a forward
    pass may have left in it: buffers, their values, other attributes and what lies in containers
    among these. Rotary embeddings whose frequencies depend on the length of the input leave some.
    With `eager` the attention implementation in each config is eager meanwhile. Autocast is off, or
    on in the dtype given.
    """
    modules = list(model.modules())
    configs = _configs(model) if eager else []
    kinds = [vars(config).get(_IMPLEMENTATION) for config in configs]
    # FSDP1 sets itself up in the first forward pass, which must not be undone.
    states = [_State(module) for module in modules if not isinstance(module, FSDP1)]
    flags = [(module, module.training) for module in modules]
    try:
        for module in modules:
            # Their flag decides only how they are packed: they have no dropout.
            module.training = repacks(module)
        for config in configs:
            vars(config)[_IMPLEMENTATION] = "eager"
        kind = next(model.parameters()).device.type
        with torch.no_grad(), torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        for state in states:
            state.restore()
        for module, training in flags:
            module.training = training
        for config, name in zip(configs, kinds, strict=True):
            vars(config)[_IMPLEMENTATION] = name


def logits_of(
    model: nn.Module,
    tokens: Tensor,
    *,
    eager: bool = False,
    autocast: torch.dtype | None = None,
    wrapped: bool = False,
) -> Tensor:
    """The live model's logits, computed as its class does: trainers patch `forward` on the
    instance (autocast, losses).

    Args:
        model: the `PreTrainedModel`; or, if `wrapped`, what its trainer has made of it, whose hooks
            bring the parameters of a sharded model together.
        eager, autocast: see `as_inference`.
    """
    with as_inference(model, eager=eager, autocast=autocast):
        if not wrapped:
            return type(model).forward(model, input_ids=tokens, use_cache=False).logits
        for module in model.modules():
            # Given back by `as_inference`. A compiled module has no other.
            if "_orig_mod" not in module._modules:
                vars(module).pop("forward", None)
            if isinstance(module, PreTrainedModel):
                break
        return model(input_ids=tokens, use_cache=False).logits


def foreign_attention(model: nn.Module) -> list[str]:
    """The names of the model's attention implementations that are not transformers' own.

    Eager attention computes what one of transformers' own (sdpa, flash, flex) does, up to rounding.
    Under another name, or under one of these names, a user may have registered any function.
    """
    names = {vars(config).get(_IMPLEMENTATION) for config in _configs(model)}
    registered = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
    return sorted(
        name
        for name in names - {None, "eager"}
        if not all(_from_transformers(functions.get(name)) for functions in registered)
    )


def _from_transformers(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "")).startswith("transformers.")


def _configs(model: nn.Module) -> list[Any]:
    """Each config that one of the modules holds, once."""
    found = [vars(module).get("config") for module in model.modules()]
    return list({id(config): config for config in found if config is not None}.values())


class _State:
    """All that a forward pass may change in one module, without what lies in its children."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes = vars(module)
        self._before = dict(self._attributes)
        self._contents = [
            (value, value.copy())
            for value in self._before.values()
            if isinstance(value, _CONTAINERS) and value is not module._parameters
        ]
        tensors = (*module._buffers.values(), *self._before.values())
        self._tensors = [
            (tensor, tensor._version, tensor.detach().clone())
            for tensor in tensors
            if isinstance(tensor, Tensor) and not tensor.is_inference()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        if not _same(self._attributes, self._before):
            self._attributes.clear()
            self._attributes.update(self._before)
        for value, before in self._contents:
            if not _same(value, before):
                value.clear()
                (value.extend if isinstance(value, list | deque) else value.update)(before)
        for tensor, version, before in self._tensors:
            if tensor._version != version:
                tensor.copy_(before)


def _same(value: Any, before: Any) -> bool:
    """Whether two containers hold the same objects, in the same order."""
    if len(value) != len(before):
        return False
    if isinstance(value, set):
        return value == before
    ours, theirs = list(value), list(before)
    if isinstance(value, dict):
        ours, theirs = [*ours, *value.values()], [*theirs, *before.values()]
    return all(a is b for a, b in zip(ours, theirs, strict=True))
