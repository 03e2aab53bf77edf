"""What a notebook shows for a reading: its numbers, and text that is no markup."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.browser import needs_browser, opened
from tests.byte_names import CASES
from tests.sinks.samples import everything, pattern
from tlens_callback.palette import NOT_A_NUMBER, ZERO, colour_range, colour_table, colours
from tlens_callback.reading import Reading
from tlens_callback.render import mosaic
from tlens_callback.render.bitmap import picture
from tlens_callback.render.snippet import snippet

RNG = np.random.default_rng(0)
INF = float("inf")
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "a\0b\n'\"",
    "\u202eabc שלום",
    "&lt;i&gt; %{x} </title></svg><svg onload=alert(3)>",
]


class Markup(HTMLParser):
    """What a browser makes of it: the elements with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


DRAWN = set("div b span table tr th td svg rect path polyline circle title text img bdi".split())


def foreign(html):
    """Elements and attributes that `snippet` has no use for: what somebody else's text became."""
    found = Markup(html)
    attributes = set("style title alt src role viewbox".split())
    attributes |= set("x y x1 d width height fill stroke stroke-width stroke-opacity".split())
    attributes |= set("points cx cy r text-anchor fill-opacity font-size".split())
    return [
        (tag, attrs)
        for tag, attrs in found.elements
        if tag not in DRAWN
        or not {*attrs} <= attributes
        or not (attrs.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        or "url(" in (attrs.get("style") or "")
    ]


def shown(text):
    """As it has to be read: what has no shape as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reading(values, axes=(), key="a/b", unit="nats", **more):
    return Reading(key=key, values=values, axes=axes, unit=unit, **more)


def hostile():
    """Every form that carries text, each with hostile key, unit, axis, labels and texts."""
    n = len(HOSTILE)
    values = RNG.normal(size=n)
    for name in HOSTILE:
        about = {"key": f"x/{name}", "unit": name}
        texts = np.array(HOSTILE)
        yield reading(1.5, **about, texts=np.array(name))
        yield reading(values, (name,), labels={name: HOSTILE}, texts=texts, **about)
        yield reading(values, ("layer",), labels={"layer": HOSTILE}, **about)
        yield reading(values, ("pos",), labels={"pos": HOSTILE}, **about)
        both = {"labels": {"pos": HOSTILE, name: HOSTILE}}
        yield reading(np.outer(values, values), (name, "pos"), **both, **about)
        yield reading(np.eye(n), (name, "pos"), **both, texts=np.tile(texts, (n, 1)), **about)
        yield reading(RNG.normal(size=(2, n, n)), ("z", name, "pos"), **both, **about)
        yield reading(RNG.normal(size=(n, n, 2)), (name, "pos", "rank"), **both, **about)
        yield reading(values, (name,), **about)
        yield reading(RNG.normal(size=(n, 90)), (name, "neuron"), **about)
        yield reading(np.ones((1, 1, n, n)) / n, ("layer", "head", "query", "key"), **about,
                      labels={"query": HOSTILE, "key": HOSTILE})  # fmt: skip


def test_hostile_text_is_text():
    for each in hostile():
        html = snippet(each)
        assert foreign(html) == [], each.axes
        found = Markup(html).texts
        assert shown(each.key) in found
        assert any(text.startswith(shown(each.unit)) for text in found)
        assert not any(c in html for c in "\0\u202e")
        if each.texts is not None and each.axes and len(each.axes) == 1:
            assert {shown(repr(text)) for text in HOSTILE} <= {*found}
        if each.axes == ("pos",):
            assert {shown(text) for text in HOSTILE} <= {*found}


def test_an_unescaped_text_would_be_found():
    html = snippet(reading([1.0, 2.0], ("x",), labels={"x": ["harmless", "other"]}))
    assert foreign(html) == []
    for bad in (
        HOSTILE[0],
        f'<b title="{HOSTILE[1]}">',
        HOSTILE[4],
        "<b onclick=x>",
        "<img src=x>",
    ):
        assert foreign(html.replace("harmless", bad)), bad


@needs_browser()
def test_in_a_browser_nothing_runs(tmp_path):
    file = tmp_path / "book.html"
    readings = [*hostile(), *everything()]
    file.write_text("<!doctype html><meta charset=utf-8>" + "".join(map(snippet, readings)))
    with opened(file.as_uri()) as (page, faults):
        assert page.locator("b", has_text="x/").count() > len(HOSTILE)
        assert page.locator("script").count() == 0 and faults == []
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    file.write_text(f"<!doctype html>{HOSTILE[0]}")
    with opened(file.as_uri()) as (_, faults):
        assert faults == ["dialog: 1"]


def test_characters_that_are_cut_into_bytes_are_legible():
    tokens, words = CASES["two and one"]
    html = snippet(
        Reading(
            key="token_loss/loss/p",
            values=[1, 2, 3, 4],
            axes=("token",),
            unit="nats",
            labels={"token": tokens},
        )
    )
    shown = re.findall('<bdi[^>]*title="([^"]*)">([^<]*)</bdi>', html)
    assert [text for _, text in shown] == words
    assert shown[0][0] == "0: &lt;0xE4&gt;&lt;0xB8&gt;: 1"


def test_a_matrix_is_a_table_of_its_values():
    values = RNG.random((30, 9)).astype(np.float32)
    each = reading(values, ("layer", "head"), "head_scores/induction", limits=(0, 1))
    found = Markup(snippet(each))
    cells = [cell for cell in found.all("td") if "title" in cell]
    said = [re.fullmatch(r"L(\d+)H(\d+): (\S+)", cell["title"]).groups() for cell in cells]
    assert [(int(i), int(j)) for i, j, _ in said] == list(np.ndindex(30, 9))
    np.testing.assert_allclose([float(v) for *_, v in said], values.ravel(), rtol=1e-6)
    assert {f"{v:.3g}" for v in values.ravel()} <= {*found.texts}
    assert "nats · layer 30 x head 9 · limits 0..1" in found.texts
    i, j = np.unravel_index(values.argmax(), values.shape)
    assert f"largest {values.max():.4g} at L{i}H{j}" in "".join(found.texts)
    red, green, blue = colours(each, (0, 1))[0, 0]
    assert cells[0]["style"].startswith(f"background:#{red:02x}{green:02x}{blue:02x};")


def test_attention_is_the_mosaic():
    for each in (pattern(), pattern(heads=1)):
        (image,) = Markup(snippet(each)).all("img")
        assert base64.b64decode(image["src"].split(",")[1]) == mosaic(each)
    whole = pattern()
    one = reading(
        whole.values[0, 1],
        ("query", "key"),
        unit="probability",
        labels={"key": whole.labels["key"]},
    )
    (image,) = Markup(snippet(one)).all("img")
    png = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
    assert png.mode == "P" and png.width >= 440
    # Of more values than a notebook should hold it says which it shows.
    big = reading(np.zeros((40, 1, 300, 300), np.float32), ("layer", "head", "query", "key"))
    html = snippet(big)
    assert "the first 22 of 40 layers, 1 of 1 heads" in html and len(html) < 500_000


def test_small():
    rng = np.random.default_rng(0)
    p = np.tril(rng.random((30, 9, 48, 48)))
    p = reading(p / p.sum(-1, keepdims=True), ("layer", "head", "query", "key"), limits=(0, 1))
    assert len(snippet(p)) < 600_000
    for shape in ((32, 32), (40, 64), (30, 3072), (200, 9), (4, 5, 6, 7), (5000,)):
        axes = tuple("abcd"[: len(shape)])
        assert len(snippet(reading(rng.normal(size=shape), axes))) < 260_000, shape


def test_long_lists_are_cut_and_counted():
    many = reading(np.arange(250), ("thing",), labels={"thing": [f"t{i}" for i in range(250)]})
    found = Markup(snippet(many)).texts
    assert "... 230 more thing" in found and "t19" in found and "t20" not in found
    ranked = reading(
        np.arange(3 * 50).reshape(3, 50), ("layer", "rank"), unit="index",
        texts=np.arange(150).astype(str).reshape(3, 50),
    )  # fmt: skip
    found = Markup(snippet(ranked)).texts
    assert "... 34 more rank" in found and "'115'" in found and "'116'" not in found
    found = Markup(snippet(reading(np.zeros((3, 4, 2, 2)), ("a", "b", "c", "d")))).texts
    assert "... 8 more of a x b" in found and "a 0, b 3" in found and "a 1, b 0" not in found


def test_what_is_not_finite_is_said():
    found = "".join(Markup(snippet(reading([np.nan, 1, INF, -INF, np.nan], ("layer",)))).texts)
    assert "2 of 5 NaN · 1 of 5 inf · 1 of 5 -inf" in found
    assert "smallest 1 at L1" in found and "largest 1 at L1" in found
    for value, said in ((np.nan, "NaN"), (INF, "inf"), (-INF, "-inf"), (0.25, "0.25")):
        assert said in Markup(snippet(reading(value))).texts
    matrix = reading([[np.nan, INF], [1, 2]], ("x", "y"))
    assert [t for t in Markup(snippet(matrix)).texts if t in ("NaN", "inf")] == ["NaN", "inf"]
    assert (colours(matrix, (1, 2))[0] == colour_table()[NOT_A_NUMBER]).all()
    assert "4 of 4 NaN" in snippet(reading(np.full((2, 2), np.nan), ("x", "y")))


def test_a_line_has_its_values_and_gaps():
    values = [0.5, 2, np.nan, 3, INF, 2, 1]
    found = Markup(snippet(reading(values, ("layer",), limits=(0, INF))))
    points = [
        [tuple(map(float, p.split(","))) for p in each["points"].split()]
        for each in found.all("polyline")
    ]
    assert [len(each) for each in points] == [2, 2]
    said = [t for t in found.texts if t.startswith("layer ") and ": " in t]
    assert said == ["layer 0: 0.5", "layer 1: 2", "layer 3: 3", "layer 5: 2", "layer 6: 1"]
    # Heights are linear between the limit 0 and the largest value.
    (frame,) = found.all("rect")
    top, height = float(frame["y"]), float(frame["height"])
    drawn = [float(circle["cy"]) for circle in found.all("circle")]
    expected = [top + (1 - v / 3) * height for v in (0.5, 2, 3, 2, 1)]
    np.testing.assert_allclose(drawn, expected, atol=0.06)
    # A spike among many values is drawn.
    long = np.zeros(5000)
    long[3211] = 7
    spike = Markup(snippet(reading(long, ("update",))))
    heights = [float(p.split(",")[1]) for p in spike.all("polyline")[0]["points"].split()]
    assert len(heights) < 1100 and min(heights) == pytest.approx(top)


def test_numbers_that_are_names_are_whole():
    found = Markup(snippet(reading([[8403, 1e6]], ("layer", "rank"), unit="index"))).texts
    assert "8403" in found and "1000000" in found
    assert "8403" in Markup(snippet(reading(8403, unit="index"))).texts


def test_a_large_matrix_keeps_what_is_farthest_from_zero():
    values = np.zeros((700, 1300), np.float32)
    values[699, 5], values[3, 1299], values[0, 0] = -4, 3, np.nan
    each = reading(values, ("layer", "neuron"), limits=(-4, 4))
    html = picture(each, colour_range(each))
    png = base64.b64decode(Markup(html).all("img")[0]["src"].split(",")[1])
    pixels = np.array(Image.open(io.BytesIO(png)))
    assert "farthest from 0 of 3 x 3 values" in html and pixels.shape == (234, 434, 3)
    table = colour_table(diverging=True)
    assert (pixels[233, 1] == table[0]).all() and (pixels[0, 0] == table[NOT_A_NUMBER]).all()
    assert (pixels[1, 433] == table[round(7 / 8 * 2 * ZERO)]).all()
    middle = (pixels == table[ZERO]).all(-1)
    assert middle.sum() == middle.size - 3


@pytest.mark.parametrize("axes", [(), ("a",), ("layer", "head"), ("query", "key"), tuple("abcde")])
def test_any_axes(axes):
    shape = tuple(range(2, 2 + len(axes)))
    for size in (shape, (*shape[:-1], 0) if shape else (), tuple(1 for _ in shape)):
        html = snippet(reading(RNG.normal(size=size), axes))
        assert foreign(html) == []
        assert ("no values" in html) == (0 in size)


def test_colours():
    assert colour_range(reading([1, 3], ("x",))) == (1, 3)
    assert colour_range(reading([-1, 3], ("x",))) == (-3, 3)
    assert colour_range(reading([-1, 0.5], ("x",), limits=(-INF, 2.5))) == (-2.5, 2.5)
    assert colour_range(reading([5, 7], ("x",), limits=(0, INF))) == (0, 7)
    assert colour_range(reading([5, 7], ("x",), limits=(0, 1))) == (0, 1)
    assert colour_range(reading([0, 0], ("x",))) == (0, 1)
    attention = reading([[0.25, 1.0]], ("query", "key"))
    other = reading([[0.25, 1.0]], ("layer", "pos"))
    assert (colours(attention, (0, 1))[0, 0] == colour_table()[120]).all()
    assert (colours(other, (0, 1))[0, 0] == colour_table()[60]).all()


@pytest.mark.parametrize("large", [1e20, 3e38])
def test_large_numbers(large):
    """Where float32 has no number for the width of the range, or for one more."""
    same, opposite = [large, large], [-large, large]
    assert colour_range(reading(same, ("x",)))[1] > np.float32(large)
    rgb = colours(reading([opposite], ("layer", "pos")), (-large, large))[0]
    assert (rgb == colour_table(diverging=True)[[0, 238]]).all()
    for values in (same, opposite):
        assert "<circle" in snippet(reading(values, ("layer",)))
