"""Tables against loops over the readings."""

import numpy as np
import pandas as pd
import pytest

from tlens_callback.reading import Reading
from tlens_callback.render import long_frame, neuron_table

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
    ]


def test_long_frame_is_a_row_per_number():
    frame = long_frame(readings())
    assert list(frame.columns) == (
        "key instrument measure probe unit layer head block query key_index value".split()
    )
    expected = []
    for r in readings():
        for index in np.ndindex(r.values.shape):
            row = dict.fromkeys(("layer", "head", "block", "query", "key_index"))
            for axis, i in zip(r.axes, index, strict=True):
                # Block lengths and layers go by their labels, tokens by their position.
                named = axis in ("block", "layer") and axis in r.labels
                row["key_index" if axis == "key" else axis] = int(r.labels[axis][i]) if named else i
            names = (r.key, r.instrument, r.measure, r.probe, r.unit)
            expected.append((*names, *row.values(), float(r.values[index])))
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
    with pytest.raises(ValueError, match="one key"):
        neuron_table([a, a])
    with pytest.raises(ValueError, match="other layers or ranks"):
        neuron_table([a, neurons("p", labels={"layer": ["4", "5"]})[1]])
    assert neuron_table([]).empty and isinstance(neuron_table([]), pd.DataFrame)
