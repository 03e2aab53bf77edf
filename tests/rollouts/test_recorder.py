"""What the reward functions of a trainer are given and return, and how it is listened to."""

import asyncio
import functools
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests import tiny
from tests.rollouts.test_look import shown
from tests.rollouts.trained import distinct, look, trainer, watched
from tests.sae.by_hand import random_sae
from tests.training import CAPITAL
from tlens_callback import Rollouts, SparseFeatures, TLensCallback
from tlens_callback.rollouts import Recorder

pytestmark = pytest.mark.slow


async def slowly(completion_ids: Any, **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(ids[0]) for ids in completion_ids]


class Counting:
    """A reward function that is an object, and whose call is async."""

    calls = 0

    async def __call__(self, completion_ids: Any, **_: Any) -> Any:
        self.calls += 1
        return torch.tensor([float(len(ids)) for ids in completion_ids])


def reward_model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, num_labels=1, pad_token_id=3,
            )
        )  # fmt: skip


def test_functions_of_every_kind(tmp_path):
    """Plain, partial, async, objects, and reward models before and after them."""
    functions = [
        reward_model(),
        distinct,
        functools.partial(distinct, unused=1),
        slowly,
        Counting(),
        reward_model(),
    ]
    of, sink = watched(tmp_path, rewards=functions, max_steps=2)
    assert functions[4].calls == 2 and of.reward_funcs == functions
    assert not functions[0]._forward_hooks
    names = of.reward_func_names
    assert sink.readings["rollouts/rewards"][1].labels["function"] == tuple(names)
    rows = shown(sink, 1)
    logs = of._logs["rewards"]
    # Functions of one name share a place in TRL's log.
    for i, name in enumerate(names):
        if names.count(name) == 1:
            np.testing.assert_allclose([r["rewards"][i] for r in rows], [*logs[name]], rtol=1e-6)
    both = [[r["rewards"][i] for r in rows] for i in (0, 5)]
    np.testing.assert_array_equal(*both)
    assert len(set(both[0])) > 4


@pytest.mark.parametrize("chat", [False, True])
def test_reward_models_alone(tmp_path, chat):
    """They are not told what they judge; TRL's method that asks them is."""
    prompts: Any = [[{"role": "user", "content": "what is"}]] * 8 if chat else ["what is"] * 8
    of, sink = watched(tmp_path, rewards=[reward_model()], max_steps=1, prompts=prompts)
    rows = shown(sink, 0)
    assert len(rows) == 8 and "_calculate_rewards" not in vars(of)
    np.testing.assert_allclose(
        [r["rewards"][0] for r in rows], [*of._logs["rewards"][of.reward_func_names[0]]], rtol=1e-6
    )


def test_conversations(tmp_path):
    prompts = [
        [{"role": "system", "content": "yes or no"}, {"role": "user", "content": one}]
        for one in ("what is the capital of France ?", "which city is in Italy ?") * 4
    ]

    def judged(completions: Any, **_: Any) -> list[float]:
        return [float(len(set(turns[0]["content"]))) for turns in completions]

    of, sink = watched(tmp_path, rewards=[judged], prompts=prompts, max_steps=1)
    rows = shown(sink, 0)
    theirs = {
        tuple(ids[mask.bool()].tolist())
        for batch in of._buffered_inputs
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert {tuple(row["prompt"]) for row in rows} == theirs
    np.testing.assert_allclose([r["rewards"][0] for r in rows], [*of._logs["rewards"]["judged"]])


def fails(**_: Any) -> Any:
    raise OverflowError("a fault of the user's own")


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        (fails, OverflowError, "a fault of the user's own"),
        (lambda **_: [1.0], ValueError, "returned 1 rewards, but 8 were expected"),
        (lambda **_: None, TypeError, "not iterable"),
        (lambda **_: ["good"] * 8, ValueError, "could not convert|too many dimensions"),
    ],
)
def test_errors_of_reward_functions_are_the_trainers(tmp_path, function, error, says):
    """The same with and without the callback, and the functions are given back the next time."""
    texts = []
    for attached in (False, True):
        of = trainer(tmp_path, rewards=[function], max_steps=1)
        callback, _ = look()
        if attached:
            callback.attach(of)
        with pytest.raises(Exception) as raised:
            of.train()
        texts.append((type(raised.value), str(raised.value)))
    assert texts[0] == texts[1] and isinstance(raised.value, BaseException)


def test_a_run_that_does_not_begin_leaves_the_functions_as_they_are(tmp_path):
    of = trainer(tmp_path, rewards=[distinct], max_steps=1)
    callback, _ = look(instruments=[SparseFeatures(random_sae(), hook="blocks.9.hook_mlp_out")])
    with pytest.raises(ValueError, match="no hook point"):
        callback.attach(of).on_train_begin(of.args, of.state, of.control, model=of.model)
    assert of.reward_funcs == [distinct] and of.reward_funcs[0] is distinct


def test_another_version_of_trl_is_said_once(tmp_path, caplog, monkeypatch):
    from trl import GRPOTrainer

    def other(self: Any, batch: Any) -> Any:
        raise AssertionError

    of = trainer(tmp_path, rewards=[reward_model()], max_steps=1)
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", other)
    callback, _ = look()
    callback.attach(of)
    callback.recorder.listen(of.model)
    assert "all rewards come from models" in caplog.text and not vars(of).get("_calculate_rewards")
    callback.recorder.stop()


def test_an_iterator_is_left_to_the_trainer(tmp_path):
    """What it gives is not known then, and training has it."""
    of, sink = watched(
        tmp_path, rewards=[lambda completion_ids, **_: iter([1.0, 2.0] * 4), distinct], max_steps=1
    )
    rewards = sink.readings["rollouts/rewards"][0].values
    assert np.isnan(rewards[:, 0]).all() and not np.isnan(rewards[:, 1]).any()
    assert [*of._logs["rewards"]["<lambda>"]] == [1.0, 2.0] * 4


@pytest.mark.exhaustive
def test_generations_of_evaluations_are_left_out(tmp_path):
    _, plain = watched(tmp_path / "plain", max_steps=2)
    _, sink = watched(tmp_path / "evaluates", max_steps=2, evaluates=True)
    ages = sink.curve("rollouts/age")[1]
    assert ages.tolist() == [0, 0]
    one, other = (s.readings["rollouts/token"][0].values for s in (plain, sink))
    np.testing.assert_array_equal(one, other)


def test_a_recorder_keeps_one_generation():
    recorder = Recorder()
    reward = recorder.reward(distinct)
    kept = []

    class Ids(list[Any]):
        pass

    for step in range(3):
        ids = Ids([[step, 1], [step, 2]])
        kept.append(weakref.ref(ids))
        state = SimpleNamespace(global_step=step)
        found = reward(prompts=["a", "a"], completions=["b", "c"], completion_ids=ids,
                       trainer_state=state)  # fmt: skip
        assert found == [float(len({step, 1})), float(len({step, 2}))]
        assert recorder.latest is not None and recorder.latest.step == step
        assert recorder.latest.rewards[0].tolist() == found
    del ids
    gc.collect()
    assert [one() is None for one in kept] == [True, True, False]
    recorder.stop()
    gc.collect()
    assert kept[-1]() is None and recorder.latest is None


class Plain:
    reward_funcs: Any = None


@pytest.mark.parametrize("given", [None, [], (distinct,), distinct])
def test_a_trainer_without_reward_functions_is_refused(given):
    of = Plain()
    of.reward_funcs = given
    with pytest.raises(ValueError, match=r"no list reward_funcs.*look\.reward\(f\)"):
        TLensCallback([CAPITAL]).attach(of)


def test_a_callback_is_attached_once(tmp_path):
    of = trainer(tmp_path, max_steps=1)
    callback = TLensCallback([CAPITAL])
    assert callback.attach(of) is callback
    assert sum(one is callback for one in of.callback_handler.callbacks) == 1
    with pytest.raises(ValueError, match="Attach it once"):
        callback.attach(of)
    other = TLensCallback([CAPITAL], name="other")
    of.add_callback(other)
    other.attach(of)
    assert sum(one is other for one in of.callback_handler.callbacks) == 1


def test_a_second_training_is_listened_to_again(tmp_path):
    of, sink = watched(tmp_path, max_steps=1)
    assert of.reward_funcs == [distinct]
    of.train()
    assert len(sink.readings["rollouts/token"]) == 1 and of.reward_funcs == [distinct]
    assert sink.steps == (0, 1) or list(sink.steps) == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"groups": 0}, "groups"),
        ({"per_observation": 7}, "needs two rollouts"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"base": "model"}, "adapter. or .copy"),
        ({"fdr": 0.0}, "between 0 and 1"),
        ({"fdr": float("nan")}, "give a number"),
        ({"texts": 1}, "True or False"),
        ({"permutations": 2.5}, "whole number"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Rollouts(**wrong)


def test_rollouts_must_be_settings():
    given: Any = True
    with pytest.raises(ValueError, match=r"rollouts must be Rollouts\(\.\.\.\)"):
        TLensCallback([CAPITAL], rollouts=given)


def test_functions_are_recognised_through_the_listener():
    """TRL asks whether a function is async, and what it is named."""
    recorder = Recorder()
    module = nn.Linear(1, 1)
    of = SimpleNamespace(reward_funcs=[slowly, distinct, Counting(), module], model=module)
    recorder.attach(of)
    recorder.listen(module)
    listened = [*of.reward_funcs]
    assert [asyncio.iscoroutinefunction(one) for one in listened] == [True, False, True, False]
    assert [getattr(one, "__name__", "") for one in listened[:2]] == ["slowly", "distinct"]
    assert listened[3] is module and recorder.names == ["slowly", "distinct", "Counting", "Linear"]
    recorder.listen(module)
    assert not {id(one) for one in of.reward_funcs[:3]} & {id(one) for one in listened[:3]}
    assert of.reward_funcs[0].__wrapped__ is slowly, "not a listener around a listener"
    recorder.stop()
    assert of.reward_funcs[0] is slowly and not module._forward_hooks


def test_a_trainer_of_ones_own_may_say_nothing_of_groups():
    """Equal prompts in turn are a group then, and advantages are those of GRPO's defaults."""
    from tests.rollouts.test_planted import planted
    from tests.rollouts.test_tokens import batch_of
    from tlens_callback import Shadow
    from tlens_callback.rollouts import Look

    recorder, shadow = Recorder(), Shadow.of(planted())
    reward = recorder.reward(lambda completion_ids, **_: [1.0, 3.0, 2.0, 5.0, 5.0, 5.0])
    ids = [[9, 8], [7], [10, 11], [9], [8], [12]]
    reward(prompts=[[1, 20]] * 3 + [[1, 21]] * 3, completions=ids, completion_ids=ids)
    look = Look(Rollouts(), recorder)
    found = look.before_update(shadow, batch_of(shadow), planted(), SimpleNamespace(), 0)
    at = {one.key: one.values for one in found}
    assert at["rollouts/group"].tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(at["rollouts/advantage"], [-1, 1, 0, 0, 0, 0], atol=1e-3)
    assert at["rollouts/dead_groups"] == 0.5


@pytest.mark.parametrize("given", [None, np.zeros(2), "ab", [1], 3.5, [None, None]])
def test_odd_arguments_reach_the_function_and_do_no_harm(given):
    recorder = Recorder()
    reward = recorder.reward(lambda prompts, completion_ids: [1.0, 2.0])
    assert reward(prompts=given, completion_ids=[[1], [2]]) == [1.0, 2.0]
    assert recorder.latest is not None and [*recorder.latest.prompts] == [None, None]
    assert reward(prompts=given, completion_ids=given) == [1.0, 2.0]
