"""DeepSpeed: as in test_engines. `scripts/check --deepspeed` installs it and runs this."""

import pytest

from tests.engines import changed, trained

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

LOOKED_AT = ["zero3: rollouts lora", "zero3: rollouts dora", "zero2: rollouts lora"]
RUNS = [
    "zero3: sft lora",
    "zero3: sft full",
    "zero3 kept: grpo lora",
    "zero2: sft lora",
    *LOOKED_AT,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    # At its first use DeepSpeed compiles for minutes.
    return trained(tmp_path_factory.mktemp("ranks"), *RUNS, "zero3: resume lora")


@pytest.mark.parametrize("run", RUNS)
def test_training_is_bit_for_bit_the_same(ranks, run):
    assert changed(ranks, run, "auto") == []
    of = ranks[0][run]["auto"]
    assert of["steps"] == [0, 1, 2, 3, 4] and ranks[1][run]["auto"]["steps"] == []
    assert 0 < of["fidelity"] < 1e-4 and of["kl"] < 1e-6
    assert (of["gathers"] > 0) == run.startswith("zero3")


@pytest.mark.parametrize("run", LOOKED_AT)
def test_rollouts_are_looked_at_with_the_weights_that_sampled_them(ranks, run):
    """The engine updates the weights before the trainer says that it will."""
    of = ranks[0][run]["auto"]
    assert of["looked at"] == [0, 1, 2, 3]
    assert min(of["changed by steps"]) > 0.01
    first, *later = of["from the base"]
    assert first == 0 and min(later) > 0.01


def test_a_resumed_training_goes_on_in_the_same_way(ranks):
    of = ranks[0]["zero3: resume lora"]
    assert changed(ranks, "zero3: resume lora", "auto") == []
    assert of["auto"]["drift"] == of["not stopped"]["drift"]
