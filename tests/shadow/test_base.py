"""With adapters left out the shadow is the base, for every tuner, family and layout."""

import functools

import pytest
import torch
from torch.nn.utils import parametrizations

from tests import tiny
from tests.adapters import (
    CONFIGS,
    EXPERTS,
    adapt,
    build,
    llama,
    mostly_slow,
    state,
    tuner,
)
from tests.adapters import lora as config
from tests.marks import in_turns
from tests.shadow.test_layers import activations
from tests.shadow.test_shadow import hugging_face_logits, lora, train
from tests.shadow.test_shadow_tuners import batch_for
from tests.shadow.test_weights import initialised
from tests.shadow.test_weights_layouts import TIED
from tlens_callback import Shadow
from tlens_callback.shadow.layers import _tensors as tensors

# PEFT warns about many of the configurations; none of the warnings is ours.
pytestmark = pytest.mark.filterwarnings("ignore")

WAYS = ("resident", "streamed")
GPT2 = {
    "lora": config(target_modules=["c_attn", "c_proj", "c_fc"]),
    "lora embeddings": config(target_modules=["c_attn", "wte", "wpe"]),
    "dora": config(target_modules=["c_attn", "wte"], use_dora=True),
    "ia3": tuner("IA3Config", target_modules=["c_attn"], feedforward_modules=[]),
    "ln_tuning": tuner("LNTuningConfig", target_modules=["ln_1", "ln_f"]),
}
WRITE_TO_BASE = {"pissa", "pissa_niter", "olora", "kasa", "lora bias=all", "lora bias=lora_only"}


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(
        torch.equal(value, wanted[name]) for name, value in found.items()
    )


@functools.cache
def untouched_llama():
    return llama(bias=True)


@functools.cache
def of_the_base(untouched):
    """All activations of a model without adapters."""
    shadow = Shadow.of(untouched)
    return activations(shadow, batch_for(shadow))


def check(model, untouched, how="resident", *, steps=2, same=True):
    """That the shadow is the base inside the block, and what it was after it.

    Args:
        untouched: the model before it was adapted.
        same: whether the base is still that one; if not, only PEFT says what it is.
    """
    shadow = Shadow.of(model, weights=how)
    batch = batch_for(shadow)
    train(model, batch, steps=steps, lr=5e-3)
    shadow.sync()
    adapted, before = activations(shadow, batch), state(model)
    with shadow.without_adapters():
        found = activations(shadow, batch)
    assert state(model) == before and equal(activations(shadow, batch), adapted)
    with model.disable_adapter():
        live = hugging_face_logits(model, batch)[batch.mask]
    assert (found["logits"][batch.mask] - live).abs().max() < 1e-5 * live.abs().max()
    wanted = of_the_base(untouched)
    assert equal(found, wanted) is same and len(found) > 60
    # The controls: with its adapters it is another model, and both checks see it.
    assert (adapted["logits"][batch.mask] - live).abs().max() > 1e-3 * live.abs().max()
    assert not equal(adapted, wanted)
    assert (shadow.changed_base == ()) is same


@pytest.mark.parametrize(("name", "how"), in_turns(mostly_slow(CONFIGS), WAYS))
def test_every_tuner_is_left_out(name, how):
    model = build(name)
    untouched = untouched_llama()
    if name == "lora layer_replication":
        untouched = llama(bias=True)
        untouched.model.layers = torch.nn.ModuleList(untouched.model.layers[i] for i in (0, 1, 1))
        untouched.config.num_hidden_layers = 3
    check(model, untouched, how, same=name not in WRITE_TO_BASE)


@pytest.mark.parametrize("method", ["corda", "lora_ga", "eva"])
def test_which_initialisations_write_to_the_base(method):
    check(initialised(method), llama(), same=method == "eva")


@pytest.mark.parametrize(("family", "how"), in_turns(tiny.FAMILIES, WAYS))
def test_every_family_has_its_base(family, how):
    """Also where the bridge splits a fused tensor, into views or into copies."""
    check(lora(tiny.model(family), lora_dropout=0.0), tiny.model(family), how)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(name):
    check(adapt(llama(tied=True), TIED[name]), llama(tied=True))


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_with_its_transposed_layers_and_tied_embeddings(name):
    check(adapt(tiny.model("gpt2"), GPT2[name]), tiny.model("gpt2"))


@pytest.mark.parametrize("how", WAYS)
def test_experts_adapted_by_target_parameters(how):
    made = config(target_modules=["q_proj"], target_parameters=EXPERTS)
    check(adapt(tiny.model("qwen3_moe"), made), tiny.model("qwen3_moe"), how)


@pytest.mark.parametrize("how", WAYS)
def test_a_trained_copy_of_a_fused_module_is_its_original(how):
    """Its split into query, key and value is a copy that has to follow."""
    made = config(target_modules=["dense_h_to_4h"], modules_to_save=["attention"])
    check(adapt(tiny.model("gpt_neox"), made), tiny.model("gpt_neox"), how)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_every_tensor_that_the_bridge_holds_follows(family):
    """Its norms and MLPs keep weights and biases beside their parameters."""
    saved = {"gpt2": ["ln_1", "mlp"], "gpt_neox": ["input_layernorm", "mlp"]}
    made = config(target_modules="all-linear", modules_to_save=saved.get(family, ["norm"]))
    model = adapt(tiny.model(family), made)
    shadow = Shadow.of(model, weights="resident")
    wanted = [tensor.clone() for tensor in tensors(Shadow.of(tiny.model(family)).bridge)]
    before = [tensor.clone() for tensor in tensors(shadow.bridge)]
    with shadow.without_adapters():
        found = list(tensors(shadow.bridge))
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    found = list(tensors(shadow.bridge))
    assert all(torch.equal(*pair) for pair in zip(found, before, strict=True))
    assert sum(not torch.equal(*pair) for pair in zip(found, wanted, strict=True)) > 10


@pytest.mark.parametrize("how", WAYS)
def test_parametrised_weights_are_those_of_the_base(how):
    def made():
        model = tiny.model("llama")
        parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
        parametrizations.weight_norm(model.lm_head)
        return model.requires_grad_(False)

    check(adapt(made(), config(target_modules=["up_proj", "q_proj"])), made(), how)
