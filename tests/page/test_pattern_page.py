"""The attention maps of the page: hovered, clicked, pinned, compared and led by the keys alone."""

import re

import numpy as np
import pytest

from tests.browser import needs_browser, opened
from tests.page.cells import MINUS, Cells, colour, is_said, tip
from tests.page.pages import page_of
from tests.sinks.samples import TOKENS
from tlens_callback.reading import Reading

pytestmark = needs_browser()

STEPS = (0, 10, 20)
CELL = r"query (\d+).*key (\d+)"
N = len(TOKENS)
LAYERS = ["1", "3"]
AXES = ("layer", "head", "query", "key")
FIRST = "#maps canvas"
SIGNED_TICKS = [f"{MINUS}1", f"{MINUS}0.25", "0", "0.25", "1"]


def attention(step, n=N, causal=True):
    scores = np.random.default_rng([step, n]).normal(0, 3, (2, 3, n, n))
    p = np.exp(np.where(np.tri(n, dtype=bool), scores, -np.inf) if causal else scores)
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


def both_ways(step):
    p = attention(step, causal=False)
    p[0, 0, 2, 5] = 0
    p[0, 0, 0, :3] = 0
    p[0, 0, 4, 4] = np.nan
    return p


def reading(name, values, probe, tokens, limits=(0, 1)):
    labels = {"query": tokens, "key": tokens, "layer": LAYERS}
    return Reading(key=f"{name}/{probe}", values=values, axes=AXES, unit="probability",
                   labels=labels, limits=limits)  # fmt: skip


def readings(step):
    yield reading("attention_patterns/pattern", attention(step), "capital", TOKENS)
    yield reading("attention_patterns/pattern", both_ways(step), "both ways", TOKENS)
    yield reading("other/unlimited", 3 * attention(step) - 1, "own", TOKENS, None)
    change = attention(step) - attention(0)
    yield reading("pattern_change/pattern", change, "capital", TOKENS, (-1, 1))
    if step == 10:
        yield reading("attention_patterns/pattern", attention(step, 4), "late", TOKENS[:4])
    if step < 20:
        long = [f" token{i} of the long probe" for i in range(200)]
        yield reading("attention_patterns/pattern", attention(step, 200), "long", long)
    yield Reading(key="target_scores/loss/bare", values=1.0, unit="nats")
    scores = np.random.default_rng(step).random((2, 3))
    yield Reading(key="head_scores/induction", values=scores, axes=AXES[:2], unit="probability",
                  labels={"layer": LAYERS}, limits=(0, 1))  # fmt: skip


def code(values, stored_as=np.float16):
    """Eight bits of a root scale, and back, as a page has what a store has, packed if causal."""
    stored = values.astype(stored_as).astype(np.float64)
    return (np.rint(np.sqrt(stored) * 254) / 254) ** 2


def signed_code(values):
    stored = values.astype(np.float16).astype(np.float64)
    x = np.rint(np.sign(stored) * np.sqrt(np.abs(stored)) * 127) / 127
    return np.sign(x) * x * x


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    address = page_of(folder, {step: list(readings(step)) for step in STEPS})
    with opened(address, allowed=folder.parent.as_uri()) as (page, faults):
        page.locator(FIRST).first.wait_for()
        yield page
        assert faults == []


@pytest.fixture
def page(browser):
    show(browser, step=20, other=None, layer=1, head=0, pins=[], probe="capital", query=None,
         pattern=None)  # fmt: skip
    browser.mouse.move(0, 0)
    return browser


def show(page, **values):
    page.evaluate("values => tlens.set(values)", values)
    settled(page)


def settled(page):
    """Until what was asked for is decoded and drawn."""
    page.evaluate("""async () => {
      const frame = () => new Promise((done) => requestAnimationFrame(done));
      await frame();
      for (const key of tlens.data.keys().filter((key) => /pattern|unlimited/.test(key))) {
        for (const step of tlens.data.stepsOf(key)) await tlens.data.ready(key, step);
      }
      await frame();
      await frame();
    }""")


def state(page, *names):
    return page.evaluate("names => names.map(name => tlens.state[name])", list(names))


def blocks(page):
    """Of each head that is shown: its name and score, and the captions of its maps."""
    return [
        (
            re.sub(r"\s+", " ", block.locator("div").first.inner_text()).strip(),
            block.locator("figure:visible figcaption").all_inner_texts(),
        )
        for block in page.locator("#maps .headblock").all()
    ]


def check(cells, stored, stops, high=1.0):
    """What every cell says and its colour, of values as they are stored; None: masked."""
    for (row, column), value in np.ndenumerate(stored):
        where, said = cells.says[row][column][:2]
        assert re.match(rf"query {row}\b.* → key {column}\b", where)
        if value is None:
            assert said == "masked" and cells.colours[row][column][:3] == [0xE4, 0xE6, 0xEA]
            continue
        assert is_said(said, np.float32(value)), (row, column, said, value)
        if np.isnan(value):
            assert cells.colours[row][column][:3] == [0xCF, 0xD3, 0xDA]
            continue
        root = np.sign(value) * np.sqrt(abs(value / high))
        share = round(root * 255) / 255 if stops == "sequential" else round((root + 1) * 128) / 256
        wanted = colour(share, stops)
        assert np.allclose(cells.colours[row][column][:3], wanted, atol=0.51), (row, column, value)


def masked(values):
    return np.where(np.tri(len(values), dtype=bool), values.astype(object), None)


def test_every_cell_says_what_was_stored(page):
    for step, (layer, head) in zip(STEPS, [(1, 0), (3, 2), (1, 1)], strict=True):
        show(page, step=step, layer=layer, head=head)
        cells = Cells(page, FIRST, CELL)
        assert cells.rows == cells.columns == [str(i) for i in range(N)]
        stored = attention(step)[LAYERS.index(str(layer)), head]
        assert np.abs(code(stored) - stored).max() < 0.005
        check(cells, masked(code(stored)), "sequential")
    assert cells.says[4][3][0] == "query 4 </script> → key 3 ↵"
    assert page.locator("#maps .ticks").first.inner_text().split() == ["0", "0.10", "0.40", "1"]


def test_attention_to_both_sides_with_zeros_and_what_is_no_number(page):
    show(page, probe="both ways")
    cells = Cells(page, FIRST, CELL)
    check(cells, code(both_ways(20)[0, 0], np.float32), "sequential")
    assert cells.says[2][5][1] == "0" and cells.says[4][4][1] == "not a number"


def test_signed_change_beside_attention(page):
    page.locator("#kind").select_option(label="pattern_change/pattern")
    settled(page)
    assert state(page, "pattern") == ["pattern_change/pattern"]
    change = signed_code(attention(20) - attention(0))[0, 0]
    check(Cells(page, FIRST, CELL), masked(change), "light")
    assert page.locator("#maps .ticks").first.inner_text().split() == SIGNED_TICKS
    page.locator("#probe").select_option("both ways")
    settled(page)
    said = page.locator("#patterntold").inner_text()
    assert "no pattern_change/pattern of the probe both ways" in said and said.endswith("capital.")
    assert not page.locator("#maps").is_visible()


def test_a_pattern_without_limits_says_whose_range_it_shows(page):
    show(page, probe="own")
    stored = (3 * attention(20) - 1)[0, 0]
    check(Cells(page, FIRST, CELL), stored, "light", float(np.abs(stored).max()))
    assert "range of what is shown" in page.locator("#maps .legend").first.inner_text()


def test_a_layer_that_was_not_recorded_is_not_said_to_be_left_out(tmp_path, browser):
    def of(step):
        induction = np.array([[0.9, 0.1], [0.2, 0.3]], np.float32)
        yield Reading(key="head_scores/induction", values=induction, axes=("layer", "head"),
                      unit="probability", limits=(0, 1))  # fmt: skip
        yield Reading(key="attention_patterns/pattern/p", values=np.eye(4)[None, None].repeat(2, 1),
                      axes=("layer", "head", "query", "key"), unit="probability", limits=(0, 1),
                      labels={"layer": ["1"]})  # fmt: skip

    before, address = browser.url, page_of(tmp_path, {step: list(of(step)) for step in (0, 1)})
    browser.goto(address)
    settled(browser)
    # The highest score is of L0H0, whose attention there is not: another is shown first.
    assert state(browser, "layer", "head") == [1, 1]
    assert browser.locator("#maps canvas").is_visible()
    show(browser, layer=0, head=0)
    told = browser.locator("#maps .told").first.inner_text()
    assert told == "The attention of L0H0 was not recorded, only that of 2 heads."
    browser.goto(before)
    settled(browser)


def test_a_click_follows_a_query(page):
    Cells(page, FIRST, CELL).click(5, 2)
    assert state(page, "query") == [5]
    settled(page)
    assert "query 5 中 is followed" in page.locator("#querytold").inner_text()
    cells = Cells(page, FIRST, CELL)
    cells.click(5, 4)
    assert state(page, "query") == [None]
    cells.click(6, 4)
    page.keyboard.press("Escape")
    assert state(page, "query") == [None]


def test_the_keys_alone(page):
    page.evaluate("document.activeElement.blur()")

    def tab_to(what):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({what!r})"):
                return
        raise AssertionError(f"{what} cannot be reached")

    tab_to("#pin")
    page.keyboard.press("Enter")
    settled(page)
    assert state(page, "pins") == [[[1, 0]]]
    tab_to(FIRST)
    page.keyboard.press("ArrowDown")  # shows where one is: the last query
    said = page.locator("#say").inner_text()
    assert said.startswith(f"query {N - 1} 7 → key 0 <s>") and said == "; ".join(tip(page))
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    stored = code(attention(20)[0, 0])
    assert is_said(tip(page)[1], stored[N - 2, 1]) and state(page, "step") == [20]
    page.keyboard.press("End")
    assert tip(page)[1] == "masked"
    page.keyboard.press("Enter")
    assert state(page, "query") == [N - 2]
    page.keyboard.press("Escape")
    assert state(page, "query") == [None] and tip(page) == []
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.title") == "unpin L1H0"
    page.keyboard.press("Enter")
    assert state(page, "pins") == [[]]


def test_pins_stand_side_by_side(page):
    show(page, pins=[[3, 2], [1, 1]])
    scores = np.random.default_rng(20).random((2, 3))
    found = blocks(page)
    for (text, captions), (row, head) in zip(found, [(0, 0), (1, 2), (0, 1)], strict=True):
        name, measure, value, *close = text.split(" ")
        assert (name, measure) == (f"L{LAYERS[row]}H{head}", "induction")
        assert is_said(value, np.float32(scores[row, head])) and captions == ["step 20"]
        assert close == ([] if (row, head) == (0, 0) else ["\u00d7"])
    check(
        Cells(page, "#maps .headblock:nth-child(2) canvas", CELL),
        masked(code(attention(20)[1, 2])),
        "sequential",
    )
    page.locator("button[title='unpin L3H2']").click()
    settled(page)
    assert state(page, "pins") == [[[1, 1]]] and len(blocks(page)) == 2
    show(page, head=1)  # which is pinned: it is not shown twice
    assert len(blocks(page)) == 1 and page.locator("#pin").inner_text() == "unpin L1H1"


def test_hovering_one_map_shows_the_place_in_all(page):
    show(page, pins=[[3, 2]])
    second = "#maps .headblock:nth-child(2) canvas"
    pixels = f"document.querySelector({second!r}).toDataURL()"
    before = page.evaluate(pixels)
    Cells(page, FIRST, CELL).hover(5, 2)
    assert page.evaluate(pixels) != before
    page.mouse.move(0, 0)
    assert page.evaluate(pixels) == before


def test_two_steps_and_their_difference(page):
    page.locator("#other").select_option("10")
    settled(page)
    a, b = (code(attention(step)[0, 0]) for step in (20, 10))
    difference = (a - b).astype(np.float32)
    most = np.abs(difference).max()
    ((_, captions),) = blocks(page)
    assert captions[:2] == ["step 20", "step 10"]
    text, shown = captions[2].split(", at most ")
    assert text == f"step 20 {MINUS} step 10" and is_said(shown, most)
    maps = [f"#maps figure:nth-child({i}) canvas" for i in (1, 2, 3)]
    for selector, stored, stops in zip(
        maps, (a, b, difference), ("sequential", "sequential", "light"), strict=True
    ):
        check(Cells(page, selector, CELL), masked(stored), stops)
    ticks = page.locator("#maps figure:nth-child(3) .ticks").inner_text().split()
    assert ticks == SIGNED_TICKS
    cells = Cells(page, maps[0], CELL)
    first, second, third = re.fullmatch(
        "step 20 (.*), step 10 (.*), difference (.*)", cells.says[7][3][2]
    ).groups()
    assert is_said(first, a[7, 3]) and is_said(second, b[7, 3]) and is_said(third, difference[7, 3])


def test_what_is_missing_is_said(page):
    show(page, probe="bare")
    said = page.locator("#patterntold").inner_text()
    assert "no attention pattern of the probe bare" in said and "capital, both ways" in said
    assert "bare (no patterns)" in page.locator("#probe option").all_inner_texts()
    show(page, probe="late", step=0)
    assert page.locator("#patterntold").inner_text() == "Not measured until step 10."
    show(page, step=20)
    assert blocks(page)[0][1] == ["step 10, the latest by step 20"]
    check(Cells(page, FIRST, CELL), masked(code(attention(10, 4)[0, 0])), "sequential")
    show(page, step=20, other=0)
    assert "Not measured until step 10." in page.locator("#maps .told").first.inner_text()


def test_many_tokens_are_thinned_and_whole_under_the_pointer(page):
    show(page, probe="long", step=10)
    cells = Cells(page, FIRST, CELL, every=21)
    assert len(cells.rows) == len(cells.columns) == 200
    stored = code(attention(10, 200)[0, 0])
    assert is_said(cells.says[189][42][1], stored[189, 42])
    assert cells.says[189][42][0] == (
        "query 189 ·token189·of·the·long·probe → key 42 ·token42·of·the·long·probe"
    )
