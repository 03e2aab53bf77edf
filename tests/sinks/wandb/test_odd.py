"""Odd names, numbers and sizes in W&B, read back from the run's own file."""

import json

import numpy as np
import pytest
import wandb

from tests.sinks.samples import pattern, small
from tests.sinks.wandb.wandb_file import history, run_file
from tlens_callback import Reading, WandbSink


def test_names_become_keys_and_files(offline):
    probes = ["a/../..", "</script>", "中文 é", "x" * 300, "a.b", "a:b", "", "\n\x00", "\ud83d"]
    probes = [p for p in probes if p]
    sink = WandbSink()
    readings = [
        Reading(key=f"mine/m/{probe}", values=float(i), unit="x") for i, probe in enumerate(probes)
    ]
    pictures = [pattern(0, probe) for probe in probes]
    sink.write([*readings, *pictures], step=3)
    sink.write([*readings, *pictures], step=4)
    sink.close()
    wandb.teardown()
    path = run_file(offline)
    first, second = history(path)
    assert set(first) == set(second)
    values = {key: value for key, value in first.items() if key.startswith("tlens/mine/m")}
    assert sorted(values.values()) == list(range(len(probes))), "no two share a key"
    assert values["tlens/mine/m/中文 é"] == 2
    assert {values["tlens/mine/m/a_b"], values["tlens/mine/m/a_b_2"]} == {4, 5}
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


def test_small_readings_make_no_files(offline):
    sink = WandbSink()
    sink.write([r for r in small(0) if not r.axes], step=0)
    sink.close()
    wandb.teardown()
    assert not (run_file(offline).parent / "files" / "media").exists()
