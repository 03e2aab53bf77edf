"""The lens tables on the page: tokens, colours, the target, another step, keys."""

import json
import re

import numpy as np
import pytest

from tests.browser import drawn, needs_browser, opened
from tests.page.pages import page_of
from tests.page.test_tokens_page import number, settled, viridis
from tlens_callback.reading import Reading

pytestmark = needs_browser()

WORDS = ["", " Paris", "</script><script>alert(1)</script>", "\n", "y" * 2000, " London", "\u202e"]
TARGET = 1  # Paris
LAYERS, K = 3, 2
IDS = {
    10: [[2, 3], [3, 4], [5, 1]],
    20: [[2, 6], [1, 3], [1, 5]],
}
RANKS = {10: [4000, 30, 1], 20: [900, 0, 0]}


def readings(step):
    rng = np.random.default_rng(step)
    ids = np.array(IDS[step])
    none = np.zeros((LAYERS, K), int) if step == 10 else ids[:, ::-1]
    layers = {"axes": ("layer",)}
    ranked = {"axes": ("layer", "rank")}

    def key(measure, instrument="logit_lens", probe="/capital"):
        return f"{instrument}/{measure}{probe}"

    return [
        Reading(key=key("token"), values=ids, unit="index", texts=np.array(WORDS)[ids], **ranked),
        Reading(key=key("top"), values=rng.random((LAYERS, K)), unit="probability", limits=(0, 1),
                **ranked),
        Reading(key=key("rank"), values=RANKS[step], unit="rank", **layers),
        Reading(key=key("kl"), values=rng.random(LAYERS) * step, unit="nats", **layers),
        Reading(key=key("token", "difference_lens", ""), values=none, unit="index",
                texts=np.array(WORDS)[none], **ranked),
        Reading(key=key("probability", "difference_lens", ""), values=rng.random((LAYERS, K)),
                unit="probability", limits=(0, 1), **ranked),
        Reading(key=key("guess", "my_lens"), values=ids, unit="index", texts=np.array(WORDS)[ids],
                **ranked),
        Reading(key=key("logit", "my_lens"), values=rng.random((LAYERS, K)) * step, unit="logit",
                **ranked),
        Reading(key="target_scores/loss/bare", values=1.0, unit="nats"),
        Reading(key="top_neurons/neuron/capital", values=ids, unit="index", **ranked),
    ]  # fmt: skip


STEPS = (10, 20)
STORED = {step: {r.key: r.values for r in readings(step)} for step in STEPS}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    address = page_of(tmp_path_factory.mktemp("lens"), {s: readings(s) for s in STEPS})
    with opened(address) as (page, faults):
        page.wait_for_selector("#lens td")
        yield page
        assert faults == []


@pytest.fixture
def page(shown):
    shown.mouse.move(2, 2)
    put(shown, step=20, other=None, probe="capital")
    return shown


def put(page, **values):
    page.evaluate(f"tlens.set({json.dumps(values)})")
    settled(page)


def table(page, key="logit_lens/token/capital", i=0):
    return page.locator(f'.lensblock[data-key="{key}"] table').nth(i)


def cell(page, layer, column, **which):
    return table(page, **which).locator(f'td[data-at="{layer}.{column}"]')


def told(page, *place, **which):
    cell(page, *place, **which).hover()
    return page.locator("#tip").inner_text().split("\n")


def test_tokens_are_texts_coloured_by_their_probability(page):
    top = STORED[20]["logit_lens/top/capital"]
    for layer in range(LAYERS):
        for rank in range(K):
            one = cell(page, layer, rank)
            background = one.evaluate("one => one.style.background")
            seen = [float(x) for x in re.findall(r"\d+", background)]
            assert seen == pytest.approx(viridis(np.sqrt(top[layer, rank])), abs=3)
            assert number(told(page, layer, rank)[1]) == pytest.approx(top[layer, rank], rel=0.01)
    assert cell(page, 0, 0).inner_text() == "</script><scr…"
    assert told(page, 0, 0)[0] == f"L0, rank 0: {WORDS[2].replace(' ', '·')}"
    assert cell(page, 0, 1).inner_text() == "\\u202e"
    assert page.locator("#lens script").count() == 0


def test_what_else_is_known_of_a_layer_stands_beside(page):
    head = table(page).locator("thead th").all_inner_texts()
    assert head == ["layer", "rank 0", "1", "rank", "kl, nats"]
    for layer in range(LAYERS):
        assert number(cell(page, layer, 2).inner_text()) == RANKS[20][layer]
        kl = STORED[20]["logit_lens/kl/capital"][layer]
        assert number(told(page, layer, 3)[1]) == pytest.approx(kl, rel=0.01)
    # A bar's full length is the largest of all steps.
    most = max(STORED[step]["logit_lens/kl/capital"].max() for step in STEPS)
    bar = cell(page, 1, 3).evaluate("one => one.style.background")
    share = STORED[20]["logit_lens/kl/capital"][1] / most * 100
    assert any(float(x) == pytest.approx(share, abs=0.2) for x in re.findall(r"([\d.]+)%", bar))


def test_the_target_is_marked_wherever_it_is_listed(page):
    def marked():
        return (
            table(page).locator("td.target").evaluate_all("all => all.map(one => one.dataset.at)")
        )

    assert marked() == ["1.0", "2.0"]
    assert "Target: ·Paris" in page.locator(".lensblock p").first.inner_text()
    assert "the target" in told(page, 1, 0)
    put(page, step=10)
    assert marked() == ["2.1"]


def test_another_step_is_a_second_table_that_shows_what_is_new(page):
    assert page.locator('[data-key="logit_lens/token/capital"] table').count() == 1
    put(page, other=10)
    assert table(page).locator("caption").inner_text() == "step 20"
    assert table(page, i=1).locator("caption").inner_text() == "step 10"
    assert number(told(page, 1, 0, i=1)[1]) == pytest.approx(
        STORED[10]["logit_lens/top/capital"][1, 0], rel=0.01
    )
    new = table(page).locator("td.new").evaluate_all("all => all.map(one => one.dataset.at)")
    expected = [
        f"{layer}.{rank}"
        for layer in range(LAYERS)
        for rank in range(K)
        if IDS[20][layer][rank] not in IDS[10][layer]
    ]
    assert new == expected == ["0.1", "1.0"]
    assert told(page, 0, 1)[-1] == "not among these at step 10"


def test_lenses_without_a_probe_and_of_others_are_shown_too(page):
    key = "difference_lens/token"
    assert cell(page, 1, 0, key=key).inner_text() == "↵"
    assert "Of no single probe" in page.locator(f'[data-key="{key}"] p').inner_text()
    put(page, step=10)  # nothing but empty texts there
    assert table(page, key=key).locator("td.token").all_inner_texts() == ["–"] * (LAYERS * K)
    assert told(page, 0, 0, key=key) == ["L0, rank 0: nothing to read"]
    put(page, step=20)
    other = "my_lens/guess/capital"
    value = STORED[20]["my_lens/logit/capital"][2, 1]
    assert number(told(page, 2, 1, key=other)[1].removeprefix("logit ")) == pytest.approx(
        value, rel=0.01
    )
    assert "last token" not in page.locator(f'[data-key="{other}"] p').inner_text()
    assert page.locator(".lensblock").count() == 3  # neurons have no texts: no lens


def test_what_the_lens_shows_is_not_listed_again_below(page):
    sections = {}
    for name in ("logit_lens", "difference_lens", "my_lens", "top_neurons"):
        section = page.locator(f"[data-instrument={name}]")
        section.scroll_into_view_if_needed()
        drawn(page)
        title = section.locator("summary").inner_text()
        sections[name] = [section.locator("table").count(), " ".join(title.split())]
    assert sections["logit_lens"] == [0, "logit lens of capital"]  # its lines are there
    assert sections["difference_lens"] == [0, "difference lens shown above, under the logit lens"]
    assert sections["my_lens"] == [0, "my lens shown above, under the logit lens"]
    assert sections["top_neurons"] == [1, "top neurons of capital"]  # no lens shows it
    assert page.locator("[data-instrument=logit_lens] figure").count() == 2


def test_a_measure_that_is_its_own_unit_is_named_once(page):
    units = page.locator("#lens .legend .unit").all_inner_texts()
    assert [text.split(", ")[:2] for text in units][:2] == [
        ["top", "probability"],
        ["probability", "square-root scale"],
    ]


def test_keys_move_through_the_cells_which_say_what_they_hold(page):
    cell(page, 0, 0).focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.at") == "2.1"
    assert page.locator("#say").inner_text().startswith("L2, rank 1: ·London")
    page.keyboard.press("End")
    assert page.locator("#say").inner_text().startswith("L2 kl")
    assert page.evaluate("tlens.state.step") == 20
    assert table(page).locator("td[tabindex='0']").count() == 1


def test_cells_stay_from_one_step_to_the_next(page):
    page.evaluate("window.kept = [...document.querySelectorAll('#lens td')]")
    put(page, step=10)
    assert page.evaluate("kept.length && kept.every(one => one.isConnected)")
    assert cell(page, 2, 0).inner_text() == "·London"


def test_a_probe_that_no_lens_reads_says_so(page):
    put(page, probe="bare")
    assert page.locator("#nolens").inner_text() == "No lens reads this probe."
    assert page.locator(".lensblock").count() == 1  # that of no probe
    put(page, probe="capital")
    assert not page.locator("#nolens").is_visible()
