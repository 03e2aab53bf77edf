"""What only a GPU can show. Skipped where there is none."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.instruments.common import encoded
from tests.shadow.test_shadow import batch_for, gap, lora, train
from tests.test_no_trace import differences, grpo, sft, state_of, watcher
from tests.test_no_trace_instruments import every_instrument, everything
from tlens_callback import MemorySink, ProbeBatch, Shadow, observe
from tlens_callback.instruments import fast
from tlens_callback.shadow.fidelity import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def cuda_state(trainer: Any) -> dict[str, Any]:
    return {**state_of(trainer), "cuda generator": torch.cuda.get_rng_state().tolist()}


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_sft_leaves_no_trace(tmp_path, bf16):
    args = dict(use_cpu=False, bf16=bf16)
    without = cuda_state(sft(tmp_path / "a", [], **args))
    again = cuda_state(sft(tmp_path / "a2", [], **args))
    assert differences(without, again) == [], "the run itself repeats"
    memory = MemorySink()
    watched = cuda_state(sft(tmp_path / "b", [watcher(sinks=[memory])], **args))
    assert differences(without, watched) == [] and list(memory.steps) == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_grpo_leaves_no_trace(tmp_path):
    without = cuda_state(grpo(tmp_path / "a", [], use_cpu=False))
    watched = cuda_state(grpo(tmp_path / "b", [watcher()], use_cpu=False))
    assert differences(without, watched) == []


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shadow_equals_live_in_float32(family):
    moe = family in ("qwen3_moe", "mixtral")
    model = lora(tiny.model(family), lora_dropout=0.0 if moe else 0.2).cuda()
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    train(model, batch)
    shadow.sync()
    assert gap(model, shadow, batch) < 5e-5
    held = [p.device for p in shadow.bridge.original_model.parameters()]
    assert {device.type for device in held} == {"cuda"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_base_with_float32_adapters(attention):
    model = tiny.model("llama", attn_implementation=attention).cuda().to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    first, reference = compare(model, shadow, batch)
    train(model, batch)
    shadow.sync()
    after, _ = compare(model, shadow, batch, reference=reference)
    assert first.close and after.close and after.moved > 0.1 and not after.stale(first)
    assert model.config._attn_implementation == attention


def test_extra_memory_is_that_of_the_adapted_weights():
    overrides = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=8)
    model = get_peft_model(
        tiny.model("llama", **overrides).cuda(), LoraConfig(r=8, target_modules="all-linear")
    )
    adapted = sum(m.base_layer.weight.nbytes for m in model.modules() if hasattr(m, "lora_A"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    shadow = Shadow.of(model)
    held = torch.cuda.memory_allocated() - before
    assert adapted <= held <= 1.05 * adapted
    torch.cuda.reset_peak_memory_stats()
    shadow.sync()
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * adapted
    shadow.release()
    assert torch.cuda.memory_allocated() - before <= 0.05 * adapted


def test_another_device_holds_a_copy_that_follows():
    model = lora(tiny.model("llama")).cuda()
    shadow = Shadow.of(model, device="cpu")
    batch = batch_for(shadow)
    assert Shadow.of(model, device="cuda").mirror.extra_bytes == Shadow.of(model).extra_bytes
    on_gpu = batch_for(Shadow.of(model))
    train(model, on_gpu)
    shadow.sync()
    assert compare(model, shadow, batch)[0].close
    assert shadow.logits(batch.tokens).device.type == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("how", ["resident", "streamed"])
def test_adapters_are_left_out_without_a_second_copy(how, device):
    """On the model's device, and on another, where the weights of the base are copies."""
    untouched = tiny.model("llama", hidden_size=256, intermediate_size=512).cuda()
    model = lora(tiny.model("llama", hidden_size=256, intermediate_size=512)).cuda()
    shadow = Shadow.of(model, weights=how, device=device)
    batch = batch_for(shadow)
    wanted = Shadow.of(untouched, device=device).logits(batch.tokens)
    adapted = shadow.logits(batch.tokens)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with shadow.without_adapters():
        layer = sum(p.nbytes for p in model.get_base_model().model.layers[0].parameters())
        assert torch.cuda.max_memory_allocated() - held < layer
        assert torch.equal(shadow.logits(batch.tokens), wanted)
    assert torch.equal(shadow.logits(batch.tokens), adapted) and not torch.equal(adapted, wanted)


def test_readings_come_over_together_and_equal_the_cpus():
    on_cpu = Shadow.of(tiny.model("llama"))
    on_gpu = Shadow.of(tiny.model("llama").cuda())
    cpu = observe(on_cpu, batch_for(on_cpu), fast())
    gpu = observe(on_gpu, batch_for(on_gpu), fast())
    for one, other in zip(cpu, gpu, strict=True):
        assert one.key == other.key
        if one.unit != "index":
            assert abs(one.values - other.values).max() < 1e-4


def two_looks(device: str, family: str) -> list:
    """Every instrument, at a first observation and after the model has moved."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lora(tiny.model(family), lora_dropout=0.0).to(device)
    shadow = Shadow.of(model)
    on_cpu = encoded()
    batch = ProbeBatch.encode(
        on_cpu.probes, on_cpu.tokenizer, vocab_size=tiny.VOCAB, context=tiny.CONTEXT, device=device
    )
    instruments = every_instrument()
    observe(shadow, batch, instruments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    shadow.sync()
    return observe(shadow, batch, instruments)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_every_instrument_reads_what_it_reads_on_the_cpu(family):
    cpu, gpu = two_looks("cpu", family), two_looks("cuda", family)
    assert [reading.key for reading in cpu] == [reading.key for reading in gpu]
    for one, other in zip(cpu, gpu, strict=True):
        # A trained autoencoder amplifies rounding, and so do ranks and indices.
        if not one.instrument.startswith("trainedfeatures") and one.unit not in ("index", "rank"):
            np.testing.assert_allclose(
                other.values, one.values, rtol=2e-3, atol=2e-4, err_msg=one.key
            )


def test_every_instrument_leaves_no_trace(tmp_path):
    without = cuda_state(sft(tmp_path / "a", [], use_cpu=False))
    sink = MemorySink()
    watched = cuda_state(sft(tmp_path / "b", [everything(sink)], use_cpu=False))
    assert differences(without, watched) == [] and sink.steps == (0, 1, 2, 3, 4, 5)
