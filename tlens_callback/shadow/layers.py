"""`LayerWeights`: gives each decoder layer its weights while it is entered, and only then."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlens_callback.shadow.bridge import SplitCopy

Slot = tuple[str, str]
"""A tensor of a layer: path of its module within the layer, and name of the parameter."""


def layer_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the modules of the language model's decoder layers; [] if they are in no list."""
    n_layers = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    # A vision tower may have as many layers.
    inside = {id(module) for module in decoder.modules()}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and id(module) in inside:
            return [f"{path}.{i}" for i in range(n_layers)]
    return []


def layer_of(path: str, layers: list[str]) -> int | None:
    """The decoder layer that a module is in."""
    inside = (i for i, layer in enumerate(layers) if f"{path}.".startswith(f"{layer}."))
    return next(inside, None)


@dataclass(eq=False)
class _Place:
    """A tensor of the module tree that shows a slot, or copies some rows of a tensor."""

    tensor: Tensor
    slot: Slot | None
    size: torch.Size
    stride: tuple[int, ...]
    offset: int = 0
    source: Tensor | None = None
    rows: Tensor | None = None

    def values(self, slots: Mapping[Slot, Tensor]) -> Tensor:
        source = self.source if self.slot is None else slots[self.slot]
        assert source is not None
        if self.rows is None:
            return source.as_strided(self.size, self.stride, self.offset)
        return source.detach().index_select(0, self.rows)


class _Entered:
    """The tensors of a layer that somebody uses now."""

    def __init__(self, slots: dict[Slot, Tensor]) -> None:
        self.users = 0
        self.slots = slots
        self.copies: list[tuple[_Place, Tensor]] = []

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.slots.values(), *(copy for _, copy in self.copies)]


class LayerWeights:
    """Holds the weights of a decoder layer while somebody uses it, in storage made for that time.

    Outside it, each tensor of the layer is NaN everywhere, without storage. When a layer is left,
    its storage is filled with NaN too: whoever has kept a view of it finds NaN, never the numbers
    of another layer.

    The layers are built on storage that all layers of one shape share: `template` gives it. What
    the finished module tree made of it (views, split copies) is learned by `bind`.

    Args:
        write: writes the current values of a layer into tensors, by slot.
    """

    def __init__(self, write: Callable[[int, Mapping[Slot, Tensor]], None]) -> None:
        self._write = write
        self._templates: dict[tuple[Any, ...], Tensor] = {}
        self._slots: dict[int, dict[Slot, Tensor]] = {}
        self._layouts: dict[int, dict[Slot, tuple[Any, ...]]] = {}
        self._places: dict[int, list[_Place]] = {}
        self._entered: dict[int, _Entered] = {}
        self._by_passes: list[int] = []
        self._kept_for_backward: int | None = None
        self._age = 0
        self.first = 0
        """Layers before this one are not entered by forward passes, since they are skipped."""
        self.loads = 0
        """How often a layer's weights were written."""

    def template(
        self, layer: int, slot: Slot, like: Tensor, dtype: torch.dtype, device: Any
    ) -> Tensor:
        """The storage on which the module tree is built, for one tensor of a layer."""
        key = (slot, like.shape, like.stride(), dtype)
        if key not in self._templates:
            self._templates[key] = torch.empty_like(like, dtype=dtype, device=device)
        tensor = self._templates[key]
        self._slots.setdefault(layer, {})[slot] = tensor
        return tensor

    def bind(self, blocks: Any, split: Sequence[SplitCopy]) -> None:
        """Finds all tensors of the blocks that show a template, and takes the templates away.

        Args:
            blocks: the blocks of the bridge.
            split: the copies that the bridge has made of fused tensors.
        """
        for layer, block in enumerate(blocks):
            slots = self._slots.get(layer, {})
            by_storage = {t.untyped_storage().data_ptr(): slot for slot, t in slots.items()}
            places: dict[int, _Place] = {}
            for tensor in _tensors(block):
                slot = by_storage.get(tensor.untyped_storage().data_ptr())
                if slot is not None:
                    layout = tensor.shape, tensor.stride(), int(tensor.storage_offset())
                    places[id(tensor)] = _Place(tensor, slot, *layout)
            for copy in split:
                if copy.layer == layer:
                    slot = by_storage.get(copy.source.untyped_storage().data_ptr())
                    shape = copy.copy.shape, copy.copy.stride()
                    places[id(copy.copy)] = _Place(
                        copy.copy, slot, *shape, source=copy.source, rows=copy.rows
                    )
            if lacking := slots.keys() - {place.slot for place in places.values()}:
                raise ValueError(
                    f"Layers cannot be streamed here: the bridge's layer {layer} does not hold "
                    f"{sorted(lacking)[0]}. Use weights='resident'."
                )
            if places:
                self._places[layer] = list(places.values())
                self._layouts[layer] = {
                    slot: (t.shape, t.stride(), t.dtype, t.device) for slot, t in slots.items()
                }
        self._templates.clear()
        self._slots.clear()
        for layer in self._places:
            self._show_nothing(layer)
            block = blocks[layer]
            block.register_forward_pre_hook(lambda *_, layer=layer: self._pass_enters(layer))
            block.register_forward_hook(
                lambda *_, layer=layer: self._pass_leaves(layer), always_call=True
            )

    def places(self) -> Iterator[_Place]:
        """All tensors of the module tree that show or copy a layer's weights."""
        return (place for places in self._places.values() for place in places)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest layer's tensors."""
        copies = {
            layer: sum(_bytes(p.size, p.tensor.dtype) for p in places if p.rows is not None)
            for layer, places in self._places.items()
        }
        sizes = [
            copies[layer] + sum(_bytes(shape, dtype) for shape, _, dtype, _ in layout.values())
            for layer, layout in self._layouts.items()
        ]
        return max(sizes, default=0)

    @contextmanager
    def entered(self, layer: int) -> Iterator[None]:
        """The layer has its weights inside the `with` block."""
        self.enter(layer)
        try:
            yield
        finally:
            self.leave(layer)

    @torch.no_grad()
    def enter(self, layer: int) -> None:
        """Gives the layer its current weights, unless it has them."""
        if layer not in self._layouts:
            return
        if self._kept_for_backward not in (None, layer):
            self.end_backward()
        entered = self._entered.get(layer)
        if entered is None:
            slots = {
                slot: torch.empty_strided(shape, stride, dtype=dtype, device=device)
                for slot, (shape, stride, dtype, device) in self._layouts[layer].items()
            }
            self._write(layer, slots)
            self.loads += 1
            entered = self._entered[layer] = _Entered(slots)
            for place in self._places[layer]:
                shown = place.values(slots)
                if place.rows is not None:
                    entered.copies.append((place, shown))
                place.tensor.data = shown
        entered.users += 1

    @torch.no_grad()
    def leave(self, layer: int) -> None:
        """Takes the weights away when nobody uses the layer any more."""
        entered = self._entered.get(layer)
        if entered is None:
            return
        entered.users -= 1
        if entered.users == 0:
            del self._entered[layer]
            self._show_nothing(layer)
            for tensor in entered.tensors:
                tensor.fill_(torch.nan)

    @torch.no_grad()
    def sync(self) -> None:
        """Brings layers that are entered now up to the live model's current values."""
        self._age += 1
        self.end_backward()
        for layer, entered in self._entered.items():
            self._write(layer, entered.slots)
            for place, copy in entered.copies:
                copy.copy_(place.values(entered.slots))

    @contextmanager
    def passing(self, *, grad: bool) -> Iterator[None]:
        """Around a forward pass: what it has entered is left, however it ends.

        Args:
            grad: a gradient is wanted. What autograd would keep of a layer's tensors is kept as
                their place, and the backward pass enters the layers again.
        """
        self.end_backward()
        before = len(self._by_passes)
        try:
            with self._for_backward() if grad else nullcontext():
                yield
        finally:
            while len(self._by_passes) > before:
                self.leave(self._by_passes.pop())

    def _for_backward(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def end_backward(self) -> None:
        """Leaves the layer that a backward pass has entered last."""
        layer, self._kept_for_backward = self._kept_for_backward, None
        if layer is not None:
            self.leave(layer)

    def release(self) -> None:
        """Drops everything."""
        self._entered.clear()
        self._by_passes.clear()
        for part in (self._templates, self._slots, self._layouts, self._places):
            part.clear()

    def _pass_enters(self, layer: int) -> None:
        if layer >= self.first:
            self.enter(layer)
            self._by_passes.append(layer)

    def _pass_leaves(self, layer: int) -> None:
        if layer in self._by_passes:
            self._by_passes.remove(layer)
            self.leave(layer)

    def _show_nothing(self, layer: int) -> None:
        for place in self._places[layer]:
            nothing = torch.full(
                (), torch.nan, dtype=place.tensor.dtype, device=place.tensor.device
            )
            place.tensor.data = nothing.expand(place.size)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage().data_ptr()
        for layer, entered in self._entered.items():
            for i, own in enumerate(entered.tensors):
                if own.untyped_storage().data_ptr() == storage:
                    layout = tensor.shape, tensor.stride(), tensor.storage_offset()
                    return self._age, layer, i, *layout
        return tensor

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        age, layer, i, *layout = packed
        if age != self._age:
            raise RuntimeError(
                "The shadow's weights were exchanged or brought up to date after this forward pass."
            )
        if self._kept_for_backward != layer:
            self.end_backward()
            self.enter(layer)
            self._kept_for_backward = layer
        return self._entered[layer].tensors[i].as_strided(*layout)


def _bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """All tensors that the modules hold, in whatever way, without their gradients."""
    for part in module.modules():
        for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(value, Tensor):
                yield value
