"""What an observation costs in kernels and in waits for the device, counted and not timed."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tlens_callback import Probe, ProbeBatch, Shadow, observe
from tlens_callback.instruments import fast
from tlens_callback.probes.builtin import repeated_blocks
from tlens_callback.shadow import stacks, unembed

ROOT = Path(__file__).parent.parent
LAYERS = 30


def counted() -> Any:
    spec = importlib.util.spec_from_file_location("counted", ROOT / "scripts" / "counted.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Counted()


@pytest.fixture(scope="module")
def watched() -> tuple[Any, Shadow, ProbeBatch, list[Any]]:
    """A model of many small layers, and the instruments that share the pass, at their second
    observation."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=300)
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, max_position_embeddings=128)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    shadow = Shadow.of(model)
    probes = [Probe(f"text-{i}", [5 + i, 6, 7, 8, 9, 10 + i], target=7, foil=9) for i in range(2)]
    batch = ProbeBatch.encode(probes + repeated_blocks(128), vocab_size=300)
    instruments = []
    for one in fast():
        if observe(shadow, batch, [one]) and one.taps(shadow, batch):
            instruments.append(one)
    assert len(instruments) == 13
    return model, shadow, batch, instruments


def test_all_that_share_a_pass_start_at_most_half_as_many_kernels_again(watched, monkeypatch):
    """Layers are reduced together as on a GPU. Tapping each layer would start four times as many
    kernels as the model itself."""
    model, shadow, batch, instruments = watched

    def kernels(taps: list[Any]) -> int:
        with counted() as count:
            shadow.run(batch, taps)
        return count.kernels

    with counted() as bare, torch.no_grad():
        model(batch.tokens, attention_mask=batch.mask.long(), use_cache=False)
    assert kernels([{"last_logits": lambda logits: logits}]) <= 1.02 * bare.kernels
    monkeypatch.setattr(stacks, "_ON_CPU", stacks._ELSEWHERE)
    monkeypatch.setattr(unembed, "IN_CACHE", unembed.CHUNK)
    together = kernels([one.taps(shadow, batch) for one in instruments])
    assert together <= 1.5 * bare.kernels
    monkeypatch.setattr(stacks, "_ON_CPU", 0)
    assert kernels([one.taps(shadow, batch) for one in instruments]) > 3 * bare.kernels


def test_a_pass_waits_for_the_device_no_more_often_than_the_model_does(watched):
    _, shadow, batch, instruments = watched

    def waits(taps: list[Any]) -> int:
        with counted() as count:
            shadow.run(batch, taps)
        return count.waits

    alone = waits([{"last_logits": lambda logits: logits}])
    assert waits([one.taps(shadow, batch) for one in instruments]) == alone
    one_more = {"last_logits": lambda logits: logits[logits > logits.mean()]}
    assert waits([one_more]) > alone


def test_an_instrument_left_out_starts_no_kernel(watched):
    """What is shared is gathered for those that are there alone."""
    _, shadow, batch, instruments = watched

    def kernels(some: list[Any]) -> int:
        with counted() as count:
            shadow.run(batch, [one.taps(shadow, batch) for one in some])
        return count.kernels

    every = kernels(instruments)
    for one in instruments:
        rest = [other for other in instruments if other is not one]
        assert kernels(rest) < every, one.name
