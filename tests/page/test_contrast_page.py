"""Which heads tell winners from losers, and what they look at in one of each."""

import numpy as np
import pytest

from tests.browser import drawn, needs_browser
from tests.page.cells import MINUS, Cells, is_said, tip
from tests.page.pages import page_of
from tests.page.rollouts import MEASURES, NAME, RUN, put, ready, sample, token, value
from tlens_callback.meaning import Description, Meaning, Quantity
from tlens_callback.reading import Reading

CONTRAST, CONTRAST_Q = Quantity.CONTRAST, Quantity.CONTRAST_Q

pytestmark = needs_browser()


@pytest.fixture(scope="module")
def run(tab):
    (folder := tab[2] / "rollouts").mkdir()
    return page_of(folder, {step: list(of.values()) for step, of in RUN.items()})


@pytest.fixture
def page(opens, run):
    return ready(opens(run))


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


LISTED = Description(
    title="Rollouts",
    group="Rollouts",
    measures={
        **MEASURES,
        "contrast_unit": Meaning(title="Winners minus losers: top neurons", quantity=CONTRAST),
        "contrast_unit_q": Meaning(quantity=CONTRAST_Q),
        "contrast_felt": Meaning(title="Winners minus losers: top features", quantity=CONTRAST),
        "felt": Meaning(title="Feature of the token"),
    },
)


def listed(step=1):
    """A sample with neurons and features that are compared, one of them at each token."""
    found, draw = sample(step), np.random.default_rng(step)
    texts = {"unit": ["L1N50", "L0N3", "L2N7"], "felt": ["sae 3", "sae </b>9"]}

    def add(measure, values, axes=("rank",), unit="activation", **more):
        key = f"{NAME}/{measure}"
        found[key] = Reading(
            key=key, values=np.asarray(values, np.float32), axes=axes, unit=unit, **more
        )

    for name, names in texts.items():
        values = draw.normal(size=len(names))
        add(f"contrast_{name}", values, texts=np.array(names))
        add(f"contrast_{name}_length", draw.uniform(-1, 1, len(names)), unit="correlation")
    add("contrast_unit_q", [0.001, 0.04, 0.3], unit="fraction")
    add("contrast_direct_length", draw.uniform(-1, 1, (4, 6)), ("layer", "head"), "correlation")
    add("contrast_direct_sign", draw.uniform(-1, 1, (4, 6)), ("layer", "head"), "fraction")
    entropy = found[f"{NAME}/entropy"]
    for name in texts["felt"][:1]:
        values = np.where(np.isnan(entropy.values), np.nan, draw.random(entropy.values.shape))
        add(f"felt/{name}", values, ("rollout", "pos"), labels=dict(entropy.labels))
    return {key: reading.described(LISTED) for key, reading in found.items()}


def test_neurons_and_features_that_tell_most_are_listed(opens, tab):
    (folder := tab[2] / "listed").mkdir()
    made = listed()
    page = ready(opens(page_of(folder, {1: list(made.values())})))
    tables = page.locator(".ranked .table:visible")
    assert tables.count() == 2
    names, *rest = tables.locator("caption").all_inner_texts()
    assert [names, *rest] == [
        "Winners minus losers: top neurons",
        "Winners minus losers: top features",
    ]
    rows = [
        [cell.inner_text() for cell in row.locator("td").all()]
        for row in tables.first.locator("tbody tr").all()
    ]
    for i, (name, *numbers) in enumerate(rows):
        assert name == made[f"{NAME}/contrast_unit"].texts[i]
        beside = ("", "_q", "_length")
        for said, suffix in zip(numbers, beside, strict=True):
            assert is_said(said, made[f"{NAME}/contrast_unit{suffix}"].values[i])
    assert tables.first.locator("td.found").all_inner_texts() == ["L1N50", "L0N3"]
    # A feature whose activation at each token is there colours the tokens.
    second = tables.nth(1).locator("tbody tr")
    assert second.nth(1).locator("td").first.inner_text() == "sae </b>9"
    assert not second.nth(1).locator("button").count()
    second.first.locator("button").click()
    drawn(page)
    assert page.input_value("#rollouttint") == "felt/sae 3"
    chosen = page.locator("#rollouttint option:checked").inner_text()
    assert chosen == "Feature of the token: sae 3"
    token(page, "1.1", 2).hover()
    said = next(line for line in tip(page) if line.startswith(chosen))
    assert is_said(said.split()[-2], made[f"{NAME}/felt/sae 3"].values[0, 2])
    assert page.evaluate("location.hash").count("felt")


def test_features_of_other_steps_are_not_offered(opens, tab):
    """Each step shows those that differ most at it; the one that is chosen stays."""
    (folder := tab[2] / "changing").mkdir()
    steps = {1: list(listed(1).values()), 2: [one.described(LISTED) for one in sample(2).values()]}
    page = ready(opens(page_of(folder, steps) + "#step=2"))
    offered = page.locator("#rollouttint option")
    assert "Feature of the token: sae 3" not in offered.all_inner_texts()
    put(page, step=1)
    assert "Feature of the token: sae 3" in offered.all_inner_texts()
    put(page, colour="felt/sae 3", step=2)
    assert page.input_value("#rollouttint") == "felt/sae 3"


def test_what_else_is_known_of_a_head_is_said_and_no_map_of_its_own(opens, tab):
    (folder := tab[2] / "beside").mkdir()
    made = listed()
    page = ready(opens(page_of(folder, {1: list(made.values())})))
    cells = Cells(page, ".contrastmap canvas", r"^(\S+) (\S+) winners", every=2)
    said = cells.says[2][4]
    for words, suffix in (("correlation with length", "length"), ("mean sign so far", "sign")):
        (line,) = [line for line in said if line.startswith(words)]
        assert is_said(line.split()[-1], made[f"{NAME}/contrast_direct_{suffix}"].values[2, 4])
    others = page.locator(f"details[data-instrument={NAME}]").all_inner_texts()
    assert not any("contrast" in text or "length" in text for text in others)
