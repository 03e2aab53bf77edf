"""What rank 0 reads of a sharded model is the model; three processes, without a trainer."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import free_port, python

pytestmark = pytest.mark.slow

WORLD = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(WORLD)}
    processes = [
        subprocess.Popen(
            [*python(), "-m", "tests.shadow.shards_script", str(folder)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **at, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    said = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(said)[-5000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD)]


WAYS = ["FSDP2 by rows", "FSDP2 in bfloat16", "FSDP2 by columns", "FSDP1"]
ENGINES = ["FSDP2", "FSDP2, compiled", "FSDP1 in units", "FSDP1 in one unit"]


@pytest.mark.parametrize("way", [*WAYS, "FSDP1 without the parameters"])
def test_shares_of_any_size_make_the_parameters_again(ranks, way):
    assert ranks[0][way]
    assert not ranks[0][f"{way}, control"], "other numbers would be noticed"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_shadow_has_the_weights_of_the_whole_model(ranks, engine):
    """Merged ones too, and two norms of one size in one share are not taken for tied ones."""
    found = ranks[0][engine]
    assert found["other weights"] == [] and found["streamed"]
    assert found["logits"] == 0 and found["live"] < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_updates_of_half_frozen_adapters(ranks, engine):
    """As LoRA-FA has them."""
    assert ranks[0][engine]["other updates"] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_without_adapters(ranks, engine):
    found = ranks[0][engine]
    assert found["base"] == 0 < 1e-3 < found["adapter"]
    assert found["after"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_one_gather_for_each_layer_and_pass(ranks, engine):
    found = ranks[0][engine]
    assert found["gathers of a pass"] == 6
    # The trained head; what is frozen is there already. FSDP1 has all of it in one share.
    assert found["gathers of a sync"] == 1


def test_memory_is_that_of_few_layers(ranks):
    for rank, found in enumerate(ranks):
        for engine in ("FSDP2", "FSDP1 in units"):
            assert found[engine]["peak"] < (2.5 if rank == 0 else 1.0), (rank, engine)
    # Whole models would be more than 6.
    assert ranks[0]["FSDP1 in one unit"]["peak"] > 6
