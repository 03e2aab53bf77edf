"""Computes the effective weights of a live model, which is read and never written to.

The effective weight of a layer is the tensor that a plain layer would need to compute what the
adapted layer computes: `W + scaling * B @ A` for LoRA, and for every other tuner what PEFT's own
merge arrives at. The live layer is never merged for it: merging and unmerging does not bring the
base weight back bit for bit, and moves it to other storage for some tuners.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlens_callback.shadow.packed import on_plain_layers, packed, placeholder, plain_tuner
from tlens_callback.shadow.parametrized import effective, original, parametrized, plain
from tlens_callback.shadow.twins import SHELLS, plain_class, shallow, unshelled

_SCRATCH = 2**23
"""Most elements of the float32 scratch space for results of lower precision."""


def unwrap(model: nn.Module) -> nn.Module:
    """Finds the `PreTrainedModel` inside DDP, `torch.compile` and PEFT.

    A model adapted with transformers' own `add_adapter` has no wrapper and comes back as it is.
    """
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        elif isinstance(model, PeftMixedModel):
            model = model.base_model.model
        else:
            inner = next(
                (model._modules[s] for s in ("module", *SHELLS) if s in model._modules), None
            )
            if inner is None:
                break
            model = inner
    return model


def resolve(base: nn.Module, path: str, *, adapted: bool = True) -> nn.Module:
    """Finds the live module that has the place of the module `path` in a plain model of its class.

    Steps through the wrappers of PEFT and compilation: `modules_to_save` leads to the active copy,
    or to the original if none is active. A tuner layer stands for the module that it adapts.

    Args:
        base: the model as `unwrap` returns it.
        path: dotted, as `named_modules()` of a fresh model gives it; "" is the model itself.
        adapted: False leads to the original in `modules_to_save`, whatever is active.

    Raises:
        ValueError: if the live model has no such module.
    """
    module = _serving(base, adapted)
    for name in path.split(".") if path else ():
        holder = innermost(module)
        child = holder._modules.get(name)
        if child is None:
            raise ValueError(
                f"The live model has no module {path!r} ({type(holder).__name__} has no {name!r}), "
                f"though its class and config need one. Pass the model as its class builds it, "
                f"with adapters added only by PEFT."
            )
        module = _serving(child, adapted)
    return module


@functools.cache
def _role(kind: type) -> str:
    """The role of modules of this class; cached, because every sync asks it for every module."""
    if issubclass(kind, TrainableTokensWrapper):
        return "tokens"
    if issubclass(kind, AuxiliaryTrainingWrapper):
        return "saved"
    return "tuner" if issubclass(kind, BaseTunerLayer) else "plain"


def _serving(module: Any, adapted: bool = True) -> Any:
    """The module that runs when `module` is called: plain, a tuner layer or trained tokens."""
    while True:
        role = _role(type(module))
        if role == "saved":
            active = module.active_adapters
            unused = module.disable_adapters or not module._adapters.issuperset(active)
            if unused or not active or not adapted:
                module = module.original_module
            else:
                module = module.modules_to_save[active[0]]
        elif role == "plain" and not module._modules.keys().isdisjoint(SHELLS):
            module = unshelled(module)
        else:
            return module


def _peel(module: nn.Module) -> tuple[list[Any], Any]:
    """The tuner layers around one plain module, the outermost first, and that module."""
    layers: list[Any] = []
    inner = _serving(module)
    while (role := _role(type(inner))) != "plain":
        if role == "tokens":
            inner = inner.token_adapter
        else:
            layers.append(inner)
            inner = _serving(inner.base_layer)
    return layers, inner


def parts(module: nn.Module) -> list[nn.Module]:
    """The module, and those in it that its effective weights depend on."""
    plain_module = _role(type(module)) == "plain" and not parametrized(module)
    return [module] if plain_module else [*module.modules()]


def innermost(module: nn.Module) -> nn.Module:
    """The plain module that holds the parameters and buffers: `module` without its adapters."""
    return _peel(module)[1]


def live_leaves(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of the innermost module by name, detached, without adapters.

    They share the live storage, but for those that are parametrised: these are computed. Of packed
    ones there are only shape, dtype and device.
    """
    base = innermost(module)
    if packed(base):
        # It may have other parameters, such as scales, and a bias that is none.
        found = {"weight": placeholder(base)}
        if getattr(base, "bias", None) is not None:
            found["bias"] = original(base, "bias").detach()
        return found
    found = {name: p.detach() for name, p in base._parameters.items() if p is not None}
    return found | {name: effective(base, name) for name in parametrized(base)}


def adapted_leaves(module: nn.Module) -> frozenset[str]:
    """Names of the parameters whose effective value is not a live tensor and needs storage.

    "weight" for a plain LoRA layer, whose bias, if it is trained, is trained in place; the targeted
    parameters where LoRA wraps parameters; "weight" for trained tokens; all that the layer has for
    any other tuner. Does not depend on which adapters are active. Empty for a module without an
    adapter, and for `modules_to_save`, whose copy is itself live. Parametrised and packed
    parameters are always among them.
    """
    base = innermost(module)
    names = set(parametrized(base) | packed(base))
    for layer in _peel(module)[0]:
        name = _plain_target(layer, ever=True)
        if name is None and plain_class(type(layer)) is not TrainableTokensLayer:
            return frozenset(live_leaves(module))
        names.add(name or "weight")
    return frozenset(names)


@torch.no_grad()
def fill(module: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Writes the effective values of the adapted parameters into `own`, in place.

    Plain LoRA on a linear layer, a Conv1D, an embedding or expert parameters takes one fused pass;
    below float32 the sum is formed in float32 and rounded once. Every other tuner is merged by
    PEFT itself, on a float32 copy of the layer. Only active adapters count; a layer that is
    disabled, or merged already, leaves its base weight as it is.

    Args:
        module: as `resolve` returned it.
        own: name -> tensor of the parameter's shape on the parameter's device, of any floating
            dtype, for names among `adapted_leaves`.

    Raises:
        ValueError: if PEFT cannot merge the layer; the text names the tuner and the layer.
    """
    layers, base = _peel(module)
    chain = [layer for layer in layers if not (layer.disable_adapters or layer.merged)]
    products = {_plain_target(layer): layer for layer in chain}
    if len(products) == len(chain) and None not in products:
        for name, out in own.items():
            product = _factors(products[name]) if name in products else None
            if product is None:
                out.copy_(effective(base, name))
            else:
                _add_product(effective(base, name), *product, out)
    elif len(chain) == 1 and plain_class(type(chain[0])) is TrainableTokensLayer:
        _replace_rows(effective(base, "weight"), chain[0], own["weight"])
    else:
        merged = _merge_stand_in(base, chain)
        for name, out in own.items():
            out.copy_(merged[name])


def low_rank_update(
    module: nn.Module, *, numbers: bool = True
) -> tuple[Tensor, Tensor, Tensor, bool, bool] | None:
    """The update that the active adapters add to a matrix, if it is a product of low rank.

    Args:
        numbers: whether the numbers of the live matrix are needed, which may be packed.

    Returns:
        The live matrix without it; B, [out, rank], with the scaling, in float32 or wider; A,
        [rank, in], several adapters side by side along the rank; whether the matrix is kept as
        [in, out], so that (B A)^T is added to it; and whether it is trained itself. None where the
        adapters do anything else, or nothing: another tuner than plain LoRA, a stack of experts, an
        adapter that is disabled or merged.
    """
    layers, base = _peel(module)
    chain = [layer for layer in layers if not (layer.disable_adapters or layer.merged)]
    name = _plain_target(chain[0]) if len(chain) == 1 else None
    product = None if name is None else _factors(chain[0])
    if name is None or product is None or product[0].ndim != 2:
        return None
    left, right, scale = product
    transposed = _transposed(chain[0]) or plain_class(type(chain[0])) is LoraEmbedding
    if transposed:
        left, right = right.mT, left.mT
    weight = effective(base, name) if numbers else live_leaves(base)[name]
    left, right = left.detach().to(_at_least_float32(left)) * scale, right.detach()
    return weight, left, right, transposed, original(base, name).requires_grad


def _plain_target(layer: Any, *, ever: bool = False) -> str | None:
    """The parameter to which this layer adds scaled products of two factors.

    None for a layer that does anything else. With `ever` all its adapters count, not only the
    active ones.
    """
    if plain_class(type(layer)) is ParamWrapper:
        # PEFT before 0.19 does not say in which order it keeps the factors of experts.
        known = hasattr(layer, "_did_swap_in_out_features")
        factored = known if layer.num_experts > 1 else layer.get_param().ndim == 2
        return layer.parameter_name if factored else None
    if plain_tuner(plain_class(type(layer))) not in (LoraLinear, LoraEmbedding):
        return None
    adapters = layer.scaling if ever else layer.active_adapters
    if any(name in layer.lora_variant or layer.lora_bias.get(name) for name in adapters):
        return None
    return "weight"


def _factors(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """(left, right, scale) with `scale * left @ right` the sum of the active adapters' updates.

    In the layout of the parameter: [row, rank] and [rank, column], for experts behind a leading
    [expert]. None where no active adapter is on this layer.
    """
    pairs = []
    for name in layer.active_adapters:
        if name in layer.lora_A:
            left, right = layer.lora_B[name].weight, layer.lora_A[name].weight
            experts = getattr(layer, "num_experts", 1)
            if experts > 1:
                right = right.reshape(experts, -1, right.shape[-1])
                left = left.reshape(left.shape[0], -1, experts).permute(2, 0, 1)
                transposed = not layer._did_swap_in_out_features
            else:
                transposed = _transposed(layer)
        elif name in layer.lora_embedding_A:
            left, right = layer.lora_embedding_B[name], layer.lora_embedding_A[name]
            transposed = True
        else:
            continue
        if transposed:
            left, right = right.transpose(-2, -1), left.transpose(-2, -1)
        pairs.append((left, right, layer.scaling[name]))
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    # Side by side along the rank, several adapters are one product: one pass, one rounding.
    left = torch.cat([left.to(_at_least_float32(left)) * scale for left, _, scale in pairs], -1)
    right = torch.cat([right.to(left.dtype) for _, right, _ in pairs], -2)
    return left, right, 1.0


def _transposed(layer: Any) -> bool:
    """Whether the weight is kept as [in, out]; layers for GPTQ do not say so (PEFT 0.21)."""
    return bool(getattr(layer, "fan_in_fan_out", False))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """Computes out = weight + scale * left @ right, rounded once to the precision of `out`.

    The arguments are matrices, or stacks of matrices along a leading dimension.
    """
    dtype = _at_least_float32(out)
    left, right = left.to(dtype), right.to(dtype)
    stacked = out.ndim == 3
    if out.dtype == dtype:
        out.copy_(weight)
        (torch.baddbmm if stacked else torch.addmm)(out, left, right, alpha=scale, out=out)
        return
    rows = max(1, _SCRATCH // out[0].numel())
    scratch = torch.empty_like(out[:rows], dtype=dtype)
    for start in range(0, len(out), rows):
        part = slice(start, start + rows)
        wide = scratch[: len(out[part])]
        _add_product(weight[part], left[part], right[part] if stacked else right, scale, wide)
        out[part].copy_(wide)


def _replace_rows(weight: Tensor, layer: Any, out: Tensor) -> None:
    """Copies weight to out, with the trained tokens' rows in place of the base layer's."""
    out.copy_(weight)
    for name in layer.active_adapters:
        if name in layer.token_indices:
            rows = torch.tensor(layer.token_indices[name], device=out.device)
            out.index_copy_(0, rows, layer.trainable_tokens_delta[name].to(out.dtype))


def _merge_stand_in(base: nn.Module, chain: list[Any]) -> dict[str, Tensor]:
    """The base layer's parameters after PEFT's own merge of these layers, the outermost first."""
    # Not those of a base in 8 bits.
    floating = [t for t in chain[0].parameters() if t.is_floating_point() and t.itemsize > 1]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in floating), torch.float32)
    inner = _stand_in(plain(base), dtype)
    try:
        with torch.autocast(floating[0].device.type, enabled=False):
            for layer in reversed(chain):
                outer = _stand_in(layer, dtype)
                outer._modules["base_layer"] = inner
                outer.merged_adapters = []
                outer.merge(safe_merge=False)
                inner = outer
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        kind = type(chain[0])
        raise ValueError(
            f"PEFT cannot merge {kind.__module__}.{kind.__qualname__} into {base!r}: {error} "
            f"So this layer has no single weight to look at. Use a tuner that merges, or turn this "
            f"adapter off."
        ) from error
    return {n: p for n, p in innermost(inner)._parameters.items() if p is not None}


def _stand_in(module: Any, dtype: torch.dtype) -> Any:
    """Makes a copy of `module` that a merge can change without effect on the live model.

    Its parameters are copies in `dtype`: some merges write to the adapter as well as to the base
    (OFT with `coft` projects its rotation). Its containers and bookkeeping are copies too: some
    merges exchange what is in them. Its buffers, which can be large and shared by all layers
    (VeRA), are the live ones. It is in eval mode: in training VB-LoRA refuses a model that was
    saved with its top vectors alone.
    """
    twin = shallow(module, plain_tuner(type(module)))
    twin.__dict__.update(on_plain_layers(module))
    twin.training = False
    for name, parameter in module._parameters.items():
        if parameter is not None:
            wide = dtype if parameter.is_floating_point() else parameter.dtype
            value = parameter.detach().to(wide, copy=True)
            twin._parameters[name] = nn.Parameter(value, requires_grad=False)
    for name, child in module._modules.items():
        if child is not None and child is not module._modules.get("base_layer"):
            twin._modules[name] = _stand_in(child, dtype)
    return twin
