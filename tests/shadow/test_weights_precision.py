"""Effective weights of plain LoRA are the exact sum, rounded once."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tests.adapters import (
    CONFIGS,
    EXPERTS,
    PROJECTIONS,
    adapt,
    build,
    llama,
    lora,
    mostly_slow,
    plain,
    state,
)
from tests.marks import in_turns
from tlens_callback.shadow import weights
from tlens_callback.shadow.weights import fill, innermost, live_leaves

# PEFT warns about many of the configurations below; none of the warnings is ours.
pytestmark = pytest.mark.filterwarnings("ignore")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def dyadic(*shape: int, bits: int, top: int = 8) -> torch.Tensor:
    """Random multiples of 2**-bits below top * 2**-bits: sums of products of them are exact."""
    return torch.randint(-top, top + 1, shape).double() * 2.0**-bits


def exact_lora(
    layout: str, base_dtype: torch.dtype, adapter_dtype: torch.dtype, adapters: int
) -> tuple[Any, torch.Tensor]:
    """An adapted layer with dyadic weights, and W + sum(s B A) in float64, without any rounding."""
    torch.manual_seed(0)
    rows, columns, experts = 48, 40, 3
    plain_layer: nn.Module
    if layout == "linear":
        plain_layer, shape = nn.Linear(columns, rows, bias=False), (rows, columns)
    elif layout == "conv1d":
        plain_layer, shape = Conv1D(columns, rows), (rows, columns)
    elif layout == "embedding":
        plain_layer, shape = nn.Embedding(rows, columns), (rows, columns)
    else:
        plain_layer, shape = nn.Module(), (experts, rows, columns)
        plain_layer.weight = nn.Parameter(torch.empty(shape))
    holder = nn.ModuleDict({"layer": plain_layer})
    settings: dict[str, Any] = {"target_modules": ["layer"]}
    if layout == "experts":
        settings = {"target_modules": [], "target_parameters": ["layer.weight"]}
    model = get_peft_model(holder, lora(**settings)())
    for i in range(1, adapters):
        model.add_adapter(f"more{i}", lora(**settings, lora_alpha=4)())
    whole: Any = model.base_model.model
    layer = whole["layer"]
    layer.set_adapter(list(layer.scaling))
    # bfloat16 holds multiples of 2**-7 up to 1; the update reaches below what it holds.
    base = dyadic(*shape, bits=7, top=127)
    innermost(layer).weight.data = base.to(base_dtype)
    total = base.clone()
    for name, scale in layer.scaling.items():
        if layout == "embedding":
            a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        exact_a, exact_b = dyadic(*a.shape, bits=6), dyadic(*b.shape, bits=6)
        a.data, b.data = exact_a.to(adapter_dtype), exact_b.to(adapter_dtype)
        if layout == "experts":
            for expert in range(experts):
                rank = exact_a.shape[0] // experts
                a_of = exact_a[expert * rank : (expert + 1) * rank]
                b_of = exact_b[:, expert::experts]
                # PEFT's layout of the factors: [expert, in, out] or [expert, out, in].
                update = b_of @ a_of
                total[expert] += scale * (update if update.shape == shape[1:] else update.T)
        else:
            update = exact_b @ exact_a
            total += scale * (update if layout == "linear" else update.T)
    return layer, total


@pytest.mark.parametrize("scratch", [2**23, 100], ids=["one piece", "many pieces"])
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("layout", ["linear", "conv1d", "embedding", "experts"])
@pytest.mark.parametrize(
    ("base_dtype", "adapter_dtype", "own_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float64),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("device", DEVICES)
def test_plain_lora_is_the_exact_sum_rounded_once(
    monkeypatch, device, scratch, adapters, layout, base_dtype, adapter_dtype, own_dtype
):
    monkeypatch.setattr(weights, "_SCRATCH", scratch)
    layer, exact = exact_lora(layout, base_dtype, adapter_dtype, adapters)
    own = torch.full_like(exact, torch.nan, dtype=own_dtype, device=device)
    fill(layer.to(device), {"weight": own})
    assert torch.equal(own.cpu(), exact.to(own_dtype))


def test_rounding_the_update_first_would_be_seen():
    layer, exact = exact_lora("linear", torch.bfloat16, torch.float32, 2)
    assert not torch.equal(exact.bfloat16().double(), exact)
    twice = live_leaves(layer)["weight"].clone()
    for name in layer.scaling:
        twice += layer.get_delta_weight(name).bfloat16()
    assert not torch.equal(twice, exact.bfloat16())


@pytest.mark.parametrize(
    ("name", "adapter_dtype"), in_turns(mostly_slow(CONFIGS), [torch.float32, torch.bfloat16])
)
def test_a_bfloat16_base_gives_the_float32_result_rounded_once(name, adapter_dtype):
    live = build(name, torch.bfloat16)
    for path, parameter in live.named_parameters():
        if parameter.requires_grad and not path.endswith("base_layer.bias"):
            parameter.data = parameter.data.to(adapter_dtype)
    wide = copy.deepcopy(live).float()
    before = state(live)
    low, high = plain(live).state_dict(), plain(wide).state_dict()
    assert state(live) == before
    for key, value in low.items():
        assert value.dtype == torch.bfloat16 or name.startswith("modules_to_save")
        torch.testing.assert_close(value, high[key].to(value.dtype), rtol=2**-8, atol=1e-6)


def test_an_autocast_region_around_the_call_changes_nothing():
    for name in ("lora", "dora", "boft"):
        live = build(name)
        expected = plain(live).state_dict()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = plain(live).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_plain_lora_is_not_merged_by_peft(monkeypatch):
    """The fused path: no stand-in, no tensor of the update."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("not the fused path")

    lives = [
        adapt(llama(bias=True), lora(target_modules=["embed_tokens", *PROJECTIONS])),
        adapt(tiny.model("gpt2"), lora(target_modules=["c_attn", "wte"])),
        adapt(tiny.model("mixtral"), lora(target_parameters=EXPERTS)),
    ]
    for kind in (LoraLinear, LoraEmbedding, ParamWrapper):
        monkeypatch.setattr(kind, "merge", never)
        monkeypatch.setattr(kind, "get_delta_weight", never)
    for live in lives:
        plain(live)
    dora = adapt(llama(), lora(use_dora=True))
    with pytest.raises(ValueError, match="not the fused path"):
        plain(dora)
