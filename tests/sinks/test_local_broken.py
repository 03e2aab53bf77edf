"""What a kill, a full disk or a copy cut short leaves of a local store."""

import errno
import os
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest

from tests.processes import python
from tests.sinks.samples import everything, same, small
from tests.sinks.test_local import fill, names, names_of
from tlens_callback.sinks import LocalSink, read_store

KILLED = """
import sys
from tests.sinks.samples import everything
from tlens_callback.sinks.local import LocalSink
sink = LocalSink(sys.argv[1])
for step in range(100_000):
    sink.write(everything(step), step=step)
    print(step, flush=True)
"""


@pytest.fixture
def writers(tmp_path):
    """Two processes that write one step after another, each in a directory of its own."""
    with ExitStack() as stack:
        children = []
        for i in range(2):
            command = [*python(), "-c", KILLED, str(tmp_path / f"run{i}")]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.enter_context(child)
            stack.callback(child.kill)
            children.append(child)
        yield children


@pytest.mark.slow
def test_a_killed_process_leaves_every_completed_step(tmp_path, writers):
    told = []
    for child, enough in zip(writers, (7, 10), strict=True):
        for line in child.stdout:
            if int(line) >= enough:
                break
        child.send_signal(signal.SIGKILL)
        rest = [line for line in child.stdout if line.endswith("\n")]
        assert child.wait() == -signal.SIGKILL
        told.append(int((rest or [line])[-1]))
    for i, last in enumerate(told):
        store = read_store(tmp_path / f"run{i}")
        assert store.steps[: last + 1] == tuple(range(last + 1))
        for step in store.steps:
            for got, put in zip(store.readings(step), everything(step), strict=True):
                assert same(got, put, atol=2**-12 if "pattern" in put.key else 0)
        assert set(pd.read_parquet(store.path / "scores").step) == set(store.steps)

        # What a step that is cut short, or lacks its arrays, would have looked like.
        arrays, scores = f"arrays/step-{last:08d}.safetensors", f"scores/step-{last:08d}.parquet"
        for damage, file in ((tear, arrays), (Path.unlink, arrays), (tear, scores)):
            copy = tmp_path / f"copy{i}"
            shutil.copytree(store.path, copy)
            damage(copy / file)
            assert last not in read_store(copy).steps
            shutil.rmtree(copy)


def tear(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_a_step_without_its_table_is_not_there(tmp_path):
    fill(tmp_path / "run", (0, 10))
    (tmp_path / "run/scores/step-00000010.parquet").unlink()
    store = read_store(tmp_path / "run")
    assert store.steps == (0,)
    with pytest.raises(ValueError, match=r"no complete step 10; its steps are \(0,\)"):
        store.readings(10)


def test_what_an_interruption_left_is_ignored_and_then_removed(tmp_path):
    fill(tmp_path / "run", (0, 10, 20))
    left = [
        tmp_path / "run/scores/.step-00000020.parquet.tmp",
        tmp_path / "run/arrays/.step-00000030.safetensors.tmp",
        tmp_path / "run/.manifest.json.tmp",
    ]
    for path in left:
        path.write_bytes(b"half")
    (tmp_path / "run/arrays/step-00000030.safetensors").write_bytes(b"half")
    store = read_store(tmp_path / "run")
    assert store.steps == (0, 10, 20)
    assert len(pd.read_parquet(tmp_path / "run/scores").step.unique()) == 3
    fill(tmp_path / "run", (20,))
    assert not any(path.exists() for path in left)
    assert names(tmp_path / "run/arrays") == names_of("safetensors", 0, 10, 20)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_keeps_the_earlier_steps(small_disk):
    sink = LocalSink(small_disk / "run")
    sink.write(everything(0), step=0)
    with pytest.raises(OSError) as caught:
        for step in range(1, 200):
            sink.write(everything(step), step=step)
    assert caught.value.errno == errno.ENOSPC
    store = read_store(small_disk / "run")
    assert store.steps == tuple(range(step)) and step > 1
    assert all(len(store.readings(s)) == len(everything(s)) for s in store.steps)
    assert not list(small_disk.rglob("*.tmp"))
    # With room again the same sink goes on.
    sink.write(small(1), step=1)
    assert read_store(small_disk / "run").steps == (0, 1)


@pytest.mark.parametrize("failing", ["arrays", "scores"])
@pytest.mark.parametrize("call", ["write_bytes", "replace"])
def test_a_write_that_fails_keeps_the_earlier_steps(tmp_path, monkeypatch, failing, call):
    sink = fill(tmp_path / "run", (0, 10))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names(tmp_path / "run")}
    write, replace = Path.write_bytes, os.replace

    def full(path, *rest):
        if Path(path).parent.name != failing:
            return {"write_bytes": write, "replace": replace}[call](path, *rest)
        if call == "write_bytes":
            write(path, b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path if call == "write_bytes" else os, call, full)
    with pytest.raises(OSError, match="No space"):
        sink.write(everything(20), step=20)
    monkeypatch.undo()
    assert read_store(tmp_path / "run").steps == (0, 10)
    kept = set(names(tmp_path / "run"))
    # Arrays without a table are no step; nothing else is left, and nothing has changed.
    assert kept - set(before) == (
        {"arrays/step-00000020.safetensors"} if failing == "scores" else set()
    )
    assert all((tmp_path / "run" / name).read_bytes() == data for name, data in before.items())
    sink.write(everything(20), step=20)
    assert read_store(tmp_path / "run").steps == (0, 10, 20)


@pytest.mark.parametrize("again", [5, 4])
def test_a_step_that_fails_while_it_is_written_again_is_gone(tmp_path, monkeypatch, again):
    """Else the new arrays would stand beside the scores of before."""
    sink = LocalSink(tmp_path / "run", page=False)
    for step in (0, 4, 5):
        sink.write(small(step), step=step)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sink, "_write_scores", full)
    with pytest.raises(OSError, match="No space"):
        sink.write(small(9), step=again)
    assert read_store(sink.path).steps == ((0, 4) if again == 5 else (0,))
