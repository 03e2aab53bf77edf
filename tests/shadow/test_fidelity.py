"""Fidelity measures what it says, and finds a shadow that is another model."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.shadow.test_shadow import batch_for, hugging_face_logits, lora, train
from tlens_callback import Shadow
from tlens_callback.shadow.fidelity import _tf32, compare
from tlens_callback.shadow.live import as_inference


def test_figures_are_those_of_the_logits():
    model = tiny.model("llama")
    shadow = Shadow.of(lora(tiny.model("llama"), target_modules=["q_proj"]))
    batch = batch_for(shadow)
    other = tiny.model("llama", seed=1)
    fidelity, last = compare(other, shadow, batch)
    live = hugging_face_logits(other, batch)[batch.mask].double()
    mine = shadow.logits(batch.tokens)[batch.mask].double()
    kl = torch.nn.functional.kl_div(mine.log_softmax(-1), live.softmax(-1), reduction="sum")
    assert fidelity.max_abs_diff == pytest.approx(float((live - mine).abs().max()), rel=1e-4)
    assert fidelity.kl == pytest.approx(float(kl) / len(live), rel=1e-4)
    agree = (live.argmax(-1) == mine.argmax(-1)).double().mean()
    assert fidelity.top1_agreement == pytest.approx(float(agree))
    assert not fidelity.close
    ends = torch.arange(3), batch.last
    for logits, of in zip(
        last, (hugging_face_logits(other, batch), shadow.logits(batch.tokens)), strict=True
    ):
        assert torch.allclose(logits, of[ends], atol=1e-5)
    assert compare(model, Shadow.of(model), batch)[0].close


def test_nan_is_not_close():
    model = tiny.model("llama")
    shadow = Shadow.of(lora(model, target_modules=["q_proj"]))
    batch = batch_for(shadow)
    with torch.no_grad():
        shadow.bridge.original_model.model.norm.weight.fill_(float("nan"))
    assert not compare(model, shadow, batch)[0].close


def test_rows_in_chunks_give_the_same_figures(monkeypatch):
    from tlens_callback.shadow import fidelity as module

    model, other = tiny.model("llama"), tiny.model("llama", seed=1)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    whole, _ = compare(other, shadow, batch)
    monkeypatch.setattr(module, "_CHUNK", 1)
    parts, _ = compare(other, shadow, batch)
    want, got = dataclasses.asdict(whole), dataclasses.asdict(parts)
    for same in ("tolerance", "moved", "followed", "attention"):
        assert want.pop(same) == got.pop(same)
    assert got == pytest.approx(want, rel=1e-4)


def test_a_missed_update_is_stale_and_a_followed_one_is_not():
    model = lora(tiny.model("llama"))
    shadow = Shadow.of(model, weights="resident")
    batch = batch_for(shadow)
    first, reference = compare(model, shadow, batch)
    train(model, batch, steps=1, lr=1e-5)
    missed, _ = compare(model, shadow, batch, reference=reference)
    assert missed.moved > 1e-4 and missed.close, "too small an update for the tolerance alone"
    assert missed.stale(first) and missed.followed == 0
    shadow.sync()
    followed, _ = compare(model, shadow, batch, reference=reference)
    assert followed.close and not followed.stale(first)
    assert followed.followed == pytest.approx(1, abs=1e-2)


def test_half_precision_compares_eager_with_eager():
    model = lora(tiny.model("llama", attn_implementation="sdpa").to(torch.bfloat16))
    shadow = Shadow.of(model)
    fidelity, _ = compare(model, shadow, batch_for(shadow))
    assert fidelity.close and model.config._attn_implementation == "sdpa"


def test_borrowed_settings_come_back_even_on_an_error():
    model = lora(tiny.model("llama", attn_implementation="sdpa"))
    model.train()
    model.get_base_model().lm_head.eval()
    flags = [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError), as_inference(model, eager=True):
        assert not any(m.training for m in model.modules())
        assert model.config._attn_implementation == "eager"
        raise ZeroDivisionError
    assert flags == [m.training for m in model.modules()] and len(set(flags)) == 2
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [2e-4, 2e-5])
def test_rounding_is_not_taken_for_a_missed_update(dtype, lr):
    """A fresh adapter changes nothing: the gap at the start is 0, and later it is rounding."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny.model("llama").to(dtype), LoraConfig(r=4, target_modules="all-linear")
    )
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    first, reference = compare(model, shadow, batch)
    assert first.gap == 0
    train(model, batch, steps=1, lr=lr)
    shadow.sync()
    followed, _ = compare(model, shadow, batch, reference=reference)
    assert followed.close and not followed.stale(first)
    assert followed.gap > 0, "a comparison with the gap at the start would call this a miss"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_model_is_not_close_in_half_precision_either(dtype):
    model = lora(tiny.model("llama").to(dtype))
    shadow = Shadow.of(model, weights="resident")
    batch = batch_for(shadow)
    assert compare(model, shadow, batch)[0].close
    train(model, batch, steps=5, lr=1e-2)
    assert not compare(model, shadow, batch)[0].close, "it missed five large steps"
    shadow.sync()
    assert compare(model, shadow, batch)[0].close


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="before torch 2.9"
)
def test_tf32_is_seen_through_the_newer_switch_and_the_older():
    cuda, matmul = torch.device("cuda"), torch.backends.cuda.matmul
    assert not _tf32(torch.device("cpu"))
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert _tf32(cuda)
        matmul.fp32_precision = "ieee"
        assert not _tf32(cuda)
    finally:
        matmul.fp32_precision = before
