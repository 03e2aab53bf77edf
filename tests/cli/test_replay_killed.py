"""`tlens-callback replay`, killed at any place, goes on to the same store."""

import subprocess

import pytest
from peft import LoraConfig

from tests.cli.test_replay import environment
from tests.offline.replaying import train, unlike
from tests.processes import python
from tlens_callback import TargetScores, read_store

KILLED = [
    "SIGKILL LocalSink._write_scores 1",
    "SIGINT Loader.load 3",
    "SIGINT LocalSink._write_scores 3",
    "SIGKILL Observer.remember 2",
    "SIGKILL Record.add 3",
    "SIGKILL Observer.remember 4",
    "SIGKILL LocalSink.close 1",
]
"""Before a step and in it, before and after what is remembered of it, and after the last."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three checkpoints of an adapter."""
    folder = tmp_path_factory.mktemp("replay")
    adapter = LoraConfig(r=4, target_modules="all-linear")
    train(folder, [TargetScores()], adapter=adapter)
    return folder


@pytest.fixture(scope="module")
def ended(run):
    command = [*python(), "-m", "tests.offline.killed_replay_script", str(run), *KILLED]
    subprocess.run(command, check=True, env=environment())
    return run


@pytest.mark.slow
def test_an_interrupted_replay_goes_on_to_the_same_store(ended):
    whole = read_store(ended / "whole" / "store")
    assert whole.steps == (0, 2, 4, 6)
    assert {"trained_features/fvu", "trainer/loss", "watch/count"} <= set(whole.keys)
    rare = [0, 6]
    assert whole.curve("frozen_weights/changed")[0].tolist() == rare
    wrong = {}
    for mode in KILLED:
        code = 130 if mode.startswith("SIGINT") else -9
        again = read_store(ended / mode / "store")
        found = unlike(whole, again)
        if (ended / mode / "status").read_text() != f"{code} 0":
            found.append((ended / mode / "status").read_text())
        if not (again.path / "page.html").exists():
            found.append("no page")
        if [path.name for path in (ended / mode).iterdir() if path.name.startswith("store-")]:
            found.append("another store")
        if left := [*again.path.rglob(".*.tmp")]:
            found.append(f"left {left}")
        if found:
            wrong[mode] = found[:8]
    assert wrong == {}
