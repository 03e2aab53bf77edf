"""Refuses models that cannot have a shadow: each refusal gives the reason and what to try."""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftType
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as _CAUSAL,
)

from tlens_callback.shadow.packed import method, packed
from tlens_callback.shadow.shards import sharded
from tlens_callback.shadow.weights import unwrap

_PROMPTS = "puts learned vectors in front of the input (or of every layer's keys and values)"

_TUNERS: dict[str, str] = {
    PeftType.PROMPT_TUNING: _PROMPTS,
    PeftType.MULTITASK_PROMPT_TUNING: _PROMPTS,
    PeftType.P_TUNING: _PROMPTS,
    PeftType.PREFIX_TUNING: _PROMPTS,
    PeftType.CPT: _PROMPTS,
    "CARTRIDGE": _PROMPTS,
    PeftType.ADAPTION_PROMPT: "adds attention over learned prompts inside the attention layers",
    PeftType.XLORA: "mixes its LoRA adapters anew for every input",
    PeftType.POLY: "mixes its modules by a task id that comes with the input",
    "LILY": "mixes its matrices by the input",
    "SHADOW": "runs a second, small network beside the model",
}
"""PEFT type -> what it does that no weight of the plain model can express."""

_VARIANTS = {
    "ALoraLinearVariant": "aLoRA acts only on the tokens behind its invocation sequence",
    "ArrowLinearVariant": "Arrow routes every token to other LoRA adapters",
    "QALoraLinearVariant": "QA-LoRA pools its input in groups and needs a quantised layer",
}
"""Variant of LoRA -> why it has no single weight."""

_READ = ("bitsandbytes", "torchao", "hqq")
"""Quantisation methods whose layers are read."""

_UNTRIED = ("gptq", "awq", "fp8")
"""Those whose layers `packed` can read, which no test on a GPU has shown to be right yet."""


def refuse(
    model: nn.Module, *, device: torch.device | str | None = None, together: bool = False
) -> None:
    """Raises a ValueError for a live model that no plain model with merged weights can represent.

    Refused are: a model that is not a transformers model; parameters that are quantised in another
    way than `packed` can read, sharded (unless all processes work together), under tensor
    parallelism, absent (meta device, offloading) or, unless `device` names the place for a copy,
    spread over several devices;
    and adapters whose effect depends on more than the layer's input vector, so that no merged
    weight has it.

    Args:
        model: as the trainer hands it over, wrappers included.
        device: device of the shadow; None: the device of the live model.
        together: whether all processes take part, so that the parameters can be gathered.

    Raises:
        ValueError: one sentence says what is refused, one says why, one says what to try.
    """
    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        raise ValueError(
            f"A {type(model).__name__} is not a transformers model. "
            f"The shadow is rebuilt from a PreTrainedModel's class and config. "
            f"Hand over a PreTrainedModel, plain or wrapped by PEFT, DDP or torch.compile."
        )
    for reason in (
        *_sharded(model, together),
        *_quantised(model),
        *_placed(model, device),
        *_adapted(model),
    ):
        raise ValueError(reason)


def language_model(model: nn.Module) -> PreTrainedModel:
    """The model inside all wrappers, if text alone runs through it from left to right.

    A model that also reads images or sounds writes text as a causal language model does, so it is
    one that can generate. Whether a token sees those behind it, the first comparison with the live
    model measures.

    Raises:
        ValueError: for any other model.
    """
    base = unwrap(model)
    name = type(base).__name__
    causal = name.endswith(("ForCausalLM", "LMHeadModel")) or name in _CAUSAL.values()
    if (
        not isinstance(base, PreTrainedModel)
        or base.config.is_encoder_decoder
        or not (causal or base.can_generate())
    ):
        raise ValueError(
            f"A {name} is no causal language model of transformers. Probes run from left to right "
            f"without a mask, which other models need. Only a model that continues a text, such as "
            f"a ...ForCausalLM, can be watched."
        )
    return base


def _sharded(model: nn.Module, together: bool) -> Iterator[str]:
    how = sharded(model)
    parallel = (m for m in model.modules() if (getattr(m, "_tp_size", None) or 1) > 1)
    if how == "DTensor" or any(isinstance(module, PreTrainedModel) for module in parallel):
        yield (
            "The model is under tensor parallelism: each process computes with a part of each "
            "layer. Such parts are not read. Train with FSDP, DeepSpeed, DDP or on one device to "
            "look inside."
        )
    elif how is not None and not together:
        yield (
            f"The model is sharded ({how}). No process holds whole weights, and gathering them "
            f"needs all processes at once. TLensCallback and Tracer do that, where every process "
            f"has them."
        )


def _quantised(model: nn.Module) -> Iterator[str]:
    way_out = "Load the base model in bfloat16 or float32 to look inside."
    for module in model.modules():
        quantizer = getattr(module, "hf_quantizer", None)
        how = getattr(module, "quantization_method", None)
        how = getattr(how, "value", how) or (quantizer and type(quantizer).__name__)
        if how is None or how in _READ:
            how = method(type(module))
            if how not in _UNTRIED:
                continue
        settings = getattr(getattr(module, "config", None), "quantization_config", None)
        if hasattr(settings, "dequantize"):
            # transformers then loads floating point numbers, and the model is a plain one.
            way_out = f"Load it with {type(settings).__name__}(dequantize=True) to look inside."
        why = "its packed weights cannot be read"
        if how in _UNTRIED:
            why = "nobody has shown on a GPU yet that its packed weights are read rightly"
        yield (
            f"The base model is quantised ({how}), and {why}: those of bitsandbytes, of torchao's "
            f"int8 and of HQQ are read. {way_out}"
        )
        return
    readable = {id(p) for m in model.modules() if packed(m) for p in m._parameters.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in readable:
            continue
        if not parameter.is_floating_point() or _kind(parameter) not in ("Tensor", "DTensor"):
            yield (
                f"Parameter {name!r} is a {_kind(parameter)} of {parameter.dtype}: quantised or "
                f"packed in a way that cannot be read. {way_out}"
            )
            return


def _kind(parameter: nn.Parameter) -> str:
    """Class of the tensor behind a parameter: Tensor, unless a library put its own there."""
    return type(parameter.detach()).__name__


def _placed(model: nn.Module, device: torch.device | str | None) -> Iterator[str]:
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    meta = torch.device("meta")
    if meta in devices:
        yield (
            f"Parameter {devices[meta]!r} is on the meta device: offloaded, or never loaded. "
            f"There is nothing to read. Keep the whole model in memory (no offloading in "
            f"device_map) to look inside."
        )
    elif len(devices) > 1 and device is None:
        where = ", ".join(sorted(map(str, devices)))
        yield (
            f"The model's parameters are on several devices ({where}). The shadow computes on one. "
            f"Pass device= to have a full copy on that device, or load the model on one device."
        )


def _adapted(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, dict) else ():
            reason = _TUNERS.get(config.peft_type)
            if reason is None and config.is_prompt_learning:
                reason = _PROMPTS
            if reason is not None:
                yield _no_weight(f"{type(config).__name__.removesuffix('Config')} {reason}")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for reason in _layer(module):
                yield _no_weight(f"{reason} (module {name!r})")


def _layer(layer: Any) -> Iterator[str]:
    if isinstance(layer, MultiheadAttention):
        yield "LoRA on torch.nn.MultiheadAttention adapts two weights that PEFT merges in place"
    for adapter in layer.active_adapters:
        variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
        if variant in _VARIANTS:
            yield _VARIANTS[variant]
        if getattr(layer, "lora_bias", {}).get(adapter) and layer.get_base_layer().bias is None:
            yield "lora_bias=True on a layer without a bias adds one that the plain model lacks"
        if getattr(layer, "sample_at_inference", {}).get(adapter):
            yield "PVeRA with sample_at_inference=True draws another weight for every input"


def _no_weight(reason: str) -> str:
    return (
        f"{reason}. So there is no set of plain weights that computes what this model computes, "
        f"which is what the shadow would hold. Use a tuner that merges (LoRA, DoRA, VeRA, ...) "
        f"to look inside."
    )
