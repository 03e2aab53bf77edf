"""The slider, the curves on its axis, and events."""

import re
from urllib.parse import quote

import numpy as np

from tests.browser import needs_browser
from tests.page.five_steps import (
    INDUCTION,
    LOSS,
    STEPS,
    UPDATES,
    addressed,
    marker,
    settled,
    step_of,
    thumb,
    ticks_of,
    words_of,
)

pytestmark = needs_browser()


def test_slider_aligned(opens, run):
    page = opens(run)
    for width in (1400, 900):
        page.set_viewport_size({"width": width, "height": 1000})
        for step in STEPS:
            page.evaluate(f"tlens.set({{ step: {step} }})")
            settled(page)
            assert abs(thumb(page) - marker(page)) <= 1
    page.evaluate("document.querySelector('.slide').style.padding = '0 56px'")  # without the inset
    assert abs(thumb(page) - marker(page)) > 5
    page.set_viewport_size({"width": 1400, "height": 1000})


def test_keys(opens, run):
    page = opens(run)
    assert step_of(page) == 101
    for key, expected in [
        ("ArrowLeft", 100), ("Home", 10), ("ArrowLeft", 10), ("ArrowRight", 20), ("End", 101),
        ("Shift+ArrowLeft", 10), ("Shift+ArrowRight", 101), ("Control+ArrowLeft", 101),
    ]:  # fmt: skip
        page.keyboard.press(key)
        assert step_of(page) == expected, key
    page.focus("#theme")
    page.keyboard.press("ArrowLeft")
    assert step_of(page) == 100
    page.focus("#step")
    for key, expected in [("ArrowDown", 50), ("ArrowLeft", 20), ("PageDown", 10), ("PageUp", 101)]:
        page.keyboard.press(key)
        assert step_of(page) == expected, key
    page.focus("#score")  # it has arrow keys of its own
    page.keyboard.press("ArrowLeft")
    assert step_of(page) == 101
    page.click("#choosecurves summary")
    page.focus("#choosecurves [type=search]")
    page.keyboard.press("Home")
    page.keyboard.press("?")
    assert page.input_value("#choosecurves [type=search]") == "?"
    assert step_of(page) == 101 and page.locator("#keys").count() == 0


def test_help(opens, run):
    page = opens(run)
    page.keyboard.press("?")
    assert "Space" in page.inner_text("#keys")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    assert not page.is_visible("#keys")
    assert step_of(page) == 101


def test_play(opens, run):
    page = opens(run)
    page.select_option("#speed", "4")  # slow enough for each step to be drawn
    page.evaluate("document.activeElement.blur()")
    page.evaluate(
        """() => {
          window.seen = [];
          const node = document.getElementById("stepname");
          new MutationObserver(() => seen.push(node.textContent))
            .observe(node, { childList: true, characterData: true, subtree: true });
        }"""
    )
    page.keyboard.press("Space")
    page.wait_for_selector("#play[aria-label=pause]")
    page.wait_for_selector("#play[aria-label=play]")
    assert page.evaluate("seen") == [f"step {step}" for step in STEPS]
    page.select_option("#speed", "1")
    page.click("#play")
    page.click("#play")
    page.wait_for_timeout(1200)
    assert step_of(page) == 10  # paused where it began


def test_drag_and_click(opens, run):
    page = opens(run)
    box = page.locator("#step").bounding_box()
    x = {}
    for step in STEPS:
        page.evaluate(f"tlens.set({{ step: {step} }})")
        settled(page)
        x[step] = marker(page)
    page.mouse.click(x[20] + 3, box["y"] + box["height"] / 2)
    assert step_of(page) == 20
    assert page.input_value("#step") == "20"  # the thumb is at a step that was observed
    curves = page.locator("#curves").bounding_box()
    page.mouse.click(x[50] - 3, curves["y"] + 60)
    assert step_of(page) == 50


def test_hover_says_stored_values(opens, run):
    page = opens(run + "#head=1.1")
    box = page.locator("#curves").bounding_box()
    for step in (10, 50):
        page.evaluate(f"tlens.set({{ step: {step} }})")
        settled(page)
        page.mouse.move(marker(page) + 1, box["y"] + 50)
        said = page.inner_text("#tip").split("\n")
        assert said[0] == f"step {step}"
        values = [float(re.search(r": ([\d.]+) ", line)[1]) for line in said[1:]]
        expected = [LOSS[step], INDUCTION[step][1, 1]]
        np.testing.assert_allclose(values, expected, rtol=5e-3)
    assert page.inner_text("#curvelist").count("L1H1") == 1


def test_loss_at_every_update(opens, run):
    page = opens(run)
    paths = page.evaluate(
        "[...document.querySelectorAll('#curves path[stroke]')].map((p) => p.getAttribute('d'))"
    )
    counts = sorted(len(re.findall("[ML]", path)) for path in paths)
    assert counts[-1] == len(UPDATES)
    assert counts[-2] == len(STEPS)
    axis = page.text_content("#curves")
    assert "trainer/loss, as logged" in axis and "probability" in axis
    assert ticks_of(page, "left") == ["2", "3", "4", "5"]
    assert 2 <= min(LOSS.values()) < 3 and 4 < max(LOSS.values()) <= 5


def test_further_curves(opens, run):
    page = opens(run)
    page.click("#choosecurves summary")
    for key in ("target_scores/loss/probe0", "target_scores/loss/probe1", "trainer/eval_loss"):
        page.check(f'#choosecurves input[value="{key}"]')
    page.fill("#choosecurves [type=search]", "RANK")
    assert page.locator("#choosecurves label:visible").count() == 1
    page.keyboard.press("Escape")
    assert not page.is_visible("#choosecurves .menu")
    listed = page.locator("#curvelist .curve")
    assert listed.count() == 5
    texts = listed.all_inner_texts()
    # Probes of one measure share their range, so that they compare.
    assert sum("0 to 3 nats" in text for text in texts) == 2
    assert page.evaluate("new Set([...document.querySelectorAll('#curvelist path')]"
                         ".map((path) => path.getAttribute('stroke'))).size") == 5  # fmt: skip
    box = page.locator("#curves").bounding_box()
    page.evaluate("tlens.set({ step: 101 })")
    settled(page)
    page.mouse.move(marker(page), box["y"] + 50)
    assert "trainer/eval_loss: 2.125 as logged (step 100)" in page.inner_text("#tip")
    addressed(page)
    address = page.url
    assert quote("target_scores/loss/probe1", safe="") in address
    again = opens(address)
    assert again.locator("#curvelist .curve").count() == 5
    again.click("#choosecurves summary")
    for key in again.evaluate("tlens.state.curves"):
        again.uncheck(f'#choosecurves input[value="{key}"]')
    settled(again)
    assert again.locator("#curvelist .curve").count() == 1
    assert words_of(again).get("curves") is None and "curves=" in again.url
    assert opens(again.url).locator("#curvelist .curve").count() == 1


def test_pins_and_other_step(opens, run):
    page = opens(run + "#step=20&other=100&head=1.1&pins=0.0,1.2,1.1")
    names = page.locator("#curvelist .curve").all_inner_texts()
    assert [re.search(r"L\dH\d", name)[0] for name in names[1:]] == ["L1H1", "L0H0", "L1H2"]
    other = page.evaluate("document.querySelector('#curves .other').getBoundingClientRect().left")
    page.evaluate("tlens.set({ step: 100, other: null })")
    settled(page)
    assert abs(other - marker(page)) < 0.6
    assert page.evaluate("document.querySelector('#curves .other').getAttribute('visibility')") == (
        "hidden"
    )


def test_events(opens, run):
    page = opens(run + "#step=10")
    marks = page.locator("#curves .event")
    assert marks.count() == 2
    marks.nth(0).hover()
    said = page.inner_text("#tip")
    assert "step 50" in said and "L1H1 has become an induction head at 50" in said
    assert "</script><script>alert(1)</script>" in said
    marks.nth(0).click()
    assert step_of(page) == 50
    assert "at 50" in page.text_content("#say")
    page.keyboard.press("Tab")
    marks.nth(1).focus()
    page.keyboard.press("Enter")
    assert step_of(page) == 100
