"""Attention maps of a whole model: pages that hold some heads only, and how quick a step is."""

import numpy as np

from tests.browser import drawn, needs_browser, opened
from tests.page.cells import Cells, is_said
from tests.page.pages import page_of
from tests.page.test_pattern_page import AXES, CELL, FIRST, code, settled, show, state
from tlens_callback.reading import Reading

pytestmark = needs_browser()


def test_a_page_of_chosen_heads_offers_those_that_it_has(tmp_path):
    def some(step):
        rng = np.random.default_rng(step)
        values = np.tril(rng.random((4, 8, 40, 40)))
        yield Reading(key="attention_patterns/pattern/p", values=values, axes=AXES,
                      unit="probability", limits=(0, 1))  # fmt: skip
        scores = rng.random((4, 8))
        yield Reading(key="head_scores/induction", values=scores, axes=AXES[:2],
                      unit="probability", limits=(0, 1))  # fmt: skip

    steps = {step: list(some(step)) for step in range(4)}
    with opened(page_of(tmp_path, steps, most_bytes=270_000)) as (page, faults):
        page.locator(FIRST).first.wait_for()
        settled(page)
        select = page.evaluate("""() => {
          const key = "attention_patterns/pattern/p";
          return tlens.data.entry(key, tlens.data.stepsOf(key).at(-1)).select;
        }""")
        assert select and len(select) < 32, "choose another most_bytes: all heads are there"
        missing = next(i for i in range(32) if i not in select)
        show(page, layer=missing // 8, head=missing % 8, step=3)
        told = page.locator("#maps .told").first.inner_text()
        assert told.startswith(f"L{missing // 8}H{missing % 8} is not in this page at step ")
        assert told.endswith(f"which holds the patterns of {len(select)} heads.")
        offer = page.locator("#maps .headblock select")
        names = [f"L{i // 8}H{i % 8}" for i in select]
        assert offer.locator("option").all_inner_texts()[1:] == names
        offer.select_option(label=names[-1])
        settled(page)
        assert state(page, "layer", "head") == [select[-1] // 8, select[-1] % 8]
        cells = Cells(page, FIRST, CELL, every=7)
        stored = code(next(some(3)).values[select[-1] // 8, select[-1] % 8])
        assert is_said(cells.says[35][14][1], stored[35, 14])
        assert faults == []


def test_the_last_row_is_seen_without_scrolling(tmp_path):
    values = np.tril(np.ones((1, 1, 37, 37)))
    some = Reading(key="attention_patterns/pattern/p", values=values, axes=AXES,
                   unit="probability", limits=(0, 1))  # fmt: skip
    size = {"width": 1400, "height": 950}
    with opened(page_of(tmp_path, {0: [some]}), viewport=size) as (page, faults):
        page.locator(FIRST).first.wait_for()
        for height in (950, 1300, 800, 400):
            page.set_viewport_size({**size, "height": height})
            drawn(page)
            box = page.locator(FIRST).bounding_box()
            side = box["height"]
            if height == 400:
                assert side > 250  # never too small to be read
            else:
                assert box["y"] + side < height
                assert side > min(560, height - 420) - 37
        assert faults == []


STEPPING = """async () => {
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  const seen = [], watch = new MutationObserver((list) => seen.push(...list));
  const box = document.getElementById("maps").closest(".card");
  watch.observe(box, { childList: true, subtree: true });
  const spent = [];
  for (let turn = 0; turn < 12; turn++) {
    for (const step of tlens.data.steps) {
      let began;
      requestAnimationFrame(() => { began = performance.now(); });
      tlens.set({ step });
      requestAnimationFrame(() => { spent.push(performance.now() - began); });
      await frame();
      await frame();
    }
  }
  return [spent, seen.length + watch.takeRecords().length];
}"""


def test_a_step_is_quick_and_changes_no_element(tmp_path):
    def some(step):
        rng = np.random.default_rng(step)
        values = np.tril(rng.random((30, 9, 48, 48)) ** 8)
        tokens = {"query": [f" t{i}" for i in range(48)], "key": [f" t{i}" for i in range(48)]}
        yield Reading(key="attention_patterns/pattern/p", values=values, axes=AXES,
                      unit="probability", labels=tokens, limits=(0, 1))  # fmt: skip
        for name in ("induction", "previous", "induction_spread"):
            yield Reading(key=f"head_scores/{name}", values=rng.random((30, 9)), axes=AXES[:2],
                          unit="probability", limits=(0, 1))  # fmt: skip

    with opened(page_of(tmp_path, {step: list(some(step)) for step in range(3)})) as (page, faults):
        page.locator(FIRST).first.wait_for()
        settled(page)
        spent, changes = page.evaluate(STEPPING)
        # The shortest: whatever else the machine does only makes them longer.
        assert min(spent) < 8 and changes == 0, (spent, changes)
        show(page, pins=[[1, 1], [2, 2], [3, 3], [4, 4]], other=0)
        assert page.locator("#maps canvas").count() == 15
        spent, changes = page.evaluate(STEPPING)
        assert min(spent) < 20 and changes == 0, (spent, changes)
        assert faults == []
