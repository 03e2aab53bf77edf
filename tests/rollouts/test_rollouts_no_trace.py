"""Training whose rollouts are looked at is, bit for bit, the training without it."""

from typing import Any

import pytest
import torch

from tests.rollouts.trained import distinct, look, short, trainer
from tests.test_no_trace import differences, state_of

pytestmark = pytest.mark.slow


def run(folder: Any, callback: Any, name: str, **args: Any) -> tuple[Any, list[Any]]:
    """The trainer after its run, and its reward functions before it."""
    of = trainer(
        folder, name, rewards=(distinct, short), dropout=0.3, evaluates=True, max_steps=2, **args
    )
    functions = [*of.reward_funcs]
    if callback is not None:
        callback.attach(of)
    of.train()
    return of, functions


GRPO = {"beta": 0.05, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    """A function of a trainer's arguments: the state after a training that nobody looked at."""
    known: dict[str, Any] = {}

    def state(name: str, **args: Any) -> dict[str, Any]:
        key = repr((name, args))
        if key not in known:
            known[key] = state_of(run(tmp_path_factory.mktemp("plain"), None, name, **args)[0])
        return known[key]

    return state


@pytest.mark.parametrize(
    ("name", "args"),
    [
        pytest.param("grpo", GRPO, id="grpo"),
        pytest.param("rloo", {"beta": 0.05}, id="rloo"),
        pytest.param("grpo", {"bf16": True}, id="bf16", marks=pytest.mark.exhaustive),
        pytest.param("grpo", {"peft": None}, id="full", marks=pytest.mark.exhaustive),
        pytest.param(
            "grpo", {"num_iterations": 2, "steps_per_generation": 2}, id="reused",
            marks=pytest.mark.exhaustive,
        ),
    ],
)  # fmt: skip
def test_rewarded_training_leaves_no_trace(tmp_path, unwatched, name, args):
    """With dropout, sampling and evaluations; looked at before and after each update."""
    plain = unwatched(name, **args)
    callback, sink = look(rollouts={"after_update": True})
    of, functions = run(tmp_path / "looked at", callback, name, **args)
    assert differences(plain, state_of(of)) == []
    assert all(one is own for one, own in zip(of.reward_funcs, functions, strict=True))
    assert sink.readings["rollouts/token"].keys() == {0, 1}
    assert sink.readings["rollouts/step_change"].keys() == {0, 1}


def test_a_look_that_draws_a_random_number_is_found_out(tmp_path, unwatched, monkeypatch):
    """The control of the test above."""
    from tlens_callback.rollouts import look as module

    usual = module.rollouts_of

    def drawing(*args: Any) -> Any:
        torch.rand(1)
        return usual(*args)

    monkeypatch.setattr(module, "rollouts_of", drawing)
    callback, _ = look()
    of, _ = run(tmp_path / "looked at", callback, "grpo", **GRPO)
    assert {"parameters", "history"} <= set(differences(unwatched("grpo", **GRPO), state_of(of)))
