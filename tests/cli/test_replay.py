"""`tlens-callback replay`, as a program."""

import os
import shutil
import subprocess

import pytest
from click.testing import CliRunner
from peft import LoraConfig

from tests.offline.replaying import train, unlike
from tests.processes import python, run_command
from tlens_callback import TargetScores, read_store
from tlens_callback.cli import main
from tlens_callback.store.format import steps_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three checkpoints of an adapter."""
    folder = tmp_path_factory.mktemp("replay")
    adapter = LoraConfig(r=4, target_modules="all-linear")
    train(folder, [TargetScores()], adapter=adapter)
    return folder


def environment():
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, to be changed."""
    shutil.copytree(run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("tlens*"))
    return tmp_path / "run"


def called(folder, *more):
    asked = ["replay", str(folder), "-i", "TargetScores", "-i", "TokenLoss", "--device", "cpu"]
    asked += ["--prompt", "the capital of France is", "--target", " Paris", "--no-repeats", *more]
    return CliRunner().invoke(main, asked)


@pytest.mark.slow
def test_a_program_that_is_interrupted(copied):
    """By a Ctrl-C that comes while the third model is loaded; then to the end, and once more."""
    script = """
import os, signal, sys
from tlens_callback.checkpoints.loader import Loader
from tlens_callback.cli import main
# What a shell starts in the background inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
load, left = Loader.load, [3]

def interrupted(*args):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGINT)
    return load(*args)

Loader.load = interrupted
main()
"""
    asked = ["replay", str(copied), "--device", "cpu", "-i", "TokenLoss", "--prompt", "the capital"]
    command = [*python(), "-c", script, *asked]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 130, ended.stderr
    assert "tlens: interrupted; the same call continues in" in ended.stdout
    assert ended.stderr.splitlines()[-1] == "Interrupted."
    assert "replay" not in ended.stderr, "no bar where there is no terminal"
    store = copied / "tlens-replay"
    assert steps_in(store / "scores") == [0, 2]
    assert "continuing at checkpoint-4" in CliRunner().invoke(main, asked).output
    assert steps_in(store / "scores") == [0, 2, 4, 6]
    assert "all checkpoints have been observed already" in CliRunner().invoke(main, asked).output


def test_checkpoints_of_a_run_that_goes_on_are_added(copied, tmp_path):
    (copied / "checkpoint-6").rename(tmp_path / "later")
    assert called(copied, "-i", "HeadAblation(every=2)").exit_code == 0
    store = read_store(copied / "tlens-replay")
    assert store.steps == (0, 2, 4)
    (tmp_path / "later").rename(copied / "checkpoint-6")
    ended = called(copied, "-i", "HeadAblation(every=2)")
    assert ended.exit_code == 0 and "continuing at checkpoint-4" in ended.output
    out = tmp_path / "whole"
    assert called(copied, "-i", "HeadAblation(every=2)", "--out", str(out)).exit_code == 0
    assert unlike(read_store(out), store) == []
    assert "trainer/loss" in store.keys


def test_one_that_was_seen_while_it_was_saved_is_observed_anew(copied, tmp_path):
    """Its weights were there, and what the trainer had logged was not."""
    state = copied / "checkpoint-6" / "trainer_state.json"
    state.rename(tmp_path / "later")
    assert called(copied).exit_code == 0
    (tmp_path / "later").rename(state)
    assert "continuing at checkpoint-6" in called(copied).output
    assert called(copied, "--out", str(tmp_path / "whole")).exit_code == 0
    assert unlike(read_store(tmp_path / "whole"), read_store(copied / "tlens-replay")) == []
    assert "all checkpoints have been observed already" in called(copied).output


def test_the_last_one_may_be_gone_when_later_ones_come(copied, tmp_path):
    (copied / "checkpoint-6").rename(tmp_path / "later")
    assert called(copied).exit_code == 0
    shutil.rmtree(copied / "checkpoint-4")
    (tmp_path / "later").rename(copied / "checkpoint-6")
    assert called(copied).exit_code == 0
    store = read_store(copied / "tlens-replay")
    assert store.steps == (0, 2, 4, 6)
    assert store.reading("trainer/loss", 6).labels["update"] == ("5", "6")


@pytest.mark.parametrize("change", ["asked", "retrained", "no memory"])
@pytest.mark.slow
def test_what_is_not_the_same_replay_makes_another_store(copied, change):
    assert called(copied).exit_code == 0
    more, why = [], ""
    if change == "asked":
        more, why = ["-i", "ResidualNorms"], "another call made it, which differs in: instruments"
    elif change == "retrained":
        os.utime(copied / "checkpoint-4" / "adapter_model.safetensors", (1, 1))
        why = "checkpoint-4 has changed since"
    else:
        (copied / "tlens-replay" / "replay-00000006.memory").unlink()
        why = "replay-00000006.memory is missing from it"
    ended = called(copied, *more)
    assert (
        ended.exit_code == 0
        and "a new store tlens-replay-2, because tlens-replay cannot" in ended.output
    )
    assert why in ended.output
    for name in ("tlens-replay", "tlens-replay-2"):
        assert read_store(copied / name).steps == (0, 2, 4, 6)
    assert "all checkpoints have been observed already" in called(copied, *more).output


def test_a_run_that_was_moved_is_the_same(copied, tmp_path):
    out = ["--out", str(tmp_path / "store")]
    assert called(copied, *out).exit_code == 0
    moved = copied.rename(tmp_path / "moved")
    assert "all checkpoints have been observed already" in called(moved, *out).output
    for one in moved.glob("checkpoint-*"):  # the control: another run over the same base
        one.rename(one.with_name(f"{one.name}0"))
    assert (
        "cannot be continued: another call made it, which differs in: run"
        in called(moved, *out).output
    )


def test_a_store_of_something_else_is_left_as_it_is(copied):
    shutil.copytree(copied.parent / "run", copied / "x", ignore=shutil.ignore_patterns("x"))
    assert called(copied, "--out", str(copied / "live")).exit_code == 0
    (copied / "live" / "replay.json").unlink()
    before = sorted((f.name, f.stat().st_mtime_ns) for f in (copied / "live").rglob("*"))
    assert called(copied, "--out", str(copied / "live")).exit_code == 0
    assert sorted((f.name, f.stat().st_mtime_ns) for f in (copied / "live").rglob("*")) == before
    assert read_store(copied / "live-2").steps == (0, 2, 4, 6)


@pytest.mark.slow
def test_what_cannot_be_loaded_is_left_out(copied):
    """3: half a checkpoint, as one that was killed while it was saved, or one that says nothing."""
    weights = copied / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    arguments = ["replay", str(copied), "-i", "HeadScores"]
    ended = run_command(*arguments)
    assert ended.returncode == 3
    assert "checkpoint-4 is left out" in ended.stderr and "is incomplete" in ended.stderr
    store = read_store(copied / "tlens-replay")
    assert store.steps == (0, 2, 6)
    assert store.reading("trainer/loss", 6).labels["update"] == ("3", "4", "5", "6")
    assert CliRunner().invoke(main, arguments).exit_code == 3, "nothing to do, but as before"


def test_what_turns_out_broken_when_its_turn_comes_is_left_out(copied, monkeypatch):
    from tlens_callback.checkpoints.loader import Loader

    load = Loader.load

    def torn(self, checkpoint):
        if checkpoint.path.endswith("checkpoint-4"):
            raise ValueError("torn")
        return load(self, checkpoint)

    monkeypatch.setattr(Loader, "load", torn)
    ended = called(copied)
    assert ended.exit_code == 3 and read_store(copied / "tlens-replay").steps == (0, 2, 6)
    monkeypatch.undo()
    assert called(copied).exit_code == 3, "its turn has passed"
    monkeypatch.setattr(Loader, "load", lambda self, checkpoint: torn(self, checkpoints[4]))
    checkpoints = {4: type("Checkpoint", (), {"path": "checkpoint-4"})}
    ended = called(copied, "--out", str(copied / "none"))
    assert ended.exit_code == 2 and ended.stderr.splitlines()[-1].endswith("torn")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["nowhere"], "'nowhere' does not exist"),
        (["."], "has no checkpoint-<step> in it"),
        (["RUN", "--base", "nowhere"], "nowhere"),
        (["RUN", "--out", "RUN/checkpoint-2/config.json"], "is a file"),
        (["RUN", "-i", "Nonsense"], "no instrument 'Nonsense'"),
    ],
)
def test_what_cannot_be_done_as_asked(copied, asked, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (copied / "checkpoint-2" / "config.json").write_text("{}")
    words = [word.replace("RUN", str(copied)) for word in asked]
    ended = CliRunner().invoke(main, ["replay", *words])
    assert ended.exit_code == 2 and said in ended.output
    assert len(ended.output.strip().splitlines()) < 6


def test_help_ends_with_an_example():
    ended = CliRunner().invoke(main, ["replay", "--help"])
    assert ended.exit_code == 0 and "tlens-callback replay out --prompt" in ended.output


def test_what_is_remembered_is_what_makes_them_equal(copied, monkeypatch):
    """The control: a replay that goes on and has forgotten is found out."""
    from tlens_callback.run import baselines

    (copied / "checkpoint-6").rename(copied.parent / "later")
    assert called(copied).exit_code == 0
    (copied.parent / "later").rename(copied / "checkpoint-6")
    monkeypatch.setattr(baselines, "restore", lambda *args: frozenset())
    assert called(copied).exit_code == 0
    monkeypatch.undo()
    assert called(copied, "--out", str(copied / "whole")).exit_code == 0
    found = unlike(read_store(copied / "whole"), read_store(copied / "tlens-replay"))
    assert any("token_loss/change" in each for each in found)
    assert any("trainer/loss" in each for each in found)
