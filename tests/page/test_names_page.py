"""Names of checkpoints on the page of saved models, and pages of one step and of two."""

import numpy as np
import pytest

from tests.browser import needs_browser, until
from tests.page.five_steps import (
    HOSTILE,
    logged,
    pattern,
    settled,
    step_of,
    words_of,
)
from tests.page.pages import page_of
from tlens_callback.page import PageFolder
from tlens_callback.page import page as packed
from tlens_callback.reading import Reading
from tlens_callback.sinks import LocalSink, read_store

pytestmark = needs_browser()

LONG = "/home/somebody/experiments/2026-11-22/smollm2-lora-rank-16/checkpoint-best"


def name(text):
    return Reading(key="checkpoint/name", values=0.0, unit="path", texts=np.asarray(text))


def lens(step):
    """Two layers that read two places each."""
    ids = np.array([[1, 2], [3, step % 3]])
    return [
        Reading(key="logit_lens/token/capital", values=ids, axes=("layer", "rank"), unit="index",
                texts=np.array([" a", " b", " c", " d"])[ids]),
        Reading(key="logit_lens/kl/capital", values=[0.5, step / 8], axes=("layer",), unit="nats"),
    ]  # fmt: skip


def readings(step):
    induction = np.array([[0.1, 0.2, 0.3], [0.05, step / 128, 0.6]])
    return [
        pattern(step),
        Reading(key="head_scores/induction", values=induction, axes=("layer", "head"),
                unit="probability", limits=(0, 1)),
        Reading(key="target_scores/loss/capital", values=step / 8, unit="nats"),
        *lens(step),
    ]  # fmt: skip


@pytest.fixture
def page_with(opens, tab, tmp_path_factory):
    """Opens a page of these names, step -> name; `address` is what follows its `#`."""

    def make(names, address=""):
        folder = tab[2] / tmp_path_factory.mktemp("named").name
        folder.mkdir()
        steps = {step: [*readings(step), *([name(text)] if text else [])]
                 for step, text in names.items()}  # fmt: skip
        return opens(page_of(folder, steps) + address)

    return make


def shown(page, selector):
    return page.text_content(selector)


def test_names_are_beside_the_steps(page_with):
    page = page_with({0: "base", 1: "fine-tune"})
    assert shown(page, "#stepname") == "step 1 · fine-tune"
    assert page.get_attribute("#step", "aria-valuetext") == "step 1 · fine-tune"
    options = page.locator("#other option").all_inner_texts()
    assert options[1:] == ["compare with step 0 · base", "compare with step 1 · fine-tune"]
    page.select_option("#other", "0")
    settled(page)
    assert shown(page, "#stepname") == "step 1 · fine-tune, beside step 0 · base"
    assert page.get_attribute("#stepname", "title") == "step 1: fine-tune\nstep 0: base"
    notes = page.locator("#maps figure").all_inner_texts()
    assert "step 1 · fine-tune" in notes[0] and "step 0 · base" in notes[1]
    captions = page.locator("table.lens caption").all_inner_texts()
    assert captions == ["step 1 · fine-tune", "step 0 · base"]
    assert "change since step 0 · base" in page.inner_text("label:has(#change)")
    assert "since step 0" in page.inner_text("#top-heads thead")
    # The other step is the first: it is drawn, and named, once.
    chart = page.locator("[data-instrument=logit_lens] .chart").first
    chart.scroll_into_view_if_needed()
    chart.locator(".line").first.wait_for(state="attached")
    assert chart.locator(".curve").all_inner_texts() == ["step 0 · base", "step 1 · fine-tune"]
    page.keyboard.press("Home")
    settled(page)
    assert shown(page, "#stepname").startswith("step 0 · base")


def test_a_name_is_no_number(page_with):
    page = page_with({0: "base", 1: "fine-tune"}, "#curves=checkpoint/name")
    assert page.locator("[data-instrument=checkpoint]").count() == 0
    assert "checkpoint" not in page.text_content("#choosecurves")
    assert "checkpoint" not in page.text_content("#curvelist")
    assert "checkpoint" not in page.text_content("#curves")
    # Another reading of the instrument would be shown.
    assert page.locator("[data-instrument=target_scores]").count() == 1
    assert page.evaluate("tlens.data.entry('checkpoint/name', 1).texts[0]") == "fine-tune"


def test_long_and_hostile_names(page_with):
    page = page_with({0: LONG, 1: HOSTILE, 2: "checkpoint-2", 3: "out/checkpoint-3/", 4: None})
    assert shown(page, "#stepname") == "step 4"
    options = page.locator("#other option").all_inner_texts()[1:]
    first, hostile, *rest = (text.removeprefix("compare with ") for text in options)
    assert first == "step 0 · …/checkpoint-best"
    assert hostile.startswith("step 1 · …") and "\u202e" not in hostile
    assert "quoted" in hostile and "\\u202e" in hostile
    # What only says the step again is left out.
    assert rest == ["step 2", "step 3", "step 4"]
    page.keyboard.press("Home")
    assert step_of(page) == 0
    assert page.get_attribute("#stepname", "title") == f"step 0: {LONG}"
    page.set_viewport_size({"width": 420, "height": 800})
    page.select_option("#other", "1")
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 420
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.keyboard.press("ArrowRight")
    assert step_of(page) == 1
    assert "</script><script>alert(1)</script>" in page.get_attribute("#stepname", "title")
    assert page.locator(".error:visible").count() == 0


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("a/b", 3, "a/b"),
        ("a/b/", 3, "a/b"),
        ("abcdef", 4, "…def"),
        ("long/path/to/it", 8, "…/to/it"),
        ("😀😀😀😀", 3, "…😀😀"),
        ("a/very-long-last-folder", 10, "…st-folder"),
        ("", 3, ""),
    ],
)
def test_ending(tab, text, most, expected):
    from tests.page.test_scripts import SCRIPTS

    page = tab[0]
    page.goto("about:blank")
    code = SCRIPTS["names.js"]
    assert page.evaluate(f"([text, most]) => {{ {code}; return ending(text, most); }}",
                         [text, most]) == expected  # fmt: skip


NEEDLESS = ["#play", "#speed", "#step", "#curves", "#choosecurves", "#curvelist", "#other",
            "label:has(#change)"]  # fmt: skip


def test_a_page_of_one_step_offers_no_course(opens, tab):
    (tab[2] / "alone").mkdir()
    address = page_of(tab[2] / "alone", {20: [*readings(20), name("it")]})
    page = opens(address + "#step=3&other=5&change=1")
    assert shown(page, "#stepname") == "step 20 · it"
    assert {one: page.is_visible(one) for one in NEEDLESS} == dict.fromkeys(NEEDLESS, False)
    assert page.is_visible("#matrix") and page.is_visible("#maps")
    assert page.evaluate("[tlens.state.other, tlens.state.change]") == [None, False]
    assert "since" not in page.inner_text("#top-heads")
    assert "most changed" not in [
        text for text in page.locator("#order option:not([hidden])").all_inner_texts()
    ]
    section = page.locator("[data-instrument=target_scores]")
    section.scroll_into_view_if_needed()
    section.locator("td").first.wait_for()
    heads = section.locator("th").all_inner_texts()
    assert heads == ["measure", "value", "unit"]
    assert section.locator("polyline").count() == 0
    page.locator("#matrix").hover(position={"x": 60, "y": 40})
    assert "change" not in page.inner_text("#tip") and "at step" not in page.inner_text("#tip")
    assert page.locator(".error:visible").count() == 0


def test_a_page_of_one_step_opens_on_what_writes_the_answer(opens, tab):
    written = Reading(
        key="logit_attribution/head/it",
        values=np.eye(2, 3),
        axes=("layer", "head"),
        unit="logit",
    )
    for steps, score in (((20,), written.key), ((0, 20), "head_scores/induction")):
        given = {step: [*readings(step), written] for step in steps}
        (folder := tab[2] / f"answer-{len(steps)}").mkdir()
        page = opens(page_of(folder, given))
        assert page.evaluate("tlens.state.score") == score


def test_one_step_of_a_training_keeps_its_loss(opens, tab):
    (tab[2] / "loss").mkdir()
    some = [*readings(2), logged("loss", {1: 3.0, 2: 2.0})]
    page = opens(page_of(tab[2] / "loss", {2: some}))
    assert page.is_visible("#curves")
    assert not page.is_visible("#play") and not page.is_visible("#step")


def test_a_page_of_two_steps_compares_but_does_not_play(opens, tab):
    (tab[2] / "two").mkdir()
    steps = {step: [*readings(step), name(f"model {step}")] for step in (0, 1)}
    page = opens(page_of(tab[2] / "two", steps))
    seen = {one: page.is_visible(one) for one in NEEDLESS}
    assert seen == {**dict.fromkeys(NEEDLESS, True), "#play": False, "#speed": False}
    heads = page.locator("[data-instrument=target_scores]")
    heads.scroll_into_view_if_needed()
    heads.locator("polyline").first.wait_for(state="attached")
    three = {step: readings(step) for step in (0, 1, 2)}
    (tab[2] / "three").mkdir()
    page = opens(page_of(tab[2] / "three", three))
    assert {one: page.is_visible(one) for one in NEEDLESS} == dict.fromkeys(NEEDLESS, True)


def test_a_live_page_of_one_step_has_its_slider_until_it_ends(opens, tab):
    folder = PageFolder(tab[2] / "live" / "page")
    (tab[2] / "live").mkdir()
    folder.write([pattern(0), *lens(0)], 0)
    page = opens((folder.path / "index.html").as_uri())
    until(page, "document.getElementById('stepname').textContent", "step 0")
    assert page.is_visible("#step") and page.is_visible("#play")
    folder.finish()
    until(page, "document.getElementById('status').textContent", "ended, last step 0")
    settled(page)
    assert not page.is_visible("#step") and not page.is_visible("#play")


def test_the_address_opens_on_the_change(page_with):
    page = page_with({0: "base", 1: "fine-tune"}, "#step=1&change=1&score=head_scores/induction")
    assert step_of(page) == 1 and page.is_checked("#change")
    assert page.evaluate("tlens.state.score") == "head_scores/induction"
    page = page_with({0: "base", 1: "fine-tune"}, "#step=1&other=0")
    assert page.locator("#maps figure").count() == 3 and not page.is_checked("#change")


def test_a_page_says_itself_how_it_opens(opens, tab):
    folder = tab[2] / "viewed"
    sink = LocalSink(folder / "store", page=False)
    for step in (0, 1, 2):
        sink.write([*readings(step), name(f"model {step}")], step=step)
    file = folder / "page.html"
    text = packed(read_store(sink.path), view="step=1&other=0&change=1&head=1.2")
    file.write_text(text, encoding="utf-8")
    page = opens(file.as_uri())
    assert step_of(page) == 1 and page.is_checked("#change")
    assert page.evaluate("[tlens.state.other, tlens.state.layer, tlens.state.head]") == [0, 1, 2]
    page.click("#change")
    words = words_of(page)
    assert words["step"] == "1" and "change" not in words
    page = opens(file.as_uri() + "#step=2")  # an address says it all
    assert step_of(page) == 2 and not page.is_checked("#change")
    hostile = packed(read_store(sink.path), view=HOSTILE + "&step=2&head=x")
    file.write_text(hostile, encoding="utf-8")
    assert step_of(opens(file.as_uri())) == 2
