"""Reads the packed weights of quantised layers as numbers, and writes nothing to them."""

import functools
import re
import sys
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tlens_callback.shadow.twins import shallow

_CLASSES = {
    ("bitsandbytes", "Linear4bit"): "4bit",
    ("bitsandbytes", "Linear8bitLt"): "8bit",
    ("hqq", "HQQLinear"): "hqq",
    ("gptqmodel", "BaseQuantLinear"): "gptq",
    ("transformers", "FP8Linear"): "fp8",
}
"""Library and class of a layer -> how it is packed. GPT-QModel's are read alike, also for AWQ."""

_ROWS = 1024
"""Inputs with which the weight of a layer is found at once."""


def packed(module: nn.Module) -> frozenset[str]:
    """Names, in a plain layer, of the parameters that this plain module holds packed.

    Read are layers of bitsandbytes, in 4 and 8 bits, int8 weights of torchao, layers of HQQ and of
    GPT-QModel, and those of transformers in 8-bit floating point.
    """
    if isinstance(module, BaseTunerLayer):
        return frozenset()
    how = method(type(module))
    if how in ("hqq", "gptq"):
        return frozenset({"weight"} if held(module) is not None else ())
    weight = module._parameters.get("weight")
    if weight is None:
        return frozenset()
    if how == "fp8":
        return frozenset({"weight"} if weight.element_size() == 1 else ())
    # A layer of bitsandbytes holds a plain weight until it is moved to its device.
    plain = type(weight.detach()) is Tensor and weight.is_floating_point()
    return frozenset({"weight"} if (how or _is_torchao(weight)) and not plain else ())


def held(module: nn.Module) -> Any:
    """The tensor in which a packed layer holds its weight; None if it has none of this name."""
    name = {"hqq": "W_q", "gptq": "qweight"}.get(method(type(module)), "weight")
    return getattr(module, name, None)


def placeholder(module: Any) -> Tensor:
    """A tensor of the shape, dtype and device of the dequantised weight, without its numbers."""
    numbers = held(module)
    shape = module.out_features, module.in_features
    match method(type(module)):
        case "hqq":
            dtype = module.compute_dtype
        case "gptq":
            dtype = module.scales.dtype
        case "fp8":
            # The layer does not say; transformers loads such models in bfloat16.
            dtype = torch.bfloat16 if module.bias is None else module.bias.dtype
        case _:
            state = getattr(numbers, "quant_state", None)
            dtype = numbers.dtype if state is None else state.dtype
            if not dtype.is_floating_point:
                dtype = torch.float32 if module.bias is None else module.bias.dtype
            shape = numbers.shape if _is_torchao(numbers) else shape
    return torch.empty((), dtype=dtype, device=numbers.device).expand(shape)


@torch.no_grad()
def dequantised(module: Any) -> Tensor:
    """The weight of a packed layer in floating point, as its forward pass uses it.

    The 8-bit layers also round what they multiply it with; that is not part of it.
    """
    weight = held(module)
    match method(type(module)):
        case "hqq":
            # HQQ unpacks scales into what the layer keeps of its packing, and takes them out again.
            return shallow(module, type(module)).dequantize()
        case "gptq":
            return _seen_from_outside(module)
        case "fp8":
            return _of_blocks(module)
    if _is_torchao(weight):
        return weight.detach().dequantize()
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    state = getattr(weight, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            return _unpacked_on_cpu(weight.data, state)
        return functional.dequantize_4bit(weight.data, state)
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    codes = weight.CB if getattr(weight, "CB", None) is not None else weight.data
    return functional.int8_vectorwise_dequant(codes, scales)


def precisions(module: Any) -> list[torch.dtype]:
    """The precisions in which a packed layer computes, beside that of its weight."""
    if not packed(module):
        return []
    how, compute = method(type(module)), getattr(module, "compute_dtype", None)
    if how == "fp8":
        return [torch.bfloat16]  # They round their input to 8 bits.
    if how == "8bit":
        # So do these, some 2e-2, which is more than half precision; but not on a CPU in the mode of
        # training, in which they are compared.
        return [] if module.weight.device.type == "cpu" else [torch.bfloat16]
    return [compute] if compute else []


def repacks(module: nn.Module) -> bool:
    """Whether a forward pass of this layer in eval mode may pack its weight anew.

    On CPUs with AVX512-BF16 the 4-bit layers of bitsandbytes 0.50 do. Training then computes with
    the other packing, and is no longer the same.
    """
    return method(type(module)) in ("4bit", "8bit")


def plain_linear(module: Any) -> nn.Linear:
    """A plain layer with the dequantised weight and the bias of a packed one."""
    weight = dequantised(module)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return layer.train(module.training)


def plain_tuner(kind: type) -> type:
    """The class that PEFT uses on plain layers, for one that it uses on packed ones."""
    package, _, library = kind.__module__.rpartition(".")
    if library not in ("bnb", "torchao", "hqq", "gptq", "awq"):
        return kind
    name = re.sub("Torchao|Hqq|GPTQ|Awq|Lora|Quant|4bit|8bitLt", "", kind.__name__)
    return getattr(sys.modules[f"{package}.layer"], name)


def on_plain_layers(layer: Any) -> dict[str, Any]:
    """The attributes that a copy of a tuner layer needs to merge into a plain layer.

    On a packed one some tuners keep how its weight is dequantised and packed anew, and some do not
    say that it is not transposed (PEFT 0.21).
    """
    needed: dict[str, Any] = {}
    if vars(layer).get("quantization_backend") is not None:
        needed["quantization_backend"] = None
    if plain_tuner(type(layer)) is not type(layer) and not hasattr(layer, "fan_in_fan_out"):
        needed["fan_in_fan_out"] = False
    return needed


@functools.cache
def method(kind: type) -> str:
    """How layers of this class are packed, or ""; cached: every sync asks it for every module."""
    for base in kind.__mro__:
        library = base.__module__.partition(".")[0]
        if how := _CLASSES.get((library, base.__name__)):
            return how
    return ""


def _is_torchao(weight: Tensor) -> bool:
    kind = type(weight.detach())
    # Not those that quantise activations too, whose layers compute something else.
    return (
        kind.__module__.startswith("torchao.")
        and kind.__name__ == "Int8Tensor"
        and getattr(weight, "act_quant_kwargs", None) is None
    )


def _unpacked_on_cpu(codes: Tensor, state: Any, block: int = 32) -> Tensor:
    """The weight of a 4-bit layer that bitsandbytes packed anew for AVX512.

    The library's own inverse writes to the layer, and rounds its scales once more.
    """
    n, half = codes.shape
    rows = codes.reshape(-1, block)
    nibbles = torch.cat([rows & 15, (rows >> 4) & 15], 1)
    nibbles = nibbles.reshape(n // block, half, block, 2).transpose(1, 2).reshape(n, 2 * half)
    scale = state.absmax.float().T.repeat_interleave(state.blocksize, 1)
    return (state.code[nibbles.long()] * scale).to(state.original_dtype)


def _of_blocks(module: Any) -> Tensor:
    """The weight of a layer in 8-bit floating point, with a scale for each block, or for all."""
    dtype, scale = placeholder(module).dtype, module.weight_scale_inv.float()
    weight = module.weight.float()
    if module.block_size is not None:
        for dim, size in enumerate(module.block_size):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight.mul_(scale).to(dtype)


def _seen_from_outside(module: Any) -> Tensor:
    """The weight of a layer as what it answers to each unit vector, without its bias.

    One matrix product, of [in, in] with [in, out]. The kernels of GPT-QModel lay out their weights
    each in its own way, and some have no function that unpacks them.
    """
    layer = shallow(module, type(module))
    for names in (layer.__dict__, layer._buffers, layer._parameters):
        names.pop("bias", None)
    layer.__dict__["bias"] = None
    weight = placeholder(module)
    found = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for start in range(0, module.in_features, _ROWS):
        ones = weight.new_zeros(min(_ROWS, module.in_features - start), module.in_features)
        ones.diagonal(start).fill_(1)
        # Without the hooks of the live layer, and what somebody has put in the place of its pass.
        found[:, start : start + _ROWS] = type(layer).forward(layer, ones).T
    return found
