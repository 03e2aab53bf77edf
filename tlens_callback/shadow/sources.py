"""The sources of the mirror's parameters, and `Weight`, which is what others see of one of them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter of the model, with the value that the model computes with.

    Attributes:
        name: name of the parameter in a plain model of the live model's class.
        own: the shadow's parameter, which is the live one where it is borrowed.
        live: the live model's parameter, without adapters, or what it is packed in. Of a sharded
            model it has only shape, dtype and requires_grad, and NaN for numbers;
            `Mirror.live_values` gives these.
        trained: whether training changes the effective value, because the live parameter or an
            adapter on it is trained.
        layer: the decoder layer that it belongs to, or None.
    """

    name: str
    own: Tensor
    live: Tensor
    trained: bool
    layer: int | None

    @property
    def value(self) -> Tensor:
        """The effective value, on the shadow's device and in its dtype: with adapters merged.

        That of a streamed layer is NaN outside `with shadow.layer(weight.layer)`, and has to be
        copied to be used after it.
        """
        return self.own.detach()


@dataclass(eq=False)
class Stored:
    """A parameter that the mirror stores: a merged weight, or a copy in another place or dtype."""

    like: Tensor
    dtype: torch.dtype
    merged: bool
    users: list[tuple[nn.Module, str]]
    layers: set[int | None]
    stamp: tuple[int, int] | None = None
    """The address of a copied live tensor's data, and how often it had been written."""

    @property
    def bytes(self) -> int:
        return self.like.numel() * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Source:
    """The source of the parameters of one module; each name is in one mapping, or is tied."""

    path: str
    module: nn.Module
    live: nn.Module
    adapted: frozenset[str]
    layer: int | None
    aliased: dict[str, int] = field(default_factory=dict)
    """Parameters that are the live tensor itself: the address of its data when it was borrowed."""
    stored: dict[str, Stored] = field(default_factory=dict)
