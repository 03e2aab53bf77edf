"""Reads parameters that `torch.nn.utils.parametrize` computes from others."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tlens_callback.shadow.live import as_inference
from tlens_callback.shadow.packed import dequantised, held, packed, plain_linear


def parametrized(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of this module that are computed at every use."""
    if not parametrize.is_parametrized(module):
        return frozenset()
    lists: Any = module.parametrizations
    return frozenset(lists.keys())


def original(module: nn.Module, name: str) -> Tensor:
    """The parameter itself, the first of those that it is made of, or what it is packed in."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        return parameter
    if name in packed(module):
        return held(module)
    if name in parametrized(module):
        lists: Any = module.parametrizations
        return next(lists[name].parameters())
    # The bias of packed layers may be no parameter, and the result of a copy.
    tensor = getattr(module, name)
    return tensor if tensor.is_leaf else tensor.detach()


@torch.no_grad()
def effective(module: nn.Module, name: str) -> Tensor:
    """The value that the module computes with: the live tensor itself if it is a plain parameter,
    and the dequantised one if it is packed.

    A parametrisation is read as in inference and gets its state back: in training spectral
    normalisation changes its vectors at every use.
    """
    if name in packed(module):
        return dequantised(module)
    if name not in parametrized(module):
        return original(module, name).detach()
    lists: Any = module.parametrizations
    with as_inference(lists[name]):
        return lists[name]().detach()


def plain(module: nn.Module) -> nn.Module:
    """A module of the class that was parametrised, with the effective values as parameters."""
    if packed(module):
        return plain_linear(module)
    names = parametrized(module)
    if not names:
        return module
    twin = object.__new__(type(module).__bases__[0])
    twin.__dict__ = dict(module.__dict__)
    twin.__dict__["_parameters"] = {**module._parameters}
    for name in names:
        value = nn.Parameter(effective(module, name), requires_grad=False)
        twin.__dict__["_parameters"][name] = value
    children = {n: child for n, child in module._modules.items() if n != "parametrizations"}
    twin.__dict__["_modules"] = children
    return twin
