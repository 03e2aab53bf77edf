"""Where a callback writes that is not told: what `report_to` names, beside the trainer's own."""

import os
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from tests.sinks.trackio_run import DIR, rows  # before whatever imports trackio
from tests.training import CAPITAL, Constant, trainer
from tlens_callback import TLensCallback, read_store
from tlens_callback.sinks.default import tensorboard_folder

trackio = pytest.importorskip("trackio")


def trained(folder, name="tlens", **args):
    callback = TLensCallback(
        [CAPITAL], instruments=[Constant()], every_n_steps=3, on_error="raise", name=name
    )
    run = trainer(folder, callback, logging_steps=1, **args)
    run.train()
    return run, [type(sink).__name__ for sink in callback.sinks]


def runs(folder) -> dict[str, list[str]]:
    """What `tensorboard --logdir folder` lists: run -> its tags."""
    found = EventMultiplexer().AddRunsFromDirectory(str(folder))
    found.Reload()
    tags = {name: found.GetAccumulator(name).Tags() for name in found.Runs()}
    return {name: [*kinds["scalars"], *kinds["tensors"]] for name, kinds in tags.items()}


def test_a_local_store_and_nothing_else(tmp_path):
    _, sinks = trained(tmp_path)
    assert sinks == ["LocalSink"]
    assert (tmp_path / "tlens" / "page.html").exists() and not (tmp_path / "runs").exists()


def test_tensorboard_lists_it_beside_the_trainers_run(tmp_path):
    _, sinks = trained(tmp_path, report_to=["tensorboard"])
    assert sinks == ["LocalSink", "TensorBoardSink"]
    found = runs(tmp_path)
    theirs, ours = sorted(found)
    assert ours == f"{theirs}/tlens" and theirs.startswith("runs/")
    assert "train/loss" in found[theirs] and "tlens/constant/mean" in found[ours]
    assert not [tag for tag in found[theirs] if tag.startswith("tlens/")]


def test_each_training_has_its_own(tmp_path, monkeypatch):
    """Two in one process; the trainer names its folders by the second."""
    names = iter(["runs/first", "runs/second"])
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.default_logdir", lambda: next(names)
    )
    for _ in range(2):
        trained(tmp_path, report_to=["tensorboard"])
    both = {"runs/first", "runs/first/tlens", "runs/second", "runs/second/tlens"}
    assert set(runs(tmp_path)) == both


def test_the_folder_that_the_environment_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trained(tmp_path / "out", report_to=["tensorboard"], name="mine")
    assert set(runs(tmp_path / "events")) == {".", "mine"}


def test_files_of_other_processes_and_of_sinks_are_not_the_trainers(tmp_path):
    run = trainer(tmp_path, None)
    own = f"events.out.tfevents.1.{os.uname().nodename}.{os.getpid()}.0"
    assert tensorboard_folder(run.args, "tlens") == tmp_path / "runs" / "tlens"
    for place, name in (
        ("old", own),
        ("new", own),
        ("new/other", own),
        ("foreign", own.replace(f".{os.getpid()}.", ".999999999.")),
    ):
        file = tmp_path / "runs" / place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        age = ["old", "new", "new/other", "foreign"].index(place)
        os.utime(file, (1000 + age, 1000 + age))
    assert tensorboard_folder(run.args, "tlens") == tmp_path / "runs" / "new" / "tlens"


def test_trackio_has_the_last_observation_and_the_page(tmp_path, monkeypatch):
    """Its run is finished by transformers before the callback's own end of training."""
    assert Path(trackio.utils.TRACKIO_DIR) == DIR
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"):
        monkeypatch.delenv(variable, raising=False)
    for name, args in (
        ("logs_last", dict()),
        ("logs_epochs", dict(logging_strategy="epoch", eval_strategy="epoch")),
    ):
        project = f"default_sinks_{name}"
        run, sinks = trained(tmp_path / name, report_to=["trackio"], project=project, **args)
        assert sinks == ["LocalSink", "TrackioSink"] and run.state.global_step == 6
        found = rows(project)
        assert len({row for row, _, _ in found}) == 1, "one run, the trainer's"
        assert [s for _, s, row in found if "tlens/constant/mean" in row] == [0, 3, 6]
        assert sum("tlens/page" in row for _, _, row in found) == 1
        assert [row for _, _, row in found if "train/loss" in row]
        losses = read_store(tmp_path / name / "tlens").reading("trainer/loss", 6)
        assert losses.labels["update"][-1] == "6"


@pytest.mark.parametrize("product", ["trackio", "tensorboard"])
def test_a_package_that_is_not_there_is_the_trainers_to_report(tmp_path, monkeypatch, product):
    callback = TLensCallback([CAPITAL], instruments=[Constant()], on_error="raise")
    run = trainer(tmp_path, callback)
    run.args.report_to = [product]
    for name in [name for name in sys.modules if name.split(".")[0] == product]:
        monkeypatch.setitem(sys.modules, name, None)
    run.train()
    assert [type(sink).__name__ for sink in callback.sinks] == ["LocalSink"]
