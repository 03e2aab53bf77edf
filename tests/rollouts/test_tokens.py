"""Measures of sampled tokens, held against plain arithmetic on the model's own logits."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests import tiny
from tests.adapters import PROJECTIONS
from tlens_callback import Probe, ProbeBatch, Shadow
from tlens_callback.instruments.parts import predictions as module
from tlens_callback.instruments.parts.predictions import compare, most_frequent
from tlens_callback.rollouts.inside import last_residuals, parts
from tlens_callback.rollouts.rollout import Rollout


def adapted(family="llama", dtype=torch.float32, std=0.3, **config) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wanted = {"r": 4, "target_modules": PROJECTIONS} | config
        model: Any = get_peft_model(tiny.model(family).to(dtype), LoraConfig(**wanted))
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=std)
    return model.eval()


def rollouts(seed=0, lengths=((5, 9), (5, 4), (3, 12), (3, 1))):
    draw = torch.Generator().manual_seed(seed)

    def ids(n):
        return tuple(torch.randint(7, tiny.VOCAB, (n,), generator=draw).tolist())

    return [
        Rollout(ids(p), ids(c), i // 2, i % 2, (1.0,), 1.0, float(i % 2))
        for i, (p, c) in enumerate(lengths)
    ]


def batch_of(shadow: Shadow) -> ProbeBatch:
    about = {"vocab_size": shadow.vocab_size, "context": shadow.context}
    return ProbeBatch.encode([Probe("p", [1, 9, 10])], **about)


def seen(model, few, temperature=1.0):
    shadow = Shadow.of(model)
    of = parts(few, batch_of(shadow), 64)
    now = torch.cat([last_residuals(shadow, part) for part in of])
    with shadow.without_adapters():
        base = torch.cat([last_residuals(shadow, part) for part in of])
    ids = torch.cat([part.tokens for part in of])
    order = [i for part in of for i in part.which]
    return shadow, now, base, ids, order, temperature


@torch.no_grad()
def plain(model, one, temperature):
    """[token, vocab], log probabilities of a plain forward pass, in float64."""
    ids = torch.tensor([[*one.prompt, *one.completion]])
    logits = model(ids).logits[0, len(one.prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_measure_is_that_of_a_plain_forward_pass(family, temperature, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5 * tiny.VOCAB)
    monkeypatch.setattr(module, "IN_CACHE", 2 * tiny.VOCAB)
    model = adapted(family, target_modules="all-linear")
    few = rollouts()
    shadow, now, base, ids, order, _ = seen(model, few)
    found = compare(shadow, now, base, ids, temperature=temperature).numbers
    at = 0
    for i in order:
        one = few[i]
        log = plain(model, one, temperature)
        with model.disable_adapter():
            log0 = plain(model, one, temperature)
        for t, y in enumerate(one.completion):
            p, p0 = log[t].exp().numpy(), log0[t].exp().numpy()
            wanted = {
                "logp": log[t, y],
                "base_logp": log0[t, y],
                "log_ratio": log[t, y] - log0[t, y],
                "entropy": scipy.stats.entropy(p),
                "base_entropy": scipy.stats.entropy(p0),
                "kl": scipy.stats.entropy(p, p0),
                "js": (scipy.stats.entropy(p, (p + p0) / 2) + scipy.stats.entropy(p0, (p + p0) / 2))
                / 2,
                "rank": (log[t] > log[t, y]).sum(),
                "base_rank": (log0[t] > log0[t, y]).sum(),
            }
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                tight = 1e-9 if "rank" in name else 2e-5
                assert float(found[name][at]) == pytest.approx(float(value), abs=tight), name
            assert ids[at] == y
            at += 1
    assert at == len(ids) == sum(len(one.completion) for one in few)
    assert found["js"].max() > 0.05, "the base is another model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_does_nothing_differs_by_nothing(dtype):
    """Exactly, at step 0; and one that does the least is found."""
    zero, little = adapted(dtype=dtype, std=0), adapted(dtype=dtype, std=0.02)
    for model, nothing in ((zero, True), (little, False)):
        shadow, now, base, ids, *_ = seen(model, rollouts())
        found = compare(shadow, now, base, ids, temperature=0.9, k=3)
        for name in ("log_ratio", "kl", "js"):
            assert bool((found.numbers[name] == 0).all()) == nothing, name
        assert bool((found.gained_by == 0).all() and (found.lost_by == 0).all()) == nothing


def test_a_head_that_is_trained_itself_is_left_out_for_the_base():
    model = adapted(modules_to_save=["lm_head"])
    few = rollouts()
    shadow, now, base, ids, order, _ = seen(model, few)
    found = compare(shadow, now, base, ids).numbers
    with model.disable_adapter():
        wanted = torch.cat(
            [
                plain(model, few[i], 1.0).gather(1, torch.tensor(few[i].completion)[:, None])[:, 0]
                for i in order
            ]
        )
    assert torch.allclose(found["base_logp"].double(), wanted, atol=2e-5)


def test_tokens_gained_and_lost_are_counted_over_positions(monkeypatch):
    """At every third of them, whatever the pieces are in which they are computed."""
    monkeypatch.setattr(module, "CHUNK", 5 * tiny.VOCAB)
    monkeypatch.setattr(module, "IN_CACHE", 2 * tiny.VOCAB)
    model = adapted(target_modules="all-linear")
    few = rollouts()
    shadow, now, base, ids, order, _ = seen(model, few)
    found = compare(shadow, now, base, ids, k=3, every=3)
    logs = []
    for i in order:
        log = plain(model, few[i], 1.0)
        with model.disable_adapter():
            logs.append(log - plain(model, few[i], 1.0))
    moved = torch.cat(logs)[::3].numpy()
    assert len(moved) == 9
    for tokens, sizes, signed in (
        (found.gained, found.gained_by, moved),
        (found.lost, found.lost_by, -moved),
    ):
        ranked = np.argsort(-signed, 1)[:, :3]
        np.testing.assert_array_equal(tokens, ranked)
        np.testing.assert_allclose(sizes, np.take_along_axis(signed, ranked, 1), atol=2e-5)
        token, share = most_frequent(tokens.numpy(), sizes.numpy(), 96)
        counts = np.bincount(ranked.flatten(), minlength=tiny.VOCAB) / len(moved)
        for one, of in zip(token, share, strict=True):
            assert np.isnan(one) or of == pytest.approx(counts[int(one)])
        assert np.nansum(share) == pytest.approx(3)


def test_a_temperature_that_is_left_out_is_found_out():
    model = adapted()
    shadow, now, base, ids, *_ = seen(model, rollouts())
    warm = compare(shadow, now, base, ids, temperature=0.7).numbers["entropy"]
    cold = compare(shadow, now, base, ids).numbers["entropy"]
    assert float((warm - cold).abs().max()) > 0.05
