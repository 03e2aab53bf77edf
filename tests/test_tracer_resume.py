"""A loop that is stopped and gone on with sees what one sees that was not stopped."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.own_loop import Loop, adapted, tracer
from tests.training import CAPITAL
from tlens_callback import ActivationDrift, HeadScores, Probe, Store, TargetScores, read_store

pytestmark = pytest.mark.usefixtures("one_thread")


def checkpoint(loop: Loop, folder: Path) -> None:
    """What a loop of one's own would write."""
    folder.mkdir(parents=True)
    kept = {
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(kept, folder / "loop.pt")


def restored(folder: Path, model: torch.nn.Module, batches: int) -> Loop:
    """Goes on behind as many batches as were used."""
    loop, kept = Loop(model), torch.load(folder / "loop.pt", weights_only=True)
    model.load_state_dict(kept["model"])
    loop.optimizer.load_state_dict(kept["optimizer"])
    for _ in range(batches):
        loop._batch()
    torch.set_rng_state(kept["random"])
    return loop


def whole(out: Path, steps: int = 8, every: int = 2) -> Store:
    loop = Loop(adapted())
    torch.manual_seed(3)
    with tracer(loop.model, sinks=None, output_dir=out, every_n_steps=every) as watching:
        loop.run(steps, watching)
    return read_store(out / "tlens")


def stopped(out: Path, at: int, lost: int = 1, every: int = 2) -> Path:
    """Saves at a step and is killed so many steps later."""
    loop, folder = Loop(adapted()), out / "checkpoint"
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        with tracer(loop.model, sinks=None, output_dir=out, every_n_steps=every) as watching:
            loop.run(at, watching)
            watching.save(folder / "eyes")
            checkpoint(loop, folder / "loop")
            loop.run(lost, watching)
            raise KeyboardInterrupt
    return folder


def resumed(out: Path, folder: Path, at: int, to: int = 8, every: int = 2, **settings) -> Store:
    loop = restored(folder / "loop", adapted(), at)
    settings = {"resume_from": folder / "eyes", "every_n_steps": every, **settings}
    with tracer(loop.model, sinks=None, output_dir=out, step=at, **settings) as watching:
        loop.run(to - at, watching)
    return read_store(watching.sinks[0].path)


def differing(one: Store, other: Store, steps) -> set[str]:
    """Keys whose readings are not the same at one of the steps. Left out is what it cost, and when
    the shadow was checked."""
    found = set()
    for step in steps:
        a, b = ({r.key: r for r in store.readings(step)} for store in (one, other))
        found |= a.keys() ^ b.keys()
        for key in a.keys() & b.keys():
            x, y = a[key], b[key]
            same = (x.labels, str(x.texts)) == (y.labels, str(y.texts))
            if not same or not np.array_equal(x.values, y.values, equal_nan=True):
                found.add(key)
    return {key for key in found if not key.startswith(("cost/", "fidelity/"))}


@pytest.mark.slow
@pytest.mark.parametrize(("at", "lost"), [(3, 0), (3, 3), (4, 1), (4, 0)])
def test_the_store_is_that_of_an_uninterrupted_loop(tmp_path, at, lost):
    one = whole(tmp_path / "whole")
    out = tmp_path / "parts"
    folder = stopped(out, at, lost)
    other = resumed(out, folder, at)
    # A resumed loop observes where it begins, and checks its shadow after its first update.
    extra = {at, at + 1} - {0, 1, 2, 4, 6, 8}
    assert one.steps == (0, 1, 2, 4, 6, 8)
    assert set(other.steps) == {*one.steps, *extra} and not (out / "tlens-2").exists()
    # What is of the time since the observation before is cut in two by one that is extra.
    since = {"trainer/loss", "adapter_spectrum/rotation"} if at == 3 else set()
    assert differing(one, other, one.steps) == since
    steps, drift = one.curve("activation_drift/relative")
    assert (drift[0] == 0).all() and (drift[list(steps).index(at + at % 2)] > 0).all()
    logged = [
        (label, value)
        for step in other.steps
        for reading in other.readings(step)
        if reading.key == "trainer/loss"
        for label, value in zip(reading.labels["update"], reading.values.tolist(), strict=True)
    ]
    assert [int(label) for label, _ in logged] == list(range(1, 9)), "each loss once"
    losses = np.concatenate([r.values for s in one.steps for r in one.readings(s)
                             if r.key == "trainer/loss"])  # fmt: skip
    assert [value for _, value in logged] == losses.tolist()
    assert len(set(losses.tolist())) == 8 and (out / "tlens" / "page.html").exists()


@pytest.mark.slow
def test_stopped_twice(tmp_path):
    one, out = whole(tmp_path / "whole"), tmp_path / "parts"
    folder = stopped(out, 2)
    loop = restored(folder / "loop", adapted(), 2)
    with pytest.raises(ZeroDivisionError):
        with tracer(loop.model, sinks=None, output_dir=out, every_n_steps=2, step=2,
                    resume_from=folder / "eyes") as watching:  # fmt: skip
            loop.run(4, watching)
            watching.save(out / "second" / "eyes")
            checkpoint(loop, out / "second" / "loop")
            raise ZeroDivisionError
    other = resumed(out, out / "second", 6)
    assert differing(one, other, [0, 2, 4, 6, 8]) == set()


@pytest.mark.slow
def test_without_resume_from_changes_are_measured_anew(tmp_path):
    """The control: the same loop, which does not say where its memory is."""
    one = whole(tmp_path / "whole")
    folder = stopped(tmp_path / "parts", 4)
    other = resumed(tmp_path / "parts", folder, 4, resume_from=None)
    assert other.path.name == "tlens-2" and other.steps[0] == 4, "the first is left as it was"
    assert read_store(tmp_path / "parts" / "tlens").steps[-1] == 4
    first = other.reading("activation_drift/relative", 4).values
    assert (first == 0).all() and (one.reading("activation_drift/relative", 4).values > 0).all()
    assert {"activation_drift/relative", "token_loss/change/capital"} <= differing(one, other, [8])
    assert "target_scores/loss/capital" not in differing(one, other, [8])


def anew(folder: Path, caplog, **settings) -> str:
    """Resumes at step 4 in vain; what is said."""
    settings = {"step": 4, "resume_from": folder / "eyes", **settings}
    loop, instruments = restored(folder / "loop", adapted(), 4), [ActivationDrift(), HeadScores()]
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        with tracer(loop.model, instruments=instruments, **settings) as watching:
            loop.run(1, watching)
    readings = watching.sinks[0].readings["activation_drift/relative"]
    assert (readings[settings["step"]].values == 0).all()
    return caplog.text


def test_the_memory_of_another_step_or_other_probes_is_not_taken(tmp_path, caplog):
    folder = stopped(tmp_path, 4)
    assert "is from another training run, so" in anew(folder, caplog, step=5)
    caplog.clear()
    rome = Probe("capital", "the capital of Italy is", target=" Rome")
    assert "is from other probes, so" in anew(folder, caplog, probes=[rome])
    caplog.clear()
    log = folder / "eyes" / "tlens.log.json"
    log.write_text(json.dumps([{"loss": 1.0, "step": 4}]))
    assert "is from another training run, so" in anew(folder, caplog)


@pytest.mark.parametrize("missing", ["tlens.memory", "tlens.log.json"])
def test_a_folder_without_the_files_is_refused(tmp_path, missing):
    folder = stopped(tmp_path, 4) / "eyes"
    names = {"tlens.constants", "tlens.log.json", "tlens.memory"}
    assert {path.name for path in folder.iterdir()} == names
    (folder / missing).unlink()
    watching = tracer(adapted(), step=4, resume_from=folder)
    with pytest.raises(ValueError, match=f"{folder} has no {missing}"), watching:
        raise AssertionError("the block was entered")
    with pytest.raises(ValueError, match="inside the block"):
        watching.step()


def test_a_torn_log_is_refused(tmp_path):
    folder = stopped(tmp_path, 4) / "eyes"
    (folder / "tlens.log.json").write_text('[{"loss":')
    with pytest.raises(ValueError, match=r"tlens\.log\.json is incomplete or damaged"):
        tracer(adapted(), step=4, resume_from=folder).__enter__()


def test_instruments_that_remember_nothing_resume_too(tmp_path):
    settings = dict(instruments=[HeadScores()], watch=False)
    with tracer(tiny.model("llama"), **settings) as watching:
        watching.step(loss=math.nan)
        watching.save(tmp_path)
    with tracer(tiny.model("llama"), step=1, resume_from=tmp_path, **settings) as watching:
        watching.step()
    assert list(watching.sinks[0].steps) == [1, 2]
    assert list(watching.sinks[0].readings["trainer/loss"]) == [1], "observed anew, with its loss"


def test_two_tracers_keep_files_of_their_own(tmp_path):
    rome = Probe("rome", "the capital of Italy is", target=" Rome")
    model = tiny.model("llama")
    with tracer(model) as one, tracer(model, probes=[CAPITAL, rome], name="rome") as two:
        for watching in (one, two):
            watching.step(loss=1.0)
            watching.save(tmp_path)
    assert {path.stem.partition(".")[0] for path in tmp_path.iterdir()} == {"tlens", "rome"}


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_folder_that_cannot_be_written(tmp_path, on_error, caplog):
    (tmp_path / "file").write_text("")
    watching = tracer(adapted(), instruments=[TargetScores()], on_error=on_error)
    with watching, caplog.at_level(logging.WARNING, "tlens_callback"):
        if on_error == "raise":
            with pytest.raises(OSError):
                watching.save(tmp_path / "file")
        else:
            watching.save(tmp_path / "file")
            assert "could not be written" in caplog.text
