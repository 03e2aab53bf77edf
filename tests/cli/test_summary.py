"""`tlens-callback summary` as a person uses it."""

import os

import numpy as np
import pytest
from click.testing import CliRunner

from tests.processes import run_command
from tlens_callback import LocalSink, Reading, read_store
from tlens_callback.cli import main
from tlens_callback.offline.summary import summary
from tlens_callback.store.format import arrays_file


def run(*arguments):
    return CliRunner().invoke(main, ["summary", *map(str, arguments)])


@pytest.fixture
def store(tmp_path):
    sink = LocalSink(tmp_path / "run" / "tlens", page=False)
    for step in (0, 5, 9):
        sink.write([Reading(key="mine/it", values=np.array(1.0 + step), unit="x")], step=step)
    sink.close()
    return sink.path


@pytest.mark.slow
def test_the_real_entry_point(store):
    done = run_command("summary", store, env={**os.environ, "COLUMNS": "40"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == summary(read_store(store)) + "\n"
    assert "mine/it 1 -> 10" in done.stdout


def test_the_directory_of_the_run_will_do(store):
    assert run(store.parent).output == run(store).output


def test_a_later_run_is_meant_and_the_earlier_said(store):
    sink = LocalSink(store, page=False)
    sink.write([Reading(key="mine/it", values=np.array(7.0), unit="x")], step=0)
    sink.close()
    result = run(store.parent)
    assert result.exit_code == 0 and "mine/it 7" in result.stdout
    assert "tlens-2. Other stores beside it: tlens." in result.stderr


def test_a_torn_step_is_left_out_and_said(store):
    file = arrays_file(store, 9)
    file.write_bytes(file.read_bytes()[:-3])
    result = run(store)
    assert result.exit_code == 3
    assert "mine/it 1 -> 6" in result.stdout
    assert "incomplete: steps 9." in result.stderr


def test_what_is_no_store(tmp_path, store):
    missing = run_command("summary", tmp_path / "nothing")
    assert missing.returncode == 2 and missing.stdout == ""
    assert missing.stderr.startswith("Error: There is no directory")
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty").exit_code == 2
    for file in store.glob("*/step-*"):
        file.unlink()
    result = run(store)
    assert result.exit_code == 2 and "has no complete step" in result.stderr
    assert run().exit_code == 2


def test_help_shows_an_example():
    assert "tlens-callback summary out/tlens" in run("--help").output
