"""The matrix of the page: what hovering, clicking and the keys say equals what was stored."""

import numpy as np
import pytest

from tests.browser import needs_browser, opened, until
from tests.page.cells import MINUS, Cells, colour, is_said, number, tip
from tests.page.pages import page_of
from tests.sinks.samples import ODD
from tlens_callback.reading import Reading

pytestmark = needs_browser()

STEPS = (0, 10, 20)
MATRIX = r"^L(\d+)H(\d+) "
MODULES = [
    "q_proj",
    "self_attn.k_proj",
    "</script><script>alert(1)</script>",
    "\u202eodd\0",
    "x" * 300,
]
TOKENS = ["<s>", " The", "\n", "中", " a"]
LAYERS = ["1", "3"]


def values(step, *shape, low=0.0, high=1.0):
    return np.random.default_rng([step, *shape]).uniform(low, high, shape).astype(np.float32)


def induction(step):
    one = values(step, 2, 3)
    one[0, 1] = 0
    one[1, 2] = np.nan if step == 10 else 0.5
    return one


def fine(step):
    return np.full((60, 60), 0.7 + step * 1e-6, np.float32)


def signed(step):
    one = values(step, 2, 3, low=-2, high=1 + step / 10)
    one[0, 0] = 0
    return one


def readings(step):
    heads = ("layer", "head")
    layers = {"layer": LAYERS}
    yield Reading(key="head_scores/induction", values=induction(step), axes=heads,
                  unit="probability", labels=layers, limits=(0, 1))  # fmt: skip
    yield Reading(key="head_scores/induction_spread", values=values(step + 1, 2, 3, high=0.1),
                  axes=heads, unit="probability", labels=layers, limits=(0, 0.5))  # fmt: skip
    yield Reading(key="head_scores/induction_by_block", values=values(step, 3, 2, 3),
                  axes=("block", *heads), unit="probability", limits=(0, 1),
                  labels={"block": ["8", "12", "24"], **layers})  # fmt: skip
    yield Reading(key="attribution/head/a, b", values=signed(step), axes=heads, unit="logit")
    if step:
        yield Reading(key="late/score", values=np.full((2, 3), -3.0), axes=heads, unit="nats")
    yield Reading(key="adapter/norm", values=values(step, 2, 5), axes=("layer", "module"),
                  unit="norm", labels={"module": MODULES})  # fmt: skip
    ids = np.random.default_rng(step).integers(0, len(ODD), (4, 5))
    yield Reading(key="lens/token_by_pos/p", values=ids, axes=("layer", "pos"), unit="index",
                  labels={"pos": TOKENS}, texts=np.array(ODD)[ids])  # fmt: skip
    yield Reading(key="lens/kl_by_pos/p", values=values(step, 4, 5), axes=("layer", "pos"),
                  unit="nats", labels={"pos": TOKENS}, limits=(0, float("inf")))  # fmt: skip
    yield Reading(key="top_neurons/neuron/p", values=ids, axes=("layer", "rank"), unit="index")
    yield Reading(
        key="wide/score", values=values(step, 64, 64), axes=heads, unit="bits", limits=(0, 1)
    )
    yield Reading(key="fine/score", values=fine(step), axes=heads, unit="probability")
    yield Reading(
        key="large/score", values=values(step, 150, 140), axes=("layer", "source"), unit="bits"
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("page"), {step: list(readings(step)) for step in STEPS})


@pytest.fixture(scope="module")
def browser(address):
    with opened(address) as (page, faults):
        page.locator("#matrix").wait_for()
        yield page
        assert faults == []


@pytest.fixture
def page(browser):
    show(browser, step=20, score="head_scores/induction", change=False, layer=1, head=0, pins=[])
    browser.mouse.move(0, 0)
    return browser


def show(page, **state):
    page.evaluate("values => tlens.set(values)", state)
    settled(page)


def settled(page):
    """Two frames: one to draw in, and one after it."""
    frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    page.evaluate(frame)


def state(page, *names):
    return page.evaluate("names => names.map(name => tlens.state[name])", list(names))


def test_every_cell_says_what_was_stored(page):
    for step in STEPS:
        show(page, step=step)
        cells = Cells(page, "#matrix", MATRIX)
        assert (cells.rows, cells.columns) == (LAYERS, ["0", "1", "2"])
        spread = values(step + 1, 2, 3, high=0.1)
        for (row, column), value in np.ndenumerate(induction(step)):
            first, then = cells.says[row][column]
            start = f"L{LAYERS[row]}H{column} induction "
            assert first.startswith(start)
            now, plus = first.removeprefix(start).split(" ± ")
            assert is_said(now, value) and is_said(plus, spread[row, column])
            before, change = then.split(" at step 0, change ")
            assert is_said(before, induction(0)[row, column])
            assert is_said(change, value - induction(0)[row, column])
    assert number(f"{MINUS}1.2e+5") == (-120000, 5000) and not is_said("0.93", np.float32(0.94))


def test_a_cell_has_the_colour_of_its_value(page):
    show(page, step=10)
    cells = Cells(page, "#matrix", MATRIX)
    for (row, column), value in np.ndenumerate(induction(10)):
        wanted = (
            (0xCF, 0xD3, 0xDA)
            if np.isnan(value)
            else colour(round(float(value) * 255) / 255, "sequential")
        )
        assert np.allclose(cells.colours[row][column][:3], wanted, atol=0.51)


def test_a_signed_score_diverges_around_zero_within_the_range_of_all_steps(page):
    show(page, score="attribution/head/a, b", step=10)
    most = max(np.abs(signed(step)).max() for step in STEPS)
    cells = Cells(page, "#matrix", MATRIX)
    for (row, column), value in np.ndenumerate(signed(10)):
        share = round((float(value) / most + 1) * 128) / 256
        assert np.allclose(cells.colours[row][column][:3], colour(share, "light"), atol=0.51)
        assert is_said(cells.says[row][column][0].split(" ")[-1], value)
    assert cells.colours[0][0][:3] == [0xF7] * 3  # exactly zero
    legend = page.locator("#matrix").locator("xpath=../..").locator(".legend")
    low, middle, high = legend.locator(".ticks span").all_inner_texts()
    assert is_said(low, -most) and middle == "0" and is_said(high, most)
    assert "range of all steps" in legend.inner_text()


def test_change_since_the_first_step(page):
    page.locator("#change").check()
    settled(page)
    assert state(page, "change") == [True]
    most = max(np.nanmax(np.abs(induction(step) - induction(0))) for step in STEPS)
    cells = Cells(page, "#matrix", MATRIX)
    for (row, column), value in np.ndenumerate(induction(20) - induction(0)):
        first, then = cells.says[row][column]
        assert is_said(first.split(" change ")[1], value)
        assert is_said(then.split(" ± ")[0], induction(20)[row, column])
        share = round((float(value) / most + 1) * 128) / 256
        assert np.allclose(cells.colours[row][column][:3], colour(share, "light"), atol=0.51)
    assert "largest change of all steps" in page.locator(".legend").first.inner_text()


def test_a_change_is_not_that_of_rounded_numbers(page):
    """In float16 a score of 0.7 moves in steps of 0.0005."""
    show(page, score="fine/score", step=20)
    said = Cells(page, "#matrix", MATRIX, every=30).says[30][30]
    assert is_said(said[0].split(" ")[-1], 0.7 + 20e-6)
    change = float(fine(20)[30, 30] - fine(0)[30, 30])
    assert is_said(said[1].split(" change ")[1].removeprefix("+"), change)
    assert change == pytest.approx(20e-6, rel=0.01)


def test_the_list_of_those_that_changed_most(page):
    show(page, score="attribution/head/a, b", step=20, change=False)
    page.locator("#order").select_option(label="most changed")
    settled(page)
    order = np.argsort(-np.abs(signed(20) - signed(0)).ravel(), kind="stable")
    listed = page.locator("#top-heads tbody tr:visible button").all_inner_texts()
    assert listed == [f"L{i // 3}H{i % 3}" for i in order]
    page.locator("#order").select_option(label="largest")


def test_no_more_heads_are_pinned_than_a_link_holds(page):
    show(page, score="wide/score", pins=[[0, i] for i in range(12)])
    cells = Cells(page, "#matrix", MATRIX, every=60)
    cells.click(5, 5, modifiers=["Shift"])
    assert len(state(page, "pins")[0]) == 12
    for cell in ((0, 3), (5, 5)):  # to unpin is always possible
        cells.click(*cell, modifiers=["Shift"])
    assert state(page, "pins")[0][-1] == [5, 5]


def test_one_block_at_a_time(page):
    options = page.locator("#score option").all_inner_texts()
    assert [o for o in options if "induction" in o] == ["head_scores: induction"] + [
        f"head_scores: induction_by_block, {n}" for n in (8, 12, 24)
    ]
    assert not any("neuron" in o or "token_by_pos" in o for o in options)
    page.locator("#score").select_option(label="head_scores: induction_by_block, 24")
    settled(page)
    assert state(page, "score") == ["head_scores/induction_by_block, 24"]
    cells = Cells(page, "#matrix", MATRIX)
    for (row, column), value in np.ndenumerate(values(20, 3, 2, 3)[2]):
        first = cells.says[row][column][0]
        assert first.startswith(f"L{LAYERS[row]}H{column} induction_by_block, 24 ")
        assert is_said(first.split(" ")[-1], value)


def test_click_selects_and_shift_pins(page):
    cells = Cells(page, "#matrix", MATRIX)
    cells.click(1, 2)
    assert state(page, "layer", "head", "pins") == [3, 2, []]
    cells.click(0, 1, modifiers=["Shift"])
    assert state(page, "layer", "head", "pins") == [3, 2, [[1, 1]]]
    cells.click(0, 1, modifiers=["Shift"])
    assert state(page, "pins") == [[]]
    assert "L1H0" in cells.hover(0, 0)[0]


def test_the_keys_alone(page):
    page.evaluate("document.activeElement.blur()")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "matrix":
            break
    else:
        raise AssertionError("the matrix cannot be reached")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")  # the edge
    assert state(page, "layer", "head", "step") == [3, 2, 20]
    said = page.locator("#say").inner_text()
    assert said.startswith("L3H2 induction 0.5") and said == "; ".join(tip(page))
    page.keyboard.press("p")
    assert state(page, "pins") == [[[3, 2]]]
    page.keyboard.press("Home")
    assert state(page, "layer", "head") == [3, 0]
    settled(page)
    assert "L3H0 induction" in page.locator("#matrix").get_attribute("aria-label")


def listed(page):
    rows = page.locator("#top-heads tbody tr:not([hidden])")
    return [row.split("\t") for row in rows.all_inner_texts()]


def test_the_heads_that_stand_out(page):
    show(page, score="attribution/head/a, b")
    now, first = signed(20), signed(0)
    order = np.argsort(-np.abs(now), axis=None, kind="stable")
    assert [row[1].strip() for row in listed(page)] == [f"L{i // 3}H{i % 3}" for i in order]
    for i, (rank, _, value, change) in zip(order, listed(page), strict=True):
        assert int(rank) == list(order).index(i) + 1
        assert is_said(value.strip(), now.flat[i])
        assert is_said(change.strip(), now.flat[i] - first.flat[i])
    page.locator("#order").select_option("low")
    assert listed(page)[0][1].strip() == f"L{now.argmin() // 3}H{now.argmin() % 3}"
    page.locator("#order").select_option("size")
    page.locator("#top-heads tbody button").first.click()
    assert state(page, "layer", "head") == [order[0] // 3, order[0] % 3]


def test_a_head_that_is_no_number_is_not_listed(page):
    show(page, step=10)
    assert "L3H2" not in [row[1].strip() for row in listed(page)]
    show(page, step=20)
    assert "L3H2" in [row[1].strip() for row in listed(page)]


def test_an_axis_that_is_no_head(page):
    show(page, score="adapter/norm")
    cells = Cells(page, "#matrix", r"^L(\d+) (.*?) norm ")
    assert cells.rows == ["0", "1"] and len(cells.columns) == 5
    assert cells.columns[2] == MODULES[2] and cells.columns[3] == "\\u202eodd\\u0000"
    assert len(cells.columns[4]) == 60
    for (row, column), value in np.ndenumerate(values(20, 2, 5)):
        assert is_said(cells.says[row][column][0].split(" ")[-1], value)
    cells.click(1, 1)
    assert state(page, "layer", "head") == [1, 0]
    page.keyboard.press("ArrowLeft")
    assert tip(page)[0].startswith("L1 q_proj norm") and state(page, "layer", "head") == [1, 0]
    assert all(button.is_disabled() for button in page.locator("#top-heads tbody button").all())


def test_tokens_are_named_and_what_the_lens_reads_there(page):
    show(page, score="lens/kl_by_pos/p")
    ids = np.random.default_rng(20).integers(0, len(ODD), (4, 5))
    cells = Cells(page, "#matrix", r"^L(\d+) (\d+) ")
    assert (len(cells.rows), len(cells.columns)) == (4, 5)
    paris = np.argwhere(ids == ODD.index(" Paris"))[0]
    assert cells.says[paris[0]][paris[1]][0].endswith(" ·Paris")
    assert cells.says[0][1][0].startswith("L0 1 ·The kl_by_pos/p ")


def test_not_measured_yet_and_measured_before(page):
    show(page, score="late/score", step=0)
    assert page.locator("#matrixtold").inner_text() == "Not measured until step 10."
    assert not page.locator("#matrix").is_visible()
    show(page, step=20)
    assert page.locator("#matrix").is_visible()
    cells = Cells(page, "#matrix", MATRIX)
    assert cells.colours[0][0][:3] == [0x05, 0x30, 0x61]  # the lowest: all are negative


def test_a_large_model_fits(page):
    show(page, score="wide/score")
    assert page.locator("#matrix").bounding_box()["height"] < 560
    frame = page.locator("#matrix").locator("xpath=..")
    assert frame.evaluate("node => node.scrollWidth - node.clientWidth") == 0
    assert frame.evaluate("node => node.scrollHeight - node.clientHeight") == 0
    cells = Cells(page, "#matrix", MATRIX, every=7)
    assert (len(cells.rows), len(cells.columns)) == (64, 64)
    stored = values(20, 64, 64).astype(np.float16)
    assert is_said(cells.says[63][7][0].split(" ")[-1], stored[63, 7])


def test_a_matrix_too_large_to_be_decoded_at_once(page):
    show(page, score="large/score", step=10)
    until(page, "document.getElementById('matrix').parentNode.hidden", False)
    settled(page)
    all_steps = np.stack([values(step, 150, 140) for step in STEPS]).astype(np.float16)
    legend = page.locator(".legend").first
    assert is_said(legend.locator(".ticks span").last.inner_text(), all_steps.max())
    cells = Cells(page, "#matrix", r"^L(\d+) source (\d+) ", every=9)
    assert is_said(cells.says[18][9][0].split(" ")[-1], all_steps[1, 18, 9])


def test_playing_changes_no_element(page):
    found = page.evaluate("""async () => {
      const seen = [], frame = () => new Promise(requestAnimationFrame);
      const box = document.getElementById("matrix").closest(".card");
      const watch = new MutationObserver((list) => seen.push(...list));
      watch.observe(box, { childList: true, subtree: true });
      for (const step of [0, 10, 20, 0]) { tlens.set({ step }); await frame(); await frame(); }
      const quiet = watch.takeRecords().length + seen.length;
      tlens.set({ score: "adapter/norm" }); await frame(); await frame();
      return [quiet, watch.takeRecords().length + seen.length];
    }""")
    assert found[0] == 0 and found[1] > 0
