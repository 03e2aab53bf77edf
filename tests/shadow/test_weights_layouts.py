"""Effective weights where layers are tied, transposed, stacked, nested or wrapped."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel

from tests import tiny
from tests.adapters import (
    EXPERTS,
    adapt,
    gap,
    llama,
    logits,
    lora,
    needs_transformers_peft,
    plain,
    randomise,
    state,
    tuner,
)
from tlens_callback.shadow.weights import adapted_leaves, innermost, live_leaves, resolve, unwrap

# PEFT warns about many of the configurations below; none of the warnings is ours.
pytestmark = pytest.mark.filterwarnings("ignore")

# Tied embeddings: an adapter on one of the two parts them.

TIED = {
    "no adapter on either": lora(target_modules=["q_proj"]),
    "lora embed_tokens": lora(target_modules=["embed_tokens"]),
    "lora embed_tokens, tied": lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "dora embed_tokens": lora(target_modules=["embed_tokens"], use_dora=True),
    "lora lm_head": lora(target_modules=["lm_head"]),
    "modules_to_save embed_tokens": lora(modules_to_save=["embed_tokens"]),
    "modules_to_save embed_tokens, tied": lora(
        modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "modules_to_save both": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "trainable_token_indices": lora(trainable_token_indices=[1, 5, 20]),
    "trainable_token_indices, tied": lora(
        trainable_token_indices=[1, 5, 20], ensure_weight_tying=True
    ),
    "trainable_tokens": tuner(
        "TrainableTokensConfig", token_indices=[5, 10], target_modules=["embed_tokens"]
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(name):
    live = adapt(llama(tied=True), TIED[name])
    before = state(live)
    base: Any = unwrap(live)
    assert base.config.tie_word_embeddings
    own = plain(live)
    assert state(live) == before
    expected = logits(live)
    assert (logits(own) - expected).abs().max() < 1e-5 * expected.abs().max()


# Other layouts than a linear layer's.


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["c_attn", "c_proj", "c_fc"]),
        lora(target_modules=["c_attn", "c_proj"], lora_bias=True),
        lora(target_modules=["c_attn", "wte"], use_dora=True),
        lora(target_modules=["c_attn", "wte", "wpe"]),
        tuner("IA3Config", target_modules=["c_attn"], feedforward_modules=[]),
        tuner("VeraConfig", target_modules=["c_attn"], r=4),
        tuner("AdaLoraConfig", target_modules=["c_attn", "c_proj"], total_step=10),
        tuner("LNTuningConfig", target_modules=["ln_1", "ln_f"]),
    ],
    ids=["lora", "lora_bias", "dora", "embeddings", "ia3", "vera", "adalora", "ln_tuning"],
)
def test_gpt2_with_its_transposed_linear_layers(config):
    live = adapt(tiny.model("gpt2"), config)
    before = state(live)
    own = plain(live)
    assert state(live) == before
    expected = logits(live)
    assert (logits(own) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "config",
    [lora(target_modules=["embed_tokens", "q_proj"]), lora(trainable_token_indices=[1, 5])],
    ids=["lora", "trainable tokens"],
)
def test_an_embedding_with_a_scale_keeps_its_buffer(config):
    live = adapt(tiny.model("gemma3_text"), config)
    scale: Any = innermost(resolve(unwrap(live), "model.embed_tokens"))._buffers["embed_scale"]
    assert float(scale) == pytest.approx(32**0.5)
    assert gap(live) < 1e-5


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("config", "adapted"),
    [
        (lora(target_modules=["q_proj"], target_parameters=EXPERTS), {"gate_up_proj", "down_proj"}),
        (lora(target_modules=[], target_parameters=EXPERTS[1:], use_rslora=True), {"down_proj"}),
        (lora(target_modules="all-linear"), {"gate_up_proj", "down_proj"}),
    ],
    ids=["both", "one", "all-linear"],
)
def test_experts_adapted_by_target_parameters(family, config, adapted):
    live = adapt(tiny.model(family), config)
    experts = resolve(unwrap(live), "model.layers.0.mlp.experts")
    assert adapted_leaves(experts) == adapted
    assert live_leaves(experts).keys() == {"gate_up_proj", "down_proj"}
    before = state(live)
    own = plain(live)
    assert state(live) == before
    expected = logits(live)
    assert (logits(own) - expected).abs().max() < 1e-5 * expected.abs().max()
    merged = copy.deepcopy(live).merge_and_unload().state_dict()
    for key, value in own.state_dict().items():
        torch.testing.assert_close(value, merged[key], rtol=1e-5, atol=1e-6)


def test_two_adapters_on_the_same_experts():
    live = get_peft_model(
        tiny.model("qwen3_moe"), lora(target_modules=[], target_parameters=EXPERTS)()
    )
    live.add_adapter("other", lora(target_modules=[], target_parameters=EXPERTS, r=2)())
    for name, parameter in live.named_parameters():
        parameter.requires_grad_("lora" in name)
    randomise(live, only_trainable=True)
    for active in (["default"], ["other"], ["default", "other"]):
        live.base_model.set_adapter(active)
        assert gap(live) < 1e-5


def test_tuners_of_several_kinds_around_one_layer():
    live = get_peft_model(llama(), lora(target_modules=["q_proj"])(), mixed=True)
    live.add_adapter("loha", tuner("LoHaConfig", r=2, target_modules=["q_proj", "v_proj"])())
    live.add_adapter("oft", tuner("OFTConfig", oft_block_size=8, target_modules=["q_proj"])())
    live.set_adapter(["default", "loha", "oft"])
    randomise(live, only_trainable=True)
    base: Any = unwrap(live)
    assert isinstance(base, PreTrainedModel)
    before = state(live)
    own = plain(live)
    assert state(live) == before
    expected = logits(live)
    assert (logits(own) - expected).abs().max() < 1e-5 * expected.abs().max()


# Wrappers.


@needs_transformers_peft
def test_transformers_own_add_adapter():
    live = llama()
    live.add_adapter(lora()())
    randomise(live, only_trainable=True)
    assert unwrap(live) is live
    assert gap(live) < 1e-5
    live.disable_adapters()
    assert gap(live) < 1e-5


def test_compiled_and_checkpointed_layers_are_stepped_through():
    live = adapt(llama(), lora())
    base: Any = unwrap(live)
    expected = logits(plain(live))
    base.model.layers[0] = torch.compile(base.model.layers[0])
    base.model.layers[1] = checkpoint_wrapper(base.model.layers[1])
    q_proj = resolve(base, "model.layers.0.self_attn.q_proj")
    assert isinstance(q_proj, BaseTunerLayer)
    assert torch.equal(logits(plain(live)), expected)
    compiled: Any = torch.compile(live)
    assert unwrap(compiled) is base


def test_unwrap_steps_through_data_parallel_wrappers():
    live = adapt(llama(), lora())
    assert unwrap(nn.DataParallel(live)) is unwrap(live) is live.get_base_model()
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert unwrap(nn.parallel.DistributedDataParallel(live)) is live.get_base_model()
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_that_the_live_model_has_not_is_named():
    base = unwrap(adapt(llama(), lora()))
    with pytest.raises(ValueError, match=r"no module 'model.layers.0.mixer' .*no 'mixer'"):
        resolve(base, "model.layers.0.mixer")
