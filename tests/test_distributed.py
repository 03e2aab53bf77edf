"""Two processes: rank 0 observes, the other does nothing, and the weights are the same bits."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder: Path, watched: str) -> list[dict]:
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *(f"--master_port={port}", "-m", "tests.ddp_script", str(folder), watched),
        ],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_rank_0_observes_and_training_is_unchanged(tmp_path):
    without = run(tmp_path / "without", "0")
    watched = run(tmp_path / "watched", "1")
    assert watched[0]["steps"] == [0, 1, 2, 3] and watched[1]["steps"] == []
    assert watched[0]["worst"] < 1e-4
    assert {r["weights"] for r in (*without, *watched)} == {without[0]["weights"]}
