"""What never changes is written once for a run, and a resumed run has the same numbers."""

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.training import CAPITAL, trainer
from tlens_callback import MemorySink, Reading, TLensCallback
from tlens_callback.run import baselines, constants
from tlens_callback.run.constants import LARGE, Constants

N = LARGE // 4
"""So many float32 are large."""


def tensors(seed=0) -> dict[str, torch.Tensor]:
    """Large ones of several kinds, and a small one."""
    drawn = torch.Generator().manual_seed(seed)
    return {
        "drift/first": torch.randn(N, generator=drawn, dtype=torch.float32),
        "drift/half": torch.randn(2 * N, generator=drawn, dtype=torch.float32).bfloat16(),
        "places/at": torch.randint(9, (N, 2), generator=drawn, dtype=torch.int64).T,
        "drift/small": torch.randn(N - 1, generator=drawn, dtype=torch.float32),
    }


class Run:
    """Checkpoints of a run, each with its file of constants."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.constants = folder, Constants()

    def file(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}" / "tlens.constants"

    def save(self, step: int, held: dict[str, torch.Tensor]) -> dict[str, str]:
        self.file(step).parent.mkdir(exist_ok=True)
        digests = self.constants.write(self.file(step), held)
        assert not list(self.folder.rglob("*.tmp"))
        if digests:
            self.holds(step, held, digests)
        return digests

    def holds(self, step: int, held: dict[str, torch.Tensor], digests: dict[str, str]) -> None:
        found, why = constants.read(self.file(step), digests)
        assert why == "" and found.keys() == digests.keys()
        for key, tensor in found.items():
            assert tensor.dtype == held[key].dtype and torch.equal(tensor, held[key])

    def file_of(self, step: int) -> int:
        return self.file(step).stat().st_ino


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def test_checkpoints_share_one_copy(run):
    held = tensors()
    run.constants.begin(held)
    for step in (1, 2, 3):
        assert run.save(step, held).keys() == {"drift/first", "drift/half", "places/at"}
    assert len({run.file_of(step) for step in (1, 2, 3)}) == 1
    assert run.file(3).stat().st_nlink == 3
    # The oldest are deleted one after another.
    shutil.rmtree(run.file(1).parent)
    shutil.rmtree(run.file(2).parent)
    digests = run.save(4, held)
    assert run.file_of(4) == run.file_of(3)
    run.holds(3, held, digests)


def test_what_is_equal_is_the_same_though_it_is_a_copy(run):
    run.save(1, tensors())
    run.save(2, tensors())
    assert run.file_of(1) == run.file_of(2)


def test_what_changes_is_not_among_it(run):
    """One is replaced at each observation, the other written to in place."""
    held = tensors() | {"last/b": torch.zeros(N, dtype=torch.float32)}
    run.constants.begin(held)
    held["last/b"] = torch.ones(N, dtype=torch.float32)
    assert "last/b" not in run.save(1, held)
    first = held["drift/first"].clone()
    held["drift/first"] += 1
    digests = run.save(2, held)
    assert digests.keys() == {"drift/half", "places/at"} and run.file_of(2) != run.file_of(1)
    held["drift/first"] += 1
    assert run.save(3, held) == digests and run.file_of(3) == run.file_of(2)
    # It stays so, though it is now as it was before.
    assert run.save(4, held) == digests and run.file_of(4) == run.file_of(2)
    early, why = constants.read(run.file(1), {"drift/first": constants._digest(first)})
    assert torch.equal(early["drift/first"], first) and why == "", "what was linked is left alone"


def test_what_is_new_later_is_added(run):
    held = tensors()
    run.save(1, held)
    held["late/first"] = torch.ones(N, dtype=torch.float32)
    assert "late/first" in run.save(2, held)
    run.save(3, held)
    assert run.file_of(3) == run.file_of(2) != run.file_of(1)


def test_where_nothing_is_large_there_is_no_file(run):
    small = {
        "a/b": torch.ones(N - 1, dtype=torch.float32),
        "a/none": torch.zeros(0, dtype=torch.int64),
    }
    assert run.save(1, small) == {} and not run.file(1).exists()
    run.save(2, tensors())
    assert run.file(2).exists()
    assert run.save(2, small) == {} and not run.file(2).exists()


def test_the_same_folder_again_and_again(run):
    """As a loop that saves its latest state in one place."""
    held = tensors()
    for _ in range(3):
        run.save(1, held)
    assert run.file(1).stat().st_nlink == 1
    assert [path.name for path in run.file(1).parent.iterdir()] == ["tlens.constants"]


@pytest.mark.parametrize("lost", ["deleted", "torn", "overwritten"])
def test_a_file_that_is_not_as_it_was_is_not_linked_again(run, lost):
    """The trainer deletes the last checkpoint before the next one is noted, or a disk fails."""
    held = tensors()
    run.save(1, held)
    if lost == "deleted":
        shutil.rmtree(run.file(1).parent)
    elif lost == "torn":
        run.file(1).write_bytes(run.file(1).read_bytes()[:1000])
    else:
        run.file(1).write_bytes(bytes(run.file(1).stat().st_size))
        os.utime(run.file(1), ns=(0, 0))
    run.save(2, held)  # and holds what it should
    assert run.file(2).stat().st_nlink == 1


def test_where_there_are_no_links_each_checkpoint_has_a_copy(run, monkeypatch):
    def none(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("tlens_callback.run.constants.os.link", none)
    for step in (1, 2):
        run.save(step, tensors())
    assert run.file_of(1) != run.file_of(2)


def test_a_resumed_run_shares_the_file_that_it_was_resumed_from(run):
    held = tensors() | {"last/b": torch.zeros(N, dtype=torch.float32)}
    run.constants.begin(held)
    held["last/b"] = torch.ones(N, dtype=torch.float32)
    digests = run.save(1, held)
    again = Run(run.folder)
    own = {"last/b": held["last/b"], "drift/small": held["drift/small"]}
    again.constants.resume(run.file(1), digests, own)
    again.constants.begin(held)
    assert again.save(2, held) == digests and again.file_of(2) == run.file_of(1)


def spoiled(path: Path, held: dict[str, torch.Tensor], how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "torn":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit":
        at = content.index(held["drift/first"].numpy().tobytes())
        content[at + 5] ^= 1
        path.write_bytes(content)
    elif how == "of another run":
        Constants().write(path, tensors(seed=1))
    else:
        Constants().write(path, {**held, "drift/first": held["drift/first"].view(torch.int32)})


SPOILED = {
    "missing": "cannot be read",
    "torn": "cannot be read",
    "empty": "cannot be read",
    "a bit": "has other content than this checkpoint was saved with",
    "of another run": "has other content than this checkpoint was saved with",
    "another precision": "has other content than this checkpoint was saved with",
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_spoiled_is_left_out_and_said(tmp_path, how, caplog):
    """The whole instrument: half of what it compares with would give wrong numbers."""
    held = tensors()
    path, about = tmp_path / "tlens.memory", {"run": "a"}
    parted = {name: {} for name in ("drift", "places")}
    for key, tensor in held.items():
        name, _, own = key.partition("/")
        parted[name][own] = tensor
    baselines.write(path, parted, about, Constants())
    cpu = torch.device("cpu")

    def restored(of=("drift", "places")):
        into = {name: {} for name in of}
        with caplog.at_level(logging.WARNING, "tlens_callback"):
            assert baselines.restore(path, into, about, cpu, Constants()) == {"drift", "places"}
        return into

    whole = restored()
    assert caplog.text == "" and whole.keys() == parted.keys()
    for name, kept in parted.items():
        assert whole[name].keys() == kept.keys()
        assert all(torch.equal(whole[name][key], tensor) for key, tensor in kept.items())
    spoiled(tmp_path / "tlens.constants", held, how)
    found = restored()
    kept = how in ("a bit", "another precision")
    assert found["drift"] == {} and found["places"].keys() == ({"at"} if kept else set())
    (said,) = caplog.messages
    assert f"tlens.constants {SPOILED[how]}" in said
    which = "drift" if kept else "drift, places"
    assert said.endswith(f"so the changes of {which} are measured from this step on.")
    caplog.clear()
    restored(of=["other"])
    assert caplog.text == "", "nobody misses it"


def test_what_is_referred_to_is_written_before_what_refers_to_it(tmp_path, monkeypatch):
    """Where the first cannot be written, as on a full disk, there is neither."""
    held = {"drift": {"first": torch.ones(N, dtype=torch.float32)}}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, left in (("constants", []), ("baselines", ["tlens.constants"])):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(f"tlens_callback.run.{module}.write_whole", full)
            baselines.write(tmp_path / "tlens.memory", held, {}, Constants())
        assert [path.name for path in tmp_path.iterdir()] == left


def test_a_file_without_a_second_one_is_read_as_ever(tmp_path):
    """As older versions wrote it, and as a replay does."""
    held = {"drift": {"first": torch.ones(2 * N, dtype=torch.float32)}}
    baselines.write(tmp_path / "tlens.memory", held, {})
    assert [path.name for path in tmp_path.iterdir()] == ["tlens.memory"]
    into: dict = {"drift": {}}
    shared = Constants()
    baselines.restore(tmp_path / "tlens.memory", into, {}, torch.device("cpu"), shared)
    assert torch.equal(into["drift"]["first"], held["drift"]["first"])


# --- in a training ---


class Distance:
    """How far the last token's residual stream has moved since the first observation and since the
    last one; what it keeps is large."""

    name = "distance"

    def __init__(self):
        self.baseline = {}

    def taps(self, shadow, batch):
        def last(hidden):
            now = hidden[0, batch.last[0]].repeat(N)
            first = self.baseline.setdefault("first", now.clone())
            before = self.baseline.get("before", now)
            self.baseline["before"] = now.clone()
            return torch.stack([(now - first).norm(), (now - before).norm()])

        return {"blocks.1.hook_resid_post": last}

    def read(self, taken, shadow, batch):
        values = next(iter(taken.values()))
        yield Reading(key="distance/norm", values=values, axes=("which",), unit="1")


def watched(folder, resume=None, name="tlens", **args) -> dict[int, list[float]]:
    sink = MemorySink()
    callback = TLensCallback(
        [CAPITAL], instruments=[Distance()], sinks=[sink], every_n_steps=1, on_error="raise",
        name=name,
    )  # fmt: skip
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **args}
    trainer(folder, callback, **settings).train(resume_from_checkpoint=resume)
    readings = sink.readings["distance/norm"]
    return {step: reading.values.tolist() for step, reading in readings.items()}


def later(whole, step):
    """What a run that is resumed at this step reads, which observes it again and has no other
    before it."""
    return {at: values for at, values in whole.items() if at > step}


def without_start(resumed):
    return {at: values for at, values in resumed.items() if at != min(resumed)}


def test_a_resumed_run_reads_the_same_bits(tmp_path):
    whole = watched(tmp_path)
    files = [tmp_path / f"checkpoint-{step}" / "tlens.constants" for step in (2, 4, 6)]
    assert len({file.stat().st_ino for file in files}) == 1
    own = files[0].with_suffix(".memory").stat().st_size
    assert files[0].stat().st_size > 32 * LARGE and own > 32 * LARGE, "first, and before"
    again = watched(tmp_path, str(tmp_path / "checkpoint-2"))
    assert again[2][0] == whole[2][0] > 0
    assert without_start(again) == later(whole, 2)
    assert files[2].stat().st_ino == files[0].stat().st_ino


def test_a_checkpoint_that_is_copied_or_renamed_is_whole(tmp_path):
    whole = watched(tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "alone" / "checkpoint-2")
    shutil.rmtree(tmp_path / "a")
    alone = str(tmp_path / "alone" / "checkpoint-2")
    again = watched(tmp_path / "b", alone, resume_from_checkpoint=alone)
    assert without_start(again) == later(whole, 2) and again[2][0] > 0


def test_of_one_checkpoint_that_is_kept(tmp_path):
    """The one before is gone when the next is noted."""
    whole = watched(tmp_path, save_total_limit=1, max_steps=5)
    again = watched(tmp_path, str(tmp_path / "checkpoint-5"), save_total_limit=1)
    assert again[5][0] == whole[5][0] > 0


def test_without_the_file_it_says_so_and_begins_anew(tmp_path, caplog):
    """The control: the same checkpoint, whose constants are another's."""
    watched(tmp_path)
    path = tmp_path / "checkpoint-2" / "tlens.constants"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        again = watched(tmp_path, str(tmp_path / "checkpoint-2"))
    assert again[2] == [0, 0] and again[6][0] > 0
    (said,) = [text for text in caplog.messages if "measured from this step on" in text]
    assert "tlens.constants has other content" in said and "distance" in said


def test_callbacks_of_other_names_have_files_of_their_own(tmp_path):
    callbacks = [
        TLensCallback([CAPITAL], instruments=[Distance()], sinks=[], name=name, every_n_steps=1)
        for name in ("one", "two")
    ]
    run = trainer(tmp_path, callbacks[0], save_strategy="steps", save_steps=3)
    run.add_callback(callbacks[1])
    run.train()
    for step in (3, 6):
        found = {path.name for path in (tmp_path / f"checkpoint-{step}").glob("*.constants")}
        assert found == {"one.constants", "two.constants"}
    inodes = {path.stat().st_ino for path in tmp_path.rglob("*.constants")}
    assert len(inodes) == 2
