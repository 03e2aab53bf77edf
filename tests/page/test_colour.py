"""The page's colours: even in lightness, told apart by the colour-blind, and text one can read."""

import re
from importlib.resources import files

import numpy as np
import pytest

from tests.browser import needs_browser, opened
from tests.page.cells import STOPS, colour, number
from tlens_callback.page import template
from tlens_callback.palette import colour_range, is_diverging, is_fixed, slots
from tlens_callback.reading import Reading

ASSETS = files("tlens_callback.page") / "assets"

# Machado et al. 2009, severity 1, for linear RGB.
BLIND = {
    "protan": "0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216 -0.003882 -0.048116 1.051998",
    "deutan": "0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413 -0.011820 0.042940 0.968881",
    "tritan": "1.255528 -0.076749 -0.178779 -0.078411 0.930809 0.147602 0.004733 0.691367 0.303900",
}
XYZ = "0.4124564 0.3575761 0.1804375 0.2126729 0.7151522 0.0721750 0.0193339 0.1191920 0.9503041"


def matrix(numbers):
    return np.array(numbers.split(), float).reshape(3, 3)


def linear(rgb):
    share = np.asarray(rgb, float) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lab(rgb, blind=None):
    """CIE 1976 L*a*b* (D65) of 8-bit sRGB, as somebody who lacks a kind of cone sees it."""
    light = linear(rgb)
    if blind:
        light = np.clip(light @ matrix(BLIND[blind]).T, 0, 1)
    x = light @ matrix(XYZ).T / [0.95047, 1, 1.08883]
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )


@pytest.fixture(scope="module")
def maps():
    """The tables that the page paints with."""
    scripts = [(ASSETS / name).read_text() for name in ("colour.js", "draw.js")]
    source = "\n".join([template.colour_script(), *scripts])
    ask = """() => { %s
      const legends = {};
      for (const root of [false, true]) for (const diverging of [false, true]) {
        const scale = { low: diverging ? -2 : 0, high: 2, diverging, root, given: true };
        const node = legend(scale, "logit");
        legends[`${diverging ? "light" : "sequential"} ${root ? "root" : "linear"}`] = {
          bar: node.querySelector(".bar").getAttribute("style"),
          ticks: [...node.querySelectorAll(".ticks span")].map((tick) => {
            const place = parseFloat(tick.style.left);
            return [tick.textContent, place, shade(scale, valueAt(scale, place / 100))];
          }),
          colours: Array.from({ length: 65 }, (_, i) => shade(scale, valueAt(scale, i / 64))) };
      }
      const entry = (limits) => ({ limits });
      return { sequential: SEQUENTIAL, ...DIVERGING, lines: LINES, legends,
        zero: shade(scaleOf(entry([-3, 3]), []), 0), given: scaleOf(entry([-1, 3]), []),
        open: scaleOf(entry([0, Infinity]), [0.5, 2, NaN]), below: scaleOf(entry(null), [-3, -1]),
        none: scaleOf(entry(null), [NaN]),
        still: scaleOf(entry([0, 1]), [0, 0], { change: true }) };
    }"""
    with opened("about:blank") as (page, faults):
        found = page.evaluate(ask % source)
        assert faults == []
    return found


@needs_browser()
@pytest.mark.parametrize("name", STOPS)
def test_the_tables_are_the_maps_written_here(maps, name):
    table = maps[name]
    assert len(table) == (256 if name == "sequential" else 257)
    wanted = [colour(i / (len(table) - 1), name) for i in range(len(table))]
    assert np.allclose(table, wanted, atol=0.5 + 1e-9)


@needs_browser()
@pytest.mark.parametrize("blind", [None, *BLIND])
def test_the_sequential_map_grows_lighter_all_the_way(maps, blind):
    light = lab(maps["sequential"], blind)[:, 0]
    # Whole numbers of 8 bits: a step is a third of a unit, its rounding half of one.
    assert np.diff(light).min() > (-0.15 if blind is None else -0.6)
    assert np.diff(light[::8]).min() > (1 if blind is None else 0.3)
    assert light[-1] - light[0] > 70


@needs_browser()
@pytest.mark.parametrize("name", ["light", "dark"])
def test_the_diverging_maps_are_symmetric_around_a_neutral_zero(maps, name):
    seen = lab(maps[name])
    light, middle = seen[:, 0], 128
    below, above = light[middle::-1], light[middle:]
    assert np.abs(below - above).max() < 2
    away = 1 if name == "dark" else -1
    for arm in (below, above):
        assert (np.diff(arm) * away).min() > -0.3 and (np.diff(arm[::8]) * away).min() > 1
    assert np.abs(seen[middle, 1:]).max() < 0.5  # no hue
    assert len(set(maps[name][middle])) == 1


@needs_browser()
@pytest.mark.parametrize("name", ["light", "dark"])
@pytest.mark.parametrize("blind", [None, *BLIND])
def test_both_signs_are_told_apart(maps, name, blind):
    seen = lab(maps[name], blind)
    apart = np.linalg.norm(seen[128::-1] - seen[128:], axis=1)
    assert apart[26:].min() > 12  # from a fifth of the range on; 2.3 is just noticeable


def test_a_red_and_a_green_that_look_alike_would_be_seen():
    pair = np.array([[224, 60, 40], [90, 168, 40]])
    assert np.linalg.norm(np.subtract(*lab(pair))) > 40
    assert np.linalg.norm(np.subtract(*lab(pair, "deutan"))) < 12


@needs_browser()
def test_zero_has_the_colour_of_the_middle(maps):
    assert maps["zero"] == [0xF7] * 3


INF = float("inf")
LIMITS = [
    *(None, (0, 1), (-3, 3), (-1, 3), (-3, -1), (-2, 0), (2, 5), (-INF, INF)),
    *((0, INF), (5, INF), (-INF, 2.5), (-INF, 0)),
]
VALUES = [
    *([0.5, 2], [-3, -1], [-4, 1], [0, 0], [7e7, 7e7], [float("nan")] * 2),
    *([0.25, INF], [-INF, -2.0], [float("nan"), -0.5]),
]


@pytest.fixture(scope="module")
def asked():
    """A page with the scripts of colours, to be asked for what they give."""
    with opened("about:blank") as (page, faults):
        source = "\n".join([template.colour_script(), (ASSETS / "colour.js").read_text()])
        yield lambda what, given: page.evaluate(f"(given) => {{ {source}\n{what} }}", given)
        assert faults == []


def page_range(limits, values):
    """The range of the package's pictures; but without a lower limit the page begins at zero or
    below, and negative values are never on the sequential scale."""
    values = [*values, 0] if limits is None or limits[0] == -INF else values
    reading = Reading(key="a/b", values=values, axes=("pos",), unit="nats", limits=limits)
    low, high = colour_range(reading)
    return (low, high) if low >= 0 else (-max(-low, high), max(-low, high))


@needs_browser()
def test_the_page_follows_the_rule_of_ranges(asked):
    cases = [(limits, values) for limits in LIMITS for values in VALUES]
    ask = """return given.map(([limits, values]) => {
      const { low, high, diverging, given } = scaleOf({ limits, unit: "nats" }, values);
      return [[low, high], diverging, given];
    });"""
    found = asked(ask, [[limits and list(limits), values] for limits, values in cases])
    for (limits, values), (ends, diverging, fixed) in zip(cases, found, strict=True):
        assert ends == pytest.approx(page_range(limits, values)), (limits, values)
        assert diverging == is_diverging(tuple(ends)) and fixed == is_fixed(limits)
    # The rules differ only where the docstring above says so.
    plain = [(limits, values) for limits, values in cases if limits and limits[0] >= 0]
    for limits, values in plain:
        reading = Reading(key="a/b", values=values, axes=("pos",), unit="nats", limits=limits)
        assert page_range(limits, values) == colour_range(reading)
    assert len(plain) == 4 * len(VALUES)


@needs_browser()
@pytest.mark.parametrize("limit", [None, 2.0])
def test_the_page_follows_the_square_root_scale(asked, limit):
    values = np.linspace(0 if limit is None else -limit, limit or 1, 97)
    scale = {"low": values[0], "high": limit or 1, "diverging": limit is not None, "root": True}
    ask = "return given.values.map((value) => placeOf(given.scale, value));"
    places = np.array(asked(ask, {"scale": scale, "values": values.tolist()}))
    shares = slots(values, limit) / (239 if limit is None else 238)
    size = 255 if limit is None else 256
    assert np.abs(places / size - shares).max() <= 0.5 / size + 0.5 / 238
    assert np.abs(places / size - np.linspace(0, 1, 97)).max() > 0.1, "a linear one is another"


@needs_browser()
def test_scales(maps):
    def ends(name):
        scale = maps[name]
        return scale["low"], scale["high"], scale["diverging"], scale["given"]

    assert ends("given") == (-3, 3, True, True)  # of both signs: zero in the middle
    assert ends("open") == (0, 2, False, False)
    assert ends("below") == (-3, 3, True, False)
    assert ends("none") == (0, 1, False, False)
    assert ends("still") == (-1, 1, True, False)


@needs_browser()
@pytest.mark.parametrize("name", ["sequential", "light"])
@pytest.mark.parametrize("kind", ["root", "linear"])
def test_a_colour_bar_says_the_truth(maps, name, kind):
    legend = maps["legends"][f"{name} {kind}"]
    # The bar runs evenly through the map, whatever the scale; the ticks say what stands there.
    for i, rgb in enumerate(legend["colours"]):
        assert np.allclose(rgb, colour(i / 64, name), atol=4)
    for text, place, rgb in legend["ticks"]:
        share = place / 100
        x = share if name == "sequential" else 2 * share - 1
        value = 2 * (np.sign(x) * x * x if kind == "root" else x)
        shown, half = number(text)
        assert shown == pytest.approx(value, abs=half * 1e-3 + 1e-9)  # a round number, exactly
        assert np.allclose(rgb, colour(share, name), atol=4)
    assert re.findall(r"rgb\(([\d,]+)\)", legend["bar"]) == [
        ",".join(map(str, rgb)) for rgb in legend["colours"]
    ]


def contrast(a, b):
    """WCAG 2."""
    bright, dull = sorted((float(linear(c) @ matrix(XYZ)[1]) for c in (a, b)), reverse=True)
    return (bright + 0.05) / (dull + 0.05)


def rgb(text):
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)]


def themes():
    """The variables of each block of the stylesheet that sets them, over the light ones."""
    style = (ASSETS / "style.css").read_text()
    blocks = re.findall(r":root[^{]*\{([^}]*--paper[^}]*)\}", style)
    found = [dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})\b", block)) for block in blocks]
    return [{**found[0], **block} for block in found]


def test_text_has_contrast_in_both_themes():
    light, *dark = themes()
    assert len(dark) == 2 and dark[0] == dark[1]
    for theme in (light, dark[0]):
        for ground in ("paper", "card"):
            for text in ("ink", "faint", "mark", "accent"):
                assert contrast(rgb(theme[text]), rgb(theme[ground])) >= 4.5, (text, ground)
    assert contrast([0x59, 0x60, 0x70], [0xA0] * 3) < 4.5


@needs_browser()
def test_curves_are_seen_in_both_themes(maps):
    assert len(set(maps["lines"])) == len(maps["lines"]) == 8
    for theme in themes():
        for line in maps["lines"]:
            assert min(contrast(rgb(line), rgb(theme[g])) for g in ("paper", "card")) >= 3
