"""Runs over many observations, resumed runs, and a look that fails."""

import gc
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.rollouts.test_planted import SIZE, completions, counts, planted
from tests.rollouts.test_tokens import batch_of
from tests.rollouts.trained import look, trainer
from tlens_callback import Shadow
from tlens_callback.rollouts import Look, Recorder, Rollouts

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive
def test_memory_stays_flat_over_200_observations():
    shadow, recorder = Shadow.of(planted()), Recorder()
    each, sampled = completions()
    rewards = counts()
    reward = recorder.reward(lambda completion_ids, **_: rewards)
    args = SimpleNamespace(num_generations=SIZE, scale_rewards="group", temperature=1.0)
    of = Look(Rollouts(groups=2, per_observation=4, permutations=20), recorder)
    batch, sizes, tensors = batch_of(shadow), [], []
    for step in range(200):
        ids = [list(one) for one in sampled]
        reward(prompts=each, completions=ids, completion_ids=ids)
        of.before_update(shadow, batch, planted(), args, step)
        if step in (20, 199):
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss / 2**20)
            tensors.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))
    assert tensors[1] <= tensors[0]
    assert sizes[1] - sizes[0] < 20, "MiB"


@pytest.mark.exhaustive
def test_a_resumed_run_goes_on_counting_signs(tmp_path):
    """As the run that was never stopped."""
    runs = {}
    every_other: Any = dict(
        save_strategy="steps", save_steps=2, max_steps=4, lr_scheduler_type="constant"
    )
    for name, stops in (("whole", ()), ("parts", (2,))):
        callback, sink = look()
        of = trainer(tmp_path / name, **every_other)
        if stops:
            of.args.max_steps = 2
        callback.attach(of)
        of.train()
        if stops:
            callback, later = look()
            of = trainer(tmp_path / name, **every_other)
            callback.attach(of)
            of.train(resume_from_checkpoint=True)
            for key, readings in later.readings.items():
                sink.readings.setdefault(key, {}).update(readings)
        runs[name] = sink.readings
    for step in range(4):
        one, other = (runs[name]["rollouts/contrast_direct_sign"][step] for name in runs)
        np.testing.assert_allclose(one.values * (step + 1), np.round(one.values * (step + 1)))
        np.testing.assert_allclose(one.values, other.values, err_msg=str(step))


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_look_that_fails(tmp_path, on_error, monkeypatch, caplog):
    """It is the last one; the observation that waits for it is written, and training goes on."""

    def fails(*_: Any, **__: Any) -> Any:
        raise FloatingPointError("a fault of ours")

    monkeypatch.setattr("tlens_callback.rollouts.look.inside", fails)
    callback, sink = look(on_error=on_error)
    of = trainer(tmp_path, max_steps=2)
    callback.attach(of)
    if on_error == "raise":
        with pytest.raises(FloatingPointError):
            of.train()
        return
    with caplog.at_level(logging.WARNING):
        of.train()
    assert list(sink.steps) == [0, 1, 2] and of.state.global_step == 2
    assert caplog.text.count("the look at rollouts") == 1 and "a fault of ours" in caplog.text
    assert not [key for key in sink.readings if key.startswith("rollouts/")]


def test_a_trainer_that_never_samples_delays_nothing(tmp_path):
    """An observation waits for its rollouts until the update, whether there are any or not."""
    callback, sink = look()
    of = trainer(tmp_path, max_steps=2, callbacks=[callback])
    callback.reward(lambda **_: [])
    of.train()
    assert list(sink.steps) == [0, 1, 2]
    assert not [key for key in sink.readings if key.startswith("rollouts/")]
