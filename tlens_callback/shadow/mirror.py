"""`Mirror`: a module tree of the live model's class that holds its weights, adapters merged."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlens_callback.shadow.bar import with_bar
from tlens_callback.shadow.parametrized import original
from tlens_callback.shadow.state import ModuleState
from tlens_callback.shadow.weights import adapted_leaves, fill, innermost, live_leaves, resolve


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter of the model, with the value that the model computes with.

    Attributes:
        name: name of the parameter in a plain model of the live model's class.
        value: the effective value, on the mirror's device and in its dtype: with adapters merged.
        live: the live model's parameter, without adapters.
        trained: whether training changes the effective value, because the live parameter or an
            adapter on it is trained.
    """

    name: str
    value: Tensor
    live: nn.Parameter
    trained: bool


@dataclass(frozen=True)
class _Source:
    """The source of the parameters of one module; each name is in one mapping, or is tied."""

    path: str
    live: nn.Module
    adapted: frozenset[str]
    own: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that an adapter changes: the mirror's own storage for the merged weight."""
    aliased: dict[str, int] = field(default_factory=dict)
    """Parameters that are the live tensor itself: the address of its data when it was borrowed."""
    copied: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that copy the live tensor to another device or another dtype."""
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The address of each copied live tensor's data, and how often it had been written."""


class Mirror:
    """An empty model of the live model's class, filled with aliased, owned and copied tensors.

    Args:
        base: the live model, as `weights.unwrap` returns it.
        device, dtype: device and dtype of the mirror; None: those of the live model.

    Attributes:
        module: the module tree.
        device, dtype: its device, and the dtype of most of its parameters.
        coarsest: the live model's dtype of lowest precision.
        mixed: whether the live model computes with parameters of several dtypes, for which
            trainers use autocast. The mirror copies parameters of other dtypes into the common
            one, except where the model's class keeps a module in float32 by design.
    """

    @torch.no_grad()
    def __init__(
        self, base: PreTrainedModel, *, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        self.module = _skeleton(base)
        self.device = device or next(base.parameters()).device
        by_design = {
            *(getattr(base, "_keep_in_fp32_modules", None) or ()),
            *(getattr(base, "_keep_in_fp32_modules_strict", None) or ()),
        }
        paths = [path for path, _ in self.module.named_modules(remove_duplicate=False)]
        live = {path: resolve(base, path) for path in paths}
        sizes: Counter[torch.dtype] = Counter()
        for path, module in live.items():
            if not by_design.intersection(path.split(".")):
                for leaf in live_leaves(module).values():
                    sizes[leaf.dtype] += leaf.numel()
        self.mixed = len(sizes) > 1
        self.coarsest = max(sizes, key=lambda dtype: torch.finfo(dtype).eps)
        self.dtype = dtype or sizes.most_common(1)[0][0]
        self._held: list[Tensor] = []
        self._sources: list[_Source] = []
        self._states: list[ModuleState] = []
        tied: dict[tuple[int, ...], nn.Parameter] = {}
        for path, module in self.module.named_modules(remove_duplicate=False):
            state = ModuleState.of(module, innermost(live[path]), self.device)
            if state is not None:
                state.follow()
                self._states.append(state)
            names = [name for name, p in module._parameters.items() if p is not None]
            if not names:
                continue
            leaves = live_leaves(live[path])
            _check_parameters(path, innermost(live[path]), leaves, module)
            source = _Source(path, live[path], adapted_leaves(live[path]))
            kept = dtype is None and by_design.intersection(path.split("."))
            for name in names:
                origin = leaves[name]
                wanted = origin.dtype if kept else self.dtype
                # Tied weights stay one parameter, unless an adapter changes one of them.
                key = (origin.data_ptr(), *origin.shape)
                if name in source.adapted:
                    parameter = self._own(source, name, origin, wanted)
                elif key in tied:
                    parameter = tied[key]
                else:
                    parameter = tied[key] = self._share(source, name, origin, wanted)
                module._parameters[name] = parameter
            self._sources.append(source)
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        left = [name for name, tensor in tensors if tensor.is_meta]
        assert not left, f"no source for {left}"

    def _own(self, source: _Source, name: str, origin: Tensor, dtype: torch.dtype) -> nn.Parameter:
        own = torch.empty_like(origin, dtype=dtype, device=self.device)
        source.own[name] = own
        self._held.append(own)
        return nn.Parameter(own, requires_grad=False)

    def _share(
        self, source: _Source, name: str, origin: Tensor, dtype: torch.dtype
    ) -> nn.Parameter:
        if origin.device == self.device and origin.dtype == dtype:
            source.aliased[name] = origin.data_ptr()
            return nn.Parameter(origin, requires_grad=False)
        copied = torch.empty_like(origin, dtype=dtype, device=self.device)
        source.copied[name] = copied
        self._held.append(copied)
        return nn.Parameter(copied, requires_grad=False)

    @property
    def extra_bytes(self) -> int:
        """Bytes held beyond the live model's own."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._held)

    @property
    def n_owned(self) -> int:
        """Number of parameters that hold a merged weight."""
        return sum(len(source.own) for source in self._sources)

    def weights(self) -> list[Weight]:
        """Every parameter, in the order of the modules; tied parameters are listed once."""
        found = []
        for source in self._sources:
            module = innermost(source.live)
            for name in live_leaves(source.live):
                live = original(module, name)
                if name in source.own:
                    value = source.own[name]
                    trained = any(p.requires_grad for p in source.live.parameters())
                elif name in source.aliased or name in source.copied:
                    value = source.copied.get(name, live.detach())
                    trained = live.requires_grad
                else:  # tied to one before it
                    continue
                path = f"{source.path}.{name}" if source.path else name
                found.append(Weight(path, value, live, trained))
        return found

    def live_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Name in a plain model, and live module with its adapters, of all with parameters."""
        for source in self._sources:
            yield source.path, source.live

    def fits(self, base: nn.Module) -> bool:
        """Whether each module still has the source that it was built on; False after `release`."""
        if not self._sources:
            return False
        for source in self._sources:
            live = resolve(base, source.path)
            if live is not source.live or adapted_leaves(live) != source.adapted:
                return False
            parameters: Any = innermost(live)._parameters
            if any(parameters[name].data_ptr() != at for name, at in source.aliased.items()):
                return False
        return True

    @torch.no_grad()
    def fill(self) -> None:
        """Brings owned and copied tensors up to the live model's current values."""
        # The bar shows only where filling takes long: a large model, or a costly kind of adapter.
        for source in with_bar(self._sources, desc="tlens: weights", delay=5.0, leave=False):
            if source.own:
                self._merge(source)
            for name, own in source.copied.items():
                origin = innermost(source.live)._parameters[name]
                assert origin is not None
                stamp = origin.data_ptr(), origin._version
                # Some optimizers write through `.data`, which the version does not count.
                if origin.requires_grad or source.stamps.get(name) != stamp:
                    own.copy_(origin)
                    source.stamps[name] = stamp

    def follow_state(self) -> None:
        """Takes over what modules hold beside parameters: buffers, and lengths that they have seen.

        To be called before each forward pass, which in the live model would begin with the same.
        """
        for state in self._states:
            state.follow()

    def _merge(self, source: _Source) -> None:
        """Merges on the devices of the live tensors, since a live model may be on several."""
        devices = {name: leaf.device for name, leaf in live_leaves(source.live).items()}
        if set(devices.values()) == {self.device}:
            fill(source.live, source.own)
            return
        merged = {n: torch.empty_like(own, device=devices[n]) for n, own in source.own.items()}
        fill(source.live, merged)
        for name, own in source.own.items():
            own.copy_(merged[name])

    def release(self) -> None:
        """Drops every tensor now; a bridge is a reference cycle and would hold them longer."""
        for module in self.module.modules():
            module._parameters.clear()
            module._buffers.clear()
        self._sources.clear()
        self._states.clear()
        self._held.clear()


def _skeleton(base: PreTrainedModel) -> PreTrainedModel:
    """Makes an empty model of the live model's class, on the meta device, with its own config.

    Nothing is drawn or allocated. A deep copy of the live model would not work: trainers patch
    `forward` on the instance, and the patch of a copy would still call the live model.
    """
    config = copy.deepcopy(base.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
        part.use_cache = False
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        skeleton = type(base)(config)
    return skeleton.eval()


def _check_parameters(
    path: str, live: nn.Module, leaves: Mapping[str, Tensor], module: nn.Module
) -> None:
    """Raises a ValueError if the live module has not the parameters that its class should have."""
    wanted = {name for name, p in module._parameters.items() if p is not None}
    if lacking := sorted(wanted - leaves.keys()):
        what = f"has no {' and no '.join(map(repr, lacking))}"
    elif more := sorted(leaves.keys() - wanted):
        what = f"has also {' and '.join(map(repr, more))}"
    else:
        return
    raise ValueError(
        f"Module {path!r} of the live model is a {type(live).__name__} that {what}, unlike the "
        f"{type(module).__name__} that the model's class and config put there. The shadow is built "
        f"from class and config and would compute something else. Pass the model as its class "
        f"builds it, with adapters added only by PEFT; torch.nn.utils.parametrize can be read."
    )
