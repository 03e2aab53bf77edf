"""Every adapter that merges: the shadow equals the live model after real optimizer steps."""

import pytest
import torch

from tests.adapters import CONFIGS, build, mostly_slow
from tests.shadow.test_shadow import gap, train
from tlens_callback import Probe, ProbeBatch, Shadow

# PEFT warns about many of the configurations; none of the warnings is ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def batch_for(shadow: Shadow) -> ProbeBatch:
    """With every token that one of the configurations trains."""
    probes = [Probe("all", range(1, 48)), Probe.repeated("repeat", block=8)]
    return ProbeBatch.encode(probes, None, vocab_size=shadow.vocab_size)


@pytest.mark.parametrize("name", mostly_slow(CONFIGS))
def test_the_shadow_follows_every_tuner(name):
    model = build(name)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    scale = float(shadow.logits(batch.tokens)[batch.mask].abs().max())
    assert gap(model, shadow, batch) < 3e-5 * scale
    before = shadow.logits(batch.tokens)
    train(model, batch, steps=3, lr=5e-3)
    shadow.sync()
    moved = float((shadow.logits(batch.tokens) - before)[batch.mask].abs().max())
    assert gap(model, shadow, batch) < 3e-5 * scale
    assert moved > 1e-3 * scale, "the steps change what the shadow has to follow"


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft", "trainable_tokens"])
def test_without_the_sync_the_check_fails(name):
    model = build(name)
    shadow = Shadow.of(model, weights="resident")
    batch = batch_for(shadow)
    scale = float(shadow.logits(batch.tokens)[batch.mask].abs().max())
    train(model, batch, steps=3, lr=5e-3)
    assert gap(model, shadow, batch) > 1e-4 * scale


@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
def test_switching_and_disabling_adapters_is_followed(name):
    model = build(name)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    adapted = shadow.logits(batch.tokens)
    with model.disable_adapter():
        shadow.sync()
        assert gap(model, shadow, batch) < 2e-5
        assert float((shadow.logits(batch.tokens) - adapted)[batch.mask].abs().max()) > 1e-2
    shadow.sync()
    assert torch.equal(shadow.logits(batch.tokens), adapted)
