"""Rollouts on the page: cards by group, the colours and numbers of tokens, heads that differ."""

import json
import re

import numpy as np
import pytest

from tests.browser import drawn, needs_browser, until
from tests.page.cells import MINUS, Cells, colour, is_said, tip
from tests.page.five_steps import words_of
from tests.page.pages import page_of
from tests.page.rollouts import NAME, sample
from tlens_callback.meaning import Description
from tlens_callback.page import PageFolder
from tlens_callback.page import page as packed
from tlens_callback.page.template import html
from tlens_callback.reading import Reading
from tlens_callback.sinks import LocalSink, read_store

pytestmark = needs_browser()

STEPS = (10, 20, 30)
RUN = {step: sample(step) for step in STEPS}


@pytest.fixture(scope="module")
def run(tab):
    (folder := tab[2] / "rollouts").mkdir()
    return page_of(folder, {step: list(of.values()) for step, of in RUN.items()})


@pytest.fixture
def page(opens, run):
    return ready(opens(run))


def ready(page):
    page.wait_for_selector("#rollouts .rollout:not([hidden])")
    drawn(page)
    return page


def put(page, **values):
    page.evaluate(f"tlens.set({json.dumps(values)})")
    drawn(page)


def value(measure, step):
    return RUN[step][f"{NAME}/{measure}"].values


def cards(page):
    """Name of the group -> its cards from the left: {advantage, name, text, facts}."""
    return page.evaluate("""() => Object.fromEntries(
      [...document.querySelectorAll(".group:not([hidden])")].map((group) => [
        group.querySelector(".name").textContent,
        [...group.querySelectorAll(".rollout:not([hidden])")].map((card) => ({
          advantage: card.querySelector(".advantage").textContent,
          name: card.querySelector(".head .told").textContent.split(" ").at(-1),
          text: card.querySelector(".tokentexts").hidden ? null
            : card.querySelector(".tokentexts").textContent,
          facts: [...card.querySelectorAll(".fact")].map((one) => one.textContent),
        }))]))""")


def token(page, rollout, i):
    card = page.locator(f'.rollout[aria-label^="rollout {rollout},"]')
    return card.locator(".t").nth(i)


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


def test_heads_that_tell_winners_from_losers(page):
    put(page, step=20)
    assert page.inner_text("#discoveries") == (
        "2 of 24 heads tell winners from losers (false discovery rate 5 %): L1H2, L3H0."
    )
    cells = Cells(page, ".contrastmap canvas", r"^(\S+) (\S+) winners", every=1)
    assert cells.rows == ["L0", "L1", "L2", "L3"] and len(cells.columns) == 6
    contrast, q = value("contrast_direct", 20), value("contrast_direct_q", 20)
    for row in range(4):
        for column in range(6):
            _, number, rate = cells.says[row][column]
            assert is_said(number, contrast[row, column])
            assert is_said(rate.split(":")[0].split()[-1], q[row, column])
            assert ("tells winners" in rate) == ((row, column) in ((1, 2), (3, 0)))
    # The two are outlined, and only they.
    outlined = page.evaluate("""() => {
      const canvas = document.querySelector(".contrastmap canvas");
      const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
      copy.drawImage(canvas, 0, 0);
      const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
      let found = 0;
      for (let i = 0; i < data.length; i += 4) {
        found += data[i] === 0xb8 && data[i + 1] === 0x4f && data[i + 2] === 0;
      }
      return found;
    }""")
    assert outlined > 60
    cells.click(2, 4)
    drawn(page)
    assert page.evaluate("[tlens.state.layer, tlens.state.head]") == [2, 4]
    page.click("#discoveries button >> nth=1")
    drawn(page)
    assert page.evaluate("[tlens.state.layer, tlens.state.head]") == [3, 0]
    page.focus(".contrastmap canvas")
    page.keyboard.press("ArrowUp")
    drawn(page)
    assert page.evaluate("[tlens.state.layer, tlens.state.head]") == [2, 0]
    assert tip(page)[0] == "L2 H0 winners minus losers"


def test_what_a_head_looks_at_in_a_winner_and_in_a_loser(page):
    put(page, step=20, layer=3, head=0)
    looks, texts = RUN[20][f"{NAME}/looks"], RUN[20][f"{NAME}/token"]
    winner, loser = looks.labels["rollout"]
    lines = page.locator(".looksat:not([hidden])")
    names = lines.locator("p").all_inner_texts()
    assert names[0].startswith(f"Winner {winner}, advantage +")
    assert names[1].startswith(f"Loser {loser}, advantage {MINUS}")
    prompt = "".join(RUN[20][f"{NAME}/prompt"].texts[0])
    at = texts.labels["rollout"].index(loser)
    shown = lines.nth(1).locator(".t").all_inner_texts()
    assert "".join(shown) == (prompt + "".join(texts.texts[at])).replace("\n", "↵\n")
    lines.nth(1).locator(".t").nth(1).hover()
    name, where, number = tip(page)
    assert (name, where) == ("1 ·has", "in the prompt")
    assert is_said(number.split()[1], looks.values[1, 3, 0, 1])
    lines.nth(1).locator(".t").last.hover()
    assert tip(page)[1] == "sampled"


@pytest.mark.parametrize("found, says", [
    ((), "No head tells winners from losers (false discovery rate 5 %)."),
    (((2, 5),), "1 of 24 heads tells winners from losers (false discovery rate 5 %): L2H5."),
    ([(i // 6, i % 6) for i in range(15)], "15 of 24 heads tell winners from losers (false "
     "discovery rate 5 %): L0H0, L0H1, L0H2, L0H3, L0H4, L0H5, L1H0, L1H1, L1H2, L1H3, L1H4, L1H5 "
     "and 3 more."),
], ids=["none", "one", "many"])  # fmt: skip
def test_the_discoveries_in_words(opens, tab, found, says):
    (folder := tab[2] / f"found-{len(found)}").mkdir()
    page = ready(opens(page_of(folder, {5: list(sample(5, found=found).values())})))
    assert page.inner_text("#discoveries") == says


def test_a_contrast_without_rates_was_not_tested(page):
    put(page, step=20, contrast=f"{NAME}/contrast_first")
    assert page.inner_text("#discoveries") == "These contrasts were not tested at this step."
    assert page.input_value("#contrast") == f"{NAME}/contrast_first"
    options = page.locator("#contrast option").all_inner_texts()
    assert options == ["Direct effect on the sampled tokens", "Attention to the first token"]


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


def test_other_panels_do_not_repeat_them(page):
    put(page, step=20)
    panel = page.locator(f"[data-instrument={NAME}]")
    panel.scroll_into_view_if_needed()
    panel.locator("td").first.wait_for()
    assert [row.split("\t")[0] for row in panel.locator("tbody tr").all_inner_texts()] == ["kl"]
    assert panel.locator("canvas").count() == 0
    names = page.locator("#score option").all_inner_texts()
    assert not any("looks" in name for name in names)


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


def test_a_head_can_be_chosen_where_nothing_contrasts_the_heads(opens, tab):
    some = [one for key, one in sample(1).items() if "contrast" not in key]
    (folder := tab[2] / "alone").mkdir()
    page = ready(opens(page_of(folder, {1: some}) + "#head=3.5"))
    assert page.evaluate("[tlens.state.layer, tlens.state.head]") == [3, 5]
    page.select_option("select[aria-label='layer that is looked at']", "2")
    drawn(page)
    assert page.inner_text(".looks h4").startswith("What L2H5 looks at")
    assert not page.is_visible("#discoveries")
    looks = next(one for one in some if one.axes[-1] == "key")
    page.locator(".looksat .t").first.hover()
    assert is_said(tip(page)[-1].split()[1], looks.values[0, 2, 5, 0])
