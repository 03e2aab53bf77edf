"""A run of five steps for the tests of the page, and what they ask of an open page."""

import io
import re
from urllib.parse import parse_qs

import numpy as np
from PIL import Image

from tlens_callback.reading import Reading

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


def step_of(page):
    settled(page)
    return int(re.match(r"step (\d+)", page.text_content("#stepname"))[1])


def settled(page):
    page.evaluate("() => new Promise((done) => setTimeout(() => requestAnimationFrame(done), 20))")


def addressed(page):
    """Waits until the page has written its address, which it does when 150 ms were quiet."""
    settled(page)
    page.evaluate("() => new Promise((done) => setTimeout(done, 200))")


def words_of(page):
    addressed(page)
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
