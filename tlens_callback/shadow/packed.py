"""Reads the packed weights of quantised layers as numbers, and writes nothing to them."""

import sys
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def packed(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of this plain module that are packed and can be read.

    Read are layers of bitsandbytes, in 4 and 8 bits, and int8 weights of torchao.
    """
    weight = module._parameters.get("weight")
    if weight is None or isinstance(module, BaseTunerLayer):
        return frozenset()
    kinds = _bitsandbytes()
    readable = (isinstance(module, kinds) if kinds else False) or _is_torchao(weight)
    # A layer of bitsandbytes holds a plain weight until it is moved to its device.
    plain = type(weight.detach()) is Tensor and weight.is_floating_point()
    return frozenset({"weight"}) if readable and not plain else frozenset()


def placeholder(module: Any) -> Tensor:
    """A tensor of the shape, dtype and device of the dequantised weight, without its numbers."""
    weight = module.weight
    dtype = weight.dtype
    state = getattr(weight, "quant_state", None)
    if state is not None:
        dtype = state.dtype
    elif not weight.is_floating_point():
        dtype = torch.float32 if module.bias is None else module.bias.dtype
    shape = weight.shape if _is_torchao(weight) else (module.out_features, module.in_features)
    return torch.empty((), dtype=dtype, device=weight.device).expand(shape)


@torch.no_grad()
def dequantised(module: Any) -> Tensor:
    """The weight of a packed layer in floating point, as its forward pass uses it.

    The 8-bit layers of bitsandbytes also round what they multiply it with; that is not part of it.
    """
    weight = module.weight
    if _is_torchao(weight):
        return weight.detach().dequantize()
    from bitsandbytes import functional

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
    weight, compute = module.weight, getattr(module, "compute_dtype", None)
    if weight.dtype == torch.int8:
        # They round their input to 8 bits, some 2e-2, which is more than half precision; but not on
        # a CPU in the mode of training, in which they are compared.
        return [] if weight.device.type == "cpu" else [torch.bfloat16]
    return [compute] if compute else []


def repacks(module: nn.Module) -> bool:
    """Whether a forward pass of this layer in eval mode may pack its weight anew.

    On CPUs with AVX512-BF16 the 4-bit layers of bitsandbytes 0.50 do. Training then computes with
    the other packing, and is no longer the same.
    """
    kinds = _bitsandbytes()
    return bool(kinds) and isinstance(module, kinds)


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
    package, _, name = kind.__module__.rpartition(".")
    if name != "bnb" and kind.__name__ != "TorchaoLoraLinear":
        return kind
    layers = sys.modules[f"{package}.layer"]
    plain = kind.__name__.replace("Linear4bit", "Linear").replace("Linear8bitLt", "Linear")
    return getattr(layers, plain.replace("TorchaoLora", ""))


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


def _bitsandbytes() -> tuple[type, ...]:
    library = sys.modules.get("bitsandbytes")
    return () if library is None else (library.nn.Linear4bit, library.nn.Linear8bitLt)


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
