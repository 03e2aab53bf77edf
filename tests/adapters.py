"""Adapted models of every kind, a plain model of their effective weights, and all their state."""

import copy
import hashlib
import random
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from peft.tuners.lora.config import (
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from tests import tiny
from tlens_callback.shadow.weights import (
    adapted_leaves,
    fill,
    innermost,
    live_leaves,
    resolve,
    unwrap,
)

TOKENS = torch.arange(24).reshape(2, 12) * 5 % tiny.VOCAB
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


needs_transformers_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="transformers wants a newer PEFT"
)


def randomise(model: nn.Module, *, only_trainable: bool = False, std: float = 0.1) -> None:
    """Every parameter moves: norm gains and biases too, so that nothing is one or zero."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.requires_grad or not only_trainable):
            parameter.data += torch.randn_like(parameter) * std


def llama(*, bias: bool = False, tied: bool = False) -> Any:
    """Two layers, two heads a key-value head; wide enough for every tuner's blocks."""
    return tiny.model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
    )


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """The model with other layers in the place of its linear ones, but for the head."""
    for module in [*model.modules()]:
        for name, layer in [*module.named_children()]:
            if isinstance(layer, nn.Linear) and name != "lm_head":
                setattr(module, name, make(layer))
    return model


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


def plain(live: nn.Module, find: Any = effective) -> Any:
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
            repr(np.random.get_state()),
        )
    }
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    if tensor is not None:
                        raw = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
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


Config = Callable[[], Any]


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


QUICK = {"lora", "lora bias=all", "dora", "ia3", "oft", "vera", "trainable_tokens"}
assert QUICK <= CONFIGS.keys()


def mostly_slow(names: Iterable[str], *, turn: int | None = None) -> list[Any]:
    """Parameters of a test; all but a few kinds are marked as slow, and with `turn`, 0 or 1, every
    other of these as exhaustive: another test has them."""
    found = []
    for i, name in enumerate(names):
        marks = [pytest.mark.slow] * (name not in QUICK)
        marks += [pytest.mark.exhaustive] * (bool(marks) and turn is not None and i % 2 != turn)
        found.append(pytest.param(name, marks=marks))
    return found


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name == "adamss":
        pytest.importorskip("sklearn", reason="AdaMSS clusters with scikit-learn")
    return adapt(llama(bias=True).to(dtype), CONFIGS[name])
