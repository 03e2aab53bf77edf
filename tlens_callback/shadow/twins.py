"""Twins: copies of modules that can be read as plain ones, whatever a library has made of them."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

SHELLS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""The names under which `torch.compile`, activation checkpointing and FSDP1 keep the wrapped
module."""

Values = Callable[[nn.Module, str], nn.Parameter | None]
"""Gives a parameter of a live module, or None for one that is read where it is."""


def plain_class(kind: type) -> type:
    """The class of a module before FSDP2 put a subclass of its own in its place."""
    if not issubclass(kind, FSDPModule):
        return kind
    # PyTorch before 2.12 does not say where in the list it is.
    return kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]


def unshelled(module: nn.Module) -> nn.Module:
    """The module inside the shells of compilation, checkpointing and FSDP1."""
    while shell := next((name for name in SHELLS if name in module._modules), None):
        inner = module._modules[shell]
        assert inner is not None
        module = inner
    return module


def shallow(module: nn.Module, kind: type) -> Any:
    """A copy that shares every tensor and none of the containers, and is of the class `kind`."""
    twin = object.__new__(kind)
    for name, value in vars(module).items():
        copied = type(value) in (dict, list, set, OrderedDict)
        twin.__dict__[name] = type(value)(value) if copied else value
    for name in ("_parameters", "_modules", "_buffers"):
        # DeepSpeed puts a class of its own there, which a copy would share with the live module.
        twin.__dict__[name] = dict(vars(module)[name])
    return twin


def whole_twin(
    module: nn.Module,
    values: Values,
    named: Callable[[nn.Module], Iterable[str]],
    *,
    deep: bool = True,
) -> Any:
    """A copy of a module, without shells, whose parameters are whole.

    Args:
        values: gives the parameters that the live modules hold a part of.
        named: names of the parameters that a live module may not list itself.
        deep: the modules in it are such copies too, else they are the live ones.
    """
    module = unshelled(module)
    twin = shallow(module, plain_class(type(module)))
    twin.__dict__.pop("forward", None)
    for name in {**module._parameters, **dict.fromkeys(named(module))}:
        value = values(module, name)
        if value is not None:
            twin.__dict__.pop(name, None)
            twin._parameters[name] = value
    for name, child in module._modules.items() if deep else ():
        if child is not None:
            twin._modules[name] = whole_twin(child, values, named)
    return twin
