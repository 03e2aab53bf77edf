"""Two processes: rank 0 observes, the other does nothing, and the weights are the same bits."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, dict]]]:
    """What each rank found; both train in all ways, one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
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


@pytest.mark.parametrize("how", ["trainer", "plain", "accelerate"])
def test_rank_0_observes_and_training_is_unchanged(ranks, how):
    without = [rank["without"][how] for rank in ranks]
    watched = [rank["watched"][how] for rank in ranks]
    assert watched[0]["steps"] == [0, 1, 2, 3] and watched[1]["steps"] == []
    assert 0 < watched[0]["worst"] < 1e-4
    assert {r["weights"] for r in (*without, *watched)} == {without[0]["weights"]}
    assert [rank["random"] for rank in watched] == [rank["random"] for rank in without]
    assert [r["said"].count("tlens: watching") for r in (*without, *watched)] == [0, 0, 1, 0]


@pytest.mark.parametrize("how", ["plain", "accelerate"])
def test_rank_0_saves(ranks, how):
    assert [rank["watched"][how]["saved"] for rank in ranks] == [True, False]


def test_the_ways_to_train_differ(ranks):
    """Else one could be taken for another."""
    assert len({of["weights"] for of in ranks[0]["without"].values()}) == 3
