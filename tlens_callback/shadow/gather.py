"""Brings the shares of a model's parameters together, in groups."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tlens_callback.shadow.shards import Place, Share, shares


class Gather:
    """Brings shares together in rank 0: one collective for each group of processes.

    What may run out of memory is done when it is made: in rank 0 before the others are asked.
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
            total, device = sum(share.bytes for share in members), members[0].device
            everyone = None
            if dist.get_rank() == 0:
                shape = (dist.get_world_size(group), total)
                everyone = torch.empty(shape, dtype=torch.uint8, device=device)
                self._of.update({id(share): everyone for share in members})
                mine = everyone[dist.get_group_rank(group, 0)]
            else:
                mine = torch.empty(total, dtype=torch.uint8, device=device)
            at = 0
            for share in members:
                self._offsets[id(share)] = at
                own = mine[at : at + share.numel * share.dtype.itemsize]
                own.view(share.dtype).copy_(share.local())
                at += share.bytes
            self._buffers.append((group, mine, everyone))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to bring together."""
        return not self._buffers

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
        in_adapters = {
            id(module)
            for tuner in model.modules()
            if isinstance(tuner, BaseTunerLayer)
            for name, part in tuner.named_children()
            if name != "base_layer"
            for module in part.modules()
        }
        self.adapters = {s for s in found if any(of in in_adapters for (of, _), _ in s.parameters)}
        """Those with parameters of adapters, trained or not."""
        for share in found:
            for place, i in share.parameters:
                self._shares[place] = share, i
                self._named.setdefault(place[0], []).append(place[1])
            for i, (shape, trained) in enumerate(share.tensors):
                # Whoever takes it for the numbers finds that they are none.
                none = torch.nan if share.dtype.is_floating_point else 0
                nothing = torch.full((), none, dtype=share.dtype, device=share.device)
                nothing = nothing.expand(shape)
                self._outlines[id(share), i] = nn.Parameter(nothing, requires_grad=trained)
        # FSDP1 shares nothing where there is one process.
        self.device = found[0].device if found else next(model.parameters()).device
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
