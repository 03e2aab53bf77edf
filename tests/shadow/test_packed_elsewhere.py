"""Packed layers of libraries that run on GPUs, or that the tests do not install: how they are read.

The whole models are for machines that have what they need, and skipped on others:

    .venv/bin/python -m pip install gptqmodel optimum
    scripts/test tests/shadow/test_packed_elsewhere.py
"""

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from tests import tiny
from tests.adapters import PROJECTIONS, effective, replaced
from tests.shadow.test_other_families import OTHERS
from tests.shadow.test_other_families import model as other_model
from tests.shadow.test_shadow import batch_for, train
from tlens_callback import Shadow
from tlens_callback.instruments import frozen
from tlens_callback.shadow import packed, refusals
from tlens_callback.shadow.fidelity import compare
from tlens_callback.shadow.packed import dequantised, placeholder

cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    ],
)

MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""What a code of three bits stands for; the fourth is the sign."""


class BaseQuantLinear(nn.Module):
    """A layer as GPT-QModel has them: no parameters, and no word of what it multiplies with."""

    __module__ = "gptqmodel.nn_modules.qlinear"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        weight = layer.weight.detach()
        scales = weight.abs().amax(1) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (weight / scales[:, None]).round().to(torch.int8).T)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x):
        y = x @ (self.qweight * self.scales)
        return y if self.bias is None else y + self.bias


def differing(one, other):
    return [n for n, value in one.items() if not torch.equal(value, other[n])]


@pytest.fixture
def unrefused(monkeypatch):
    monkeypatch.setattr(refusals, "_READ", (*refusals._READ, *refusals._UNTRIED))
    monkeypatch.setattr(refusals, "_UNTRIED", ())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [4, 7, 1024])
def test_a_layer_is_seen_from_outside(bias, rows, monkeypatch):
    """And nothing around the live layer sees it: no hook, and no other pass than its own."""
    monkeypatch.setattr(packed, "_ROWS", rows)
    layer = BaseQuantLinear(nn.Linear(30, 50, bias=bias))
    seen = []
    layer.register_forward_hook(lambda *of: seen.append(of))
    layer.forward = lambda x, usual=layer.forward: seen.append(x) or usual(x)
    before = copy.deepcopy(layer.state_dict())
    wanted = layer.qweight.T * layer.scales[:, None]
    assert torch.equal(dequantised(layer), wanted) and not seen
    assert packed.packed(layer) == {"weight"}
    like = placeholder(layer)
    assert (like.shape, like.dtype) == ((50, 30), torch.float32)
    assert not differing(before, layer.state_dict()) and layer.training


@pytest.mark.parametrize("make", [BaseQuantLinear, lambda layer: fp8(layer)])
def test_layers_that_nobody_has_tried_on_a_gpu_are_refused(make):
    """Whoever has put them there."""
    model = replaced(tiny.model("llama"), make)
    with pytest.raises(
        ValueError, match=r"quantised \((gptq|fp8)\), and nobody has shown on a GPU"
    ):
        Shadow.of(model)


def test_a_model_of_such_layers(unrefused):
    model = replaced(tiny.model("llama", attention_bias=True), BaseQuantLinear)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    found, _ = compare(model, shadow, batch)
    assert found.close and found.relative < 1e-5 and shadow.streamed
    model.model.layers[1].mlp.up_proj.scales.mul_(1.5)
    resident = Shadow.of(model, weights="resident")
    model.model.layers[1].mlp.up_proj.scales.mul_(1.5)
    assert compare(model, shadow, batch)[0].close and not compare(model, resident, batch)[0].close


def fp8(layer: nn.Linear, block=(128, 128)):
    """A layer of transformers with these weights, whose blocks have different scales."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    made = FP8Linear(layer.in_features, layer.out_features, block, has_bias=layer.bias is not None)
    if block is None:
        made.weight_scale_inv.data = layer.weight.detach().abs().max() / 448
    else:
        nn.init.uniform_(made.weight_scale_inv, 0.5, 2.0)
    made.weight.data = layer.weight.detach().to(torch.float8_e4m3fn)
    if layer.bias is not None:
        made.bias.data = layer.bias.detach().to(torch.bfloat16)
    return made.requires_grad_(False)


@pytest.mark.parametrize("block", [(128, 128), (64, 32), None])
@pytest.mark.parametrize("bias", [False, True])
def test_8_bit_floating_point_numbers_have_the_scale_of_their_block(block, bias):
    layer = fp8(nn.Linear(200, 150, bias=bias), block)
    found = dequantised(layer)
    assert packed.packed(layer) == {"weight"}
    assert (found.shape, found.dtype) == ((150, 200), torch.bfloat16)
    for row in range(0, 150, 13):
        for column in range(0, 200, 7):
            scale = layer.weight_scale_inv
            if block is not None:
                scale = scale[row // block[0], column // block[1]]
            wanted = (layer.weight[row, column].float() * scale).bfloat16()
            assert found[row, column] == wanted


def test_a_change_of_8_bit_floating_point_numbers_is_measured():
    weight = fp8(nn.Linear(200, 150)).weight
    first = frozen._look(weight, torch.device("cpu"))
    again = frozen._look(weight, torch.device("cpu"))
    assert torch.equal(first[0], again[0]) and not frozen._distance(again[1], first[1]).any()
    weight.view(torch.uint8)[0] ^= 64
    changed = frozen._look(weight, torch.device("cpu"))
    assert not torch.equal(first[0], changed[0])
    assert (frozen._distance(changed[1], first[1]) >= 1).all()


def test_peft_merges_into_8_bit_floating_point_numbers():
    """What it does with a plain layer that has the same numbers."""
    model = nn.Sequential(fp8(nn.Linear(256, 128)))
    live: Any = get_peft_model(model, LoHaConfig(r=4, target_modules=["0"], init_weights=False))
    layer = live.base_model.model[0]
    wanted = dequantised(layer.base_layer).float() + layer.get_delta_weight("default")
    assert torch.equal(effective(layer)["weight"], wanted.bfloat16())


def shown(model, target_modules=PROJECTIONS) -> Shadow:
    """The shadow is the model before and after it was trained, with and without its adapters."""
    live = get_peft_model(model, LoraConfig(r=4, target_modules=target_modules)).train()
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    held = {name: value.clone() for name, value in live.state_dict().items() if "lora" not in name}
    shadow, behind = Shadow.of(live), Shadow.of(live, weights="resident")
    batch = batch_for(shadow)
    found, _ = compare(live, shadow, batch)
    assert found.close and found.kl < 1e-2
    assert torch.equal(shadow.logits(batch.tokens), behind.logits(batch.tokens))
    with live.disable_adapter():
        assert not compare(live, behind, batch)[0].close
        with behind.without_adapters():
            assert compare(live, behind, batch)[0].close
    train(live, batch, lr=1e-2)
    shadow.sync()
    assert compare(live, shadow, batch)[0].close and not compare(live, behind, batch)[0].close
    assert not differing(held, live.state_dict())
    return shadow


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_in_8_bit_floating_point(tmp_path, unrefused):
    tiny.model("llama", hidden_size=256, intermediate_size=512, head_dim=64).save_pretrained(
        tmp_path
    )
    how = {"dtype": torch.bfloat16, "device_map": "cuda"}
    live = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(), **how
    )
    assert shown(live).streamed


def four_bits(kernel, dtype):
    """Makes layers of GPT-QModel with four bits in groups of 64 inputs."""

    def made(layer: nn.Linear):
        out, of = layer.weight.shape
        groups = layer.weight.detach().float().view(out, of // 64, 64)
        low, high = groups.amin(-1), groups.amax(-1)
        scales = (high - low) / 15
        zeros = (-low / scales).round()
        packed = kernel(
            bits=4, group_size=64, sym=False, desc_act=False, in_features=of, out_features=out,
            bias=layer.bias is not None,
        )  # fmt: skip
        if "AWQ" in str(kernel.SUPPORTS_METHODS):
            packed.pack(layer, scales.to(dtype), zeros)
        else:
            packed.pack_original(layer, scales, zeros, torch.arange(of, dtype=torch.int32) // 64)
        packed.post_init()
        packed.scales = packed.scales.to(dtype)
        if layer.bias is not None:
            packed.bias = packed.bias.to(dtype)
        return packed

    return made


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["torch.TorchLinear", "torch_awq.AwqTorchLinear"])
def test_a_model_of_gpt_qmodel(kernel, dtype, device, unrefused):
    """As GPTQ packs them, and as AWQ does, which has none in float32."""
    module, name = kernel.split(".")
    kernel = getattr(pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{module}"), name)
    pytest.importorskip("optimum")
    if dtype not in kernel.SUPPORTS_DTYPES and "AWQ" in str(kernel.SUPPORTS_METHODS):
        pytest.skip("no kernel for it")
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "attention_bias": True}
    model = tiny.model("llama", **shape).to(dtype)
    assert shown(replaced(model, four_bits(kernel, dtype)).to(device)).streamed


def in_mxfp4(folder) -> None:
    """Packs the experts of the checkpoint in this folder as gpt-oss has them, by the naive rule."""
    file = folder / "model.safetensors"
    held = load_file(file)
    for name in [n for n in held if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight = held.pop(name).float().mT
        blocks = weight.reshape(*weight.shape[:-1], -1, 32)
        exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
        scaled = blocks / exponents.exp2()[..., None]
        codes = (scaled.abs()[..., None] - MXFP4).abs().argmin(-1) + 8 * (scaled < 0)
        held[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        held[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    save_file(held, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_gpt_oss_is_read_as_transformers_dequantises_it(device, tmp_path):
    """Which trains it in no other way; on a CPU, or without its kernels, it is loaded like this."""
    name, shape = OTHERS["gpt_oss"]
    plain: Any = other_model(name, {**shape, "intermediate_size": 64})
    plain = plain.to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    in_mxfp4(tmp_path)
    live = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), device_map=device
    )
    experts = live.model.layers[0].mlp.experts.down_proj
    error = (experts.cpu() - plain.model.layers[0].mlp.experts.down_proj).abs().max()
    assert 0 < error < experts.abs().max() / 4
    assert not shown(live, target_modules=["q_proj", "o_proj"]).streamed
