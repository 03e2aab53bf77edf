"""Rollouts of all kinds on the page: without texts, with any text, live, too many, long ones."""

import re

import numpy as np

from tests.browser import drawn, needs_browser, until
from tests.page.pages import page_of
from tests.page.rollouts import NAME, RUN, STEPS, cards, put, ready, sample
from tlens_callback.meaning import Description
from tlens_callback.page import PageFolder
from tlens_callback.page import page as packed
from tlens_callback.page.template import html
from tlens_callback.reading import Reading
from tlens_callback.sinks import LocalSink, read_store

pytestmark = needs_browser()


def test_without_texts_there_are_numbers_only(opens, tab):
    (folder := tab[2] / "textless").mkdir()
    steps = {step: list(sample(step, with_texts=False).values()) for step in STEPS}
    page = ready(opens(page_of(folder, steps)))
    found = cards(page)
    assert [len(row) for row in found.values()] == [4, 4]
    assert {card["text"] for row in found.values() for card in row} == {None}
    assert found["Prompt 1"][0]["facts"][0].startswith("reward correct ")
    assert not page.is_visible("#rollouttint") and not page.is_visible("#rolloutlegend")
    assert "want of room" not in page.inner_text("#rollouts")
    assert page.is_visible(".contrastmap canvas")


HOSTILE = "</script><script>alert(1)</script> <!-- \u202e \x00 " + "x" * 900
ARABIC = "السلام عليكم 3 + 4 كيف حالك"
ODD = [
    (HOSTILE + "\n" * 3, [HOSTILE, ARABIC, "\n\n a\tb\r\n", "<0xE4><0xB8> 😀‍👩 \u200b"]),
    (ARABIC, [ARABIC * 20, "", "y", "\n"]),
]


def test_any_text_can_be_shown_and_nothing_overflows(opens, tab):
    (folder := tab[2] / "odd").mkdir()
    page = ready(opens(page_of(folder, {1: list(sample(1, texts=ODD).values())})))
    texts = {card["name"]: card["text"] for row in cards(page).values() for card in row}
    assert texts["1.1"].startswith("</script><script>alert(1)</script> <!-- \\u202e")
    assert "\u202e" not in texts["1.1"] and "\u202e" not in page.inner_text("body")
    assert texts["1.2"] == ARABIC and texts["1.3"].startswith("↵\n↵\n a")
    direction = page.locator('.rollout[aria-label^="rollout 1.2,"] .tokentexts').evaluate(
        "node => { const of = [...node.querySelectorAll('.t')].map((one) => "
        "one.getBoundingClientRect().left); return of[0] > of[1]; }"
    )
    assert direction, "the first word is at the right"
    for width in (400, 1400):
        page.set_viewport_size({"width": width, "height": 1000})
        drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        out = page.evaluate("""[...document.querySelectorAll("#rollouts *")].filter((node) => {
          const box = node.getBoundingClientRect();
          return box.width && box.right > innerWidth && !node.closest(".cards, canvas, .legend");
        }).map((node) => node.className)""")
        assert out == []


def test_a_long_prompt_is_folded_to_its_end(opens, tab):
    long = "You are helpful. " * 20 + "\nWhat is 3 + 4?"
    texts = [(long, ["7", "8"]), ("Short?", ["Yes.", "No."])]
    (folder := tab[2] / "prompts").mkdir()
    page = ready(opens(page_of(folder, {s: list(sample(s, texts=texts).values()) for s in (1, 2)})))
    whole = page.locator(".group .prompt").first
    assert not whole.is_visible()
    short = page.locator(".group .short").all_inner_texts()
    assert short[0].startswith("…") and short[0].endswith("helpful.↵ What is 3 + 4?")
    assert len(short[0]) <= 160 and short[1] == "Short?"
    page.locator(".group summary").first.click()
    assert whole.text_content() == long.replace(" \n", "↵\n")
    put(page, step=1)
    assert whole.is_visible(), "it stays open from one step to the next"
    page.locator(".group summary").nth(1).click()
    assert page.locator(".group .prompt").nth(1).inner_text() == ""


def test_unknown_advantages_and_equal_ones(opens, tab):
    some = sample(1)
    better = some[f"{NAME}/better"]
    values = better.values.copy()
    values[:2], values[4:] = np.nan, 0
    some[better.key] = Reading(key=better.key, values=values, axes=better.axes, unit=better.unit,
                               description=better.description)  # fmt: skip
    (folder := tab[2] / "unknown").mkdir()
    page = ready(opens(page_of(folder, {1: list(some.values())})))
    first, second = cards(page).values()
    assert [card["advantage"] for card in first[2:]] == ["unknown", "unknown"]
    assert [card["advantage"] for card in second] == ["0.00"] * 4
    notes = page.locator(".group summary > .told").all_inner_texts()
    assert notes == ["", "All are equally good: nothing to learn here."]


def test_only_descriptions_make_rollouts(opens, tab):
    """The same readings without their descriptions are drawn by their axes, as any others."""
    (folder := tab[2] / "plain").mkdir()
    plain = [one.described(Description()) for one in sample(1).values()]
    page = opens(page_of(folder, {1: plain}))
    drawn(page)
    assert not page.is_visible("#rollouts")
    assert page.locator(f"[data-instrument={NAME}] canvas").count() > 2


def test_texts_are_left_out_where_there_is_no_room_and_never_of_another_step(opens, tab):
    """Small readings with texts at many steps: all of them would not fit."""
    steps = {step: sample(step) for step in range(0, 300, 10)}
    (folder := tab[2] / "thinned").mkdir()
    sink = LocalSink(folder / "store", page=False)
    for step, some in steps.items():
        sink.write(list(some.values()), step=step)
    sink.close()
    store = read_store(folder / "store")
    whole, frame = len(packed(store).encode()), len(html({}).encode())
    most = frame + (whole - frame) // 3
    text = packed(store, most_bytes=most)
    assert most * 0.8 < len(text.encode()) <= most
    (folder / "page.html").write_text(text, encoding="utf-8")
    page = ready(opens((folder / "page.html").as_uri()))
    notes = page.inner_text("#notes")
    assert "Texts of rollouts and what was measured at their tokens" in notes
    assert re.search(r"at \d+ of 30 steps", notes) and f"({NAME}/looks)" in notes
    kept = page.evaluate(f"tlens.data.stepsOf('{NAME}/token')")
    assert 2 <= len(kept) < 30 and kept[0] == 0 and kept[-1] == 290
    for measure in ("prompt", "entropy", "change"):
        assert page.evaluate(f"tlens.data.stepsOf('{NAME}/{measure}')") == kept
    assert page.evaluate(f"tlens.data.stepsOf('{NAME}/looks')") == [], "texts come first"
    gone = next(step for step in steps if step not in kept)
    put(page, step=gone)
    found = cards(page)
    assert {card["text"] for row in found.values() for card in row} == {None}
    best = max(steps[gone][f"{NAME}/better"].values[:4])
    assert found["Prompt 1"][0]["advantage"] == f"▲ +{best:.2f}"
    assert "for want of room" in page.inner_text("#rollouts")
    assert not page.is_visible(".looks")
    page.click("#rollouts > p button")
    drawn(page)
    assert page.evaluate("tlens.state.step") in kept
    texts = {card["text"] for row in cards(page).values() for card in row}
    assert None not in texts
    text = packed(store, most_bytes=frame + int((whole - frame) * 0.9))
    (folder / "more.html").write_text(text, encoding="utf-8")
    page = ready(opens((folder / "more.html").as_uri()))
    assert page.evaluate(f"tlens.data.stepsOf('{NAME}/token')") == list(steps)
    looks = page.evaluate(f"tlens.data.stepsOf('{NAME}/looks')")
    assert 2 <= len(looks) < 30
    put(page, step=next(step for step in steps if step not in looks))
    assert "not in this page, for want of room" in page.inner_text(".looks")
    page.click(".looks .told button")
    drawn(page)
    assert page.evaluate("tlens.state.step") in looks
    assert page.locator(".looksat:not([hidden])").count() == 2
    for share in (10, 20, 40):
        most = frame + (whole - frame) // share
        try:
            assert len(packed(store, most_bytes=most).encode()) <= most
        except ValueError as error:
            assert "is too few for" in str(error) and share == 40


def test_a_page_of_a_run_in_progress_has_them(opens, tab):
    folder = PageFolder(tab[2] / "live" / "page")
    (tab[2] / "live").mkdir()
    folder.write(list(RUN[10].values()), 10)
    page = ready(opens((folder.path / "index.html").as_uri()))
    first = cards(page)
    folder.write(list(RUN[20].values()), 20)
    folder.finish()
    until(page, "document.getElementById('status').textContent", "ended, last step 20")
    drawn(page)
    assert cards(page) != first
    put(page, step=10)
    assert cards(page) == first


def test_many_long_rollouts_are_fast(opens, tab):
    """32 rollouts of 512 tokens, drawn to the end; of some switches those that nobody disturbed."""
    rng = np.random.default_rng(0)
    words = np.array("the of and we two plus then apples = + 7 first let us think".split())

    def text():
        return " ".join(rng.choice(words, 512))

    steps = {
        step: list(
            sample(step, texts=[(text(), [text() for _ in range(8)]) for _ in range(4)],
                   layers=30, heads=9).values()
        )
        for step in (0, 10, 20)
    }  # fmt: skip
    (folder := tab[2] / "many").mkdir()
    page = ready(opens(page_of(folder, steps)))
    assert page.locator(".rollout:not([hidden])").count() == 32
    switch = """async (step) => {
      const start = performance.now();
      tlens.set({ step });
      await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
      document.body.getBoundingClientRect();
      return performance.now() - start;
    }"""
    for step in (0, 10, 20):
        page.evaluate(switch, step)
        drawn(page)
    times = []
    for step in (0, 10, 20) * 3:
        times.append(page.evaluate(switch, step))
        drawn(page)
    assert np.percentile(times, 25) < 300, times
    # The end of a text can be pointed at once it is scrolled to.
    text_of = page.locator(".rollout .tokentexts").first
    few = text_of.locator(".t").count()
    assert few < 512 and text_of.evaluate("node => node.textContent.length") > 1000
    text_of.evaluate("node => { node.scrollTop = 1e6; }")
    drawn(page)
    assert text_of.locator(".t").count() == 512
    assert text_of.locator(".t").last.evaluate("node => node.style.background") != ""
