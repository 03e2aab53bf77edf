"""The slider, the curves on its axis, events, the address, and runs that lack something."""

import io
import re
from urllib.parse import parse_qs, quote

import numpy as np
import pytest
from PIL import Image

from tests.browser import needs_browser, opened
from tests.render.page.pages import page_of
from tlens_callback.reading import Reading
from tlens_callback.render.page.template import html

pytestmark = needs_browser()

STEPS = (10, 20, 50, 100, 101)
HOSTILE = '</script><script>alert(1)</script> "quoted" \u202e'
UPDATES = range(1, 102)
LOSS = {update: np.float32(4 - update / 50 + (update % 7) / 10) for update in UPDATES}
INDUCTION = {
    step: np.array([[0.1, 0.2, 0.3], [0.05, step / 128, 0.6]], np.float32) for step in STEPS
}
EVALUATED = {20: 3.25, 100: 2.125}


def since(step):
    before = max([0, *(at for at in STEPS if at < step)])
    return range(before + 1, step + 1)


def pattern(step):
    values = np.tril(np.ones((2, 3, 4, 4))) / np.arange(1, 5)[:, None]
    return Reading(
        key="attention_patterns/pattern/capital",
        values=values,
        axes=("layer", "head", "query", "key"),
        unit="probability",
        limits=(0, 1),
        labels={"query": ["a", "b", "c", "d"], "key": ["a", "b", "c", "d"]},
    )


def scores(step):
    return Reading(
        key="head_scores/induction",
        values=INDUCTION[step],
        axes=("layer", "head"),
        unit="probability",
        limits=(0, 1),
    )


def logged(name, values):
    return Reading(
        key=f"trainer/{name}",
        values=list(values.values()),
        axes=("update",),
        unit="as logged",
        labels={"update": [str(update) for update in values]},
    )


def readings(step):
    some = [pattern(step), scores(step), logged("loss", {at: LOSS[at] for at in since(step)})]
    if step in EVALUATED:
        some.append(logged("eval_loss", {step: EVALUATED[step]}))
    for i in range(2):
        some.append(Reading(key=f"target_scores/loss/probe{i}", values=i + step / 100, unit="nats"))
    some.append(Reading(key=f"target_scores/rank/{HOSTILE}", values=step, unit="rank"))
    if step in (50, 100):
        events = [f"L1H1 has become an induction head at {step}", HOSTILE]
        some.append(
            Reading(
                key="watch/events",
                values=[0.4, np.nan],
                axes=("event",),
                unit="event",
                labels={"event": events},
            )
        )
    return some


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    with opened("about:blank", allowed=folder.as_uri()) as (page, faults):
        page.set_default_timeout(5000)
        yield page, faults, folder


@pytest.fixture(scope="module")
def run(tab):
    folder = tab[2] / "run"
    folder.mkdir()
    return page_of(folder, {step: readings(step) for step in STEPS})


@pytest.fixture
def opens(tab):
    """Opens an address anew in the module's browser; afterwards nothing has gone wrong in it."""
    page, faults, _ = tab

    def at(address):
        page.goto("about:blank")
        page.mouse.move(700, 990)
        page.goto(address)
        page.wait_for_selector("#title:not(:empty)")
        settled(page)
        return page

    yield at
    assert faults == []


def settled(page):
    page.evaluate("() => new Promise((done) => setTimeout(() => requestAnimationFrame(done), 20))")


def step_of(page):
    settled(page)
    return int(re.match(r"step (\d+)", page.text_content("#stepname"))[1])


def words_of(page):
    page.wait_for_timeout(250)  # the address is written when things are quiet
    return {name: words[0] for name, words in parse_qs(page.evaluate("location.hash")[1:]).items()}


def marker(page):
    return page.evaluate("document.querySelector('#curves .now').getBoundingClientRect().left")


def thumb(page):
    """The middle of the slider's thumb, in the picture of it."""
    box = page.locator("#step").bounding_box()
    shot = Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")
    blue = np.abs(np.asarray(shot, int) - (11, 99, 181)).sum(-1) < 60  # --accent
    columns = np.flatnonzero(blue.any(0))
    return box["x"] + (columns[0] + columns[-1] + 1) / 2


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
    page.select_option("#speed", "16")
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


def ticks_of(page, side):
    """The numbers at an axis of values, from below."""
    found = page.evaluate(
        """(side) => [...document.querySelectorAll("#curves text")]
      .filter((text) => text.getAttribute("text-anchor") === (side === "left" ? "end" : "start")
        && text.textContent !== "step" && !text.textContent.includes(","))
      .map((text) => text.textContent)""",
        side,
    )
    return found


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
    page.wait_for_timeout(250)
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


def test_address_shows_a_head_at_a_step(opens, run):
    page = opens(run + "#step=20&head=1.2&score=head_scores/induction")
    assert step_of(page) == 20
    assert page.evaluate("[tlens.state.layer, tlens.state.head]") == [1, 2]
    assert "L1H2" in page.inner_text("#curvelist")
    page.keyboard.press("ArrowRight")
    assert words_of(page)["step"] == "50"
    page.evaluate("tlens.set({ layer: 0, head: 1 })")
    assert words_of(page)["head"] == "0.1"
    page.evaluate("tlens.set({ pins: [[0, 0]] })")
    assert words_of(page)["pins"] == "0.0"
    page.go_back()
    assert page.evaluate("tlens.state.pins") == []
    page.go_back()
    settled(page)
    assert words_of(page)["head"] == "1.2" and "L1H2" in page.inner_text("#curvelist")
    page.go_forward()
    settled(page)
    assert "L0H1" in page.inner_text("#curvelist")


@pytest.mark.parametrize(
    "words",
    [
        "step=-5&other=x&head=99.99&score=__proto__&probe=%00&query=1e9&pins=,1.1.1,9.9",
        "step=99999999999999999999&head=999999999999.1&curves=constructor&pattern=/",
        "%&%%&step=%E0%A4%A&<script>alert(1)</script>",
        "step=70&pins=" + ",".join(f"{i}.{i}" for i in range(3000)),
    ],
)
def test_hostile_address(opens, run, words):
    page = opens(run + "#" + words)
    assert step_of(page) in STEPS
    head = page.evaluate("[tlens.state.layer, tlens.state.head]")
    assert head[0] in (0, 1) and head[1] in (0, 1, 2)
    assert page.locator(".error:visible").count() == 0
    assert all(layer < 2 and head < 3 for layer, head in page.evaluate("tlens.state.pins"))


def test_page_in_a_frame_without_an_address(tab, run):
    page, faults, folder = tab
    text = (folder / "run" / "page.html").read_text()
    page.goto("about:blank")
    page.evaluate(
        """(text) => {
          const frame = document.createElement("iframe");
          frame.sandbox = "allow-scripts";
          frame.style = "width: 1300px; height: 900px";
          frame.srcdoc = text;
          document.body.replaceChildren(frame);
        }""",
        text,
    )
    inside = page.frame_locator("iframe")
    inside.locator("#stepname").wait_for()
    inside.locator("#theme").focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(300)
    assert inside.locator("#stepname").inner_text() == "step 10"
    page.keyboard.press("?")
    assert inside.locator("#keys").is_visible()
    assert faults == []


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
