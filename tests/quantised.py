"""Tiny models whose base is quantised, as people load them for QLoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests import tiny
from tests.adapters import PROJECTIONS, replaced

functional = pytest.importorskip("bitsandbytes").functional
quantize = pytest.importorskip("hqq.core.quantize")
Int8WeightOnlyConfig = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig

KINDS = ("nf4", "fp4", "int8", "torchao", "hqq")
"""4 bits of bitsandbytes (nf4 with scales that are quantised too), its 8 bits, torchao's, and those
of HQQ, 4 bits."""

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 3,
}


def loaded(folder: Path, how: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama whose linear layers are quantised while it is loaded."""
    if not (folder / "config.json").exists():
        tiny.model("llama", **SHAPE).save_pretrained(folder)
    if how == "hqq":
        # transformers 5.23 does not quantise with HQQ, but the library itself does.
        return with_hqq(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    if how == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    elif how == "torchao":
        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=how,
            bnb_4bit_use_double_quant=how == "nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map="cpu"
    )


def with_hqq(model: Any, **settings: Any) -> Any:
    """The model with all linear layers but the head in 4 bits, or as these settings say."""
    config = quantize.BaseQuantizeConfig(**{"nbits": 4, "group_size": 64, **settings})
    how = {"compute_dtype": model.dtype, "device": "cpu"}
    return replaced(model, lambda layer: quantize.HQQLinear(layer, config, **how))


def linear_layers(model: nn.Module) -> str | list[str]:
    """All of them but the head: PEFT 0.21 does not count HQQ's among "all-linear"."""
    has_hqq = any(isinstance(module, quantize.HQQLinear) for module in model.modules())
    return PROJECTIONS if has_hqq else "all-linear"


def float_copy(model: Any) -> Any:
    """A plain model with the numbers that the libraries' own functions give for packed weights."""
    plain = tiny.model("llama", **SHAPE)
    for name, module in plain.named_modules():
        own = getattr(module, "weight", None)
        if own is None:
            continue
        layer = model.get_submodule(name)
        if hasattr(layer, "W_q"):
            # Two numbers in a byte, those of the first half of the groups in its upper bits.
            codes = torch.cat([layer.W_q >> 4, layer.W_q & 15]).float()
            numbers = (codes - layer.meta["zero"]) * layer.meta["scale"]
            own.data = numbers.view(own.shape)
            continue
        weight = layer.weight
        if getattr(weight, "quant_state", None) is not None:
            weight = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif getattr(weight, "SCB", None) is not None:
            # 127 steps to the largest entry of each row.
            weight = weight.data.float() * weight.SCB[:, None] / 127
        elif hasattr(weight.detach(), "qdata"):
            weight = weight.qdata.float() * weight.scale
        own.data = weight.detach().clone()
    return plain


def adapted(model: Any, **settings: Any) -> nn.Module:
    """The model with adapters on all linear layers but the head, whose effect is as large as the
    model's."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        given = {"r": 8, "lora_alpha": 16, "target_modules": linear_layers(model)} | settings
        found = get_peft_model(model, LoraConfig(**given))
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return found
