"""`Mirror`: a module tree of the live model's class that holds its weights, adapters merged."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlens_callback.shadow.bar import with_bar
from tlens_callback.shadow.layers import LayerWeights, Slot, layer_of, layer_paths
from tlens_callback.shadow.memory import Holding, share_of_free_memory
from tlens_callback.shadow.packed import packed, precisions
from tlens_callback.shadow.parametrized import effective, original
from tlens_callback.shadow.ranks import Ranks
from tlens_callback.shadow.skeleton import skeleton
from tlens_callback.shadow.sources import Source, Stored, Weight
from tlens_callback.shadow.state import ModuleState
from tlens_callback.shadow.weights import (
    adapted_leaves,
    fill,
    innermost,
    live_leaves,
    resolve,
)
from tlens_callback.shadow.whole import WholeModules


class Mirror:
    """An empty model of the live model's class, filled with aliased and stored tensors.

    Args:
        base: the live model, as `weights.unwrap` returns it.
        device, dtype: device and dtype of the mirror; None: those of the live model.
        weights: "resident": what cannot be borrowed is stored. "streamed": of the decoder layers,
            it is stored only while a layer is entered; see `LayerWeights`. "auto": streamed if
            stored weights would take more than a quarter of the free memory, or are quantised.

    Attributes:
        module: the module tree.
        device, dtype: its device, and the dtype of most of its parameters.
        coarsest: the live model's dtype of lowest precision.
        roughest: the lowest precision of all, adapters and the arithmetic of packed layers
            included.
        mixed: whether the live model computes with parameters of several dtypes, for which
            trainers use autocast. The mirror copies parameters of other dtypes into the common
            one, except where the model's class keeps a module in float32 by design.
        base: path -> live module without adapters, while these are left out; see `base_lent`.
    """

    @torch.no_grad()
    def __init__(
        self,
        base: PreTrainedModel,
        *,
        device: torch.device | None,
        dtype: torch.dtype | None,
        weights: Holding = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        self.module = skeleton(base)
        self._whole = WholeModules(ranks)
        self.device = device or self._whole.device or next(base.parameters()).device
        by_design = {
            *(getattr(base, "_keep_in_fp32_modules", None) or ()),
            *(getattr(base, "_keep_in_fp32_modules_strict", None) or ()),
        }
        paths = [path for path, _ in self.module.named_modules(remove_duplicate=False)]
        live = {path: resolve(base, path) for path in paths}
        outlined = {path: self._whole.outlined(module) for path, module in live.items()}
        sizes: Counter[torch.dtype] = Counter()
        trained = (p.dtype for p in base.parameters() if p.requires_grad)
        rough = {dtype for dtype in trained if dtype.is_floating_point}
        for path, module in outlined.items():
            if not by_design.intersection(path.split(".")):
                for leaf in live_leaves(module).values():
                    sizes[leaf.dtype] += leaf.numel()
                rough.update(precisions(innermost(module)))
        rough |= self._whole.compute_dtypes
        self.mixed = len(sizes) > 1
        self.coarsest = max(sizes, key=lambda dtype: torch.finfo(dtype).eps)
        self.roughest = max(rough | {self.coarsest}, key=lambda dtype: torch.finfo(dtype).eps)
        self.dtype = dtype or sizes.most_common(1)[0][0]
        self.base: Mapping[str, nn.Module] | None = None
        self._held: list[Tensor] = []
        self._sources: list[Source] = []
        self._states: list[ModuleState] = []
        self._layers = layer_paths(self.module)
        tied: dict[tuple[int, ...], nn.Parameter | Stored] = {}
        for path, module in self.module.named_modules(remove_duplicate=False):
            state = ModuleState.of(module, innermost(live[path]), self.device)
            if state is not None:
                state.follow()
                self._states.append(state)
            names = [name for name, p in module._parameters.items() if p is not None]
            if not names:
                continue
            leaves = live_leaves(outlined[path])
            _check_parameters(path, innermost(outlined[path]), leaves, module)
            layer = layer_of(path, self._layers)
            source = Source(path, module, live[path], adapted_leaves(outlined[path]), layer)
            kept = dtype is None and by_design.intersection(path.split("."))
            for name in names:
                origin = leaves[name]
                wanted = origin.dtype if kept else self.dtype
                outline = self._whole.outline(innermost(live[path]), name)
                # Tied weights stay one parameter, unless an adapter changes one of them.
                key = (origin.data_ptr() if outline is None else id(outline), *origin.shape)
                found = None if name in source.adapted else tied.get(key)
                if found is None:
                    merged = name in source.adapted
                    if (
                        outline is not None
                        or merged
                        or origin.device != self.device
                        or origin.dtype != wanted
                    ):
                        found = Stored(origin.to("meta"), wanted, merged, [], set())
                        source.stored[name] = found
                    else:
                        source.aliased[name] = origin.data_ptr()
                        found = nn.Parameter(origin, requires_grad=False)
                    if not merged:
                        tied[key] = found
                if isinstance(found, Stored):
                    found.users.append((module, name))
                    found.layers.add(layer)
                else:
                    module._parameters[name] = found
            self._sources.append(source)
        self.layers = LayerWeights(self._write_layer) if self._streams(weights) else None
        self._store()
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        left = [name for name, tensor in tensors if tensor.is_meta]
        assert not left, f"no source for {left}"

    def _streams(self, weights: Holding) -> bool:
        """Whether the stored weights of decoder layers are held one layer at a time."""
        if weights == "streamed" and not self._layers:
            raise ValueError(
                f"weights='streamed' needs a model with a list of decoder layers, which "
                f"{type(self.module).__name__} does not have. Use weights='resident'."
            )
        if weights != "auto":
            return weights == "streamed"
        stored = [s for source in self._sources for s in source.stored.values()]
        would_take = sum(s.bytes for s in stored if s.layers != {None})
        packs = any(packed(innermost(source.live)) for source in self._sources)
        too_much = would_take > share_of_free_memory(self.device)
        return bool(self._layers) and (too_much or packs or self._whole.sharded)

    def _store(self) -> None:
        """Makes the parameters that the mirror stores."""
        for source in self._sources:
            for name, stored in source.stored.items():
                if self.layers is not None and source.layer is not None and len(stored.layers) == 1:
                    within = source.path.removeprefix(self._layers[source.layer])
                    tensor = self.layers.template(
                        source.layer, (within, name), stored.like, stored.dtype, self.device
                    )
                else:
                    stored.layers.add(None)
                    tensor = torch.empty_like(stored.like, dtype=stored.dtype, device=self.device)
                    self._held.append(tensor)
                parameter = nn.Parameter(tensor, requires_grad=False)
                for module, own in stored.users:
                    module._parameters[own] = parameter

    @property
    def extra_bytes(self) -> int:
        """Bytes held beyond the live model's own; of streamed layers, those of one layer."""
        held = sum(tensor.numel() * tensor.element_size() for tensor in self._held)
        return held + (0 if self.layers is None else self.layers.layer_bytes)

    @property
    def n_owned(self) -> int:
        """Number of parameters that hold a merged weight."""
        return sum(s.merged for source in self._sources for s in source.stored.values())

    def weights(self) -> Iterator[Weight]:
        """Every parameter, in the order of the modules; tied parameters come once."""
        for source in self._sources:
            outlined = self._whole.outlined(source.live)
            module = innermost(outlined)
            for name in live_leaves(outlined):
                live = original(module, name)
                stored = source.stored.get(name)
                if stored is None and name not in source.aliased:
                    continue  # tied to one before it
                trained = live.requires_grad
                if stored is not None and stored.merged:
                    trained = any(p.requires_grad for p in outlined.parameters())
                # An aliased tensor may have moved to other storage since.
                borrowed = stored is None and self.base is None
                own = live if borrowed else source.module._parameters[name]
                assert own is not None
                yield Weight(_name(source, name), own, live, trained, source.layer)

    @property
    def paths(self) -> list[str]:
        """Names, in a plain model, of all modules with parameters."""
        return [source.path for source in self._sources]

    def live_modules(self, *, adapters: bool = False) -> Iterator[tuple[str, nn.Module]]:
        """Name in a plain model, and live module with its adapters, of all with parameters.

        Of a sharded model it is a copy with whole parameters, to be used before the next one.

        Args:
            adapters: only the numbers of adapters are needed; other parameters may have a shape
                alone.
        """
        for source, whole in self._wholes(self._sources, adapters=adapters):
            yield source.path, whole(source.live)

    def live_values(self, weights: Iterable[Weight]) -> Iterator[tuple[Weight, Tensor]]:
        """Those of the weights with their live parameters, whole, to be used before the next."""
        wanted = {weight.name: weight for weight in weights}
        leaves = {
            source.path: [
                n for n in (*source.aliased, *source.stored) if _name(source, n) in wanted
            ]
            for source in self._sources
        }
        for source, whole in self._wholes([s for s in self._sources if leaves[s.path]]):
            module = innermost(whole(source.live))
            for name in leaves[source.path]:
                yield wanted[_name(source, name)], original(module, name)

    def resident(self) -> Iterator[tuple[Source, str, nn.Parameter]]:
        """Every parameter that is there all the time, tied ones once, with its source and name."""
        for source in self._sources:
            for name in (*source.aliased, *source.stored):
                own = source.module._parameters[name]
                assert own is not None
                if name in source.aliased or None in source.stored[name].layers:
                    yield source, name, own

    @torch.no_grad()
    def write(self, stored: Collection[tuple[Source, str]]) -> None:
        """Writes the current values of stored resident parameters, given by source and name."""
        names: dict[int, list[str]] = {}
        sources = {id(source): source for source, _ in stored}
        for source, name in stored:
            names.setdefault(id(source), []).append(name)
        # The bar shows only where filling takes long: a large model, or a costly kind of adapter.
        settings = {"desc": "tlens: weights", "delay": 5.0, "leave": False, "total": len(sources)}
        for source, whole in with_bar(self._wholes([*sources.values()]), **settings):
            into = {}
            for name in names[id(source)]:
                parameter = source.module._parameters[name]
                assert parameter is not None
                into[name] = parameter.detach()
            self._write(source, whole(self._shown(source)), into)

    def fits(self, base: nn.Module) -> bool:
        """Whether each module still has the source that it was built on; False after `release`."""
        if not self._sources:
            return False
        for source in self._sources:
            live = resolve(base, source.path)
            if (
                live is not source.live
                or adapted_leaves(self._whole.outlined(live)) != source.adapted
            ):
                return False
            held = innermost(live)
            if any(original(held, name).data_ptr() != at for name, at in source.aliased.items()):
                return False
        return True

    def fill(self) -> None:
        """Brings all that is stored now up to the live model's current values."""
        self.write(
            [
                (source, name)
                for source in self._sources
                for name, stored in source.stored.items()
                if None in stored.layers and not self._is_current(source, name)
            ]
        )

    def _write_layer(self, layer: int, slots: Mapping[Slot, Tensor]) -> None:
        """Writes the current values of a streamed layer."""
        for source, whole in self._wholes([s for s in self._sources if s.layer == layer]):
            within = source.path.removeprefix(self._layers[layer])
            into = {n: slots[within, n] for n in source.stored if (within, n) in slots}
            if into:
                self._write(source, whole(self._shown(source)), into)

    def _write(self, source: Source, live: nn.Module, into: Mapping[str, Tensor]) -> None:
        """Writes the current values of stored parameters of one module, which `live` holds."""
        if self.base is not None:
            for name, own in into.items():
                own.copy_(effective(live, name))
                source.stored[name].stamp = None
            return
        merged = {name: own for name, own in into.items() if source.stored[name].merged}
        if merged:
            self._merge(live, merged)
        for name in into.keys() - merged.keys():
            into[name].copy_(original(innermost(live), name))
            source.stored[name].stamp = self._stamp(source, name)

    def _is_current(self, source: Source, name: str) -> bool:
        """Whether what is stored holds the live value already."""
        stored = source.stored[name]
        return not stored.merged and stored.stamp == self._stamp(source, name) is not None

    def _stamp(self, source: Source, name: str) -> tuple[int, int] | None:
        """Where a live parameter's numbers are, and how often they have been written; None if that
        is not known: some optimizers write through `.data`, which is not counted."""
        module = innermost(source.live)
        if (share := self._whole.share(module, name)) is not None:
            return None if share.trained else share.stamp()
        origin = original(module, name)
        return None if origin.requires_grad else (origin.data_ptr(), origin._version)

    def _shown(self, source: Source) -> nn.Module:
        """The live module whose values the mirror is to have."""
        return source.live if self.base is None else self.base[source.path]

    def _wholes(
        self, sources: list[Source], *, adapters: bool = False
    ) -> Iterator[tuple[Source, Callable[[nn.Module], nn.Module]]]:
        """Each source with what makes its live module whole, until the next one."""
        groups: dict[int | None, list[Source]] = {}
        for source in sources:
            groups.setdefault(self._whole.group_of(source.live), []).append(source)
        for group, members in groups.items():
            with self._whole.reading(group, adapters=adapters) as whole:
                for source in members:
                    yield source, whole

    def follow_state(self) -> None:
        """Takes over what modules hold beside parameters: buffers, and lengths that they have seen.

        To be called before each forward pass, which in the live model would begin with the same.
        """
        for state in self._states:
            state.follow()

    def _merge(self, live: nn.Module, into: Mapping[str, Tensor]) -> None:
        """Merges on the devices of the live tensors, since a live model may be on several."""
        devices = {name: leaf.device for name, leaf in live_leaves(live).items()}
        if set(devices.values()) == {self.device}:
            fill(live, into)
            return
        merged = {n: torch.empty_like(own, device=devices[n]) for n, own in into.items()}
        fill(live, merged)
        for name, own in into.items():
            own.copy_(merged[name])

    def release(self) -> None:
        """Drops every tensor now; a bridge is a reference cycle and would hold them longer."""
        for module in self.module.modules():
            module._parameters.clear()
            module._buffers.clear()
        self._sources.clear()
        self._states.clear()
        self._held.clear()
        if self.layers is not None:
            self.layers.release()


def _name(source: Source, leaf: str) -> str:
    return f"{source.path}.{leaf}" if source.path else leaf


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
