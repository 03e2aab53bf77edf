"""Effective weights: a plain model that holds them computes what the live model computes."""

import copy
import hashlib
import random
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tlens_callback import weights
from tlens_callback.refusals import refuse
from tlens_callback.weights import adapted_leaves, fill, innermost, live_leaves, resolve, unwrap

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

TOKENS = torch.arange(24).reshape(2, 12) * 5 % tiny.VOCAB
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomise(model: nn.Module, *, only_trainable: bool = False, std: float = 0.1) -> None:
    """Every parameter moves: norm gains and biases too, so that nothing is one or zero."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.requires_grad or not only_trainable):
            parameter.data += torch.randn_like(parameter) * std


def llama(*, bias: bool = False, tied: bool = False) -> PreTrainedModel:
    """Two layers, two heads a key-value head; wide enough for every tuner's blocks."""
    return tiny.model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
    )


def adapt(base: nn.Module, config: "Config") -> Any:
    """The adapted model in the mode of training, its adapter moved away from the identity."""
    torch.manual_seed(1)
    live = get_peft_model(base, config())
    randomise(live, only_trainable=True)
    return live.train()


def effective(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters of the plain layer that `module` amounts to."""
    leaves = live_leaves(module)
    # What fill leaves out stays NaN.
    own = {n: torch.full_like(leaves[n], torch.nan) for n in adapted_leaves(module)}
    fill(module, own)
    return leaves | own


def plain(live: nn.Module, find: Any = effective) -> nn.Module:
    """A fresh model without adapters, with the weights that `find` gives for each module."""
    base: Any = unwrap(live)
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        skeleton = type(base)(config)
    for path, module in skeleton.named_modules():
        source = resolve(base, path)
        if any(p is not None for p in module._parameters.values()):
            values = find(source)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(values[name], requires_grad=False)
        for name in module._buffers:
            module._buffers[name] = innermost(source)._buffers[name]
    return skeleton.eval()


@contextmanager
def evaluated(model: nn.Module) -> Any:
    """The model in eval mode, and back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    with evaluated(model):
        return model(input_ids=TOKENS, use_cache=False).logits


def gap(live: nn.Module, find: Any = effective) -> float:
    """Largest difference of a logit, live against plain, relative to the largest logit."""
    expected = logits(live)
    assert expected.isfinite().all()
    found = logits(plain(live, find)).nan_to_num(1e9)
    return float((found - expected).abs().max() / expected.abs().max())


def state(model: nn.Module) -> dict[str, Any]:
    """All that must not change: values, storage, versions, modes, adapters, bookkeeping, RNG."""
    seen: dict[str, Any] = {
        "rng": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )
    }
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    if tensor is not None:
                        raw = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
                        seen[f"{path}/{key}"] = (
                            id(tensor),
                            tensor.data_ptr(),
                            tensor._version,
                            tensor.requires_grad,
                            tensor.dtype,
                            hashlib.sha1(raw).hexdigest(),
                        )
            elif isinstance(value, dict):
                seen[f"{path}/{name}"] = [(key, id(item)) for key, item in value.items()]
            elif isinstance(value, bool | int | float | str | list | tuple | set):
                seen[f"{path}/{name}"] = repr(value)
            else:
                seen[f"{path}/{name}"] = id(value)
    return seen


Config = Callable[[], peft.PeftConfig]


def lora(**settings: Any) -> Config:
    return tuner("LoraConfig", **({"r": 4, "lora_alpha": 8} | settings))


def tuner(kind: str, **settings: Any) -> Config:
    """Built when called: PEFT writes into the configs it is given."""
    return partial(getattr(peft, kind), **({"target_modules": PROJECTIONS} | settings))


CONFIGS: dict[str, Config] = {
    "lora": lora(),
    "lora rslora": lora(use_rslora=True),
    "lora dropout": lora(lora_dropout=0.5),
    "lora bias=lora_only": lora(bias="lora_only"),
    "lora bias=all": lora(bias="all"),
    "lora lora_bias": lora(lora_bias=True),
    "lora rank and alpha patterns": lora(
        rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}, exclude_modules=["k_proj"]
    ),
    "lora all-linear": lora(target_modules="all-linear"),
    "lora embed_tokens": lora(target_modules=["embed_tokens", "q_proj"]),
    "lora lm_head": lora(target_modules=["lm_head", "q_proj"]),
    "lora one layer": lora(layers_to_transform=[1]),
    "lora layer_replication": lora(layer_replication=[[0, 2], [1, 2]]),
    "lora target_parameters 2-D": lora(
        target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"]
    ),
    "dora": lora(use_dora=True),
    "dora dropout": lora(use_dora=True, lora_dropout=0.5),
    "dora embed_tokens": lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa_niter": lora(init_lora_weights="pissa_niter_4"),
    "olora": lora(init_lora_weights="olora"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "gaussian": lora(init_lora_weights="gaussian"),
    "mica": lora(init_lora_weights="mica"),
    "mica embed_tokens": lora(init_lora_weights="mica", target_modules=["embed_tokens"]),
    "velora": lora(velora_config=VeloraConfig(num_groups=4)),
    "monteclora": lora(monteclora_config=MontecloraConfig()),
    "kasa": lora(kasa_config=KasaConfig()),
    "bdlora": lora(
        target_modules=["q_proj", "o_proj"],
        use_bdlora=BdLoraConfig(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2
        ),
    ),
    "modules_to_save lm_head": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "modules_to_save of many kinds": lora(
        target_modules=["q_proj"],
        modules_to_save=["lm_head", "embed_tokens", "norm", "input_layernorm", "mlp"],
    ),
    "modules_to_save around adapted modules": lora(modules_to_save=["mlp"]),
    "trainable_token_indices": lora(trainable_token_indices=[1, 5, 20]),
    "trainable_token_indices by name": lora(trainable_token_indices={"embed_tokens": [5, 20]}),
    "trainable_tokens": tuner(
        "TrainableTokensConfig", token_indices=[5, 10], target_modules=["embed_tokens"]
    ),
    "adalora": tuner("AdaLoraConfig", init_r=6, target_r=4, total_step=10),
    "adamss": tuner("AdamssConfig", r=8, num_subspaces=2, target_modules=["q_proj", "v_proj"]),
    "loha": tuner("LoHaConfig", r=4, rank_dropout=0.5, module_dropout=0.5),
    "lokr": tuner("LoKrConfig", r=4, rank_dropout=0.5, module_dropout=0.5),
    "lokr decompose_both": tuner("LoKrConfig", r=2, decompose_both=True, decompose_factor=8),
    "oft": tuner("OFTConfig", oft_block_size=8, module_dropout=0.5),
    "oft coft": tuner("OFTConfig", oft_block_size=8, coft=True, eps=0.1),
    "oft block_share": tuner("OFTConfig", oft_block_size=8, block_share=True),
    "boft": tuner("BOFTConfig", boft_block_size=4, boft_dropout=0.5),
    "boft butterfly": tuner("BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=2),
    "ia3": tuner(
        "IA3Config",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "ln_tuning": tuner("LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    "vera": tuner("VeraConfig", r=8, vera_dropout=0.5),
    "pvera": tuner("PveraConfig", r=8),
    "frod": tuner("FrodConfig", progressbar=False),
    "fourierft": tuner("FourierFTConfig", n_frequency=50),
    "hra": tuner("HRAConfig", r=4),
    "hra gram-schmidt": tuner("HRAConfig", r=4, apply_GS=True),
    "vblora": tuner("VBLoRAConfig", r=4, num_vectors=16, vector_length=16),
    "unilora": tuner("UniLoraConfig", r=4),
    "miss": tuner("MissConfig", r=4),
    "miss mini": tuner("MissConfig", r=4, init_weights="mini", mini_r=2),
    "miss bat": tuner("MissConfig", r=4, init_weights="bat"),
    "randlora": tuner("RandLoraConfig", r=4),
    "road_1": tuner("RoadConfig", variant="road_1", group_size=16),
    "road_2": tuner("RoadConfig", variant="road_2", group_size=16),
    "road_4": tuner("RoadConfig", variant="road_4", group_size=16),
    "hira": tuner("HiraConfig", r=4),
    "hira embed_tokens": tuner("HiraConfig", r=4, target_modules=["embed_tokens"]),
    "shira": tuner("ShiraConfig", r=4, random_seed=0),
    "c3a": tuner("C3AConfig", block_size=16),
    "waveft": tuner("WaveFTConfig", n_frequency=50),
    "osf": tuner("OSFConfig", effective_rank=16),
    "delora": tuner("DeloraConfig", r=4),
    "gralora": tuner("GraloraConfig", r=4, alpha=8),
    "gralora hybrid": tuner("GraloraConfig", r=4, hybrid_r=2, alpha=8),
    "tinylora": tuner("TinyLoraConfig", r=2, u=8),
    "tinylora embed_tokens": tuner("TinyLoraConfig", r=2, u=8, target_modules=["embed_tokens"]),
    "psoft": tuner("PsoftConfig", r=4),
    "peanut": tuner("PeanutConfig", r=4),
    "peanut deep": tuner("PeanutConfig", r=4, depth=2),
    "supertuning": tuner("SupertuningConfig", sparsity=0.9),
    "supertuning lora": tuner("SupertuningConfig", sparsity=0.9, r=4, lora_alpha=8),
    "deft": tuner("DeftConfig", r=4),
    "deft qr": tuner("DeftConfig", r=4, decomposition_method="qr"),
    "deft para": tuner("DeftConfig", r=4, para=True),
    "beft": tuner("BeftConfig", target_modules=["v_proj"]),
    "glora": tuner("GloraConfig", r=4),
}
"""Every kind of PEFT adapter that has a merged weight, with what changes how it merges."""


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name == "adamss":
        pytest.importorskip("sklearn", reason="AdaMSS clusters with scikit-learn")
    return adapt(llama(bias=True).to(dtype), CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
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


@pytest.mark.parametrize("name", CONFIGS)
def test_the_effective_weights_are_those_of_peft_s_own_merge_of_a_copy(name):
    if name == "lora layer_replication":
        pytest.skip("PEFT merges twice into the base weight that the replicas share")
    live = build(name)
    merged = copy.deepcopy(live).merge_and_unload().state_dict()
    own = plain(live).state_dict()
    assert own.keys() == merged.keys()
    for key in own:
        torch.testing.assert_close(own[key], merged[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["corda", "lora_ga", "eva"])
def test_initialisations_that_look_at_data_first(method):
    base = llama()
    config = lora(init_lora_weights=method)()
    if method == "corda":
        corda = pytest.importorskip("peft.tuners.lora.corda", reason="it imports attrs")
        config.corda_config = CordaConfig()
        corda.preprocess_corda(base, config, run_model=lambda: base(TOKENS))
    elif method == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(base, config, lambda: base(TOKENS, labels=TOKENS).loss.backward())
    else:
        config.eva_config = EvaConfig()
    live = get_peft_model(base, config)
    if method == "eva":
        initialize_lora_eva_weights(live, [{"input_ids": TOKENS}] * 4, show_progress_bar=False)
    randomise(live, only_trainable=True)
    assert gap(live) < 1e-5


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
    base = unwrap(live)
    q_proj = resolve(base, "model.layers.0.self_attn.q_proj")
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
    assert unwrap(live).config.tie_word_embeddings
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
    scale = innermost(resolve(unwrap(live), "model.embed_tokens"))._buffers["embed_scale"]
    assert float(scale) == pytest.approx(32**0.5)
    assert gap(live) < 1e-5


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


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
    base = unwrap(live)
    assert isinstance(base, PreTrainedModel)
    before = state(live)
    own = plain(live)
    assert state(live) == before
    expected = logits(live)
    assert (logits(own) - expected).abs().max() < 1e-5 * expected.abs().max()


# Wrappers.


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
    assert unwrap(torch.compile(live)) is base


def test_unwrap_steps_through_data_parallel_wrappers():
    live = adapt(llama(), lora())
    assert unwrap(nn.DataParallel(live)) is unwrap(live) is live.get_base_model()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert unwrap(nn.parallel.DistributedDataParallel(live)) is live.get_base_model()
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_that_the_live_model_has_not_is_named():
    base = unwrap(adapt(llama(), lora()))
    with pytest.raises(ValueError, match=r"no module 'model.layers.0.mixer' .*no 'mixer'"):
        resolve(base, "model.layers.0.mixer")


# Precision: one rounding, of the exact sum.


def dyadic(*shape: int, bits: int, top: int = 8) -> torch.Tensor:
    """Random multiples of 2**-bits below top * 2**-bits: sums of products of them are exact."""
    return torch.randint(-top, top + 1, shape).double() * 2.0**-bits


def exact_lora(
    layout: str, base_dtype: torch.dtype, adapter_dtype: torch.dtype, adapters: int
) -> tuple[nn.Module, torch.Tensor]:
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
    layer: Any = model.base_model.model["layer"]
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
    twice = innermost(layer).weight.data.clone()
    for name in layer.scaling:
        twice += layer.get_delta_weight(name).bfloat16()
    assert not torch.equal(twice, exact.bfloat16())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
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
    if isinstance(module, BaseTunerLayer):
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
