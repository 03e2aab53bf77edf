"""Quantised bases: the shadow has what the packed layers hold, and no layer is packed anew."""

import copy

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from tests import tiny
from tests.quantised import KINDS, SHAPE, adapted, float_copy, loaded, with_hqq
from tests.shadow.test_shadow import batch_for, hugging_face_logits, train
from tlens_callback import Shadow, instruments, observe
from tlens_callback.shadow import packed
from tlens_callback.shadow.fidelity import compare
from tlens_callback.shadow.packed import dequantised

HALF = torch.bfloat16
CASES = [
    *((kind, dtype, "lora") for kind in KINDS for dtype in (torch.float32, HALF)),
    ("nf4", torch.float32, "dora"),
    ("torchao", torch.float32, "dora"),
    ("hqq", torch.float32, "dora"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


def model_of(folder, kind, dtype=torch.float32, tuner="lora"):
    return adapted(loaded(folder, kind, dtype), use_dora=tuner == "dora").train()


@pytest.mark.parametrize(("kind", "dtype", "tuner"), CASES)
def test_the_shadow_is_the_live_model(folder, kind, dtype, tuner):
    """By default a layer at a time; resident gives the same, bit for bit."""
    model = model_of(folder, kind, dtype, tuner)
    shadow, resident = Shadow.of(model), Shadow.of(model, weights="resident")
    batch = batch_for(shadow)
    found, _ = compare(model, shadow, batch)
    assert found.close and shadow.streamed and shadow.n_owned == 7 * SHAPE["num_hidden_layers"]
    if dtype == torch.float32:
        assert found.relative < 1e-5
    assert torch.equal(shadow.logits(batch.tokens), resident.logits(batch.tokens))
    assert shadow.extra_bytes < resident.extra_bytes
    # The control: the same without its adapters is another model.
    with model.disable_adapter():
        assert not compare(model, resident, batch)[0].close


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_merges_into_a_base_of_plain_numbers(folder, kind):
    """Whose weights the library's own functions have written out."""
    model = model_of(folder, kind)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    plain = adapted(float_copy(loaded(folder, kind)))
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    wanted = hugging_face_logits(plain.merge_and_unload().eval(), batch)
    difference = (shadow.logits(batch.tokens) - wanted)[batch.mask].abs().max()
    assert difference < 1e-5 * wanted.abs().max()
    begun = tiny.model("llama", **SHAPE)
    assert (hugging_face_logits(begun, batch) - wanted)[batch.mask].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_read_wrongly_are_found(folder, kind, dtype, monkeypatch):
    """As after another block size: some rows have the scale of others."""
    model = model_of(folder, kind, dtype)
    monkeypatch.setattr(
        "tlens_callback.shadow.parametrized.dequantised", lambda *of: dequantised(*of).roll(16, 0)
    )
    shadow = Shadow.of(model)
    assert not compare(model, shadow, batch_for(shadow))[0].close


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_followed_and_missed_ones_found(folder, kind):
    model = model_of(folder, kind)
    shadow, behind = Shadow.of(model), Shadow.of(model, weights="resident")
    batch = batch_for(shadow)
    train(model, batch, lr=1e-2)
    shadow.sync()
    assert compare(model, shadow, batch)[0].close
    assert not compare(model, behind, batch)[0].close


@pytest.mark.parametrize("kind", KINDS)
def test_every_fast_instrument_runs(folder, kind):
    model = model_of(folder, kind)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    made = [instruments.FrozenWeights(every=1), *instruments.fast()]
    readings = {r.key: r for r in observe(shadow, batch, made)}
    assert readings["frozen_weights/watched"].values > 7 * SHAPE["num_hidden_layers"]
    assert readings["adapter_spectrum/effective_rank"].values.size
    # One bit of a packed weight, or one of its numbers.
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer
    with torch.no_grad():
        inner = layer.W_q.data if kind == "hqq" else layer.weight.data
        inner = layer.weight.qdata if kind == "torchao" else inner
        inner.view(-1)[7] ^= 1
    changed = {r.key: r for r in observe(shadow, batch, made[:1])}["frozen_weights/changed"]
    assert changed.values == 1


@pytest.mark.parametrize("tuner", ["lora", "dora"])
@pytest.mark.parametrize(("nbits", "axis"), [(8, 1), (4, 0), (3, 0), (2, 1)])
def test_other_packings_of_hqq_and_biases(nbits, axis, tuner):
    """HQQ keeps the bias beside its numbers, where it is no parameter and no training sees it."""
    plain = tiny.model("llama", **SHAPE, attention_bias=True)
    biases = {n: p.clone() for n, p in plain.named_parameters() if n.endswith("bias")}
    assert len(biases) == 4 * SHAPE["num_hidden_layers"]
    model = adapted(with_hqq(plain, nbits=nbits, axis=axis), use_dora=tuner == "dora").train()
    shadow, behind = Shadow.of(model), Shadow.of(model, weights="resident")
    batch = batch_for(shadow)
    assert compare(model, shadow, batch)[0].relative < 1e-5
    found = list(shadow.mirror.weights())
    modules = [name for name, module in tiny.model("llama", **SHAPE).named_parameters()]
    assert [w.name for w in found if w.name not in biases] == modules
    for weight in found:
        if weight.name in biases:
            assert weight.trained is (tuner == "dora") and not weight.live.requires_grad
            with shadow.layer(weight.layer):
                assert torch.equal(weight.value, biases[weight.name])
    watched = {
        r.key: r.values for r in observe(shadow, batch, [instruments.FrozenWeights(every=1)])
    }
    frozen = sum(not weight.live.requires_grad for weight in found)
    assert watched["frozen_weights/watched"] == frozen > len(biases)
    train(model, batch, lr=1e-2)
    shadow.sync()
    assert compare(model, shadow, batch)[0].close and not compare(model, behind, batch)[0].close


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_that_was_packed_anew_is_read_as_before(kind, double):
    """As bitsandbytes does on CPUs with AVX512-BF16, whatever this CPU is."""
    import bitsandbytes
    from bitsandbytes import functional
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    weight = torch.randn(96, 64, generator=torch.manual_seed(0)).to(HALF)
    layer = bitsandbytes.nn.Linear4bit(
        64, 96, bias=False, quant_type=kind, compute_dtype=HALF, compress_statistics=double
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, quant_type=kind, compress_statistics=double, blocksize=64
    ).to("cpu")
    before = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantised(layer), before)
    state = copy.deepcopy(layer.weight.quant_state)
    codes, state = _convert_weight_packed_for_cpu(layer.weight.data.clone(), state)
    layer.weight.data, layer.weight.quant_state = codes, state
    held = codes.clone()
    # It rounds the scales to bfloat16.
    torch.testing.assert_close(dequantised(layer), before, rtol=2e-2, atol=0)
    assert torch.equal(layer.weight.data, held) and not torch.equal(dequantised(layer), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_comparison_packs_nothing_anew(folder, kind):
    """Also in a model that was loaded and not trained yet, which is in eval mode."""
    model = model_of(folder, kind).eval()
    shadow = Shadow.of(model)
    seen = []
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    compare(model, shadow, batch_for(shadow))
    handle.remove()
    repacks = kind not in ("torchao", "hqq")
    assert set(seen) == {repacks} and not any(m.training for m in model.modules())
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    assert not getattr(state, "packing_format_for_cpu", False)


def test_what_quantises_activations_too_is_refused():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = tiny.model("llama")
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match=r"Int8Tensor of .*packed in a way that cannot be read"):
        Shadow.of(model)


def test_plain_layers_are_not_packed():
    assert packed.plain_tuner(torch.nn.Linear) is torch.nn.Linear
    assert not packed.packed(torch.nn.Linear(2, 2)) and not packed.repacks(torch.nn.Linear(2, 2))
