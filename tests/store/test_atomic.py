"""Several writers of one file, and several runs of one directory: none loses what is another's."""

import subprocess
import sys
import threading

import pytest

from tests.processes import python
from tests.sinks.samples import small
from tlens_callback.sinks import LocalSink
from tlens_callback.store import read_store
from tlens_callback.store.atomic import (
    may_run,
    remove_leftovers,
    this_process,
    write_new,
    write_whole,
)

WRITES = """
import sys
from pathlib import Path
from tlens_callback.store.atomic import write_whole
print("ready", flush=True); sys.stdin.readline()
for _ in range(300):
    write_whole(Path(sys.argv[1]), sys.argv[2].encode() * 100_000)
"""
RUNS = """
import sys
from tests.sinks.samples import small
from tlens_callback.sinks.local import LocalSink
sink = LocalSink(sys.argv[1], page=False)
print("ready", flush=True); sys.stdin.readline()
for step in range(20):
    sink.write(small(step, probe=sys.argv[2]), step=step)
print(sink.path.name)
"""


def processes(code, number, path):
    children = [
        subprocess.Popen(
            [*python(), "-c", code, str(path), "abcdef"[i]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(number)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    return children


@pytest.mark.slow
def test_six_processes_write_one_file_and_no_reader_sees_less_than_a_whole_one(tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(b"z" * 100_000)
    children = processes(WRITES, 6, path)
    seen = set()
    while any(child.poll() is None for child in children):
        content = path.read_bytes()
        seen.add((len(content), len(set(content))))
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0] * 6, "a write was lost"
    assert seen == {(100_000, 1)}
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.slow
def test_two_runs_that_begin_at_once_in_one_directory_have_a_store_each(tmp_path):
    children = processes(RUNS, 2, tmp_path / "tlens")
    names = [child.communicate()[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert set(names) == {"tlens", "tlens-2"}
    for name, probe in zip(names, "ab", strict=True):
        store = read_store(tmp_path / name)
        assert store.steps == tuple(range(20))
        assert f"target_scores/loss/{probe}" in store.keys
        assert not {one for one in store.keys if one.startswith("target_scores/loss/")} - {
            f"target_scores/loss/{probe}"
        }


def test_a_store_that_another_process_has_begun_is_not_taken(tmp_path):
    """The other one has written its manifest, and its first step will come."""
    first = LocalSink(tmp_path / "tlens", page=False)
    first.write(small(0), step=0)
    for folder in ("arrays", "scores"):
        for file in (first.path / folder).iterdir():
            file.unlink()
    told = (first.path / "manifest.json").read_text()
    manifest = first.path / "manifest.json"

    manifest.write_text(told.replace(this_process(), f"{this_process().partition('-')[0]}-1"))
    second = LocalSink(tmp_path / "tlens", page=False)
    second.write(small(0), step=0)
    assert second.path.name == "tlens-2"

    # The control: of a process that was killed before its first step, the directory is used.
    manifest.write_text(told.replace(this_process(), gone()))
    (tmp_path / "tlens-2").rename(tmp_path / "other")
    third = LocalSink(tmp_path / "tlens", page=False)
    third.write(small(0), step=0)
    assert third.path.name == "tlens"


def gone() -> str:
    """A process of this machine that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return f"{this_process().partition('-')[0]}-{child.pid}"


def test_leftovers_of_ended_processes_are_removed_and_those_of_others_stay(tmp_path):
    names = {
        f".step-00000001.parquet.{gone()}-0123abcd.tmp": False,
        ".step-00000002.parquet.tmp": False,  # of an older version
        f".step-00000003.parquet.{this_process()}-0123abcd.tmp": True,
        f".step-00000004.parquet.{this_process().partition('-')[0]}-1-0123abcd.tmp": True,
        ".step-00000005.parquet.00000000-1234-0123abcd.tmp": True,  # of another machine
        "step-00000006.tmp": True,
    }
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    remove_leftovers([tmp_path, tmp_path / "not there"])
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert may_run(this_process()) and not may_run(gone())


def test_a_new_file_is_written_once(tmp_path):
    path, results = tmp_path / "manifest.json", []
    go = threading.Barrier(8)

    def write(i):
        go.wait()
        results.append((write_new(path, str(i).encode()), i))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [i for done, i in results if done]
    assert len(won) == 1 and path.read_bytes() == str(won[0]).encode()
    assert [one.name for one in tmp_path.iterdir()] == ["manifest.json"]


def test_a_long_name_can_be_written_and_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / ("é" * 127)
    write_whole(path, b"one")
    with pytest.raises(TypeError):
        write_whole(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1
