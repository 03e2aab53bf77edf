"""The models and probes that the instruments' tests look at, and Hugging Face's own account."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tlens_callback import Instrument, Probe, ProbeBatch, Reading, Shadow, observe

TEXTS = (
    Probe("capital", "The capital of France is", target=" Paris", foil=" London"),
    Probe("story", "John and Mary went to the store and John gave a drink to", target=" Mary"),
    Probe("bare", " red blue green"),
)
BLOCKS = (
    Probe.repeated("repeat-5-0", block=5, times=4, seed=0),
    Probe.repeated("repeat-9-0", block=9, times=2, seed=0),
    Probe.repeated("repeat-5-1", block=5, times=4, seed=1),
    Probe.repeated("repeat-9-1", block=9, times=2, seed=1),
)
PROBES = (TEXTS[0], BLOCKS[0], BLOCKS[1], TEXTS[1], BLOCKS[2], BLOCKS[3], TEXTS[2])
"""Of six lengths, and in no order."""

LONG_ANSWER = Probe(
    "long", "What is the capital of Italy", target=" Rome and Madrid", foil=" Berlin and Paris"
)
"""Its target and foil are three tokens each."""

MIXED_MOE = {"mlp_only_layers": [1], "num_hidden_layers": 3}
"""Overrides for "qwen3_moe": a dense layer between two of experts."""


@cache
def shadow(family: str, seed: int = 0, mixed: bool = False) -> Shadow:
    """A shadow of a tiny model; tests only look at it, so one serves all."""
    return Shadow.of(tiny.model(family, seed=seed, **(MIXED_MOE if mixed else {})))


@cache
def adapted(
    family: str, seed: int = 0, mixed: bool = False, dtype: torch.dtype = torch.float32
) -> Shadow:
    """The same with LoRA on all linear layers, as far along as after some training."""
    model = tiny.model(family, seed=seed, **(MIXED_MOE if mixed else {}))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return Shadow.of(peft.to(dtype))


@cache
def hugging_face(family: str, seed: int = 0, mixed: bool = False) -> Any:
    """The same weights in a model that no bridge has touched."""
    model = tiny.model(family, seed=seed, **(MIXED_MOE if mixed else {}))
    model.set_attn_implementation("eager")
    return model


def encoded(probes: Sequence[Probe] = PROBES) -> ProbeBatch:
    return ProbeBatch.encode(probes, tiny.tokenizer(), vocab_size=tiny.VOCAB, context=tiny.CONTEXT)


def readings(
    instrument: Instrument, of: Shadow, probes: Sequence[Probe] = PROBES
) -> dict[str, Reading]:
    return {reading.key: reading for reading in observe(of, encoded(probes), [instrument])}


def ids(probe: Probe) -> torch.Tensor:
    """[1, pos], the probe's tokens without padding."""
    return encoded([probe]).tokens


@torch.no_grad()
def attentions(model: Any, probe: Probe) -> np.ndarray:
    """[layer, head, query, key], from a forward pass of this probe alone."""
    got = model(ids(probe), output_attentions=True, use_cache=False).attentions
    return torch.stack([layer[0] for layer in got]).double().numpy()
