"""Trainers that update the weights before `on_pre_optimizer_step`, as DeepSpeed's engine does."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from tests.rollouts.trained import look, trainer, watched
from tests.test_no_trace import fingerprint
from tlens_callback import TLensCallback
from tlens_callback.rollouts.recorder import updates_in_backward
from tlens_callback.shadow.moved import TrainedSample


def rollouts_of(sink: Any) -> dict[tuple[str, int], np.ndarray]:
    return {
        (key, step): reading.values
        for key, by_step in sink.readings.items()
        for step, reading in by_step.items()
        if key.startswith("rollouts/")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [("grpo", {}), ("rloo", {}), ("grpo", {"bf16": True})], ids=str
)
def test_they_are_looked_at_before_the_pass_that_is_trained_on(name, more, tmp_path, monkeypatch):
    args = dict(dropout=0.1, rollouts={"after_update": True}, gradient_accumulation_steps=2, **more)
    first, usual = watched(tmp_path / "usual", name, **args)
    monkeypatch.setattr("tlens_callback.callback.updates_in_backward", lambda args: True)
    # Where the engine updates earlier, what follows is too late.
    monkeypatch.setattr(TLensCallback, "on_pre_optimizer_step", lambda *_, **__: None)
    other, early = watched(tmp_path / "early", name, **args)
    found, wanted = rollouts_of(early), rollouts_of(usual)
    assert found.keys() == wanted.keys() and len(found) > 100
    assert all(np.array_equal(found[at], wanted[at], equal_nan=True) for at in wanted)
    assert fingerprint(dict(other.model.named_parameters())) == fingerprint(
        dict(first.model.named_parameters())
    )
    assert not other.model._forward_pre_hooks, "the model has its own hooks again"


class Updates(TrainerCallback):
    """Moves the weights before anybody is asked."""

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(0.01)


def test_weights_that_did_not_sample_them_are_not_taken_for_those_that_did(tmp_path, caplog):
    of = trainer(tmp_path, callbacks=[Updates()])
    callback, sink = look()
    callback.attach(of)
    of.train()
    said = [m for m in caplog.messages if "are not looked at" in m]
    assert len(said) == 1 and said[0].startswith(
        "tlens: the rollouts of step 0 are not looked at: the weights were changed before "
        "on_pre_optimizer_step, and are not those that sampled them."
    )
    assert list(sink.steps) == [0, 1, 2, 3] and not rollouts_of(sink)


def test_a_change_of_any_trained_parameter_is_seen():
    model = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 2), nn.BatchNorm1d(2)).bfloat16()
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    kept = TrainedSample(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert kept.still(model), "what is not trained does not count, and NaN is NaN"
    for parameter in (model[0].bias, model[1].weight, model[2].weight):
        with torch.no_grad():
            before = parameter.clone()
            parameter.view(-1)[0] += 0.5
            assert not kept.still(model)
            parameter.copy_(before)
        assert kept.still(model)
    single = nn.Linear(3, 3)
    kept = TrainedSample(single)
    with torch.no_grad():
        single.weight.mul_(1 + 2e-7)
        assert kept.still(single), "rounding"
        single.weight.mul_(1 + 1e-5)
        assert not kept.still(single)
    alone = nn.Linear(1, 1).requires_grad_(False)
    assert TrainedSample(alone).still(alone)


@pytest.mark.parametrize(
    ("optim", "early"),
    [
        ("adamw_torch", False),
        ("galore_adamw", False),
        ("galore_adamw_layerwise", True),
        ("apollo_adamw_layerwise", True),
        ("lomo", True),
        ("adalomo", True),
    ],
)
def test_which_trainers_these_are(optim, early, tmp_path):
    args = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True, report_to="none")
    assert updates_in_backward(args) is early
    engine: Any = SimpleNamespace(optim=optim, deepspeed_plugin=object())
    assert updates_in_backward(engine)
