"""Two processes: rank 0 observes, the other does nothing, and the weights are the same bits."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder: Path, watched: str, how: str) -> list[dict]:
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["-m", "tests.tracer_ddp_script", str(folder), watched, how]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *(f"--master_port={port}", *arguments),
        ],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("tlens: watching" in done.stdout) == (watched == "1")
    assert done.stdout.count("tlens: watching") <= 1
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "accelerate"])
def test_rank_0_observes_and_the_loop_is_unchanged(tmp_path, how):
    without = run(tmp_path / "without", "0", how)
    watched = run(tmp_path / "watched", "1", how)
    assert watched[0]["steps"] == [0, 1, 2, 3] and watched[1]["steps"] == []
    assert (watched[0]["saved"], watched[1]["saved"]) == (True, False)
    assert 0 < watched[0]["worst"] < 1e-4
    assert {r["weights"] for r in (*without, *watched)} == {without[0]["weights"]}
    for rank in (0, 1):
        assert watched[rank]["random"] == without[rank]["random"]
