"""Counts what runs inside a `with` block: kernels, bytes, floating point operations, waits.

    with Counted() as counted:
        ...
    print(counted.kernels, counted.bytes, counted.flops)

Each operation that torch dispatches and that is more than another view of a tensor counts as one
kernel, which on a GPU it is or is more than. Its bytes are those of the tensors that it takes and
returns, each read or written once; of an operation that picks elements, only what it picks. Its
operations are those of `torch.utils.flop_counter`, else one for each element that it returns.

The host waits for a device where it reads a number of it, where a shape depends on numbers, and
where a tensor is made of Python's numbers. These waits are counted on a CPU, too.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_PICKS = {"index", "index_select", "gather", "embedding"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "lift_fresh"}
_NOT_WORK = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.waits = 0
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        by_mask = name in ("index", "index_put_") and any(t.dtype == torch.bool for t in taken[1:])
        self.waits += by_mask or name in _WAITS
        storages = {t.untyped_storage().data_ptr() for t in taken}
        writes = func._schema.is_mutable
        viewed = all(t.untyped_storage().data_ptr() in storages for t in given)
        if name in _NOT_WORK or not given or (viewed and not writes):
            return result
        self.kernels += 1
        read = given + taken[1:] if name in _PICKS else taken
        self.bytes += sum(t.numel() * t.element_size() for t in [*read, *given])
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket]
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        else:
            self.flops += sum(t.numel() for t in given)
        return result


def fastest(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The least seconds of several calls."""
    found = []
    for _ in range(rounds):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - began)
    return min(found)


def machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Returns bytes a second of a copy, and floating point operations a second of a product."""
    source = torch.ones(2**28 // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return (
        copied / fastest(lambda: target.copy_(source), device),
        2 * size**3 / fastest(lambda: a @ b, device),
    )


def launches(work: Callable[[], object], device: torch.device) -> int:
    """Kernels that `work` starts: on a GPU those that its profiler sees, else those `Counted`."""
    if device.type != "cuda":
        with Counted() as counted:
            work()
        return counted.kernels
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    kinds = [event.device_type for event in profiler.events()]
    return sum(kind == torch.autograd.DeviceType.CUDA for kind in kinds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
