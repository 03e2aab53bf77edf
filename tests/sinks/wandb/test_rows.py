"""What of an observation W&B shows, read back from the run's own file."""

import json
import logging

import numpy as np
import pytest
import wandb
from PIL import Image

from tests.described import as_read
from tests.sinks.samples import EVENT, everything, named, pattern, small
from tests.sinks.wandb.wandb_file import history, records, run_file
from tlens_callback import Reading, WandbSink
from tlens_callback.meaning import Description, Meaning
from tlens_callback.render import axis_table, line_figure, mosaic, neuron_table
from tlens_callback.sinks.wandb.rows import MOST_NUMBERS

STEP = "train/global_step"


def one_row(offline, readings, step=3, **settings):
    sink = WandbSink(**settings)
    sink.write(readings, step=step)
    sink.close()
    wandb.teardown()
    (row,) = history(run_file(offline))
    assert row[STEP] == step
    return {key: value for key, value in row.items() if key[0] != "_" and key != STEP}


def test_what_an_observation_becomes(offline):
    sink = WandbSink(everything=True)
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
            single = [
                [np.float32(cell) if isinstance(cell, float) else cell for cell in row]
                for row in told["data"]
            ]
            assert single == [list(row) for row in cells.itertuples(index=False)]
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

    def write(step, value=None):
        values = [step if value is None else value, 1.0]
        kl = Reading(key="lens/kl/p", values=values, axes=("layer",), unit="nats")
        sink.write([kl], step=step)

    for step in (30, 40):
        write(step)
    write(20, value=19)
    for step in (20, 50):
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


def test_the_page_has_the_headlines_of_what_it_knows(offline, caplog):
    """The rest is asked for by `everything`."""
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        row = one_row(offline, everything(2))
    assert set(row) == {
        "tlens/head_scores/max_induction",
        "tlens/attention_patterns/pattern/capital",
        "tlens/attention_patterns/pattern/other probe",
        "tlens/head_scores/heads",
        "tlens/logit_lens/by_layer",
        "tlens/top_neurons/table",
        "tlens/logit_lens/table",
        "tlens/watch/event_table",
    }
    assert words(caplog) == []


def words(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "tlens_callback"]


def numbers_of(instrument, how_many, probes=(None,)):
    keys = [
        "/".join(filter(None, (instrument, f"n{i}", p))) for p in probes for i in range(how_many)
    ]
    return [Reading(key=key, values=1.0, unit="x") for key in keys]


def test_an_instrument_that_says_nothing_of_itself_is_shown_by_its_axes(offline, caplog):
    probes = ("a", "b")
    strange = [
        *numbers_of("strange", MOST_NUMBERS + 2, probes),
        *numbers_of("small", MOST_NUMBERS),
        *as_read(*numbers_of("watch", MOST_NUMBERS + 2)),
        Reading(key="strange/m", values=np.ones((2, 2)), axes=("layer", "pos"), unit="x"),
        Reading(key="strange/l", values=np.ones(2), axes=("layer",), unit="x"),
        Reading(key="strange/r", values=np.ones(2), axes=("rank",), unit="x"),
        Reading(key="strange/t", values=np.ones((2, 2)), axes=("layer", "rank"), unit="x"),
    ]
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        row = one_row(offline, strange)
    assert set(row) == {
        *(f"tlens/strange/n{i}/{probe}" for probe in probes for i in range(MOST_NUMBERS)),
        *(f"tlens/small/n{i}" for i in range(MOST_NUMBERS)),
        *(f"tlens/watch/n{i}" for i in range(MOST_NUMBERS + 2)),
        "tlens/strange/by_pos",
        "tlens/strange/by_layer",
        "tlens/strange/table",
        "tlens/strange/rank_table",
    }
    (said,) = words(caplog)
    assert "first 8 numbers of 'strange'" in said and "everything=True" in said


def test_what_an_instrument_says_of_itself_is_done_whatever_its_name(offline, caplog):
    """Headlines are shown, other measures are not, and none is counted against the first eight."""
    said = Description(
        measures={
            "a": Meaning(headline=True),
            "b": Meaning(),
            "matrix": Meaning(headline=True),
            "beside": Meaning(),
            "line": Meaning(),
            "list": Meaning(),
            "ranked": Meaning(headline=True),
        }
    )
    square = np.ones((2, 2))
    own = [
        *(Reading(key=f"mine/a/p{i}", values=1.0, unit="x") for i in range(MOST_NUMBERS + 2)),
        Reading(key="mine/b", values=1.0, unit="x"),
        Reading(key="mine/other", values=1.0, unit="x"),
        Reading(key="mine/matrix", values=square, axes=("layer", "head"), unit="x"),
        Reading(key="mine/beside", values=square, axes=("layer", "head"), unit="x"),
        Reading(key="mine/line", values=square[0], axes=("layer",), unit="x"),
        Reading(key="mine/list", values=square[0], axes=("rank",), unit="x"),
        Reading(key="mine/ranked", values=square, axes=("layer", "rank"), unit="x"),
    ]
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        row = one_row(offline, [reading.described(said) for reading in own])
    shown = {"other", "heads", "table", *(f"a/p{i}" for i in range(MOST_NUMBERS + 2))}
    assert set(row) == {f"tlens/mine/{name}" for name in shown}
    assert words(caplog) == []


def test_everything_is_everything(offline, caplog):
    readings = [*numbers_of("strange", 12), *numbers_of("head_scores", 3), *everything(1)]
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        row = one_row(offline, readings, everything=True)
    scalars = {f"tlens/{r.key}" for r in readings if not r.axes}
    assert scalars <= set(row) and "tlens/virtual_heads/rank_table" in row
    assert words(caplog) == []


def test_what_the_trainer_logs_is_left_to_it(offline):
    loss = Reading(
        key="trainer/loss", values=[2.0, 1.0], axes=("update",), unit="as logged",
        labels={"update": ["1", "2"]},
    )  # fmt: skip
    matrix = Reading(key="x/y", values=np.ones((1, 1)), axes=("layer", "update"), unit="x")
    number = Reading(key="x/z", values=1.0, unit="x")
    assert set(one_row(offline, [loss, matrix, number], everything=True)) == {"tlens/x/z"}


def test_a_number_for_each_head_where_asked_for(offline, caplog):
    big = Reading(
        key="drift/js/a.b", values=np.arange(12.0).reshape(1, 12), axes=("layer", "head"), unit="x",
        labels={"layer": ["101"]},
    )  # fmt: skip
    heads = ["head_scores/induction", "drift/js/a.b", "head_scores/inductoin"]
    sink = WandbSink(heads=heads)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        for step in (3, 4):
            sink.write([*small(step), big], step=step)
    (said,) = words(caplog)
    assert "'head_scores/inductoin'" in said and "'head_scores/change'" in said
    sink.close()
    wandb.teardown()
    path = run_file(offline)
    for row, step in zip(history(path), (3, 4), strict=True):
        (induction,) = (r for r in small(step) if r.key == "head_scores/induction")
        shown = {k: v for k, v in row.items() if k.startswith("tlens/heads/")}
        expected = {
            f"tlens/heads/head_scores/induction/L0{layer}H0{head}": float(value)
            for (layer, head), value in np.ndenumerate(induction.values)
        } | {f"tlens/heads/drift/js/a_b/L101H{head:02}": float(head) for head in range(12)}
        assert shown == expected
    metrics = {
        r.metric.name: r.metric for r in records(path) if r.WhichOneof("record_type") == "metric"
    }
    hidden = {name for name, metric in metrics.items() if metric.options.hidden}
    # By their whole names: where a second pattern matches, W&B takes either.
    assert hidden == set(expected) and metrics[STEP].options.hidden is False
    assert {metrics[name].step_metric for name in hidden} == {STEP}


def test_each_run_is_told_which_numbers_to_hide(offline):
    sink = WandbSink(heads=["head_scores/induction"])
    for _ in range(2):
        sink.write(small(3), step=3)
        sink.close()
    wandb.teardown()
    paths = list(offline.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(paths) == 2
    for path in paths:
        assert sum(r.metric.options.hidden for r in records(path)) == 6


def test_without_being_asked_no_head_has_a_number(offline):
    row = one_row(offline, everything(3), everything=True)
    assert not [key for key in row if key.startswith("tlens/heads/")]
