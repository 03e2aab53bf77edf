"""The low-rank updates are what the merged weights have more than the base weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.adapters import CONFIGS, build, lora, randomise
from tests.shadow.test_shadow import batch_for, train
from tlens_callback import Shadow
from tlens_callback.shadow.low_rank import LowRankUpdate, low_rank_updates

# PEFT warns about many of the configurations; none of the warnings is ours.
pytestmark = pytest.mark.filterwarnings("ignore")

LORA = [name for name in CONFIGS if name.startswith(("lora", "pissa", "olora", "gaussian"))]
OTHER = ["loha", "oft", "ia3", "vera", "adalora", "trainable_tokens", "ln_tuning", "hira"]


def found(shadow: Shadow) -> dict[str, LowRankUpdate]:
    return {update.name: update for update in low_rank_updates(shadow)}


def merged(shadow: Shadow, update: LowRankUpdate) -> torch.Tensor:
    """The effective weight, as the shadow holds it."""
    weights = list(shadow.mirror.weights())
    weight = next(weight for weight in weights if weight.name == f"{update.name}.weight")
    with shadow.layer(weight.layer):
        return weight.value.clone()


def gap(shadow: Shadow) -> float:
    """Largest difference of the merged weights from base + B A, relative to the largest update."""
    errors = []
    for update in low_rank_updates(shadow):
        dense = update.b.double() @ update.a.double()
        more = merged(shadow, update).double() - update.weight.detach().double()
        more = more.mT if update.transposed else more
        errors.append(float((dense - more).abs().max() / more.abs().max()))
    assert errors
    return max(errors)


@pytest.mark.parametrize("name", [name for name in LORA if name != "lora lora_bias"])
def test_the_product_is_the_merged_weight_less_the_base(name):
    model = build(name)
    shadow = Shadow.of(model)
    adapted = {weight.name for weight in shadow.mirror.weights() if weight.own is not weight.live}
    assert gap(shadow) < 1e-5
    assert {f"{update}.weight" for update in found(shadow)} <= adapted


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi3"])
def test_after_real_steps_and_for_transposed_layers(family):
    config = LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules="all-linear")
    model = get_peft_model(tiny.model(family), config)
    shadow = Shadow.of(model)
    assert all(not update.b.any() for update in low_rank_updates(shadow)), "B starts at zero"
    train(model, batch_for(shadow))
    shadow.sync()
    assert gap(shadow) < 1e-5
    transposed = {update.transposed for update in low_rank_updates(shadow)}
    assert transposed == {family == "gpt2"}


def test_a_wrong_scaling_is_found():
    model = build("lora")
    shadow = Shadow.of(model, weights="resident")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.scaling["default"] *= 1.01  # the shadow is not synced, so its weights have the old one
    assert gap(shadow) > 1e-3


def test_several_active_adapters_are_side_by_side():
    model = build("lora")
    model.add_adapter("second", lora(r=2, lora_alpha=16, target_modules=["q_proj"])())
    model.add_adapter("idle", lora(r=8)())
    model.base_model.set_adapter(["default", "second"])
    randomise(model, only_trainable=True)
    shadow = Shadow.of(model)
    assert gap(shadow) < 1e-5
    ranks = {name.rpartition(".")[2]: u.a.shape[0] for name, u in found(shadow).items()}
    assert ranks["q_proj"] == 6 and ranks["k_proj"] == 4


@pytest.mark.parametrize("name", OTHER + [n for n in CONFIGS if n.startswith("dora")])
def test_what_is_no_low_rank_sum_is_left_out(name):
    assert found(Shadow.of(build(name))) == {}


def test_dora_beside_lora_and_experts_beside_attention():
    model = build("lora")
    model.add_adapter("second", lora(target_modules=["q_proj"], use_dora=True)())
    model.base_model.set_adapter(["default", "second"])
    names = {name.rpartition(".")[2] for name in found(Shadow.of(model))}
    assert "q_proj" not in names and "k_proj" in names
    config = LoraConfig(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], r=4
    )
    experts = Shadow.of(get_peft_model(tiny.model("qwen3_moe"), config))
    assert {name.rpartition(".")[2] for name in found(experts)} == {"q_proj"}


def test_disabled_and_merged_adapters_update_nothing():
    model = build("lora")
    shadow = Shadow.of(model)
    with model.disable_adapter():
        assert found(shadow) == {}
    model.merge_adapter()
    assert found(shadow) == {}
    model.unmerge_adapter()
    assert found(shadow)


def test_nothing_that_leads_back_to_the_live_model():
    model = build("lora")
    for update in low_rank_updates(Shadow.of(model)):
        assert not (update.a.requires_grad or update.b.requires_grad)
        assert not update.weight.requires_grad
