"""Rollouts on the page: cards by group, and the colours and numbers of their tokens."""

import re

import numpy as np
import pytest

from tests.browser import drawn, needs_browser
from tests.page.cells import MINUS, colour, is_said, tip
from tests.page.five_steps import words_of
from tests.page.pages import page_of
from tests.page.rollouts import NAME, RUN, STEPS, cards, put, ready, token, value

pytestmark = needs_browser()


@pytest.fixture(scope="module")
def run(tab):
    (folder := tab[2] / "rollouts").mkdir()
    return page_of(folder, {step: list(of.values()) for step, of in RUN.items()})


@pytest.fixture
def page(opens, run):
    return ready(opens(run))


def background(page, rollout, i):
    css = token(page, rollout, i).evaluate("node => getComputedStyle(node).backgroundColor")
    return [int(part) for part in re.findall(r"\d+", css)]


@pytest.mark.parametrize("step", STEPS)
def test_a_group_is_a_row_of_cards_the_best_first(page, step):
    put(page, step=step)
    found, advantage = cards(page), value("better", step)
    assert list(found) == ["Prompt 1", "Prompt 2"]
    for g, row in enumerate(found.values()):
        own = advantage[value("row", step) == g]
        order = np.argsort(-own, kind="stable")
        assert [card["name"] for card in row] == [f"{g + 1}.{i + 1}" for i in order]
        for card, i in zip(row, order, strict=True):
            at = 4 * g + i
            sign = "▲ +" if own[i] > 0 else "▼ "
            assert card["advantage"] == sign + f"{own[i]:.2f}".replace("-", MINUS)
            rewards = value("gave", step)[at]
            for fact, name, gave in zip(
                card["facts"], ("correct", "format"), rewards, strict=False
            ):
                assert fact.startswith(f"reward {name} ") and is_said(fact.split()[-1], gave)
            assert card["facts"][2] == f"length {value('length', step)[at]:.0f} tokens"
            truncated = value("truncated", step)[at]
            assert card["facts"][-1] == ("truncated" if truncated else "not truncated")
            texts = RUN[step][f"{NAME}/token"].texts[at]
            assert card["text"] == "".join(texts).replace("\n", "↵\n")
    prompts = page.locator(".group .short").all_inner_texts()
    assert prompts[0] == "Ann has 3 apples and buys 4 more. How many has she?"


def scale_end(measure):
    """The magnitude that has the last colour, from the numbers themselves."""
    of = np.concatenate([np.abs(value(measure, step)).ravel() for step in STEPS]).astype(float)
    of = np.sort(of[~np.isnan(of)])
    return of[int(0.99 * len(of))]


@pytest.mark.parametrize(
    ("measure", "signed"), [("entropy", False), ("change", True), ("logp", False), ("rank", False)]
)
def test_tokens_have_the_colour_of_the_chosen_measure(page, measure, signed):
    put(page, step=20, colour=measure)
    end, seen = scale_end(measure), set()
    for at, rollout in ((0, "1.1"), (4, "2.1")):
        for i in range(8):
            number = float(value(measure, 20)[at, i])
            share = min(1.0, abs(number) / end) ** 0.5
            place = (
                (128 + np.sign(number) * round(share * 128)) if signed else 128 - round(share * 128)
            )
            near = np.abs(np.array(background(page, rollout, i)) - colour(place / 256, "light"))
            assert near.max() <= 1.5, (rollout, i, number)
            seen.add(np.sign(number))
    assert seen >= ({-1, 1} if signed else set())
    legend = page.inner_text("#rolloutlegend")
    assert ("rank" if measure == "rank" else "nats") in legend and "share the last colour" in legend
    # The sign has two colours, a magnitude one, and the last is where the legend says.
    ticks = page.locator("#rolloutlegend .ticks span").all_inner_texts()
    assert is_said(ticks[-1], -end if measure == "logp" else end)
    assert (ticks[0] == "0") is not signed


def test_the_dark_theme_has_its_own_colours(page):
    put(page, step=20, colour="change")
    page.click("#theme")
    drawn(page)
    number = float(value("change", 20)[0, 1])
    share = min(1.0, abs(number) / scale_end("change")) ** 0.5
    expected = colour((128 + np.sign(number) * round(share * 128)) / 256, "dark")
    assert np.abs(np.array(background(page, "1.1", 1)) - expected).max() <= 1.5
    page.click("#theme")


def test_pointing_at_a_token_says_all_its_numbers(page):
    put(page, step=20, colour="entropy")
    token(page, "1.1", 2).hover()
    first, *lines = tip(page)
    assert first == "2 ·3"
    told = {name: rest for name, _, rest in (line.partition(": ") for line in lines)}
    # Two measures with the same title are told by their names.
    assert list(told) == [
        "Entropy of the next token", "Change of the log probability since the base model",
        "logp", "logp base", "Rank of the sampled token", "trained",
    ]  # fmt: skip
    for name, measure, unit in (
        ("Entropy of the next token", "entropy", "nats"), ("logp base", "logp_base", "nats"),
        ("Rank of the sampled token", "rank", "rank"),
    ):  # fmt: skip
        number, said = told[name].split(" ")
        assert is_said(number, value(measure, 20)[0, 2]) and said == unit
    assert told["trained"] == ("yes" if value("trained", 20)[0, 2] else "no")
    # The step may move under a mouse that rests.
    put(page, step=30)
    token(page, "1.1", 2).hover()
    number = tip(page)[1].split(": ")[1].split(" ")[0]
    assert is_said(number, value("entropy", 30)[0, 2])


def test_the_keyboard_goes_from_token_to_token(page):
    put(page, step=20)
    texts = RUN[20][f"{NAME}/token"].texts[0]
    token(page, "1.1", 0).focus()
    page.keyboard.press("ArrowRight")
    assert tip(page)[0] == f"1 {texts[1].replace(' ', '·')}"
    assert page.inner_text("#say").startswith("1 ")
    page.keyboard.press("End")
    last = int((texts != "").sum()) - 1
    assert tip(page)[0].startswith(f"{last} ")
    assert page.evaluate("tlens.state.step") == 20
    page.keyboard.press("Escape")
    assert tip(page) == []
    # One stop for the tab key in each text.
    stops = page.evaluate("""[...document.querySelectorAll(".rollout:not([hidden]) .tokentexts")]
      .map((text) => text.querySelectorAll(".t[tabindex='0']").length)""")
    assert set(stops) == {1}


def test_one_heads_attention_colours_the_two_rollouts_that_have_it(page):
    put(page, step=20, colour="looks", layer=1, head=2)
    looks = RUN[20][f"{NAME}/looks"]
    named = looks.labels["rollout"]
    told = page.locator("#rollouts > p").nth(1).inner_text()
    assert told == f"Attention was read of the rollouts {named[0]} and {named[1]}."
    before = int((RUN[20][f"{NAME}/prompt"].texts[0] != "").sum())
    for j, rollout in enumerate(named):
        for i in (0, 3):
            token(page, rollout, i).hover()
            line = tip(page)[-1]
            assert line.startswith("attention of L1H2 to it: ")
            assert is_said(line.split()[-2], looks.values[j, 1, 2, before + i])
    other = next(f"1.{i}" for i in range(1, 5) if f"1.{i}" not in named)
    assert background(page, other, 0)[3:] == [0], "no colour without attention"
    assert "L1H2" in page.inner_text("#rolloutlegend")


def test_the_choices_are_in_the_address(opens, run):
    page = ready(opens(run))
    put(page, step=20, layer=2, head=1)
    page.select_option("#rollouttint", "change")
    page.select_option("#contrast", f"{NAME}/contrast_first")
    page.check("#allnumbers")
    words = words_of(page)
    assert {name: words[name] for name in ("colour", "contrast", "numbers")} == {
        "colour": "change", "contrast": f"{NAME}/contrast_first", "numbers": "1"}  # fmt: skip
    address = page.evaluate("location.href")
    page = ready(opens(address))
    assert page.input_value("#rollouttint") == "change" and page.is_checked("#allnumbers")
    assert page.input_value("#contrast") == f"{NAME}/contrast_first"
    facts = cards(page)["Prompt 1"][0]["facts"]
    assert any(fact.startswith("sum change ") for fact in facts)
    page.uncheck("#allnumbers")
    drawn(page)
    facts = cards(page)["Prompt 1"][0]["facts"]
    assert not any(fact.startswith("sum change ") for fact in facts)
    # What is not there is not shown, and harms nothing.
    page = ready(opens(f"{run}#step=20&colour=nothing&contrast=x/y&rollouts=constructor"))
    assert page.input_value("#rollouttint") == "entropy", "the headline"
    assert len(cards(page)) == 2


def test_other_panels_do_not_repeat_them(page):
    put(page, step=20)
    panel = page.locator(f"[data-instrument={NAME}]")
    panel.scroll_into_view_if_needed()
    panel.locator("td").first.wait_for()
    assert [row.split("\t")[0] for row in panel.locator("tbody tr").all_inner_texts()] == ["kl"]
    assert panel.locator("canvas").count() == 0
    names = page.locator("#score option").all_inner_texts()
    assert not any("looks" in name for name in names)
