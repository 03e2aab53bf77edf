"""W&B offline, without an account: the run's own file is read back and compared."""

import json
import random
import sys
import threading

import numpy as np
import pytest
import wandb
from PIL import Image

from tests.sinks.samples import EVENT, everything, named, pattern, small
from tests.sinks.wandb_file import history, records, run_file
from tlens_callback.reading import Reading
from tlens_callback.render import axis_table, line_figure, mosaic, neuron_table
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


def test_what_an_observation_becomes(offline):
    sink = WandbSink()
    sink.write(everything(5), step=5)
    sink.write(everything(9), step=9)
    assert str(next(offline.glob("wandb/offline-run-*"))) in str(sink)
    sink.close()
    assert wandb.run is None, "it started this run and finishes it"
    wandb.teardown()
    path = run_file(offline)
    assert [r.WhichOneof("record_type") for r in records(path)].count("exit") == 1
    rows = history(path)
    assert [row[STEP] for row in rows] == [5, 9]
    shown = {
        "tlens/cost/seconds",
        "tlens/target_scores/loss/capital",
        "tlens/head_scores/max_induction",
        "tlens/head_scores/heads",
        "tlens/top_neurons/table",
        "tlens/logit_lens/table",
        "tlens/logit_lens/by_layer",
        "tlens/virtual_heads/rank_table",
        "tlens/watch/event_table",
        "tlens/attention_patterns/pattern/capital",
        "tlens/attention_patterns/pattern/other probe",
        STEP,
    }
    files = path.parent / "files"
    for row, step in zip(rows, (5, 9), strict=True):
        assert {key for key in row if key[0] != "_"} == shown
        assert row["tlens/cost/seconds"] == step + 0.25
        # W&B writes what is not a number as a word.
        assert row["tlens/target_scores/loss/capital"] in (
            "NaN",
            pytest.approx(np.nan, nan_ok=True),
        )

        picture = row["tlens/attention_patterns/pattern/capital"]
        assert picture["_type"] == "image-file"
        assert (files / picture["path"]).read_bytes() == mosaic(pattern(step), step=step)
        other = files / row["tlens/attention_patterns/pattern/other probe"]["path"]
        with Image.open(other) as image:
            assert image.size == (picture["width"], picture["height"])
        assert other.read_bytes() != (files / picture["path"]).read_bytes()

        figure = row["tlens/head_scores/heads"]
        assert figure["_type"] == "plotly-file"
        drawn = json.loads((files / figure["path"]).read_text(), parse_constant=pytest.fail)
        matrices = [r for r in everything(step) if r.axes == ("layer", "head") and r.values.size]
        matrices = [r for r in matrices if r.instrument == "head_scores"]
        assert len(drawn["data"]) == len(matrices) == 2
        for panel, reading in zip(drawn["data"], matrices, strict=True):
            assert (np.array(panel["z"], np.float32) == reading.values).all()

        own = {r.instrument: [] for r in everything(step)}
        for reading in everything(step):
            own[reading.instrument].append(reading)
        tables = {
            "top_neurons/table": neuron_table(own["top_neurons"]),
            "logit_lens/table": neuron_table(own["logit_lens"]),
            "virtual_heads/rank_table": axis_table(own["virtual_heads"], "rank"),
            "watch/event_table": axis_table(own["watch"], "event"),
        }
        for key, expected in tables.items():
            assert row[f"tlens/{key}"]["_type"] == "table-file"
            told = json.loads(
                (files / row[f"tlens/{key}"]["path"]).read_text(), parse_constant=pytest.fail
            )
            assert told["columns"] == list(expected.columns)
            cells = expected.astype(object)
            cells = cells.where(cells.notna(), None)
            assert told["data"] == [list(row) for row in cells.itertuples(index=False)]
        assert tables["logit_lens/table"]["token"].tolist() == named(step)[0].texts.ravel().tolist()
        assert tables["watch/event_table"]["event_name"][1] == EVENT

        drawn = json.loads((files / row["tlens/logit_lens/by_layer"]["path"]).read_text())
        first = [] if step == 5 else own_at(5, "logit_lens")
        expected = line_figure(own["logit_lens"], first, first_name="step 5").to_plotly_json()
        assert drawn["data"] == json.loads(json.dumps(expected["data"]))
        assert ("step 5" in json.dumps(drawn)) == (step == 9)
    media = [p for p in (files / "media").rglob("*") if p.is_file()]
    # Two pictures, two figures and four tables an observation.
    assert len(media) == 2 * 8
    metrics = {r.metric.name or r.metric.glob_name: r.metric.step_metric for r in records(path)}
    assert metrics["tlens/*"] == STEP and STEP in metrics


def own_at(step, instrument):
    return [r for r in everything(step) if r.instrument == instrument]


def test_the_first_observation_is_that_of_this_training(offline):
    """Dotted lines: of the first observation after a sink was made, closed, or began again."""
    run = wandb.init(project="test")
    sink = WandbSink(run)

    def write(step):
        kl = Reading(key="lens/kl/p", values=[step, 1.0], axes=("layer",), unit="nats")
        sink.write([kl], step=step)

    for step in (30, 40, 20, 50):
        write(step)
    sink.close()
    write(60)
    write(70)
    run.finish()
    wandb.teardown()
    path = run_file(offline)
    shown = {}
    for row in history(path):
        figure = path.parent / "files" / row["tlens/lens/by_layer"]["path"]
        lines = [t for t in json.loads(figure.read_text())["data"] if t["x"] != [None]]
        shown[row[STEP]] = [line["y"][0] for line in lines]
    assert shown == {30: [30], 40: [30, 40], 20: [20], 50: [20, 50], 60: [60], 70: [60, 70]}


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
    assert run.alerts[1]["text"] == "two\n  lines\nwatch/events, step 2"
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
    assert found[0].text.endswith("watch/events 0.31, step 2") and EVENT in found[1].text


def test_keys_of_lists_and_features(offline):
    """A list that is too long, and one without entries, have no table."""
    rows = ("feature",)
    labels = {"feature": ["17", "4000"]}
    sink = WandbSink()
    sink.write(
        [
            Reading(key="sae/mean", values=[0.1, 0.2], axes=rows, unit="x", labels=labels),
            Reading(
                key="sae/top", values=[[3, 2, 1]] * 2, axes=(*rows, "rank"), unit="x",
                labels=labels, texts=np.array([["a", "b", "c"]] * 2),
            ),
            Reading(
                key="sae/on/p", values=[[0, 1, 0]] * 2, axes=(*rows, "pos"), unit="x",
                labels={**labels, "pos": [" a", " b", " a"]},
            ),
            Reading(key="long/mean", values=np.zeros(1001), axes=rows, unit="x"),
            Reading(key="none/mean", values=np.zeros(0), axes=rows, unit="x"),
        ],
        step=3,
    )  # fmt: skip
    sink.close()
    wandb.teardown()
    path = run_file(offline)
    (row,) = history(path)
    assert {key for key in row if key.startswith("tlens/")} == {
        "tlens/sae/feature_table",
        "tlens/sae/feature_rank_table",
        "tlens/sae/feature_by_pos",
    }
    table = json.loads(
        (path.parent / "files" / row["tlens/sae/feature_rank_table"]["path"]).read_text()
    )
    assert table["columns"] == ["probe", "feature", "rank", "top", "top_text"]
    assert table["data"][4] == [None, 4000, 1, 2.0, "b"]


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
    with pytest.raises(RuntimeError, match="was finished by whoever started it"):
        sink.write([scalar(2)], step=2)
    sink.close()
    with pytest.raises(RuntimeError, match="was finished"):
        WandbSink(run=run).write([scalar(2)], step=2)


def test_names_become_keys_and_files(offline):
    probes = ["a/../..", "</script>", "中文 é", "x" * 300, "a.b", "a:b", "", "\n\x00", "\ud83d"]
    probes = [p for p in probes if p]
    sink = WandbSink()
    readings = [scalar(i, f"head_scores/m/{probe}") for i, probe in enumerate(probes)]
    pictures = [pattern(0, probe) for probe in probes]
    sink.write([*readings, *pictures], step=3)
    sink.write([*readings, *pictures], step=4)
    sink.close()
    wandb.teardown()
    path = run_file(offline)
    first, second = history(path)
    assert set(first) == set(second)
    values = {key: value for key, value in first.items() if key.startswith("tlens/head_scores/m")}
    assert sorted(values.values()) == list(range(len(probes))), "no two share a key"
    assert values["tlens/head_scores/m/中文 é"] == 2
    assert {values["tlens/head_scores/m/a_b"], values["tlens/head_scores/m/a_b_2"]} == {4, 5}
    files = path.parent / "files"
    for row in (first, second):
        shown = [value["path"] for key, value in row.items() if "pattern" in key]
        assert len(set(shown)) == len(probes)
        assert all((files / name).resolve().is_relative_to(files.resolve()) for name in shown)
        assert all((files / name).is_file() for name in shown)


def test_numbers_that_are_not_finite_go_through(offline):
    odd = [np.nan, np.inf, -np.inf, 1.0]
    sink = WandbSink()
    matrix = Reading(
        key="head_scores/a", values=np.array([odd]), axes=("layer", "head"), unit="nats"
    )
    index = Reading(
        key="top_neurons/neuron/p", values=np.array([odd]), axes=("layer", "rank"), unit="index"
    )
    write = Reading(
        key="top_neurons/write/p", values=np.array([odd]), axes=("layer", "rank"), unit="logit"
    )
    scalars = [Reading(key=f"a/{i}", values=np.array(x), unit="x") for i, x in enumerate(odd)]
    sink.write([*scalars, matrix, index, write], step=1)
    sink.close()
    wandb.teardown()
    path = run_file(offline)
    (row,) = history(path)
    assert row["tlens/a/3"] == 1 and {"tlens/a/0", "tlens/a/1", "tlens/a/2"} <= set(row)
    files = path.parent / "files"
    table = json.loads(
        (files / row["tlens/top_neurons/table"]["path"]).read_text(), parse_constant=pytest.fail
    )
    assert table["data"] == [
        ["p", 0, i, None if i < 3 else 1, None if i < 3 else 1.0] for i in range(4)
    ]
    figure = json.loads(
        (files / row["tlens/head_scores/heads"]["path"]).read_text(), parse_constant=pytest.fail
    )
    assert figure["data"][0]["z"] == [[None, None, None, 1.0]]


def test_a_table_keeps_the_lowest_ranks_of_too_many(offline):
    values = np.arange(120 * 100, dtype=float).reshape(120, 100)
    many = Reading(key="n/neuron/p", values=values, axes=("layer", "rank"), unit="index")
    sink = WandbSink()
    sink.write([many], step=0)
    sink.close()
    wandb.teardown()
    path = run_file(offline)
    (row,) = history(path)
    table = json.loads((path.parent / "files" / row["tlens/n/table"]["path"]).read_text())
    expected = [["p", layer, r, 100 * layer + r] for layer in range(120) for r in range(83)]
    assert table["data"] == expected and 9_900 < len(expected) <= 10_000


def test_a_disabled_run_takes_everything(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
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


def test_small_readings_make_no_files(offline):
    sink = WandbSink()
    sink.write([r for r in small(0) if not r.axes], step=0)
    sink.close()
    wandb.teardown()
    assert not (run_file(offline).parent / "files" / "media").exists()


def test_matrices_of_other_axes_are_drawn_by_their_axis(offline):
    """An instrument that somebody else wrote: [layer, pos]."""
    run = wandb.init(project="test")
    values = np.arange(6.0).reshape(2, 3)
    norm = Reading(
        key="resid/norm/p", values=values, axes=("layer", "pos"), unit="norm",
        labels={"pos": ["a", "b", "c"]},
    )  # fmt: skip
    WandbSink().write([norm], step=4)
    run.finish()
    wandb.teardown()
    (row,) = history(run_file(offline))
    assert row["train/global_step"] == 4 and row["tlens/resid/by_pos"]["_type"] == "plotly-file"
    (file,) = offline.glob("wandb/offline-*/files/media/plotly/**/*.json")
    assert json.loads(file.read_text())["data"][0]["z"] == values.tolist()
