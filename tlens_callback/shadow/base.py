"""Runs the mirror on the base's own weights, every adapter left out, without a second copy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlens_callback.shadow.bridge import SplitCopy, refresh
from tlens_callback.shadow.mirror import Mirror
from tlens_callback.shadow.packed import packed
from tlens_callback.shadow.parametrized import effective, original, parametrized
from tlens_callback.shadow.sources import Source
from tlens_callback.shadow.weights import innermost, resolve

_WRITES_TO_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` with which PEFT 0.21 writes to the weights of the base."""


@contextmanager
def base_lent(
    base: PreTrainedModel,
    mirror: Mirror,
    modules: Sequence[nn.Module],
    split: Sequence[SplitCopy],
) -> Iterator[None]:
    """Inside the `with` block the mirror has the weights of the base.

    A parameter that an adapter changes is exchanged for the live tensor without the adapter, and
    so are all views of it: nothing is copied, and what was there before comes back untouched. Only
    where the live tensor is packed, computed, sharded, of another dtype or on another device, its
    value is written into the storage of the merged weight, which is merged anew afterwards; or, for
    a trained copy of a module whose original has another dtype, into a tensor of its own. Streamed
    layers are written without adapters when they are entered.

    Args:
        base: the live model, as `weights.unwrap` returns it.
        modules: all modules that hold parameters of the mirror, or views of them.
        split: the copies that the bridge has made of the mirror's resident parameters.

    Raises:
        ValueError: see `demand_base`.
    """
    demand_base(base)
    bases = {path: innermost(resolve(base, path, adapted=False)) for path in mirror.paths}
    lent, overwritten = _plan(mirror, bases)
    exchanged: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        mirror.base = bases
        for holder in _holders(mirror, modules) if lent.tensors else ():
            for name, tensor in list(holder.items()):
                if isinstance(tensor, Tensor) and (shown := lent.shown(tensor)) is not tensor:
                    exchanged.append((holder, name, tensor))
                    holder[name] = shown
        _renew(mirror, overwritten, [c._replace(source=lent.shown(c.source)) for c in split])
        yield
    finally:
        mirror.base = None
        for holder, name, tensor in exchanged:
            holder[name] = tensor
        _renew(mirror, overwritten, split)


def demand_base(base: PreTrainedModel) -> None:
    """Raises a ValueError if the live model does not hold weights without an adapter."""
    tuners = BaseTunerLayer, AuxiliaryTrainingWrapper
    if not any(isinstance(module, tuners) for module in base.modules()):
        raise ValueError(
            f"This {type(base).__name__} has no adapter that could be left out: training changes "
            f"its own weights, and nothing keeps what they were before. To compare with the model "
            f"before training, load it a second time and make a shadow of that."
        )
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"An adapter is merged into the live weights at the moment (module {path!r}), so "
                f"the weights of the base cannot be read. Call the live model's unmerge_adapter() "
                f"first."
            )


def changed_base(model: nn.Module, base: PreTrainedModel, mirror: Mirror) -> tuple[str, ...]:
    """Says how the model without adapters differs from the one that the adapters were put on.

    Returns:
        A sentence for each reason; none if the two are the same. Two things leave no trace and are
        not found: adapters that were deleted, and the rounding that merging and unmerging leaves
        in the live weights.
    """
    trained, biases = {}, []
    for path in mirror.paths:
        module = innermost(resolve(base, path, adapted=False))
        held = {name for name, parameter in module._parameters.items() if parameter is not None}
        for name in sorted(held | parametrized(module)):
            live = original(module, name)
            if live.requires_grad:
                trained.setdefault(id(live), f"{path}.{name}".removeprefix("."))
            if name == "bias":
                biases.append(id(live))
    found = []
    for name, config in _configs(model):
        init = str(getattr(config, "init_lora_weights", "")).lower()
        how = f"init_lora_weights={init!r}" if init.startswith(_WRITES_TO_BASE) else None
        if getattr(config, "kasa_config", None) is not None:
            how = "kasa_config"
        if how is not None:
            found.append(
                f"Adapter {name!r} was initialised with {how}, which writes to the weights of the "
                f"base. So the base without the adapter is not the pretrained model."
            )
        bias = getattr(config, "bias", "none")
        if isinstance(bias, str) and bias != "none" and biases:
            found.append(
                f"Adapter {name!r} has bias={bias!r}, which trains biases of the base in place. "
                f"They stay as trained when the adapter is left out."
            )
            trained = {at: path for at, path in trained.items() if at not in biases}
    if trained:
        first, *others = trained.values()
        found.append(
            f"Training changes {first!r}{f' and {len(others)} more' if others else ''} of the "
            f"base's own weights in place. They stay as trained when adapters are left out."
        )
    return tuple(found)


def _configs(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and configs of all adapters; PEFT keeps them at several modules."""
    held = [getattr(module, "peft_config", None) for module in model.modules()]
    kept = {id(configs): configs for configs in held if isinstance(configs, dict)}
    return [pair for configs in kept.values() for pair in configs.items()]


class _Lent:
    """Tensors of the base by the place in memory of the mirror's parameters that they replace."""

    def __init__(self) -> None:
        self.tensors: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        self._shown: dict[int, Tensor] = {}

    def add(self, own: nn.Parameter, live: Tensor) -> None:
        self.tensors.setdefault(own.untyped_storage().data_ptr(), []).append((own, live.detach()))

    def shown(self, tensor: Tensor) -> Tensor:
        """What stands in the place of this tensor: itself if it shows none of those replaced."""
        at = tensor.untyped_storage().data_ptr()
        for own, live in self.tensors.get(at, ()):
            start = tensor.storage_offset() - own.storage_offset()
            if 0 <= start < _extent(own):
                if id(tensor) not in self._shown:
                    layout = tensor.size(), tensor.stride(), live.storage_offset() + start
                    view = live.as_strided(*layout)
                    kept = isinstance(tensor, nn.Parameter)
                    self._shown[id(tensor)] = nn.Parameter(view, False) if kept else view
                return self._shown[id(tensor)]
        return tensor


def _extent(tensor: Tensor) -> int:
    """Length of the piece of storage in which this tensor's numbers lie."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sizes)


def _plan(mirror: Mirror, bases: Mapping[str, nn.Module]) -> tuple[_Lent, list[tuple[Source, str]]]:
    """What stands in the place of resident parameters, and which of them are overwritten."""
    lent, overwritten = _Lent(), []
    for source, name, own in mirror.resident():
        base, stored = bases[source.path], source.stored.get(name)
        merged = stored is not None and stored.merged and base is not source.live
        if base is innermost(source.live) and not merged:
            continue
        live = None if name in packed(base) else base._parameters.get(name)
        if live is not None and _alike(live, own):
            lent.add(own, live)
        elif stored is not None:
            overwritten.append((source, name))
        else:
            # A trained copy in `modules_to_save` is in the mirror's dtype, its original is not.
            lent.add(own, torch.empty_like(own).copy_(effective(base, name)))
    return lent, overwritten


def _alike(live: Tensor, own: Tensor) -> bool:
    """Whether the live tensor can stand in the place of the mirror's."""
    layouts = [(t.dtype, t.device, t.shape, t.stride()) for t in (live, own)]
    return type(live.detach()) is Tensor and layouts[0] == layouts[1]


def _holders(mirror: Mirror, modules: Sequence[nn.Module]) -> Iterator[dict[str, Any]]:
    """All that refers to tensors of the mirror by a name."""
    for module in modules:
        yield from (module._parameters, module._buffers, vars(module))
    if mirror.layers is not None:
        yield from map(vars, mirror.layers.places())


@torch.no_grad()
def _renew(
    mirror: Mirror, overwritten: Sequence[tuple[Source, str]], split: Sequence[SplitCopy]
) -> None:
    """Writes anew all that is a copy, after the mirror's weights were exchanged."""
    mirror.write(overwritten)
    refresh(split)
    if mirror.layers is not None:
        mirror.layers.sync()
