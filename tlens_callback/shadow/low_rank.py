"""Finds the low-rank updates that LoRA adapters add to the live model's weights, as factors."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.shadow.shadow import Shadow
from tlens_callback.shadow.weights import low_rank_update


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """The update that the active adapters add to one matrix: `b @ a`.

    Attributes:
        name: name of the module in a plain model of the live model's class.
        weight: the live matrix without the update, [out, in]; not to be written to. Of a packed or
            sharded model it is a copy, to be dropped before the next update is asked for.
        b: the scaling (alpha / r, or alpha / sqrt(r) for rsLoRA) folded in; float32 or wider.
        a: as the adapter keeps it. With several active adapters their ranks stand side by side.
        transposed: the module keeps the weight as [in, out] (Conv1D, embeddings), and so is
            `weight`.
        trained: whether `weight` is trained too.
    """

    name: str
    weight: Float[Tensor, "row column"]
    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in"]
    transposed: bool
    trained: bool


@torch.no_grad()
def low_rank_updates(shadow: Shadow, *, numbers: bool = True) -> Iterator[LowRankUpdate]:
    """The low-rank updates of the live model that `shadow` follows, in the order of its modules;
    where it is sharded, those that are gathered together come together.

    Args:
        numbers: whether the numbers in `weight` are needed. Without them `weight` may have only
            shape, dtype and device, and the updates can all be held at once.

    They are those of plain LoRA on linear layers, Conv1D and embeddings, with any initialisation.
    Left out are tuners whose effect is not just such a product (DoRA, LoRA with a bias of its own,
    LoHa, OFT, IA3 ...), adapters on stacked experts, and adapters that are at the moment disabled
    or merged into the live weight.
    """
    for path, module in shadow.mirror.live_modules(adapters=not numbers):
        found = low_rank_update(module, numbers=numbers)
        if found is not None:
            yield LowRankUpdate(path, *found)
