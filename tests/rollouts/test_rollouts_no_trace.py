"""Training whose rollouts are looked at is, bit for bit, the training without it."""

from typing import Any

import pytest
import torch

from tests.rollouts.trained import distinct, look, short, trainer
from tests.test_no_trace import differences, state_of

pytestmark = pytest.mark.slow


def run(folder: Any, callback: Any, name: str, **args: Any) -> tuple[Any, list[Any]]:
    """The trainer after its run, and its reward functions before it."""
    of = trainer(folder, name, rewards=(distinct, short), dropout=0.3, evaluates=True, **args)
    functions = [*of.reward_funcs]
    if callback is not None:
        callback.attach(of)
    of.train()
    return of, functions


@pytest.mark.parametrize(
    ("name", "args"),
    [
        pytest.param("grpo", {"beta": 0.05, "gradient_accumulation_steps": 2}, id="grpo"),
        pytest.param("rloo", {"beta": 0.05}, id="rloo"),
        pytest.param("grpo", {"bf16": True}, id="bf16"),
        pytest.param("grpo", {"peft": None}, id="full", marks=pytest.mark.exhaustive),
        pytest.param(
            "grpo", {"num_iterations": 2, "steps_per_generation": 2}, id="reused",
            marks=pytest.mark.exhaustive,
        ),
    ],
)  # fmt: skip
def test_rewarded_training_leaves_no_trace(tmp_path, name, args):
    """With dropout, sampling and evaluations; looked at before and after each update."""
    plain, _ = run(tmp_path / "plain", None, name, **args)
    callback, sink = look(rollouts={"after_update": True})
    of, functions = run(tmp_path / "looked at", callback, name, **args)
    assert differences(state_of(plain), state_of(of)) == []
    assert all(one is own for one, own in zip(of.reward_funcs, functions, strict=True))
    assert sink.readings["rollouts/token"].keys() == {0, 1, 2}
    assert sink.readings["rollouts/step_change"].keys() == {0, 1, 2}


def test_a_look_that_draws_a_random_number_is_found_out(tmp_path, monkeypatch):
    """The control of the test above."""
    from tlens_callback.rollouts import look as module

    usual = module.rollouts_of

    def drawing(*args: Any) -> Any:
        torch.rand(1)
        return usual(*args)

    plain, _ = run(tmp_path / "plain", None, "grpo")
    monkeypatch.setattr(module, "rollouts_of", drawing)
    callback, _ = look()
    of, _ = run(tmp_path / "looked at", callback, "grpo")
    assert {"parameters", "history"} <= set(differences(state_of(plain), state_of(of)))
