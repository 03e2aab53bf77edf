"""`WholeModules`: live modules with whole parameters, whether processes share these or not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tlens_callback.shadow.gather import Shards
from tlens_callback.shadow.ranks import Ranks
from tlens_callback.shadow.shards import Share, compute_dtypes
from tlens_callback.shadow.twins import Values, whole_twin
from tlens_callback.shadow.weights import parts


class WholeModules:
    """Gives live modules as they are, or where they are sharded, copies that can be read.

    Args:
        ranks: the processes of the run; None if there is only this one.

    Attributes:
        sharded: whether the parameters are spread over processes.
        device: where a sharded model computes; None for another model.
        compute_dtypes: the precisions in which a sharded model gathers its parameters.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks if ranks is not None and ranks.sharded else None
        self.sharded = self._ranks is not None
        self.device: torch.device | None = None
        self.compute_dtypes: set[torch.dtype] = set()
        if self._ranks is not None:
            self.device = self._shards.device
            self.compute_dtypes = compute_dtypes(self._ranks.model)

    def outline(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """What stands for a sharded parameter, the same for tied ones; None for a whole one."""
        return None if self._ranks is None else self._shards.outline(module, name)

    def outlined(self, module: nn.Module) -> nn.Module:
        """The module, or if it is sharded a copy with the shapes of whole parameters alone."""
        return module if self._ranks is None else self._twin(module, self._shards.outline)

    def share(self, module: nn.Module, name: str) -> Share | None:
        """What this process holds of a sharded parameter; None for a whole one."""
        return None if self._ranks is None else self._shards.share(module, name)

    def group_of(self, module: nn.Module) -> int | None:
        """The modules of one number are gathered together; None where nothing is."""
        return None if self._ranks is None else self._shards.group_of(module)

    @contextmanager
    def reading(
        self, group: int | None, *, adapters: bool = False
    ) -> Iterator[Callable[[nn.Module], nn.Module]]:
        """Gathers a group; inside the `with` block its modules can be had with whole parameters.

        Args:
            group: a decoder layer, or as `group_of` gives it.
            adapters: gather adapters alone; other parameters have only a shape.
        """
        if self._ranks is None or group is None:
            yield lambda module: module
            return
        with self._ranks.gathered(group, adapters=adapters) as gather:
            read = self._shards.reader(gather)
            yield lambda module: self._twin(module, read)

    @property
    def _shards(self) -> Shards:
        # Found anew each time that rank 0 leads.
        assert self._ranks is not None and self._ranks.shards is not None
        return self._ranks.shards

    def _twin(self, module: nn.Module, values: Values) -> nn.Module:
        return whole_twin(module, values, self._shards.named, deep=len(parts(module)) > 1)
