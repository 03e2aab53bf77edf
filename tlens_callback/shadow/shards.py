"""Finds what this process holds of a sharded model, and how all shares make it whole again.

It reads the shares where FSDP1, FSDP2 and DeepSpeed ZeRO-3 keep them, and asks none of the three to
gather: that would allocate whole parameters in every process, and leave traces in their state.
"""

from collections.abc import Callable
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
        stamp: changes when the share is written to, unless through `.data`.
        local: gives the share, flat, [numel].
        join: makes the tensors from all shares, [process, numel].
    """

    tensors: list[tuple[torch.Size, bool]]
    parameters: list[tuple[Place, int]]
    group: dist.ProcessGroup | None
    numel: int
    dtype: torch.dtype
    device: torch.device
    stamp: Callable[[], tuple[int, int]]
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


def shares(model: nn.Module) -> list[Share]:
    """All shares of the model, in the same order in every process.

    Raises:
        ValueError: if a parameter is spread in another way than whole rows or columns.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A forward pass without a backward pass, as in an evaluation, leaves some of them whole
            # and in the precision of the pass. The next pass gathers them anew.
            module.reshard()
    found: list[Share] = []
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    flat: set[Place] = set()
    for module in model.modules():
        if isinstance(module, FSDP1) and module._handle is not None:
            if module._handle.uses_sharded_strategy:
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
        torch.empty(0, device=mesh.device_type).device,
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
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()

    return Share(
        [(size, parameter.requires_grad)],
        [((id(module), name), 0) for module, name in at],
        parameter.ds_process_group,
        parameter.ds_tensor.numel(),
        parameter.dtype,
        torch.empty(0, device=accelerator.current_device_name()).device,
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
        handle.process_group,
        share().numel(),
        share().dtype,
        handle.device,
        lambda: (share().data_ptr(), share()._version),
        lambda: share().detach(),
        join,
    )


class Gather:
    """Brings shares together in rank 0: one collective for each group of processes.

    What may run out of memory is done when it is made, before the other processes are asked.
    """

    def __init__(self, wanted: list[Share]) -> None:
        self._offsets: dict[int, int] = {}
        self._buffers: list[tuple[dist.ProcessGroup, Tensor, Tensor | None]] = []
        self._of: dict[int, Tensor] = {}
        self._joined: dict[int, list[Tensor]] = {}
        groups: dict[dist.ProcessGroup, list[Share]] = {}
        for share in wanted:
            if share.group is not None and 0 in dist.get_process_group_ranks(share.group):
                groups.setdefault(share.group, []).append(share)
        for group, members in groups.items():
            total = sum(share.bytes for share in members)
            mine = torch.empty(total, dtype=torch.uint8, device=members[0].device)
            at = 0
            for share in members:
                self._offsets[id(share)] = at
                own = mine[at : at + share.numel * share.dtype.itemsize]
                own.view(share.dtype).copy_(share.local())
                at += share.bytes
            everyone = None
            if dist.get_rank() == 0:
                shape = (dist.get_world_size(group), total)
                everyone = torch.empty(shape, dtype=torch.uint8, device=mine.device)
                self._of.update({id(share): everyone for share in members})
            self._buffers.append((group, mine, everyone))

    def run(self) -> None:
        """The collective; every process calls it, in the same order."""
        for group, mine, everyone in self._buffers:
            into = None if everyone is None else list(everyone.unbind(0))
            dist.gather(mine, into, dst=0, group=group)
        self._buffers.clear()

    def __contains__(self, share: Share) -> bool:
        return share.group is None or id(share) in self._of

    def whole(self, share: Share) -> list[Tensor]:
        """The whole parameters of a share; in rank 0, after `run`."""
        if share.group is None:
            return share.join(share.local()[None])
        if id(share) not in self._joined:
            at = self._offsets[id(share)]
            parts = self._of[id(share)][:, at : at + share.numel * share.dtype.itemsize]
            # Kept for the other parameters of the same share, and only for them.
            self._joined.clear()
            self._joined[id(share)] = share.join(parts.view(share.dtype))
        return self._joined[id(share)]


class Shards:
    """The shares of a model, in the groups in which they are gathered.

    Args:
        model: the live model in all its wrappers.
        layers: the live modules of each decoder layer, which is a group.
        others: a live module outside of them with those in it that its weights depend on; each is a
            group, or some are one if they are in one share.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[list[nn.Module]],
        others: list[list[nn.Module]],
    ) -> None:
        self._shares: dict[Place, tuple[Share, int]] = {}
        self._named: dict[int, list[str]] = {}
        self._outlines: dict[tuple[int, int], nn.Parameter] = {}
        found = shares(model)
        for share in found:
            for place, i in share.parameters:
                self._shares[place] = share, i
                self._named.setdefault(place[0], []).append(place[1])
            for i, (shape, trained) in enumerate(share.tensors):
                nothing = torch.empty((), dtype=share.dtype, device=share.device).expand(shape)
                self._outlines[id(share), i] = nn.Parameter(nothing, requires_grad=trained)
        self.device = found[0].device
        self.groups: list[list[Share]] = []
        self._groups: dict[int, int] = {}
        for modules in layers:
            self._groups.update({id(module): len(self.groups) for module in modules})
            self.groups.append(self._in(modules))
        held: dict[int, int] = {}
        for modules in others:
            members = self._in(modules)
            group = next((held[id(s)] for s in members if id(s) in held), len(self.groups))
            if group == len(self.groups):
                self.groups.append([])
            self.groups[group] += [share for share in members if id(share) not in held]
            held.update({id(share): group for share in members})
            self._groups[id(modules[0])] = group

    def _in(self, modules: list[nn.Module]) -> list[Share]:
        """The shares of these modules, each once."""
        found = [self._shares[id(m), name][0] for m in modules for name in self.named(m)]
        return list({id(share): share for share in found}.values())

    def group_of(self, module: nn.Module) -> int:
        """The group that holds the parameters of a live module."""
        return self._groups[id(module)]

    def named(self, module: nn.Module) -> list[str]:
        """Names of the sharded parameters of a module, which FSDP1 takes away from it."""
        return self._named.get(id(module), [])

    def share(self, module: nn.Module, name: str) -> Share | None:
        """The share that holds a parameter of this module; None for a whole parameter."""
        found = self._shares.get((id(module), name))
        return None if found is None else found[0]

    def outline(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """A parameter of the right shape, dtype and device, without its numbers."""
        found = self._shares.get((id(module), name))
        if found is None:
            return None
        share, i = found
        return self._outlines[id(share), i]

    def reader(self, gather: Gather) -> Callable[[nn.Module, str], nn.Parameter | None]:
        """Gives parameters that were gathered, and outlines of the others."""

        def value(module: nn.Module, name: str) -> nn.Parameter | None:
            found = self._shares.get((id(module), name))
            if found is None or found[0] not in gather:
                return self.outline(module, name)
            share, i = found
            return nn.Parameter(gather.whole(share)[i], requires_grad=share.tensors[i][1])

        return value
