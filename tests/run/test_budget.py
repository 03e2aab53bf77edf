"""How rarely a run with a budget is observed, on clocks that the tests set themselves."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import budget_script, tiny
from tests.budget_script import CLOCKS, STEPS
from tests.own_loop import adapted, tracer
from tests.pretend_clock import Clock
from tests.processes import torchrun
from tests.rollouts import trained as rewards
from tests.training import CAPITAL, trainer
from tlens_callback import MemorySink, TLensCallback
from tlens_callback.run.budget import Budget
from tlens_callback.run.cost import Cost


class Run:
    """A run as a budget sees it.

    Args:
        train, look, check, start: seconds of a step, of an observation, of the comparison after the
            first step, and of the start.

    Attributes:
        steps: those that were observed.
        shares: step -> share of the time since the start, behind the observation there.
    """

    def __init__(self, share, every, train, look, check=0.0, start=0.0, baseline=(), first=0):
        self.clock = Clock(train, look)
        self.steps, self.shares = [first], {}
        self.every, self.check, self.at = every, check, first
        self.looks = self.checks = 0
        with self.clock.ticks():
            self.cost = Cost()
            self.budget = Budget(share, every, self.cost)
            self.budget.baseline.update(baseline)
            with self.cost.spending():
                self.budget.start(first)
                self.clock.now += start
                self.budget.observed(first)
            self.cost.beforehand = self.cost.seconds
            self.budget.decide()

    def goes_on(self, to) -> "Run":
        with self.clock.ticks():
            while self.at < to:
                self.step()
        return self

    def step(self) -> None:
        clock, self.at = self.clock, self.at + 1
        clock.now += clock.train
        check = self.at == self.steps[0] + 1
        observe = self.at % self.every == 0 and self.at >= self.budget.next
        if not (check or observe):
            return
        with self.cost.spending():
            if check:
                with self.cost.comparison():
                    clock.now += self.check
            if observe:
                clock.now += clock.look
                self.budget.observed(self.at)
        self.budget.decide()
        self.looks, self.checks = self.looks + observe, self.checks + check
        if observe:
            self.steps.append(self.at)
            spent = self.looks * clock.look + self.checks * self.check
            self.shares[self.at] = spent / (spent + (self.at - self.steps[0]) * clock.train)

    def remembered(self):
        with self.clock.ticks(), self.cost.spending():
            self.budget.remember(self.at)
        return dict(self.budget.baseline)


def test_it_looks_more_rarely_and_says_so(capsys):
    run = Run(0.02, 100, train=0.4, look=3.1, start=60.0).goes_on(3000)
    # 3.1 s are 2 % of 155 s, of which 151.9 are 379.75 steps. The one at 100 came too early: two of
    # them need 759.5 steps.
    assert run.steps == [0, 100, 800, 1200, 1600, 2000, 2400, 2800]
    assert capsys.readouterr().out == (
        "tlens: an observation takes 3.1 s and 100 steps take 40 s; to stay below 2 % of training "
        "time (budget=0.02), it now looks next at step 800, and then every 400 steps\n"
    )
    assert all(share < 0.02 for step, share in run.shares.items() if step > 100)
    assert run.shares[100] > 0.05


def test_without_a_budget_and_within_it_each_multiple_is_observed(capsys):
    assert Run(None, 100, 0.4, 3.1).goes_on(1000).steps == list(range(0, 1001, 100))
    assert Run(0.1, 100, 0.4, 3.1).goes_on(1000).steps == list(range(0, 1001, 100))
    assert capsys.readouterr().out == ""


def test_comparisons_are_paid_for_and_are_not_taken_for_observations():
    run = Run(0.02, 100, train=0.4, look=3.1, check=6.0).goes_on(3000)
    # (6 + 2 * 3.1) * 49 / 0.4 = 1494.5 steps; the distance is the one without the comparison.
    assert run.steps == [0, 100, 1600, 2000, 2400, 2800]
    assert all(share < 0.02 for step, share in run.shares.items() if step > 100)


@given(
    share=st.floats(0.001, 0.9),
    every=st.integers(1, 50),
    train=st.floats(0.01, 10),
    look=st.floats(0.001, 100),
    check=st.floats(0, 10),
)
def test_the_share_stays_below_and_the_steps_are_on_the_grid(share, every, train, look, check):
    run = Run(share, every, train, look, check).goes_on(40 * every)
    later = run.steps[2:]
    assert run.steps[:2] == [0, every]
    assert all(run.shares[step] <= share * (1 + 1e-9) for step in later)
    distance = run.budget._distance // every
    assert distance & (distance - 1) == 0 and all(s % (distance * every) == 0 for s in later)
    # No more rarely than it has to: with half the distance it would be above.
    half = distance * every / 2
    assert distance == 1 or look / (look + half * train) > share


def test_a_slow_first_observation_does_not_make_all_later_ones_rare(capsys):
    run = Run(0.1, 10, train=1.0, look=9.0)
    run.goes_on(10)
    assert run.budget._distance == 160  # 9 s are to be less than 10 % of 90 s
    run.clock.look = 1.0
    run.goes_on(6000)
    assert run.budget._distance == 20, "1 s needs 9 steps, and a mean with 9 s in it some more"
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith("it now looks every 20 steps")
    gaps = {b - a for a, b in zip(run.steps[-20:], run.steps[-19:], strict=False)}
    assert gaps == {20}


def test_an_observation_that_took_long_is_made_up_for(capsys):
    run = Run(0.1, 10, train=1.0, look=1.0)
    assert run.goes_on(1000).steps == list(range(0, 1001, 10))
    assert capsys.readouterr().out == ""
    run.clock.look = 60.0  # what is asked at every tenth, say, or a sink that was waited for
    run.goes_on(1010)
    run.clock.look = 1.0
    run.goes_on(3000)
    spent, at = 100 + 60.0, run.steps[102]
    assert (spent + 1) / (spent + 1 + at) < 0.1 < (spent + 1) / (spent + 1 + at - 20)
    assert f"next at step {at}, and then every 20 steps" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_distance():
    whole = Run(0.02, 100, 0.4, 3.1).goes_on(1300)
    kept = whole.remembered()
    assert Run(0.02, 100, 0.4, 3.1, baseline=kept, first=1300).goes_on(2500).steps == [
        1300, 1600, 2000, 2400,
    ]  # fmt: skip
    assert Run(0.02, 100, 0.4, 3.1, first=1300).goes_on(1500).steps == [1300, 1400], "the control"
    early = Run(0.02, 100, 0.4, 3.1).goes_on(300)
    again = Run(0.02, 100, 0.4, 3.1, baseline=early.remembered(), first=300).goes_on(1300)
    assert again.steps == [300, 800, 1200], "what is made up for is still made up for"
    other = Run(0.02, 30, 0.4, 0.01, baseline=kept, first=1300).goes_on(2000)
    assert other.steps[1] == 1920, "of another every_n_steps: the next longer distance"
    assert Run(None, 100, 0.4, 3.1, baseline=kept, first=1300).goes_on(1500).steps[1:] == [
        1400, 1500,
    ]  # fmt: skip


@pytest.mark.parametrize("share", [1e-300, 1 - 1e-16])
def test_a_budget_without_sense_makes_no_endless_loop(share):
    run = Run(share, 1, train=1e-9, look=1e3).goes_on(20)
    assert run.steps[:2] == [0, 1] and 0 < run.budget.next < 2**62
    assert Run(0.5, 1, train=0.0, look=1.0).goes_on(3).steps == [0, 1, 2, 3], "a clock that stands"


# --- in a training ---


def observed(tmp_path, clock, resume=None, **settings) -> tuple[list[int], torch.Tensor]:
    """The steps that a trainer's run is observed at, and the weights that it ends with."""
    sink = MemorySink()
    wanted = {"every_n_steps": 2, "on_error": "raise", "sinks": [sink], **settings}
    callback = TLensCallback([CAPITAL], instruments=[clock.watched], **wanted)
    args: dict[str, Any] = {"max_steps": 40, "save_strategy": "steps", "save_steps": 20}
    run = trainer(tmp_path, callback, model=tiny.model("llama"), **args)
    run.add_callback(clock)
    with clock.ticks():
        run.train(resume_from_checkpoint=resume)
    assert run.model is not None
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return list(sink.readings["takes/mean"]), weights


def test_a_trainers_run(tmp_path, capsys):
    every_second = list(range(0, 41, 2))
    steps, weights = observed(tmp_path, Clock(1.0, 2.0), budget=0.25)
    # Three seconds of training for one of watching: 6 steps for an observation, so 8.
    assert steps == [0, 2, 16, 24, 32, 40]
    assert (
        "tlens: an observation takes 2 s and 2 steps take 2 s; to stay below 25 % of training time "
        "(budget=0.25), it now looks next at step 16, and then every 8 steps\n"
    ) in capsys.readouterr().out
    resumed, _ = observed(tmp_path, Clock(1.0, 2.0), str(tmp_path / "checkpoint-20"), budget=0.25)
    assert resumed == [20, 24, 32, 40]
    (tmp_path / "checkpoint-20" / "tlens.memory").unlink()
    control, _ = observed(tmp_path, Clock(1.0, 2.0), str(tmp_path / "checkpoint-20"), budget=0.25)
    assert control[:2] == [20, 22]
    assert observed(tmp_path / "b", Clock(1.0, 0.01), budget=0.25)[0] == every_second
    unlimited, without = observed(tmp_path / "c", Clock(1.0, 2.0))
    assert unlimited == every_second
    assert torch.equal(weights, without)


def test_the_last_step_is_observed(tmp_path):
    steps, _ = observed(tmp_path, Clock(1.0, 50.0), budget=0.01)
    assert steps == [0, 2, 40]


def test_rollouts_are_looked_at_where_it_observes(tmp_path):
    clock = Clock(1.0, 2.0)
    callback, sink = rewards.look(instruments=[clock.watched], budget=0.25)
    run = rewards.trainer(tmp_path, max_steps=6, callbacks=[clock])
    callback.attach(run)
    with clock.ticks():
        run.train()
    assert list(sink.readings["takes/mean"]) == [0, 1, 6]
    assert list(sink.readings["rollouts/token"]) == [0, 1], "not those of the steps between"


@pytest.mark.slow
def test_two_processes_with_other_clocks_observe_the_same_steps(tmp_path):
    done = subprocess.run(
        [*torchrun(2), "-m", "tests.budget_script", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    steps = [0, 2, 16, 24, 32, 40, 48]
    assert first["met"] == second["met"] == steps
    assert set(first["observed"]) == {*steps, 1, STEPS} and second["observed"] == []
    # The control: by the other's clock there would be other steps.
    alone = [budget_script.watched(adapted(), Clock(**of))["observed"] for of in CLOCKS]
    assert alone[0] == first["observed"] and set(alone[1]) == {0, 1, 2, STEPS}


@pytest.mark.parametrize("wrong", [0, 1, 2, -0.1, True, "0.02", float("nan"), 0.02j])
def test_what_is_no_share_is_said_at_once(wrong):
    for make in (
        lambda: TLensCallback([CAPITAL], budget=wrong),
        lambda: tracer(adapted(), budget=wrong),
    ):
        with pytest.raises(ValueError, match=r"budget is a share .*such as 0\.02 for 2 %, got"):
            make()
