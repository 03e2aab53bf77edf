"""The language model inside a model for images and text is watched with probes of text."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from tests import tiny, tiny_vision
from tests.instruments.common import encoded
from tests.shadow.test_shadow import batch_for, gap, hugging_face_logits, lora, train
from tlens_callback import AdapterSpectrum, Shadow, UpdateSparsity, fast, observe
from tlens_callback.shadow.fidelity import compare, sees_ahead

pytestmark = pytest.mark.slow

FAMILIES = [
    pytest.param(family, marks=[pytest.mark.slow] * (family not in tiny_vision.MAIN))
    for family in tiny_vision.FAMILIES
]


def adapted(family: str, **config: Any) -> Any:
    return lora(tiny_vision.model(family), target_modules=tiny_vision.LANGUAGE, **config)


@pytest.mark.parametrize("family", FAMILIES)
def test_shadow_is_the_language_model_with_its_adapters_merged(family):
    """After steps of training; against PEFT's own merge and Hugging Face's eager attention."""
    model = adapted(family, lora_dropout=0.0)
    shadow = Shadow.of(model)
    assert shadow.sizes == (2, 4, 32, tiny.VOCAB) and shadow.context == tiny.CONTEXT
    batch = encoded()
    start = shadow.logits(batch.tokens)
    train(model, batch)
    assert float((hugging_face_logits(model, batch) - start)[batch.mask].abs().max()) > 0.1
    shadow.sync()
    fidelity, _ = compare(model, shadow, batch)
    assert fidelity.relative < 1e-5 and fidelity.scale > 0.5
    assert not sees_ahead(shadow, batch)
    layers = sum(hasattr(module, "lora_A") for module in model.modules())
    assert shadow.n_owned == layers >= 8
    plain = copy.deepcopy(model).eval().merge_and_unload()
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        own = plain(input_ids=batch.tokens, use_cache=False, output_attentions=True)
    off = (own.logits - shadow.logits(batch.tokens))[batch.mask].abs().max()
    assert float(off) < 1e-5 * fidelity.scale
    readings = {one.key: one for one in observe(shadow, batch, fast())}
    patterns = [layer for layer in own.attentions if layer is not None]
    assert len(patterns) == len(shadow.attention_layers) > 0
    for row, probe in enumerate(batch.probes):
        if probe.block is None:
            n = batch.lengths[row]
            theirs = torch.stack([layer[row, :, :n, :n] for layer in patterns])
            ours = readings[f"attention_patterns/pattern/{probe.name}"].values
            assert np.allclose(ours, theirs.numpy(), atol=1e-6)
    if family in tiny_vision.MAIN:
        assert {instrument.name for instrument in fast()} == {
            key.partition("/")[0] for key in readings
        }
        parts = [f"logit_attribution/{part}/capital" for part in ("head", "mlp", "embed", "bias")]
        lead = float(readings["target_scores/logit_diff/capital"].values)
        written = sum(float(readings[part].values.sum()) for part in parts)
        assert written == pytest.approx(lead, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_changes_nothing_before_it(family):
    model = tiny_vision.model(family)
    tokens = torch.tensor([[1, 20, 21, 22, 23, 24]])
    other = tokens.clone()
    other[0, -1] = 30
    for logits in (Shadow.of(model).logits, lambda ids: model(input_ids=ids).logits):
        with torch.no_grad():
            one, two = logits(tokens)[0], logits(other)[0]
        assert torch.allclose(one[:-1], two[:-1], atol=1e-5)
        assert not torch.allclose(one[-1], two[-1], atol=1e-2)


@pytest.mark.parametrize("family", tiny_vision.MAIN)
def test_full_fine_tuning_needs_no_copy(family):
    model = tiny_vision.model(family)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    start = shadow.logits(batch.tokens)
    train(model, batch, lr=3e-3)
    assert float((shadow.logits(batch.tokens) - start)[batch.mask].abs().max()) > 0.1
    assert shadow.extra_bytes == 0 and gap(model, shadow, batch) < 3e-5


@pytest.mark.parametrize("family", tiny_vision.MAIN)
def test_half_precision(family):
    model = adapted(family).to(torch.bfloat16)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    train(model, batch)
    shadow.sync()
    fidelity, _ = compare(model, shadow, batch)
    assert fidelity.close and fidelity.kl < 0.02
    assert not sees_ahead(shadow, batch)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_embeddings_stay_one_parameter_and_may_come_apart():
    text = {**tiny_vision.config("gemma3")["text_config"], "tie_word_embeddings": True}
    model = tiny_vision.model("gemma3", text_config=text, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    shadow = Shadow.of(model)
    assert shadow.extra_bytes == 0 and gap(model, shadow, batch_for(shadow)) < 3e-5
    apart = lora(model, target_modules=["lm_head"])
    shadow = Shadow.of(apart)
    assert shadow.n_owned == 1 and gap(apart, shadow, batch_for(shadow)) < 3e-5


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_adapters_of_the_vision_tower_are_no_layers_of_the_language_model(family):
    """The tower has more layers and more adapters than the language model has."""
    model = lora(
        tiny_vision.model(family), target_modules=rf".*\.layers\..*q_proj|{tiny_vision.VISION}"
    )
    names = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert sum("language" in name for name in names) == 2 < len(names) - 2
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    assert shadow.n_owned == len(names) and compare(model, shadow, batch)[0].relative < 1e-5
    found = observe(shadow, batch, [AdapterSpectrum(), UpdateSparsity()])
    readings = {one.key: one for one in found}
    for key in ("adapter_spectrum/norm", "update_sparsity/share"):
        grid, others = readings[key], readings[f"{key}_elsewhere"]
        assert grid.values.shape == (2, 1) and list(grid.labels["module"]) == ["q_proj"]
        assert len(others.values) == len(names) - 2
        assert all("vis" in name for name in others.labels["weight"])
    inside = [m for n, m in model.named_modules() if hasattr(m, "lora_A") and "language" in n]
    with torch.no_grad():
        norms = [
            float((m.lora_B["default"].weight @ m.lora_A["default"].weight).norm())
            * m.scaling["default"]
            for m in inside
        ]
    assert readings["adapter_spectrum/norm"].values[:, 0] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("family", tiny_vision.MAIN)
def test_images_that_the_live_model_saw_before_change_nothing(family):
    """Qwen's models remember where the tokens behind an image stand."""
    model = adapted(family, lora_dropout=0.0)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    before = shadow.logits(batch.tokens)
    with torch.no_grad():
        model(**tiny_vision.with_image(family))
    shadow.sync()
    assert torch.equal(shadow.logits(batch.tokens), before)
    assert compare(model, shadow, batch)[0].relative < 1e-5


def test_what_the_bridge_cannot_build_is_named():
    model = tiny_vision.model("qwen2_vl")
    with pytest.raises(ValueError, match=r"cannot take a Qwen2VLFor.* no adapter for this class\."):
        Shadow.of(model)


def test_torchvision_is_demanded_by_others_as_before():
    demand = vars(ArchitectureAdapter)["_check_required_libraries"]
    for family in ("qwen3_vl", "qwen2_vl"):
        try:
            Shadow.of(tiny_vision.model(family))
        except ValueError:
            pass
        assert vars(ArchitectureAdapter)["_check_required_libraries"] is demand
