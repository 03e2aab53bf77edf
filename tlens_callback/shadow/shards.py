"""Finds what this process holds of a sharded model, and how all shares make it whole again.

It reads the shares where FSDP1, FSDP2 and DeepSpeed ZeRO-3 keep them, and asks none of the three to
gather: that would allocate whole parameters in every process, and leave traces in their state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, Replicate, Shard

ZERO3 = "DeepSpeed ZeRO-3"

Place = tuple[int, str]
"""A parameter of a live module: the module's id and the parameter's name."""


@dataclass(frozen=True, eq=False)
class Share:
    """What this process holds of one tensor that several processes hold together.

    Attributes:
        tensors: shape of each whole tensor in it, and whether it is trained.
        parameters: the live parameters, each with the number of its tensor.
        group: the processes that hold it; None if each of them holds all of it.
        numel, dtype: of what each of them contributes.
        device: where the model computes with it.
        stamp: changes when the share is written to, unless through `.data`; gives None where that
            is not known.
        local: gives the share, flat, [numel].
        join: makes the tensors from all shares, [process, numel].
    """

    tensors: list[tuple[torch.Size, bool]]
    parameters: list[tuple[Place, int]]
    group: dist.ProcessGroup | None
    numel: int
    dtype: torch.dtype
    device: torch.device
    stamp: Callable[[], tuple[int, int] | None]
    local: Callable[[], Tensor]
    join: Callable[[Tensor], list[Tensor]]

    @property
    def bytes(self) -> int:
        """What each process contributes, rounded up so that the next share is aligned."""
        return -(-self.numel * self.dtype.itemsize // 16) * 16

    @property
    def trained(self) -> bool:
        """Whether training writes to any of the tensors."""
        return any(trained for _, trained in self.tensors)


def sharded(model: nn.Module) -> str | None:
    """The name of the way in which the parameters are spread over processes; None if whole."""
    for module in model.modules():
        if isinstance(module, FSDP1):
            return "FSDP1"
        if isinstance(module, FSDPModule):
            return "FSDP2"
        for parameter in module._parameters.values():
            if hasattr(parameter, "ds_id"):
                return ZERO3
            if parameter is not None and isinstance(parameter.data, DTensor):
                return "DTensor"
    return None


def compute_dtypes(model: nn.Module) -> set[torch.dtype]:
    """The precisions in which FSDP gathers parameters for a pass, where it is told one."""
    policies: list[Any] = []
    for module in model.modules():
        if isinstance(module, FSDP1):
            policies.append(module.mixed_precision)
        elif isinstance(module, FSDPModule):
            policies.append(getattr(module._get_fsdp_state(), "_mp_policy", None))
    named = {getattr(policy, "param_dtype", None) for policy in policies}
    return {dtype for dtype in named if dtype is not None}


def share_again(model: nn.Module) -> None:
    """Undoes what a pass without a backward pass, as in an evaluation, leaves under FSDP2: some
    parameters whole, and in the precision of the pass. The next pass gathers them anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shares(model: nn.Module) -> list[Share]:
    """All shares of the model, in the same order in every process.

    Raises:
        ValueError: if a parameter is spread in another way than whole rows or columns.
    """
    share_again(model)
    found: list[Share] = []
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    flat: set[Place] = set()
    for module in model.modules():
        if isinstance(module, FSDP1) and module._handle is not None:
            found.append(_of_flat_parameter(module._handle))
            flat.update(place for place, _ in found[-1].parameters)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (id(module), name) not in flat:
                places.setdefault(id(parameter), []).append((module, name))
    for at in places.values():
        module, name = at[0]
        parameter = module._parameters[name]
        if hasattr(parameter, "ds_id"):
            found.append(_of_zero(at))
        elif parameter is not None and isinstance(parameter.data, DTensor):
            found.append(_of_dtensor(at))
    return found


@contextmanager
def zero_forward(model: nn.Module, *, going_on: bool) -> Iterator[None]:
    """Says to ZeRO-3 whether a forward pass goes on, as DeepSpeed's engine does it around its own.

    In a pass each parameter that is read is gathered, also one of another module (DoRA reads such
    ones), and kept in mind for the passes to come.
    """
    containers: list[Any] = [module._parameters for module in model.modules()]
    zero = [container for container in containers if hasattr(container, "_in_forward")]
    before = [container._in_forward for container in zero]
    try:
        for container in zero:
            container._in_forward = going_on
        yield
    finally:
        # The engine may be in a pass of its own.
        for container, was in zip(zero, before, strict=True):
            container._in_forward = was


def _of_dtensor(at: list[tuple[nn.Module, str]]) -> Share:
    """FSDP2: each process holds some rows; the last ones fewer, or none."""
    module, name = at[0]

    def live() -> Any:
        return module._parameters[name]

    parameter = live()
    mesh, size, dtype = parameter.device_mesh, parameter.shape, parameter.dtype
    split = [(i, p) for i, p in enumerate(parameter.placements) if type(p) is not Replicate]
    if len(split) > 1 or any(type(p) is not Shard for _, p in split):
        raise ValueError(
            f"Parameter {name!r} of a {type(module).__name__} is spread over the processes as "
            f"{parameter.placements}. Only whole rows or columns in each process can be read, as "
            f"FSDP2 keeps them. Train without tensor parallelism to look inside."
        )
    (axis, placement), *_ = split or [(None, Shard(0))]
    group = None if axis is None else mesh.get_group(axis)
    n = 1 if axis is None else mesh.size(axis)
    dim = placement.dim
    rows = size[dim]
    each = -(-rows // n)
    rest = torch.Size([length for i, length in enumerate(size) if i != dim])

    def local() -> Tensor:
        share = live().to_local().detach().movedim(dim, 0).reshape(-1)
        return nn.functional.pad(share, (0, each * rest.numel() - len(share)))

    def join(parts: Tensor) -> list[Tensor]:
        whole = parts.reshape(n * each, *rest)[:rows]
        return [whole.movedim(0, dim).contiguous()]

    def stamp() -> tuple[int, int]:
        share = live().to_local()
        return share.data_ptr(), share._version

    return Share(
        [(size, parameter.requires_grad)],
        [((id(module), name), 0) for module, name in at],
        group,
        each * rest.numel(),
        dtype,
        torch.empty(0, dtype=dtype, device=mesh.device_type).device,
        stamp,
        local,
        join,
    )


def _of_zero(at: list[tuple[nn.Module, str]]) -> Share:
    """ZeRO-3: the flattened parameter in equal pieces, padded."""
    module, name = at[0]

    def live() -> Any:
        return module._parameters[name]

    parameter = live()
    size, numel = torch.Size(parameter.ds_shape), parameter.ds_numel
    if parameter.ds_tensor.dtype != parameter.dtype or parameter.ds_tensor.numel() == 0:
        raise ValueError(
            f"Parameter {name!r} of a {type(module).__name__} is kept by ZeRO-3 quantised or on a "
            f"disk, and cannot be read. Keep it in memory as it is (offload_param to 'cpu' or "
            f"'none', no zero_quantized_weights)."
        )
    from deepspeed.accelerator import get_accelerator  # pyright: ignore[reportMissingImports]

    accelerator: Any = get_accelerator()

    return Share(
        [(size, parameter.requires_grad)],
        [((id(module), name), 0) for module, name in at],
        parameter.ds_process_group,
        parameter.ds_tensor.numel(),
        parameter.dtype,
        torch.empty(0, dtype=parameter.dtype, device=accelerator.current_device_name()).device,
        lambda: (live().ds_tensor.data_ptr(), live().ds_tensor._version),
        lambda: live().ds_tensor.detach().reshape(-1),
        lambda parts: [parts.reshape(-1)[:numel].view(size)],
    )


def _of_flat_parameter(handle: Any) -> Share:
    """FSDP1: the parameters of a unit one after another, in equal pieces, padded."""
    flat = handle.flat_param
    own = [(id(info.module), info.param_name) for info in flat._param_infos]
    same = [
        (
            (id(info.module), info.param_name),
            own.index((id(info.prim_module), info.prim_param_name)),
        )
        for info in flat._shared_param_infos
    ]
    if flat._params is None:
        trained = [flat.requires_grad] * len(own)
    else:
        trained = [parameter.requires_grad for parameter in flat._params]

    def share() -> Tensor:
        # The attribute exists from the first forward pass on.
        return vars(handle.flat_param).get("_local_shard", handle.flat_param.data)

    def join(parts: Tensor) -> list[Tensor]:
        whole = parts.reshape(-1)[: sum(flat._numels_with_padding)]
        return list(handle._get_unflat_views(whole))

    return Share(
        [(torch.Size(shape), grad) for shape, grad in zip(flat._shapes, trained, strict=True)],
        [*((place, i) for i, place in enumerate(own)), *same],
        handle.process_group if handle.uses_sharded_strategy else None,
        share().numel(),
        share().dtype,
        handle.device,
        lambda: None,  # FSDP1 keeps it as `.data`, whose writes are not counted
        lambda: share().detach(),
        join,
    )
