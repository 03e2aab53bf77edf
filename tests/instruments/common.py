"""The models and probes that the instruments' tests look at, and Hugging Face's own account."""

from collections.abc import Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

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


class Played(Shadow):
    """A shadow whose forward passes show these activations, which no model made.

    Its reductions run as those of any other. A residual stream is its own unembedding.

    Args:
        activations: name of a hook point -> [probe, ...], in the order in which they are reached.
        logits: [probe, pos, vocab]; if there are none, zeros.
        of: the shadow to which all else belongs.
    """

    def __init__(
        self,
        activations: Mapping[str, Tensor],
        logits: Tensor | None = None,
        *,
        of: Shadow | None = None,
    ) -> None:
        self._activations, self._logits = activations, logits
        self._of = shadow("llama") if of is None else of
        self.hooks = {name: HookPoint() for name in activations}
        head = nn.Identity()
        head.weight = nn.Parameter(torch.empty(tiny.VOCAB, 0))
        config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.bridge = SimpleNamespace(
            original_model=SimpleNamespace(config=config, get_output_embeddings=lambda: None),
            unembed=SimpleNamespace(original_component=head),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    @property
    def attention_layers(self) -> list[int]:
        return self._of.attention_layers

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        for name, value in self._activations.items():
            self.hooks[name](value)
        return torch.zeros(*tokens.shape, tiny.VOCAB) if self._logits is None else self._logits


def of_layers(end: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Activations of the hook points of this end, one for each layer."""
    return {f"blocks.{layer}.{end}": value for layer, value in enumerate(values)}


def played(
    instrument: Instrument,
    batch: ProbeBatch,
    activations: Mapping[str, Tensor],
    logits: Tensor | None = None,
    *,
    of: Shadow | None = None,
) -> dict[str, Reading]:
    """Readings of activations that no model made."""
    made: Any = Played(activations, logits, of=of)
    return {reading.key: reading for reading in observe(made, batch, [instrument])}
