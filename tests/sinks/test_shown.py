"""What the sinks beside a trainer's own logging have in common."""

import json

import numpy as np
import pandas as pd

from tests.sinks.samples import EVENT, everything, small
from tlens_callback.reading import Reading
from tlens_callback.sinks.shown import (
    Keys,
    cells,
    curves,
    events,
    excerpt,
    matrices,
    not_the_trainers,
    tables,
    top_rows,
)


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
    assert [key for key, _ in tables(readings)] == [
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


def test_what_the_trainer_logged_is_left_out():
    theirs = Reading(key="trainer/loss", values=[1], axes=("update",), unit="as logged")
    ours = small()
    assert not_the_trainers([theirs, *ours]) == ours


def test_a_long_table_keeps_its_lowest_ranks():
    frame = pd.DataFrame({"probe": None, "rank": [0, 1, 2] * 40, "x": range(120)})
    assert set(top_rows(frame, 90)["rank"]) == {0, 1}
    assert set(top_rows(frame, 1)["rank"]) == {0}
    assert top_rows(frame, 120) is frame
    assert top_rows(frame.drop(columns="rank"), 7)["x"].tolist() == list(range(7))
    assert list(excerpt(frame, 90)) == ["rank", "x"]
    assert list(excerpt(frame.assign(probe="p"), 90)) == ["probe", "rank", "x"]


def test_cells_are_what_json_can_hold():
    frame = pd.DataFrame(
        {
            "number": np.array([0.1, np.nan, np.inf], np.float32),
            "whole": pd.array([1, None, 3], dtype="Int64"),
            "text": pd.array(["a", "", None], dtype="str"),
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
