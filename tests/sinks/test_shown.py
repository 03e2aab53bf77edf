"""What the sinks beside a trainer's own logging have in common."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest

from tests.sinks.samples import EVENT, everything, small
from tlens_callback.reading import Reading
from tlens_callback.sinks import TensorBoardSink, TrackioSink, WandbSink
from tlens_callback.sinks.shown import (
    Keys,
    cells,
    curves,
    events,
    excerpt,
    histograms,
    matrices,
    scalars,
    tables,
    top_rows,
    without_trainer_logs,
)
from tlens_callback.store.tables import TEXT


def test_two_keys_never_have_one_name():
    keys = Keys("tlens")
    asked = ["a/b/c", "a/b/c?", "a/b/c!", "a/b/" + "é" * 200, "a/b/" + "é" * 201, "a/b/c"]
    names = [keys(key) for key in asked]
    assert names[:3] == ["tlens/a/b/c", "tlens/a/b/c_", "tlens/a/b/c__2"]
    assert names[5] == names[0]
    assert len(set(names)) == len(set(asked))
    assert all(len(part.encode()) <= 162 for name in names for part in name.split("/"))


def test_every_reading_of_the_samples_has_its_place():
    readings = everything()
    assert [key for key, _ in matrices(readings)] == ["head_scores/heads"]
    assert [key for key, _ in curves(readings)] == ["logit_lens/by_layer"]
    assert [key for key, *_ in tables(readings, 0)] == [
        "top_neurons/table",
        "logit_lens/table",
        "virtual_heads/rank_table",
        "watch/event_table",
    ]


def test_matrices_are_named_by_their_axes():
    pairs = [
        ("layer", "head"),
        ("layer", "expert"),
        ("layer", "pos"),
        ("feature", "pos"),
        ("layer", "rank"),
    ]
    readings = [
        Reading(key=f"x/{a}_{b}", values=np.ones((2, 2)), axes=(a, b), unit="1") for a, b in pairs
    ]
    assert {key: own for key, own in matrices(readings)} == {
        "x/heads": readings[:1],
        "x/experts": readings[1:2],
        "x/by_pos": readings[2:3],
        "x/feature_by_pos": readings[3:4],
    }


def test_what_is_of_many_readings_takes_the_key_of_none():
    own = [
        Reading(key="x/heads", values=np.ones((2, 2)), axes=("layer", "head"), unit="1"),
        Reading(key="x/by_layer", values=[1], axes=("layer",), unit="1"),
        Reading(key="x/table", values=[[1]], axes=("layer", "rank"), unit="1"),
        Reading(key="x/rank_table", values=[1], axes=("rank",), unit="1"),
    ]
    other = [Reading(key="y/heads_", values=np.ones((2, 2)), axes=("layer", "head"), unit="1")]
    for parts, names in (
        (matrices([*own, *other]), ["x/heads_2", "y/heads"]),
        (curves(own), ["x/by_layer_2"]),
        (tables(own, 0), ["x/table_2", "x/rank_table_2"]),
    ):
        assert [key for key, *_ in parts] == names


def test_histograms_have_what_is_finite():
    values = np.array([[np.nan, 3e38], [-3e38, np.inf]])
    odd = Reading(key="x/odd", values=values, axes=("layer", "head"), unit="1")
    none = Reading(key="x/none", values=values[:, :1] * np.nan, axes=odd.axes, unit="1")
    spread = Reading(key="x/odd_spread", values=values, axes=odd.axes, unit="1")
    ((key, finite),) = histograms([odd, none, spread])
    assert key == "x/odd" and finite.tolist() == [np.float32(3e38), np.float32(-3e38)]
    assert np.isfinite(np.ptp(finite)), "float32 would overflow"


@pytest.mark.parametrize("sink", [TrackioSink, partial(TensorBoardSink, "tb"), WandbSink])
def test_a_store_has_a_page(sink):
    with pytest.raises(ValueError, match="store must be a LocalSink"):
        sink(store="out/tlens")


def test_what_the_trainer_logged_is_left_out():
    theirs = Reading(key="trainer/loss", values=[1], axes=("update",), unit="as logged")
    ours = small()
    assert without_trainer_logs([theirs, *ours]) == ours


def test_a_name_is_no_curve():
    name = Reading(key="checkpoint/name", values=0.0, unit="path", texts=np.asarray("out"))
    number = Reading(key="a/b", values=0.0, unit="x")
    assert scalars([name, number, *small()])[0] is number
    assert all(reading.axes == () for reading in scalars(small()))


def test_a_long_table_keeps_its_lowest_ranks():
    frame = pd.DataFrame({"probe": None, "rank": [0, 1, 2] * 40, "x": range(120)})
    assert set(top_rows(frame, 90)["rank"]) == {0, 1}
    assert set(top_rows(frame, 1)["rank"]) == {0}
    assert len(top_rows(frame, 1)) == 40, "one row of each"
    long = pd.DataFrame({"rank": 0, "x": range(20_000)})
    assert top_rows(long, 100)["x"].tolist() == list(range(1_000))
    assert len(top_rows(long, 10_000)) == 10_000
    assert top_rows(frame, 120) is frame
    assert top_rows(frame.drop(columns="rank"), 7)["x"].tolist() == list(range(7))
    assert list(excerpt(frame, 90)) == ["rank", "x"]
    assert list(excerpt(frame.assign(probe="p"), 90)) == ["probe", "rank", "x"]


def test_cells_are_what_json_can_hold():
    frame = pd.DataFrame(
        {
            "number": np.array([0.1, np.nan, np.inf], np.float32),
            "whole": pd.array([1, None, 3], dtype="Int64"),
            "text": pd.array(["a", "", None], dtype=TEXT),
        }
    )
    found = cells(frame)
    assert found == {
        "number": [0.1, None, None],
        "whole": [1, None, 3],
        "text": ["a", "", None],
    }
    json.dumps(found, allow_nan=False)


def test_events_are_sentences_in_one_line():
    first, second = events(small(3))
    assert first == ("L1H2 has become an induction head (3)", "watch/events 0.31")
    assert second == (" ".join(EVENT.split()), "watch/events")
    named = Reading(
        key="watch/events", values=[1], axes=("event",), unit="event", texts=np.array(["a\nb"])
    )
    assert list(events([named])) == [("a b", "watch/events 1")]
