"""Effective weights: a plain model that holds them computes what the live model computes."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import (
    CordaConfig,
    EvaConfig,
    LoraGAConfig,
)
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.loraga import preprocess_loraga

from tests.adapters import (
    CONFIGS,
    TOKENS,
    adapt,
    build,
    gap,
    llama,
    logits,
    lora,
    mostly_slow,
    plain,
    randomise,
    state,
)
from tlens_callback.shadow.refusals import refuse
from tlens_callback.shadow.weights import adapted_leaves, fill, live_leaves, resolve, unwrap

# PEFT warns about many of the configurations below; none of the warnings is ours.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, turn=0))
def test_a_plain_model_with_the_effective_weights_is_the_live_model(name):
    live = build(name)
    before = state(live)
    refuse(live)
    own = plain(live)
    assert state(live) == before
    assert live.training
    expected = logits(live)
    assert (logits(own) - expected).abs().max() < 1e-5 * expected.abs().max()
    # Not vacuous: without its adapter the model computes something else.
    with live.disable_adapter():
        assert (logits(live) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, turn=1))
def test_the_effective_weights_are_those_of_peft_s_own_merge_of_a_copy(name):
    if name == "lora layer_replication":
        pytest.skip("PEFT merges twice into the base weight that the replicas share")
    live = build(name)
    merged = copy.deepcopy(live).merge_and_unload().state_dict()
    own = plain(live).state_dict()
    assert own.keys() == merged.keys()
    for key in own:
        torch.testing.assert_close(own[key], merged[key], rtol=1e-6, atol=1e-7)


def initialised(method: str) -> Any:
    """A model with LoRA whose initialisation looks at data first."""
    base = llama()
    config = lora(init_lora_weights=method)()
    if method == "corda":
        corda = pytest.importorskip("peft.tuners.lora.corda", reason="it imports attrs")
        config.corda_config = CordaConfig()
        corda.preprocess_corda(base, config, run_model=lambda: base(TOKENS[:1]))
    elif method == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(base, config, lambda: base(TOKENS, labels=TOKENS).loss.backward())
    else:
        config.eva_config = EvaConfig()
    live = get_peft_model(base, config)
    if method == "eva":
        initialize_lora_eva_weights(live, [{"input_ids": TOKENS}] * 4, show_progress_bar=False)
    randomise(live, only_trainable=True)
    return live


@pytest.mark.parametrize("method", ["corda", "lora_ga", "eva"])
def test_initialisations_that_look_at_data_first(method):
    assert gap(initialised(method)) < 1e-5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora", {"weight"}),
        ("lora bias=all", {"weight"}),
        ("lora lora_bias", {"weight", "bias"}),
        ("dora", {"weight", "bias"}),
        ("oft", {"weight", "bias"}),
        ("beft", set()),
        ("modules_to_save of many kinds", {"weight"}),
    ],
)
def test_only_what_an_adapter_changes_is_adapted(name, expected):
    live = build(name)
    assert adapted_leaves(resolve(unwrap(live), "model.layers.0.self_attn.q_proj")) == expected
    for path in ("model.norm", "lm_head", "model.embed_tokens", "model.layers.0", "model", ""):
        assert adapted_leaves(resolve(unwrap(live), path)) == set()


def test_live_leaves_are_the_live_tensors():
    live = adapt(llama(bias=True), lora(modules_to_save=["lm_head"]))
    base: Any = unwrap(live)
    q_proj: Any = resolve(base, "model.layers.0.self_attn.q_proj")
    leaves = live_leaves(q_proj)
    assert leaves.keys() == {"weight", "bias"}
    assert leaves["weight"].data_ptr() == q_proj.base_layer.weight.data_ptr()
    assert not any(leaf.requires_grad for leaf in leaves.values())
    head = live_leaves(resolve(base, "lm_head"))["weight"]
    assert head.data_ptr() == base.lm_head.modules_to_save["default"].weight.data_ptr()
    assert head.data_ptr() != base.lm_head.original_module.weight.data_ptr()


# Which adapters count.


def two_adapters(**settings: Any) -> Any:
    live = get_peft_model(llama(bias=True), lora(**settings)())
    live.add_adapter("ref", lora(**(settings | {"r": 3, "lora_alpha": 1}))())
    for parameter in live.parameters():
        parameter.requires_grad_(True)
    randomise(live)
    return live


ACTIVE = {"first": ["default"], "second": ["ref"], "both": ["default", "ref"]}


@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_exactly_the_active_adapters_count(active, settings):
    live = two_adapters(**settings)
    live.base_model.set_adapter(ACTIVE[active])
    assert gap(live) < 1e-5
    others = [logits(plain(live))]
    for names in ACTIVE.values():
        if names != ACTIVE[active]:
            live.base_model.set_adapter(names)
            others.append(logits(plain(live)))
    assert (others[0] - others[1]).abs().max() > 1e-2
    assert (others[0] - others[2]).abs().max() > 1e-2


def test_an_adapter_that_leaves_some_layers_alone():
    live = get_peft_model(llama(), lora(target_modules=["q_proj"])())
    live.add_adapter("other", lora(target_modules=["v_proj"], modules_to_save=["lm_head"])())
    randomise(live, only_trainable=True)
    for adapter in ("default", "other"):
        live.set_adapter(adapter)
        assert gap(live) < 1e-5


@pytest.mark.parametrize(
    "name",
    ["lora", "dora", "oft", "ia3", "ln_tuning", "trainable_tokens", "modules_to_save lm_head"],
)
def test_a_disabled_adapter_leaves_the_base_weight(name):
    live = build(name)
    adapted = logits(live)
    with live.disable_adapter():
        expected = logits(live)
        own = plain(live)
    assert torch.equal(logits(own), expected)
    assert (adapted - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "ia3", "ln_tuning", "trainable_tokens"])
def test_an_adapter_merged_into_the_live_model_is_not_merged_twice(name):
    live = build(name)
    live.merge_adapter()
    before = state(live)
    own = plain(live)
    assert state(live) == before
    assert torch.equal(logits(own), logits(live))


# What fails, and what the checks above would not let pass.


def test_a_merge_that_fails_names_the_tuner_and_the_layer():
    live = adapt(llama(), lora(lora_bias=True, target_modules=["q_proj"]))
    layer = resolve(unwrap(live), "model.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match=r"lora\.layer\.Linear into Linear\(.*has no bias"):
        fill(layer, {"weight": torch.empty(64, 64)})


def test_out_of_memory_is_passed_on(monkeypatch):
    def merge(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    live = adapt(llama(), lora(use_dora=True))
    monkeypatch.setattr(LoraLinear, "merge", merge)
    with pytest.raises(torch.OutOfMemoryError):
        plain(live)


def without_fill(module: Any) -> dict[str, torch.Tensor]:
    return live_leaves(module)


def base_plus_delta(module: Any) -> dict[str, torch.Tensor]:
    leaves = live_leaves(module)
    if hasattr(module, "get_delta_weight"):
        leaves["weight"] = leaves["weight"] + module.get_delta_weight("default").detach()
    return leaves


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "ia3", "trainable_tokens", "ln_tuning"])
def test_the_comparison_sees_base_weights_left_as_they_are(name):
    assert gap(build(name), without_fill) > 1e-3


def test_the_comparison_sees_a_naive_merge():
    assert gap(build("lora"), base_plus_delta) < 1e-5
    assert gap(build("dora"), base_plus_delta) > 1e-3
    assert gap(two_adapters(), base_plus_delta) < 1e-5
    both = two_adapters()
    both.base_model.set_adapter(["default", "ref"])
    assert gap(both, base_plus_delta) > 1e-3


def test_the_check_of_the_live_state_sees_a_merge_and_unmerge():
    for name in ("lora", "dora", "oft coft"):
        live = build(name)
        before = state(live)
        live.merge_adapter()
        live.unmerge_adapter()
        assert state(live) != before
