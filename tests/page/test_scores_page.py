"""What the page opens with, and what it says of a score."""

import inspect

import numpy as np
import pytest

from tests.browser import drawn, needs_browser, opened
from tests.described import OWN
from tests.page.pages import page_of
from tlens_callback import Watch, instruments
from tlens_callback.reading import Reading

HEADS = ("layer", "head")
INDUCTION = "Scores each head in known roles"
DRIFT = "Measures how far each head's attention has moved"


def of(step, drift):
    for key, value in (("head_scores/induction", 0.5), ("attention_drift/js", drift * step)):
        yield Reading(key=key, values=np.full((2, 3), value), axes=HEADS, unit="probability",
                      limits=(0, 1))  # fmt: skip
    # A name that every object has is no instrument of ours either.
    for key in ("theirs/score", "constructor/score"):
        yield Reading(key=key, values=np.full((2, 3), 0.25), axes=HEADS, unit="bits")


@needs_browser()
@pytest.mark.parametrize("drift, opens, says", [
    (0.01, "attention_drift/js", DRIFT),
    (0.0, "head_scores/induction", INDUCTION),
])  # fmt: skip
def test_a_page_opens_with_the_drift_where_there_is_any(tmp_path, drift, opens, says):
    address = page_of(tmp_path, {step: list(of(step, drift)) for step in (0, 10)})
    with opened(address) as (page, faults):
        page.locator("#matrix").wait_for()
        assert page.evaluate("tlens.state.score") == opens
        card = page.locator(".card", has=page.locator("#matrix"))
        assert card.locator(".meaning").inner_text().startswith(says)
        titles = {one.get_attribute("value"): one.get_attribute("title")
                  for one in page.locator("#score option").all()}  # fmt: skip
        assert titles.pop("theirs/score") == titles.pop("constructor/score") == ""
        assert titles["head_scores/induction"].startswith(INDUCTION)
        assert titles["attention_drift/js"].startswith(DRIFT)
        page.locator("#score").select_option("theirs/score")
        drawn(page)
        assert card.locator(".meaning").inner_text() == ""
        for name, count in (("head_scores", 1), ("attention_drift", 1), ("theirs", 0)):
            told = page.locator(f"[data-instrument={name}] > .meaning")
            assert told.count() == count
            assert not count or told.inner_text() == OWN[name].sentence
        assert faults == []


def test_each_instrument_has_one_sentence():
    there = [getattr(instruments, name) for name in instruments.__all__]
    made = [*filter(inspect.isclass, there), Watch]
    told = {name: one.sentence for name, one in OWN.items() if one.sentence}
    assert sorted(told) == sorted(one.name for one in made)
    for one in made:
        sentence = told[one.name]
        assert sentence.endswith(".") and ". " not in sentence and len(sentence) < 200
        assert " ".join(one.__doc__.split()).startswith(sentence)
