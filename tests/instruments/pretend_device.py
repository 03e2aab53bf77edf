"""A pretend accelerator: its tensors compute on the CPU and are as strict as a GPU's.

What a GPU refuses raises `WrongDevice`: an operation on tensors of both devices (a number without
dimensions may come from the CPU) and a generator of the CPU for a tensor of the device. PyTorch
itself refuses `.numpy()`. `waits` names the operations for which the CPU would wait for a GPU.

Importing this registers a backend for the whole process, so tests run it in a process of its own.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# What PyTorch asks the module of a device for: this one has no generators of its own.
_backend = SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: 0,
    manual_seed_all=lambda seed: None,
    _is_in_bad_fork=lambda: False,
    get_amp_supported_dtype=lambda: [torch.bfloat16],
)
# Of the names that safetensors takes for a device, one that no other library looks for.
_setup_privateuseone_for_python_backend("musa", backend_module=_backend)
DEVICE = torch.device("musa", 0)

waits: list[str] = []
"""The operations so far that a GPU finishes before the CPU goes on."""

_VALUES_NEEDED = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique2", "unique_dim", "unique_consecutive"),
    *("_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_qr", "_linalg_check_errors"),
}
"""On them a size depends, or a decision that the CPU takes."""


class WrongDevice(RuntimeError):
    """An operation that a GPU refuses."""


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in the arguments of an operation. PyTorch's own trees take half of the time."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _replaced(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Arguments or results of an operation, with other tensors."""
    if isinstance(value, Tensor):
        return replace(value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, replace) for item in value)
    return value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, Pretend) else tensor


@cache
def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _compute(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """`__torch_dispatch__`: the operation on what the shells hold, if a GPU would do it."""
    kwargs = kwargs or {}
    name = _name(func)
    tensors = [*_tensors(args), *_tensors(list(kwargs.values()))]
    far = any(isinstance(t, Pretend) for t in tensors)
    mixed = far and any(t.dim() and not isinstance(t, Pretend) for t in tensors)
    there = torch.device(kwargs.get("device") or (DEVICE if far else "cpu")).type == DEVICE.type
    copies = name in ("copy_", "_to_copy")
    if mixed and not copies:
        where = ", ".join(f"{t.device}{list(t.shape)}" for t in tensors)
        raise WrongDevice(f"{name} of tensors on two devices: {where}")
    generator = kwargs.get("generator")
    if there and generator is not None and generator.device.type != DEVICE.type:
        raise WrongDevice(f"{name} on the device with a generator of the {generator.device}")
    crosses = copies and len({there, *(isinstance(t, Pretend) for t in tensors)}) > 1
    by_mask = name.startswith(("index", "_index")) and any(
        t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1])
    )
    if crosses or (far and (name in _VALUES_NEEDED or by_mask)):
        waits.append(name)
    shells = {id(_held(t)): t for t in tensors}
    args = _replaced(args, _held)
    kwargs = {key: _replaced(value, _held) for key, value in kwargs.items()}
    kwargs |= {"device": "cpu"} if there and "device" in kwargs else {}
    if name == "histc" and there:  # The CPU has it for floating point only.
        return Pretend(func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype))
    result = func(*args, **kwargs)
    if not there:
        return result
    # An operation in place gives back the tensor that it was given.
    return _replaced(result, lambda t: shells[id(t)] if id(t) in shells else Pretend(t))


class Pretend(Tensor):
    """A tensor on the device: a shell around the one on the CPU that holds its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretend":
        like: dict[str, Any] = {"strides": held.stride(), "dtype": held.dtype, "device": DEVICE}
        shell = Tensor._make_wrapper_subclass(cls, held.shape, **like)
        shell.held = held
        return shell

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A shell has no storage.
        if func in (Tensor.data_ptr, Tensor.untyped_storage):
            return func(args[0].held)
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    __torch_dispatch__ = classmethod(_compute)


# What the tensors of a GPU are called. Another name is taken for that of packed weights.
Pretend.__name__ = "Tensor"


class Machine(TorchDispatchMode):
    """Inside, factories make tensors on `DEVICE`, and what moves there is seen."""

    __torch_dispatch__ = _compute


def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: Any = None, **_: Any) -> Any:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Any, to: Any, non_blocking: bool = False) -> Any:
    waits.append("of Python numbers")
    to.held.copy_(source)
    return to


# By these PyTorch brings Python numbers to a device, below what a mode sees.
_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
_kernels.impl("_copy_from", _copy_from, "PrivateUse1")


def to_device(model: nn.Module) -> nn.Module:
    """Moves a model in place: tied weights stay tied, tensors that are plain attributes go too."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def move(tensor: Tensor) -> Tensor:
        there: Tensor = Pretend(tensor.detach().clone())
        if isinstance(tensor, nn.Parameter):
            there = nn.Parameter(there, requires_grad=tensor.requires_grad)
        # The old one is kept too, so that its id stays its own.
        return moved.setdefault(id(tensor), (tensor, there))[1]

    for module in model.modules():
        tables: tuple[Any, ...] = module._parameters, module._buffers, vars(module)
        for table in tables:
            table.update({n: move(t) for n, t in table.items() if isinstance(t, Tensor)})
    return model
