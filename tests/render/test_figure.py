"""One reading as an interactive figure: its numbers, its places, and text that is no markup."""

import json

import numpy as np
import pytest

from tests.browser import needs_browser, opened
from tests.render.test_snippet import HOSTILE, hostile
from tests.sinks.samples import everything, pattern
from tlens_callback.reading import Reading
from tlens_callback.render.plain import plain

RNG = np.random.default_rng(0)
INF = float("inf")


def reading(values, axes=(), key="a/b", unit="nats", **more):
    return Reading(key=key, values=values, axes=axes, unit=unit, **more)


def matrix(rows):
    """[row, column] of what plotly has, None for what is not finite."""
    return np.array([[np.nan if v is None else v for v in row] for row in rows], np.float32)


def finite(values):
    return np.where(np.isfinite(values), values, np.nan)


def slices(figure):
    """[place, row, column] of all places of the slider, or of the only one."""
    if not figure.layout.sliders:
        return np.stack([matrix(figure.data[0].z)])
    steps = figure.layout.sliders[0].steps
    assert {step.method for step in steps} == {"restyle"} and not figure.frames
    return np.stack([matrix(step.args[0]["z"][0]) for step in steps])


@pytest.mark.parametrize("each", everything(), ids=lambda r: r.key)
def test_every_number_of_every_kind_of_reading(each):
    figure = each.to_plotly()
    if each.values.size == 0:
        assert not figure.data and str(each.values.shape) in figure.layout.annotations[0].text
        return
    (trace,) = figure.data
    if not each.axes:
        assert trace.value == (each.values if np.isfinite(each.values) else None)
    elif trace.type != "heatmap":
        got = np.array([np.nan if v is None else v for v in trace.y], np.float32)
        np.testing.assert_array_equal(got, finite(each.values))
    else:
        shape = each.values.shape if each.values.ndim > 1 else (each.values.size, 1)
        expected = finite(each.values).reshape(-1, *shape[-2:])
        np.testing.assert_array_equal(slices(figure), expected)
        np.testing.assert_array_equal(matrix(trace.z), expected[0])
    missing = int((~np.isfinite(each.values)).sum())
    assert (f"{missing} of {each.values.size} values" in figure.layout.title.text) == bool(missing)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = json.dumps(figure.to_plotly_json())
    json.loads(text, parse_constant=refuse)
    assert "bdata" not in text


def test_attention_has_a_place_per_head_and_root_colours():
    each = pattern()
    figure = each.to_plotly()
    steps = figure.layout.sliders[0].steps
    assert [step.label for step in steps][:2] == ["layer 1, head 0", "layer 1, head 1"]
    assert [step.label for step in pattern(heads=1).to_plotly().layout.sliders[0].steps][1] == (
        "layer 3, head 0"
    )
    (trace,) = figure.data
    assert (trace.zmin, trace.zmax) == (0, 1)
    # Half of the colours are for the lowest quarter.
    middle = trace.colorscale[len(trace.colorscale) // 2]
    assert middle[0] == pytest.approx(0.25)
    assert trace.y[1] == "1  The" and trace.x[4] == "4 &lt;/script&gt;"
    assert figure.layout.yaxis.title.text == "query" and figure.layout.xaxis.title.text == "key"
    assert figure.layout.yaxis.autorange == "reversed"


def test_at_shows_what_is_there():
    each = pattern()
    one = each.to_plotly(layer=1, head=2)
    np.testing.assert_array_equal(slices(one)[0], each.values[1, 2])
    assert not one.layout.sliders and "layer 3, head 2" in one.layout.title.text
    layer = reading(RNG.random((3, 2, 5)), ("layer", "head", "pos")).to_plotly(layer=1)
    assert not layer.layout.sliders and np.shape(layer.data[0].z) == (2, 5)
    assert "L1" in layer.layout.title.text
    for at, text in (
        ({"neuron": 1}, "no axis 'neuron'"),
        ({"layer": 2}, "layer=2 is not one of the 2 indices from 0"),
    ):
        with pytest.raises(ValueError, match=text):
            each.to_plotly(**at)


def test_too_much_says_what_to_choose():
    big = reading(np.zeros((40, 30, 30, 30), np.float32), ("layer", "head", "query", "key"))
    with pytest.raises(ValueError, match=r"1,080,000 values.*to_plotly\(layer=0\)"):
        big.to_plotly()
    assert len(big.to_plotly(layer=39, head=0).data) == 1
    with pytest.raises(ValueError, match="2,001 slices"):
        reading(np.zeros((2001, 1, 1)), ("x", "y", "z")).to_plotly()


def test_scales_are_fixed_and_diverge_around_zero():
    def ends(*args, **more):
        (trace,) = reading(*args, **more).to_plotly().data
        return trace.zmin, trace.zmax, trace.colorscale[len(trace.colorscale) // 2][1]

    axes, white = ("layer", "head"), "rgb(247,247,247)"
    assert ends([[0.2, 0.3]], axes, limits=(0, 1))[:2] == (0, 1)
    assert ends([[-1, 3]], axes) == (-3, 3, white)
    assert ends([[0.1, 0.2]], axes, limits=(-1, 1)) == (-1, 1, white)
    assert ends([[1, 3]], axes)[:2] == (1, 3) and ends([[1, 3]], axes)[2] != white


def test_lines_bars_and_names():
    line = reading([1, np.nan, INF, 4], ("layer",), limits=(0, 5)).to_plotly()
    assert (line.data[0].type, list(line.data[0].y)) == ("scatter", [1, None, None, 4])
    assert line.layout.yaxis.range[0] < 0 and line.layout.yaxis.range[1] > 5
    steps = reading([1, 2], ("update",), labels={"update": ["10", "30"]}).to_plotly()
    assert list(steps.data[0].x) == [10, 30]
    bars = reading([1, 2], ("feature",), labels={"feature": ["same", "same"]}).to_plotly()
    assert (bars.data[0].type, list(bars.data[0].x)) == ("bar", ["0 same", "1 same"])
    ids = reading([7, 3], ("rank",), unit="index", texts=np.array(["L1H2", "<b>"])).to_plotly()
    assert [row[0] for row in ids.data[0].text] == ["'L1H2'", "'&lt;b&gt;'"]
    assert ids.data[0].texttemplate == "%{text}" and not ids.data[0].showscale


def strings(value):
    """All strings in a figure's JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for each in value.values() for text in strings(each))
    elif isinstance(value, list | tuple):
        yield from (text for each in value for text in strings(each))


def test_hostile_text_is_escaped():
    def raw(figure):
        found = [text.replace("<extra></extra>", "") for text in strings(figure.to_plotly_json())]
        return [text for text in found if "<" in text or "\0" in text or "\u202e" in text]

    figures = [each.to_plotly() for each in hostile()]
    for figure in figures:
        assert raw(figure) == []
    assert any(plain(HOSTILE[0]) in text for text in strings(figures[1].to_plotly_json()))
    figures[0].update_layout(title_text=HOSTILE[0])
    assert raw(figures[0]) == [HOSTILE[0]]


@needs_browser()
def test_in_a_browser(tmp_path):
    each = pattern()
    harmful = [h for h in hostile() if HOSTILE[1] in h.key]
    figures = [each.to_plotly(), *(h.to_plotly() for h in harmful)]
    html = [f.to_html(full_html=False, include_plotlyjs=f is figures[0]) for f in figures]
    file = tmp_path / "figures.html"
    file.write_text("<!doctype html><meta charset=utf-8>" + "".join(html))
    with opened(file.as_uri()) as (page, faults):
        page.wait_for_selector(".slider-group")
        assert page.locator("script[src]").count() == 0 and page.locator("img").count() == 0
        rail = page.locator(".slider-rail-touch-rect").first.bounding_box()
        page.mouse.click(rail["x"] + rail["width"] - 2, rail["y"] + rail["height"] / 2)
        # The last place of the slider: layer 3, head 2. There query 8, key 2.
        page.wait_for_function(
            "value => Math.fround(document.querySelector('.plotly-graph-div').data[0].z[8][2]) "
            "=== value",
            arg=float(each.values[1, 2, 8, 2]),
        )
        where = """() => {
            const graph = document.querySelector(".plotly-graph-div");
            const {xaxis, yaxis} = graph._fullLayout, {left, top} = graph.getBoundingClientRect();
            return [left + xaxis._offset + xaxis.c2p(2), top + yaxis._offset + yaxis.c2p(8)];
        }"""
        page.mouse.move(*page.evaluate(where))
        page.wait_for_selector(".hoverlayer .hovertext")
        said = page.locator(".hoverlayer .hovertext").first.text_content()
        assert said == f"query 8 7, key 2  capital: {each.values[1, 2, 8, 2]:.6g}"
        assert faults == []
