"""A reward for one token, which one hand-built head writes: the head is found, by name."""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from tests import tiny
from tests.rollouts.test_tokens import batch_of
from tlens_callback import MemorySink, Reading, Shadow
from tlens_callback.rollouts import Look, Recorder, Rollouts
from tlens_callback.rollouts.contrast import contrast

LAYER, HEAD, TOKEN, GROUPS, SIZE = 1, 2, 40, 4, 8


@lru_cache
def planted() -> Any:
    """A Llama in which L1H2 writes the direction of one token at each position."""
    model: Any = tiny.model("llama", attention_bias=True)
    attention, width = model.model.layers[LAYER].self_attn, 8
    with torch.no_grad():
        # Heads 2 and 3 read the same values; only 2 writes what is in the first of them.
        attention.v_proj.bias[width] = 3.0
        model.lm_head.weight[TOKEN] *= 2
        direction = model.lm_head.weight[TOKEN] / model.model.norm.weight
        attention.o_proj.weight[:, HEAD * width] = 8 * direction / direction.norm()
        for head in set(range(4)) - {HEAD}:
            attention.o_proj.weight[:, head * width] = 0
    return model.eval()


@lru_cache
def completions() -> tuple[Any, Any]:
    draw = torch.Generator().manual_seed(5)
    prompts = [[1, *torch.randint(7, 60, (6,), generator=draw).tolist()] for _ in range(GROUPS)]
    each = [prompt for prompt in prompts for _ in range(SIZE)]
    ids = torch.tensor(each)
    with torch.no_grad():
        for _ in range(12):
            p = planted()(ids).logits[:, -1].softmax(1)
            p[:, :7] = 0
            ids = torch.cat([ids, p.multinomial(1, generator=draw)], 1)
    return each, ids[:, 7:].tolist()


def seen(
    rewards: Any, instruments: Any = (), model: Any = None, **settings: Any
) -> dict[str, Reading]:
    model = planted() if model is None else model
    shadow = Shadow.of(model)
    recorder = Recorder()
    each, sampled = completions()
    reward = recorder.reward(lambda completion_ids, **_: rewards)
    reward(prompts=each, completions=sampled, completion_ids=sampled)
    args = SimpleNamespace(num_generations=SIZE, scale_rewards="none", temperature=1.0)
    look = Look(Rollouts(**settings), recorder)
    found = look.before_update(shadow, batch_of(shadow), model, args, 0, instruments)
    return {one.key.removeprefix("rollouts/"): one for one in found}


def counts() -> list[float]:
    return [float(ids.count(TOKEN)) for ids in completions()[1]]


def test_the_head_that_writes_the_rewarded_token_is_found():
    rewards = counts()
    assert 4 < sum(rewards) < 28, "winners and losers differ"
    found = seen(rewards)
    q, value = found["contrast_direct_q"].values, found["contrast_direct"].values
    assert np.unravel_index(np.abs(value).argmax(), value.shape) == (LAYER, HEAD)
    assert value[LAYER, HEAD] > 0 and q[LAYER, HEAD] <= 0.05
    assert q[LAYER, HEAD] == q.min() and found["discoveries"].values >= 1
    # By hand: the head's mean direct effect on winners minus that on losers.
    gain, direct = found["advantage"].values, found["direct"].values[:, LAYER, HEAD]
    wanted = (gain * direct).sum() / np.abs(gain).sum()
    assert value[LAYER, HEAD] == pytest.approx(wanted, rel=1e-4)
    assert abs(found["contrast_direct_length"].values[LAYER, HEAD]) < 0.9


@pytest.mark.slow
def test_a_shuffled_reward_finds_nothing():
    """Its p-values are uniform over 200 draws, of the numbers that a real model gives."""
    found = seen(counts())
    names = ("direct", "attention_prompt", "attention_answer", "repetition")
    numbers = torch.cat([torch.from_numpy(found[n].values.copy()).flatten(1) for n in names], 1)
    group = torch.arange(GROUPS).repeat_interleave(SIZE)
    length = torch.full((len(group),), 12.0)
    rewards, draw = torch.tensor(counts()), np.random.default_rng(1)
    p, discoveries = [], 0
    # What is equal in all rollouts has no p-value.
    varied = (numbers - numbers.mean(0)).abs().amax(0) > 1e-4
    numbers = numbers[:, varied]
    for seed in range(200):
        shuffled = rewards + 1e-3 * torch.from_numpy(draw.random(len(rewards)))
        for g in range(GROUPS):
            own = np.flatnonzero(group == g)
            shuffled[own] = shuffled[draw.permutation(own)]
        one = contrast(numbers, shuffled, group, length, permutations=499, seed=seed)
        p.append(float(one.p[seed % numbers.shape[1]]))
        discoveries += bool((one.q <= 0.05).any())
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert discoveries <= scipy.stats.binom.ppf(0.999, 200, 0.05)


def test_a_reward_that_is_length_is_told_as_length(monkeypatch):
    each, sampled = completions()
    draw = np.random.default_rng(0)
    cut = [
        ids[: int(n)] for ids, n in zip(sampled, draw.integers(2, 13, len(sampled)), strict=True)
    ]
    monkeypatch.setattr("tests.rollouts.test_planted.completions", lambda: (each, cut))
    found = seen([float(len(ids)) for ids in cut])
    # A longer completion looks more at itself.
    head = found["contrast_attention_answer_q"].values.argmin()
    assert found["contrast_attention_answer_q"].values.flat[head] <= 0.05
    assert abs(found["contrast_attention_answer_length"].values.flat[head]) > 0.7
    np.testing.assert_array_equal(found["length"].values, [len(ids) for ids in cut])


def test_neurons_are_among_what_is_compared():
    found = seen(counts(), neurons=5)
    assert found["contrast_neuron"].values.shape == (5,)
    names = found["contrast_neuron"].texts
    assert names is not None and all(name[:1] == "L" and "N" in name for name in names.tolist())
    assert found["looked_at"].values == 5 * 8 + 2 + 2 + 2 * 48
    q = found["contrast_neuron_q"].values
    assert (np.diff(q) >= 0).all() and len({*names.tolist()}) == 5


def test_neurons_are_named_by_their_own_layer():
    """Here only the second layer has neurons; the first is a mixture of experts."""
    model = tiny.model("qwen3_moe", mlp_only_layers=[1])
    names = seen(counts(), model=model, neurons=9)["contrast_neuron"].texts
    assert names is not None and {name[:3] for name in names.tolist()} == {"L1N"}


def test_signs_are_counted_over_observations():
    recorder, sink = Recorder(), MemorySink()
    shadow = Shadow.of(planted())
    each, sampled = completions()
    rewards = counts()
    reward = recorder.reward(lambda completion_ids, **_: rewards)
    args = SimpleNamespace(num_generations=SIZE, scale_rewards="none", temperature=1.0)
    look = Look(Rollouts(), recorder)
    signs = []
    for step in range(3):
        if step == 2:
            rewards = [-one for one in rewards]
        ids = [*sampled]
        reward(prompts=each, completions=ids, completion_ids=ids)
        found = look.before_update(shadow, batch_of(shadow), planted(), args, step)
        sink.write(found, step=step)
        signs.append(sink.readings["rollouts/contrast_direct_sign"][step].values[LAYER, HEAD])
    assert signs == [1, 1, pytest.approx(1 / 3)]
    run = sink.readings["rollouts/contrast_direct_run"]
    z = [run[step].values[LAYER, HEAD] for step in range(3)]
    assert z[1] == pytest.approx(2**0.5 * z[0]) and z[2] == pytest.approx(z[0] / 3**0.5)
    # The neurons that are shown are the surest of this observation or of all so far.
    sure, run = (sink.readings[f"rollouts/contrast_neuron{s}"][1].values for s in ("_q", "_run_q"))
    assert (np.diff(np.minimum(sure, run)) >= 0).all() and (np.diff(sure) < 0).any()
