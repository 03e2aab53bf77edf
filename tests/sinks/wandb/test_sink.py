"""W&B offline, without an account: the run's own file is read back and compared."""

import random
import sys
import threading

import numpy as np
import pytest
import wandb

from tests.sinks.samples import EVENT, everything, named
from tests.sinks.wandb.wandb_file import history, records, run_file
from tlens_callback.reading import Reading
from tlens_callback.sinks import WandbSink

STEP = "train/global_step"


def scalar(step, key="head_scores/max_induction"):
    return Reading(key=key, values=np.array(float(step)), unit="probability")


def as_the_trainer_does(run):
    """What transformers' WandbCallback declares."""
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)


def misplaced(rows, key="tlens/head_scores/max_induction"):
    """Rows of ours whose value, which is the step, is not the step that they are filed under, or
    that have swallowed or lost something."""
    ours = [row for row in rows if key in row]
    return [
        row
        for row in ours
        if row.get(STEP) != row[key] or {k for k in row if k[0] != "_"} != {key, STEP}
    ]


def test_rows_land_on_their_step_beside_the_trainers(offline):
    run = wandb.init(project="test")
    as_the_trainer_does(run)
    sink = WandbSink()
    order = list(range(0, 40, 2))
    random.Random(0).shuffle(order)

    def write_all():
        for step in order:
            sink.write([scalar(step)], step=step)

    thread = threading.Thread(target=write_all)
    thread.start()
    for step in range(40):
        run.log({"train/loss": -step, STEP: step})
        if step % 10 == 0:
            run.log({"eval/loss": -step, STEP: step})
    thread.join()
    sink.close()
    run.finish()
    wandb.teardown()
    rows = history(run_file(offline))
    assert misplaced(rows) == []
    assert sorted(r[STEP] for r in rows if "tlens/head_scores/max_induction" in r) == sorted(order)
    for key, steps in (("train/loss", range(40)), ("eval/loss", range(0, 40, 10))):
        theirs = [row for row in rows if key in row]
        assert [row[STEP] for row in theirs] == list(steps)
        assert all(row[key] == -row[STEP] for row in theirs)


@pytest.mark.parametrize("way", [{"commit": False}, {"step": True}])
def test_the_other_ways_to_log_misplace_rows(offline, way):
    run = wandb.init(project="test")
    as_the_trainer_does(run)
    for step in range(1, 7):
        run.log({"train/loss": 0.0, STEP: step})
        if step % 3 == 0:
            more = {"step": step} if "step" in way else way
            run.log({"tlens/head_scores/max_induction": float(step)}, **more)
    run.log({"train/loss": 0.0, STEP: 7})
    run.finish()
    wandb.teardown()
    assert misplaced(history(run_file(offline)))


class StandIn:
    """A run that keeps what it is given."""

    name = id = "run"
    url, dir = None, "."

    def __init__(self):
        self.rows, self.alerts = [], []

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        self.rows.append(row)

    def alert(self, **alert):
        self.alerts.append(alert)


def test_every_event_is_an_alert():
    long = "x" * 80
    said = ["L5H1 has become an induction head", "two\n  lines", f"{long} 1", f"{long} 2"]
    events = Reading(
        key="watch/events", values=[0.5, np.nan, 1, 2], axes=("event",), unit="event",
        labels={"event": said},
    )  # fmt: skip
    texts = Reading(
        key="other/events", values=[3.0], axes=("event",), unit="event", texts=np.array([said[0]])
    )
    quiet = [
        Reading(key="watch/none", values=np.zeros(0), axes=("event",), unit="event"),
        Reading(key="watch/untold", values=[1.0], axes=("event",), unit="event"),
        Reading(key="a/list", values=[1.0], axes=("rank",), unit="x", texts=np.array(["b"])),
    ]
    run = StandIn()
    sink = WandbSink(run)
    sink.write([*quiet], step=1)
    assert run.alerts == []
    sink.write([events, *quiet, texts], step=2)
    assert [alert["title"] for alert in run.alerts] == [
        "tlens: L5H1 has become an induction head",
        "tlens: two lines",
        f"tlens: {'x' * 53}...",
        f"tlens: {'x' * 49}... (2)",
        "tlens: L5H1 has become an induction head (2)",
    ]
    assert all(len(alert["title"]) < 64 for alert in run.alerts)
    assert run.alerts[0]["text"] == f"{said[0]}\nwatch/events 0.5, step 2"
    assert run.alerts[1]["text"] == "two lines\nwatch/events, step 2"
    assert said[3] in run.alerts[3]["text"]
    assert {alert["level"] for alert in run.alerts} == {wandb.AlertLevel.WARN}
    assert all(alert["wait_duration"] >= 300 for alert in run.alerts)


def test_an_offline_run_keeps_its_alerts(offline):
    sink = WandbSink()
    sink.write([scalar(1)], step=1)
    sink.write(named(2), step=2)
    sink.close()
    wandb.teardown()
    found = [r.alert for r in records(run_file(offline)) if r.WhichOneof("record_type") == "alert"]
    assert [alert.title for alert in found] == [
        "tlens: L1H2 has become an induction head (2)",
        "tlens: the shadow of Model is not the live model: and so on ...",
    ]
    assert {(alert.level, alert.wait_duration) for alert in found} == {("WARN", 600_000)}
    assert (
        found[0].text.endswith("watch/events 0.31, step 2")
        and " ".join(EVENT.split()) in found[1].text
    )


def test_never_finishes_a_run_that_is_not_its_own(offline):
    run = wandb.init(project="test")
    for sink in (WandbSink(), WandbSink(run=run)):
        sink.write([scalar(1)], step=1)
        sink.close()
        sink.close()
        assert wandb.run is run
        # A second training writes to the same run.
        sink.write([scalar(2)], step=2)
        sink.close()
    run.log({"still": "open"})
    run.finish()
    wandb.teardown()
    rows = history(run_file(offline))
    assert [row[STEP] for row in rows[:-1]] == [1, 2, 1, 2] and rows[-1]["still"] == "open"
    assert misplaced(rows) == []


def test_a_run_that_its_owner_finished_is_an_error(offline):
    run = wandb.init(project="test")
    sink = WandbSink()
    sink.write([scalar(1)], step=1)
    run.finish()
    with pytest.raises(RuntimeError, match="has been finished, so"):
        sink.write([scalar(2)], step=2)
    sink.close()
    with pytest.raises(RuntimeError, match="has been finished"):
        WandbSink(run=run).write([scalar(2)], step=2)


def test_a_disabled_run_takes_everything(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # Put back in the end: wandb 0.26 leaves a disabled run there for ever.
    monkeypatch.setattr(wandb, "run", None)
    sink = WandbSink()
    sink.write(everything(0), step=0)
    sink.close()
    assert not list(offline.glob("wandb/*run*"))


def test_starts_its_run_in_the_named_project(offline, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    sink = WandbSink()
    assert wandb.run is None, "a sink that writes nothing starts nothing"
    sink.write([scalar(0)], step=0)
    assert wandb.run is not None and wandb.run.project == "mine"
    sink.close()
    monkeypatch.delenv("WANDB_PROJECT")
    wandb.teardown()
    sink.write([scalar(0)], step=0)
    assert wandb.run is not None and wandb.run.project == "tlens_callback"
    sink.close()


def test_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"wandb\.init\(\)"):
        WandbSink(run="project")
    with pytest.raises(ValueError, match="store must be a LocalSink"):
        WandbSink(store="out/tlens")
    for heads in ("head_scores/induction", ["induction"], [3]):
        with pytest.raises(ValueError, match="heads must be a list of keys"):
            WandbSink(heads=heads)
    for most in (-1, 0.5, "all"):
        with pytest.raises(ValueError, match="most_files must be a whole number"):
            WandbSink(most_files=most)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        WandbSink()


def test_sinks_of_two_names_share_no_key(offline):
    run = wandb.init(project="test")
    for name, step in (("tlens", 1), ("slow", 2)):
        WandbSink(name=name).write([scalar(step), *named(step)], step=step)
    run.finish()
    wandb.teardown()
    path = run_file(offline)
    first, second = history(path)
    own = [{key for key in row if key[0] != "_" and key != STEP} for row in (first, second)]
    assert {key.replace("tlens/", "slow/", 1) for key in own[0]} == own[1]
    assert second["slow/head_scores/max_induction"] == 2
    metrics = {r.metric.name or r.metric.glob_name: r.metric.step_metric for r in records(path)}
    assert metrics["tlens/*"] == metrics["slow/*"] == STEP
