"""Keeps what modules hold beside parameters equal to the live model's, and apart from it."""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

_SMALL = 2**20
"""Bytes up to which a buffer is copied; a larger one is a table that no forward pass writes to."""


class ModuleState:
    """Buffers, and attributes that are numbers or tensors, of one module of the mirror.

    A forward pass may change them: rotary embeddings with dynamic scaling remember the longest
    input so far, and what they compute depends on it. So the module of the mirror gets them from
    the live one before each pass, and a pass of the mirror changes the mirror's own.

    Args:
        module: the mirror's module.
        live: the live model's module without its adapters.
        device: of the mirror.
    """

    def __init__(self, module: nn.Module, live: nn.Module, device: torch.device) -> None:
        self._module, self._live, self._device = module, live, device
        self._seen: dict[str, float] = {}
        self._tables: dict[str, tuple[int, int]] = {}

    @staticmethod
    def of(module: nn.Module, live: nn.Module, device: torch.device) -> "ModuleState | None":
        """The state of this module; None if it holds no tensors beside its parameters."""
        tensors = (*module._buffers.values(), *vars(module).values())
        if not any(isinstance(value, Tensor) for value in tensors):
            return None
        return ModuleState(module, live, device)

    def follow(self) -> None:
        """Takes over what the live module holds now."""
        buffers, attributes = self._module._buffers, vars(self._module)
        for name, value in self._live._buffers.items():
            if name in buffers and value is not None:
                buffers[name] = self._taken(name, value, buffers[name])
        for name, value in vars(self._live).items():
            own = attributes.get(name)
            if isinstance(value, Tensor) and own is not None:
                # A length is a number at first and a tensor after the first long input.
                self._seen.pop(name, None)
                setattr(self._module, name, self._taken(name, value, own))
            # The bridge may have changed an attribute on purpose: only what changes is taken over.
            elif name in attributes and _is_number(value):
                if self._seen.get(name) != value:
                    self._seen[name] = value
                    setattr(self._module, name, value)

    def _taken(self, name: str, value: Tensor, own: Any) -> Tensor:
        """The live tensor's value in a tensor that nothing else holds, or the tensor if large."""
        value = value.detach()
        if value.numel() * value.element_size() <= _SMALL:
            return value.to(self._device, copy=True)
        at = value.data_ptr(), value._version
        if not isinstance(own, Tensor) or self._tables.get(name) != at:
            self._tables[name] = at
            own = value.to(self._device)
        return own


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
