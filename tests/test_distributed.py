"""Two processes: rank 0 observes, the other does nothing, and the weights are the same bits."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.processes import torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    """What each rank found; both train in all ways, one after the other."""
    done = subprocess.run(
        [*torchrun(2), "-m", "tests.distributed_script", str(folder)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("how", ["trainer", "plain", "accelerate", "rewarded"])
def test_rank_0_observes_and_training_is_unchanged(ranks, how):
    without = [rank["without"][how] for rank in ranks]
    watched = [rank["watched"][how] for rank in ranks]
    steps = 3 if how != "rewarded" else 2
    assert watched[0]["steps"] == [*range(steps + 1)] and watched[1]["steps"] == []
    assert 0 < watched[0]["worst"] < 1e-4
    assert {r["weights"] for r in (*without, *watched)} == {without[0]["weights"]}
    assert [rank["random"] for rank in watched] == [rank["random"] for rank in without]
    assert [r["said"].count("tlens: watching") for r in (*without, *watched)] == [0, 0, 1, 0]


@pytest.mark.parametrize("how", ["plain", "accelerate"])
def test_rank_0_saves(ranks, how):
    assert [rank["watched"][how]["saved"] for rank in ranks] == [True, False]


def test_the_rollouts_looked_at_are_rank_0s(ranks, folder):
    """Its own four of each group of eight, with their advantages over the whole group."""
    read = [
        json.loads((folder / "rewarded" / f"sampled-{rank}.json").read_text()) for rank in (0, 1)
    ]
    looked = json.loads((folder / "rewarded" / "looked-at.json").read_text())
    assert len(looked) == 4
    for ids, gain in looked:
        assert any(one == ids and other == pytest.approx(gain) for one, other in read[0])
    assert sorted(ids for ids, _ in looked) == sorted(ids for ids, _ in read[0])
    assert sum(gain for _, gain in read[0] + read[1]) == pytest.approx(0, abs=1e-3)
    assert abs(sum(gain for _, gain in looked)) > 1e-2, "not standardised among themselves"


def test_processes_that_would_wait_for_each_other_are_told(ranks):
    """Rank 0 alone looks at rollouts, in which the others would have to help."""
    assert ranks[0]["unlike"] == ranks[1]["unlike"]
    assert "attached is True in rank 0, False in rank 1" in ranks[0]["unlike"]


def test_the_ways_to_train_differ(ranks):
    """Else one could be taken for another."""
    assert len({of["weights"] for of in ranks[0]["without"].values()}) == 4
