"""Lines over the layers: every value, one colour a probe, scales that say what they are."""

import json

import numpy as np
import pytest

from tlens_callback.reading import Reading
from tlens_callback.render import is_curve, line_figure

RNG = np.random.default_rng(0)


def curve(measure, values, probe="capital", unit="nats", instrument="lens", **more):
    key = f"{instrument}/{measure}" + (f"/{probe}" if probe else "")
    return Reading(key=key, values=values, axes=("layer",), unit=unit, **more)


def lines(figure):
    """The traces with values; what is left are the entries of the legend."""
    return [trace for trace in figure.data if trace.x[0] is not None]


def strict_json(figure):
    return json.loads(json.dumps(figure.to_plotly_json()), parse_constant=pytest.fail)


def test_shows_every_value_in_a_panel_per_measure():
    readings = [
        curve(f"m{i}", RNG.normal(size=6), probe) for i in range(5) for probe in ("capital", "b")
    ]
    scalar = Reading(key="lens/total", values=1.0, unit="nats")
    figure = line_figure([*readings, scalar])
    assert len(lines(figure)) == 10
    for line, reading in zip(lines(figure), readings, strict=True):
        assert (np.array(line.y, np.float32) == reading.values).all()
        assert list(line.x) == list(range(6))
        assert f"{reading.measure} {reading.probe} %{{y:.3g}}" in line.hovertemplate
    assert [note.text for note in figure.layout.annotations] == [f"m{i}" for i in range(5)]
    assert [line.xaxis for line in lines(figure)[::2]] == ["x", "x2", "x3", "x4", "x5"]
    assert figure.layout.yaxis4.domain[1] < figure.layout.yaxis.domain[0]
    assert "bdata" not in json.dumps(strict_json(figure))


def test_a_probe_has_one_colour_and_one_entry():
    readings = [curve("kl", [1, 2], "a"), curve("kl", [1, 3], "b"), curve("entropy", [1, 4], "b")]
    figure = line_figure(readings)
    a, b, again = lines(figure)
    assert a.line.color != b.line.color == again.line.color
    named = [trace for trace in figure.data if trace.showlegend]
    assert [trace.name for trace in named] == ["a", "b"]
    assert [trace.line.color for trace in named] == [a.line.color, b.line.color]
    assert [trace.legendgroup for trace in figure.data] == ["a", "b", "b", "a", "b"]
    alone = line_figure([curve("norm", [1, 2], None)])
    assert not any(trace.showlegend for trace in alone.data)


def test_an_earlier_observation_is_dotted_behind():
    now = [curve("kl", [1, 2], "a"), curve("kl", [3, 4], "new")]
    first = [curve("kl", [5, 6], "a"), curve("gone", [7, 8], "a")]
    figure = line_figure(now, first, first_name="step 0")
    behind, *front = lines(figure)
    assert list(behind.y) == [5, 6] and behind.line.dash == "dot"
    assert behind.line.color == front[0].line.color and "(step 0)" in behind.hovertemplate
    assert [list(line.y) for line in front] == [[1, 2], [3, 4]]
    assert all(line.line.dash is None for line in front)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["a", "new", "step 0"]
    assert "step 0" not in line_figure(now, [], first_name="step 0").to_json()


def test_scales():
    figure = line_figure(
        [
            curve("fixed", [0.5, 0.6], unit="probability", limits=(0, 1)),
            curve("wide", [1, 1000]),
            curve("zero", [0, 1000]),
            curve("near", [1, 99]),
            curve("half", [1, 2], limits=(0, np.inf)),
            curve("rank", [0, 40_000], unit="rank"),
        ]
    )
    of = [figure.layout[f"yaxis{i or ''}"] for i in (0, 2, 3, 4, 5, 6)]
    assert of[0].range == pytest.approx((-0.03, 1.03))
    assert [axis.type for axis in of] == ["linear", "log", "linear", "linear", "linear", "log"]
    assert [axis.title.text for axis in of[:3]] == ["probability", "nats, log", "nats"]
    assert all(axis.range is None for axis in of[1:])
    # A rank is drawn one higher, and called by its own number.
    rank = lines(figure)[5]
    assert list(rank.y) == [1, 40_001] and list(rank.customdata) == [0, 40_000]
    assert "%{customdata}" in rank.hovertemplate
    named = dict(zip(of[5].tickvals, of[5].ticktext, strict=True))
    assert named[1] == "0" and named[101] == "100"


def test_the_range_is_also_that_of_what_is_behind():
    now, first = curve("norm", [1, 2]), curve("norm", [1, 2000])
    assert line_figure([now], [first]).layout.yaxis.type == "log"
    assert line_figure([now]).layout.yaxis.type == "linear"


def test_what_is_not_finite_is_a_gap():
    figure = line_figure(
        [
            curve("a", [1, np.nan, np.inf, -np.inf]),
            curve("b", [np.nan] * 4),
            curve("rank", [np.nan, 1, 2, 3], unit="rank"),
        ]
    )
    drawn = strict_json(figure)["data"]
    assert drawn[0]["y"] == [1, None, None, None] and drawn[1]["y"] == [None] * 4
    assert drawn[2]["y"] == [None, 2, 3, 4]


def test_layers_keep_their_names():
    chosen = line_figure([curve("a", [1, 2], labels={"layer": ["3", "11"]})])
    assert list(chosen.data[0].x) == [3, 11] and chosen.layout.xaxis.type == "linear"
    labels = {"layer": ["embed", "0", "1"]}
    named = line_figure([curve("b", [1, 2]), curve("a", [1, 2, 3], labels=labels)])
    assert list(named.layout.xaxis.categoryarray) == ["embed", "0", "1"]
    assert list(named.data[0].x) == ["0", "1"] and named.layout.xaxis.type == "category"


def test_texts_are_said_and_token_ids_left_out():
    words = np.array([" Paris", "<b>"])
    ids = curve("token", [3, 4], unit="index", texts=words)
    best = curve("best", [0.1, 0.2], texts=words)
    (line,) = lines(line_figure([ids, best]))
    assert list(line.text) == ["' Paris'", "'&lt;b&gt;'"] and "%{text}" in line.hovertemplate
    assert not is_curve(ids) and is_curve(best)
    assert is_curve(curve("argmax", [3, 4], unit="index"))


def test_names_are_no_markup():
    figure = line_figure([curve("a", [1, 2], "<b>x</b> %{z} </script>")])
    page = figure.to_html(include_plotlyjs=False)
    plain = line_figure([curve("a", [1, 2])]).to_html(include_plotlyjs=False)
    assert page.count("</script>") == plain.count("</script>")
    assert "<b>" not in json.dumps(strict_json(figure)) and "%{z}" not in figure.to_json()


def test_refuses_what_is_no_figure():
    with pytest.raises(ValueError, match="'layer'"):
        line_figure([Reading(key="a/b", values=1.0, unit="x")])
    with pytest.raises(ValueError, match="one instrument"):
        line_figure([curve("a", [1, 2]), curve("a", [1, 2], instrument="other")])
