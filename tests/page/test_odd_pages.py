"""Runs that lack something, and views that fail."""

import numpy as np

from tests.browser import needs_browser
from tests.page.five_steps import HOSTILE, pattern, readings, settled, step_of
from tests.page.pages import page_of
from tlens_callback.page.template import html
from tlens_callback.reading import Reading

pytestmark = needs_browser()


def test_one_step(opens, tab):
    (tab[2] / "one").mkdir()
    page = opens(page_of(tab[2] / "one", {20: readings(20)}))
    assert step_of(page) == 20
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    assert step_of(page) == 20
    assert page.locator(".error:visible").count() == 0


def test_only_numbers(opens, tab):
    (tab[2] / "numbers").mkdir()
    number = {s: [Reading(key="cost/seconds", values=s / 7, unit="seconds")] for s in (30, 60)}
    page = opens(page_of(tab[2] / "numbers", number) + "#curves=cost/seconds")
    assert step_of(page) == 60
    assert "cost/seconds, seconds" in page.text_content("#curves")
    assert not page.is_visible("#score") and not page.is_visible("#maps")
    assert page.locator(".error:visible").count() == 0


def test_only_patterns(opens, tab):
    (tab[2] / "patterns").mkdir()
    page = opens(page_of(tab[2] / "patterns", {0: [pattern(0)], 5: [pattern(5)]}))
    assert step_of(page) == 5
    assert not page.is_visible("#score") and page.is_visible("#maps")
    assert page.locator(".error:visible").count() == 0


def test_nothing_is_drawn_before_it_is_known_what_there_is(tab):
    """A window may change its size while the page still reads its steps."""
    (tab[2] / "early").mkdir()
    address = page_of(tab[2] / "early", {step: [pattern(step)] for step in range(40)})
    page = tab[0].context.browser.new_page()
    faults = []
    page.on("console", lambda message: faults.append(message.text))
    page.add_init_script("""
      window.early = 0;
      const unpacked = window.DecompressionStream;
      window.DecompressionStream = function (...given) {
        early++;
        dispatchEvent(new Event("resize"));
        return new unpacked(...given);
      };
      window.requestAnimationFrame = (act) => setTimeout(act, 0);
    """)
    page.goto(address)
    page.wait_for_selector("#maps canvas")
    settled(page)
    assert page.evaluate("early") >= 40
    shown = page.locator(".error:visible").count()
    page.close()
    assert faults == [] and shown == 0


def test_no_steps_and_notes(opens, tab):
    notes = ["Patterns of 24 of 270 heads.", HOSTILE]
    file = tab[2] / "empty.html"
    file.write_text(html({"title": HOSTILE, "live": False, "notes": notes}), encoding="utf-8")
    page = opens(file.as_uri() + "#step=5")
    assert page.is_visible("#empty") and "no steps" in page.inner_text("#empty")
    assert page.locator("#notes li").all_text_contents() == notes
    assert page.text_content("#title") == page.title() == HOSTILE
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    settled(page)
    assert not page.is_visible("#step")


def test_an_error_stays_in_its_view(tab, run):
    page, faults, _ = tab
    page.goto("about:blank")
    page.goto(run)
    page.wait_for_selector("#stepname:not(:empty)")
    settled(page)
    page.evaluate(
        """() => {
          window.whole = tlens.data.slice;
          tlens.data.slice = () => { throw new Error("broken on purpose"); };
        }"""
    )
    page.keyboard.press("Home")
    assert step_of(page) == 10
    assert page.locator(".error:visible").count() >= 1
    assert "broken on purpose" in page.locator(".error:visible").first.inner_text()
    assert any("broken on purpose" in fault for fault in faults)
    page.evaluate("() => { tlens.data.slice = whole; }")
    page.keyboard.press("End")
    assert step_of(page) == 101
    assert page.locator(".error:visible").count() == 0
    faults.clear()


def test_a_long_text_is_wrapped_and_keeps_its_lines(opens, tab):
    """An answer of the model is read as a text; a token shows its spaces."""
    answer = " and then\nthe model goes on and on, " * 5 + "\N{RIGHT-TO-LEFT OVERRIDE}end"
    said = Reading(
        key="somebodys/answer",
        values=[0, 1],
        axes=("prompt",),
        unit="index",
        labels={"prompt": ["one", "two"]},
        texts=np.array([answer, " Paris"]),
    )
    (tab[2] / "long").mkdir()
    page = opens(page_of(tab[2] / "long", {0: [said]}))
    long = page.locator("[data-instrument=somebodys] td.long")
    long.wait_for()
    assert long.evaluate("cell => cell.textContent") == answer.replace("\u202e", "\\u202e")
    assert long.evaluate("cell => cell.scrollWidth <= cell.clientWidth")
    assert long.evaluate("cell => cell.clientHeight > 5 * 12")
    token = page.locator("[data-instrument=somebodys] td", has_text="Paris")
    assert token.all_inner_texts() == ["·Paris"]
