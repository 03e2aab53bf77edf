"""Tables against loops over the readings."""

import numpy as np
import pandas as pd
import pytest

from tlens_callback.reading import Reading
from tlens_callback.render import axis_table, long_frame, neuron_table

TOKENS = ["<s>", " a", " b", "</script>", "7"]


def readings():
    rng = np.random.default_rng(0)
    return [
        Reading(key="s/loss/capital", values=np.array(0.5), unit="nats"),
        Reading(key="h/m", values=rng.random((2, 3)), axes=("layer", "head"), unit="probability"),
        Reading(
            key="h/m_by_block",
            values=rng.random((2, 1, 3)),
            axes=("block", "layer", "head"),
            unit="probability",
            labels={"block": ["8", "24"], "layer": ["5"]},
        ),
        Reading(
            key="p/row/capital",
            values=rng.random((1, 5)),
            axes=("query", "key"),
            unit="probability",
            labels={"key": list("12345")},
        ),
        Reading(
            key="l/token/capital", values=[[3, 4]], axes=("layer", "rank"), unit="index",
            texts=np.array([[" Paris", ""]]),
        ),
    ]  # fmt: skip


def test_long_frame_is_a_row_per_number():
    frame = long_frame(readings())
    assert list(frame.columns) == (
        "key instrument measure probe unit layer head block query key_index rank value text".split()
    )
    expected = []
    for r in readings():
        for index in np.ndindex(r.values.shape):
            row = dict.fromkeys(("layer", "head", "block", "query", "key_index", "rank"))
            for axis, i in zip(r.axes, index, strict=True):
                # Block lengths and layers go by their labels, tokens by their position.
                named = axis in ("block", "layer") and axis in r.labels
                row["key_index" if axis == "key" else axis] = int(r.labels[axis][i]) if named else i
            names = (r.key, r.instrument, r.measure, r.probe, r.unit)
            text = None if r.texts is None else str(r.texts[index])
            expected.append((*names, *row.values(), float(r.values[index]), text))
    told = frame.astype(object)
    told = told.where(told.notna(), None).itertuples(index=False, name=None)
    assert list(told) == expected
    assert frame["layer"].dtype == "Int32" and frame["value"].dtype == np.float32


def test_long_frame_of_nothing_has_its_columns():
    assert list(long_frame([]).columns) == [
        "key",
        "instrument",
        "measure",
        "probe",
        "unit",
        "value",
        "text",
    ]
    empty = Reading(key="a/b", values=np.zeros((0, 2)), axes=("layer", "head"), unit="x")
    assert len(long_frame([empty])) == 0


def neurons(probe, layers=2, ranks=3, labels=None, seed=0):
    rng = np.random.default_rng(seed)
    shape = (layers, ranks)
    labels = labels or {}
    return [
        Reading(
            key=f"top_neurons/neuron/{probe}",
            values=rng.integers(0, 100_000, shape),
            axes=("layer", "rank"),
            unit="index",
            labels=labels,
        ),
        Reading(
            key=f"top_neurons/activation/{probe}",
            values=rng.normal(0, 1, (*shape, len(TOKENS))),
            axes=("layer", "rank", "pos"),
            unit="activation",
            labels={**labels, "pos": TOKENS},
        ),
    ]


def test_neuron_table_is_a_row_per_neuron():
    first, second = neurons("capital"), neurons("other", 1, 2, {"layer": ["7"]}, seed=1)
    write = Reading(
        key="top_neurons/write/other", values=[[0.5, -1]], axes=("layer", "rank"), unit="logit",
        labels={"layer": ["7"]},
    )  # fmt: skip
    stray = Reading(key="top_neurons/count", values=3.0, unit="count")
    table = neuron_table([*first, stray, *second, write])
    assert list(table.columns) == "probe layer rank neuron activation token pos write".split()
    rows = []
    for probe, (index, activation), writes in (
        ("capital", first, None),
        ("other", second, write.values),
    ):
        for layer, rank in np.ndindex(index.values.shape):
            along = activation.values[layer, rank].tolist()
            pos = max(range(len(TOKENS)), key=lambda i: abs(along[i]))
            name = 7 if probe == "other" else layer
            number = int(index.values[layer, rank])
            written = None if writes is None else float(writes[layer, rank])
            rows.append((probe, name, rank, number, along[pos], TOKENS[pos], pos, written))
    told = table.astype(object)
    assert list(told.where(told.notna(), None).itertuples(index=False, name=None)) == rows
    # The largest magnitude is not always the largest value, and the test has such a row.
    assert any(row[4] < 0 for row in rows)


def test_a_peak_says_which_token_is_shown():
    index, activation = neurons("capital")
    where = np.ones(index.values.shape)
    where[0, 0] = 2
    peak = Reading(
        key="top_neurons/peak/capital", values=where, axes=("layer", "rank"), unit="index"
    )
    table = neuron_table([index, activation, peak])
    assert list(table.columns) == "probe layer rank neuron activation token pos".split()
    assert table["pos"].tolist() == where.astype(int).ravel().tolist()
    assert table["token"][0] == TOKENS[2] and table["token"][1] == TOKENS[1]
    assert table["activation"][0] == activation.values[0, 0, 2]


def test_indices_that_are_missing_stay_whole_numbers():
    index, activation = neurons("p")
    values = index.values.copy()
    values[1, 2] = np.nan
    holes = Reading(key=index.key, values=values, axes=index.axes, unit="index")
    dead = activation.values.copy()
    dead[0, 0], dead[0, 1, 0] = np.nan, np.nan
    nan = Reading(key=activation.key, values=dead, axes=activation.axes, unit="activation")
    table = neuron_table([holes, nan])
    assert table["neuron"].dtype == "Int64" and table["neuron"].isna().tolist() == [False] * 5 + [
        True
    ]
    assert np.isnan(table["activation"][0]) and not np.isnan(table["activation"][1])
    assert table["token"][1] == str(table["pos"][1])


def test_two_measures_along_tokens_keep_their_own_columns():
    _, activation = neurons("p")
    more = Reading(
        key="top_neurons/effect/p", values=-activation.values, axes=activation.axes, unit="logit"
    )
    table = neuron_table([activation, more])
    assert {"activation_token", "activation_pos", "effect_token", "effect_pos"} <= set(table)
    assert not {"token", "pos"} & set(table)
    assert (table["activation"] == -table["effect"]).all()


def test_refuses_what_makes_no_table():
    a, _ = neurons("p")
    with pytest.raises(ValueError, match="one instrument"):
        neuron_table([a, Reading(key="x/y", values=a.values, axes=a.axes, unit="x")])
    with pytest.raises(ValueError, match="the same key"):
        neuron_table([a, a])
    assert neuron_table([]).empty and isinstance(neuron_table([]), pd.DataFrame)
    assert list(axis_table([], "event").columns) == ["probe", "event"]


def listed(key, values, axes=("layer", "rank"), unit="logit", **more):
    return Reading(key=key, values=values, axes=axes, unit=unit, **more)


def cells(table):
    told = table.astype(object)
    return [list(row) for row in told.where(told.notna(), None).itertuples(index=False)]


def test_texts_stand_beside_their_numbers():
    """Where a number only names something, the column of the measure's name says what."""
    words = np.array([[" Paris", "\n"], ["", "7"]])
    table = neuron_table(
        [
            listed("lens/token", [[12, 30000], [0, 5]], unit="index", texts=words),
            listed("lens/p", [[0.5, 0.25], [1, 0]], unit="probability", texts=words[::-1]),
        ]
    )
    assert list(table.columns) == "probe layer rank token token_id p p_text".split()
    assert cells(table) == [
        [None, 0, 0, " Paris", 12, 0.5, ""],
        [None, 0, 1, "\n", 30000, 0.25, "7"],
        [None, 1, 0, "", 0, 1, " Paris"],
        [None, 1, 1, "7", 5, 0, "\n"],
    ]


def test_groups_of_measures_with_other_layers_and_ranks_share_a_table():
    """Each number is at its own layer and rank; rows that no measure has are not there."""
    head = listed("dla/head/p", [[1, 2, 3], [4, 5, 6]], unit="index")
    neuron = listed("dla/neuron/p", [[10], [20]], labels={"layer": ["1", "7"]})
    other = listed("dla/neuron/q", [[30, 31]], labels={"layer": ["5"]})
    table = neuron_table([head, neuron, other])
    assert cells(table) == [
        ["p", 0, 0, 1, None],
        ["p", 0, 1, 2, None],
        ["p", 0, 2, 3, None],
        ["p", 1, 0, 4, 10],
        ["p", 1, 1, 5, None],
        ["p", 1, 2, 6, None],
        ["p", 7, 0, None, 20],
        ["q", 5, 0, None, 30],
        ["q", 5, 1, None, 31],
    ]
    assert table["head"].dtype == "Int64"


def test_a_peak_is_for_measures_of_its_own_size():
    along = listed("n/act/p", [[[1.0, -3.0, 2.0]]], axes=("layer", "rank", "pos"))
    few = listed("n/peak/p", [[2]], unit="index")
    many = listed("n/peak/p", [[2, 0]], unit="index")
    assert neuron_table([along, few])["act"].tolist() == [2]
    assert neuron_table([along, many])["act"].tolist() == [-3]


def test_columns_of_one_name_do_not_hide_each_other():
    along = listed(
        "n/act/p", [[[1.0, 2.0]]], axes=("layer", "rank", "pos"), labels={"pos": ["a", "b"]}
    )
    token = listed("n/token/p", [[3]], unit="index", texts=np.array([["c"]]))
    rank = listed("n/rank/p", [[9.0]])
    table = neuron_table([along, token, rank])
    assert list(table.columns) == (
        "probe layer rank act act_token act_pos token token_id rank_value".split()
    )
    assert cells(table) == [["p", 0, 0, 2, "b", 1, "c", 3, 9]]


def test_a_third_axis_that_is_not_made_of_tokens_keeps_its_name():
    along = listed(
        "n/act", [[[1.0, 2.0]]], axes=("layer", "rank", "part"), labels={"part": ["attn", "mlp"]}
    )
    assert cells(neuron_table([along])) == [[None, 0, 0, 2, "mlp"]]
    assert list(neuron_table([along]).columns) == "probe layer rank act part".split()


def test_layers_with_names_and_other_first_axes():
    named = listed("n/act", [[1.0], [2.0]], labels={"layer": ["embed", "0"]})
    table = neuron_table([named])
    assert list(table.columns) == "probe layer layer_name rank act".split()
    assert cells(table) == [[None, 0, "embed", 0, 1], [None, 1, "0", 0, 2]]
    feature = listed(
        "n/top", [[5.0, 4.0]], axes=("feature", "rank"), labels={"feature": ["900"]},
        texts=np.array([["a", "b"]]),
    )  # fmt: skip
    assert cells(neuron_table([named, feature], "feature")) == [
        [None, 900, 0, 5, "a"],
        [None, 900, 1, 4, "b"],
    ]


def test_axis_table_is_a_row_per_entry():
    events = listed(
        "w/events", [0.5, np.nan], axes=("event",), labels={"event": ["a head", "a guard"]}
    )
    assert list(axis_table([events], "event").columns) == "probe event event_name events".split()
    assert cells(axis_table([events], "event")) == [
        [None, 0, "a head", 0.5],
        [None, 1, "a guard", None],
    ]
    labels = {"token": [" the", "7", " the"]}
    loss = listed("t/loss/p", [1, 2, 3], axes=("token",), labels=labels)
    change = listed("t/change/p", [0, 0, 1], axes=("token",), labels=labels)
    table = axis_table([events, loss, change][1:], "token")
    assert list(table.columns) == "probe index token loss change".split()
    assert cells(table) == [["p", 0, " the", 1, 0], ["p", 1, "7", 2, 0], ["p", 2, " the", 3, 1]]
    blocks = listed("r/first", [1, 2], axes=("block",), labels={"block": ["8", "24"]})
    assert cells(axis_table([blocks], "block")) == [[None, 8, 1], [None, 24, 2]]
    pairs = [
        listed("v/pair", [3, 1], axes=("rank",), unit="index", texts=np.array(["L1H0", "L0H1"])),
        listed("v/mass", [0.5], axes=("rank",)),
    ]
    assert cells(axis_table(pairs, "rank")) == [
        [None, 0, "L1H0", 3, 0.5],
        [None, 1, "L0H1", 1, None],
    ]


def test_numbers_that_stand_twice_are_names():
    digits = listed("r/first", [1, 2], axes=("word",), labels={"word": ["7", "07"]})
    assert cells(axis_table([digits], "word")) == [[None, 0, "7", 1], [None, 1, "07", 2]]
    assert long_frame([digits])["word"].tolist() == [0, 1]


def test_numbers_too_large_for_a_column_are_names():
    """The columns are of 32 bits."""
    fits = listed("r/first", [1, 2], axes=("user",), labels={"user": ["999999999", "5"]})
    assert long_frame([fits])["user"].tolist() == [999_999_999, 5]
    large = listed("r/first", [1, 2], axes=("user",), labels={"user": ["4000000000", "5"]})
    assert long_frame([large])["user"].tolist() == [0, 1]


def test_a_peak_that_is_no_index_is_a_measure():
    axes = ("layer", "rank", "pos")
    activation = Reading(key="n/activation/p", values=[[[1, 5, 2]]], axes=axes, unit="x")
    height = Reading(key="n/peak/p", values=[[7.5]], axes=axes[:2], unit="x")
    at = Reading(key="n/peak/p", values=[[2]], axes=axes[:2], unit="index")
    assert neuron_table([activation, height])[["activation", "pos", "peak"]].values.tolist() == [
        [5, 1, 7.5]
    ]
    pointed = neuron_table([activation, at])
    assert pointed[["activation", "pos"]].values.tolist() == [[2, 2]] and "peak" not in pointed
