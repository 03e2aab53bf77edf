"""Sharded models: rank 0 observes with the help of the others, and the training stays the same."""

import functools
import subprocess
from pathlib import Path

import pytest

from tests.engines import TRACES, changed, trained
from tests.marks import exhaustive
from tests.processes import python

pytestmark = pytest.mark.slow

RUNS = {
    "fsdp2: sft lora": ["auto", "resident"],
    "fsdp2: sft full": ["auto"],
    "fsdp2: rollouts lora": ["auto"],
    "fsdp2 kept: sft dora": ["auto"],
    "fsdp1: sft lora": ["auto"],
}
ALIKE = {"fsdp2 kept: sft dora"}
EACH = exhaustive(
    [pytest.param(run, how) for run, holdings in RUNS.items() for how in holdings], ALIKE
)
LAYERS, STEPS = 3, [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found in a run, which is trained when it is first asked for."""

    @functools.cache
    def of(run):
        how = " ".join([run, *RUNS.get(run, [])])
        return trained(tmp_path_factory.mktemp("ranks"), how)

    return of


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same model in one process."""
    return trained(tmp_path_factory.mktemp("alone"), "one process: sft lora")[0]


@pytest.mark.parametrize(("run", "holding"), EACH)
def test_training_is_bit_for_bit_the_same(ranks, run, holding):
    first, second = ranks(run)
    assert changed([first, second], run, holding) == []
    assert first[run][holding]["steps"] == STEPS and second[run][holding]["steps"] == []


def test_a_difference_would_be_found(ranks):
    run = "fsdp2: sft lora"
    for what in TRACES:
        of = ranks(run)[1][run]
        other = [*ranks(run), {run: {**of, "auto": {**of["auto"], what: "other"}}}]
        assert changed(other, run, "auto") == [what]


@pytest.mark.parametrize(("run", "holding"), EACH)
def test_the_shadow_is_the_model(ranks, run, holding):
    of = ranks(run)[0][run][holding]
    assert 0 < of["fidelity"] < 1e-4 and of["kl"] < 1e-6
    assert of["written"] == 0, "nothing writes to the frozen weights"


def test_the_processes_hold_different_shares_of_one_model(ranks):
    for run in RUNS.keys() - ALIKE:
        first, second = (rank[run]["without"] for rank in ranks(run))
        assert first["weights"] != second["weights"]
        assert first["history"] == second["history"]


def test_readings_are_those_of_one_process(ranks, alone):
    """At the first step, where the weights are the same: later every way adds up gradients in
    another order."""
    one = alone["one process: sft lora"]["auto"]["first"]
    for run, holding in (("fsdp2: sft lora", "auto"), ("fsdp1: sft lora", "auto")):
        other = ranks(run)[0][run][holding]["first"]
        assert other.keys() == one.keys() and len(one) > 50
        worst = {key: abs(one[key] - other[key]) / max(1.0, abs(one[key])) for key in one}
        assert max(worst.values()) < 1e-6, max(worst, key=worst.__getitem__)


def test_a_resumed_training_goes_on_in_the_same_way(ranks):
    run = "fsdp2: resume lora"
    of = ranks(run)[0][run]
    assert changed(ranks(run), run, "auto") == []
    assert of["auto"]["steps"] == [2, 3, 4]
    assert of["auto"]["drift"] == of["not stopped"]["drift"] and len(of["auto"]["drift"]) > 5


def test_rollouts_are_looked_at_with_the_help_of_the_others(ranks):
    of = ranks("fsdp2: rollouts lora")[0]["fsdp2: rollouts lora"]["auto"]
    assert of["looked at"] == STEPS[:-1]
    assert min(of["changed by steps"]) > 0.01
    first, *later = of["from the base"]
    assert first == 0 and min(later) > 0.01


def test_layers_are_gathered_one_at_a_time(ranks):
    of = ranks("fsdp2: sft lora")[0]["fsdp2: sft lora"]
    assert of["auto"]["extra bytes"] < of["resident"]["extra bytes"]
    # The pass of all instruments, and those of HeadAblation.
    assert of["auto"]["gathers"] > of["resident"]["gathers"] >= LAYERS
    assert any("weights='streamed'" in line for line in of["said"])


FAULTS = ["reduction", "room", "gather", "interrupt", "kill peer"]


def faults(*places: str, limit: int, on_error: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parent.parent
    command = [*python(), str(root / "scripts" / "rank_faults"), "--engines", "fsdp2"]
    return subprocess.run(
        [*command, "--limit", str(limit), "--on-error", on_error, "--places", *places],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("on_error", exhaustive(["warn", "raise"], {"raise"}))
def test_no_process_is_left_waiting(on_error):
    done = faults(*FAULTS, limit=200, on_error=on_error)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("held") == len(FAULTS) + 1


@pytest.mark.exhaustive
def test_a_process_that_is_left_waiting_is_found():
    done = faults("silence", limit=15, on_error="warn")
    assert done.returncode == 1 and "waits" in done.stdout
