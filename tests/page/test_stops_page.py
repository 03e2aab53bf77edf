"""Where the slider stops: at steps that were looked at, not where only the copy was compared."""

import pytest

from tests.browser import needs_browser, opened, until
from tests.page.five_steps import settled
from tests.page.pages import page_of
from tlens_callback.page import PageFolder
from tlens_callback.reading import Reading

pytestmark = needs_browser()

NAME = "document.getElementById('stepname').textContent"


def readings(step):
    """As an observer gives them: the comparison alone after the first and the second update."""
    yield Reading(key="fidelity/kl", values=step / 1e4, unit="nats")
    if step in (1, 2):
        return
    pattern = [[[[1.0, 0.0], [0.5, 0.5]]]]
    yield Reading(key="attention_patterns/pattern/p", values=pattern, unit="probability",
                  axes=("layer", "head", "query", "key"), limits=(0, 1))  # fmt: skip
    yield Reading(key="target_scores/loss/p", values=step / 8, unit="nats")


@pytest.fixture(scope="module")
def browser():
    with opened("about:blank", allowed="file:///") as (page, faults):
        yield page
        assert faults == []


@pytest.fixture
def page(browser, tmp_path):
    address = page_of(tmp_path, {step: list(readings(step)) for step in (0, 1, 2, 10, 20)})
    browser.goto(f"{address}#step=2&curves=fidelity/kl")
    browser.wait_for_selector("#stepname:not(:empty)")
    return browser


def test_a_step_of_the_comparison_alone_is_passed_by(page):
    assert page.evaluate(NAME) == "step 0"  # the stop nearest to what the address says
    for key, step in (("ArrowRight", 10), ("ArrowRight", 20), ("Home", 0)):
        page.keyboard.press(key)
        settled(page)
        assert page.evaluate(NAME) == f"step {step}"
    options = page.locator("#other option").all_inner_texts()
    assert options[1:] == [f"compare with step {step}" for step in (0, 10, 20)]
    page.locator("#speed").select_option("16")
    page.evaluate("""window.seen = [];
      new MutationObserver(() => seen.push(tlens.state.step))
        .observe(document.getElementById("stepname"), { childList: true });""")
    page.locator("#play").click()
    until(page, "seen.at(-1)", 20)
    assert page.evaluate("seen") == [10, 20]


def test_its_numbers_are_in_curves_and_tables(page):
    assert page.evaluate("tlens.data.curve('fidelity/kl').steps") == [0, 1, 2, 10, 20]
    paths = page.evaluate("""[...document.querySelectorAll("#curves path[stroke]")]
      .map((path) => path.getAttribute("d").match(/[ML]/g)?.length)""")
    assert 5 in paths
    table = page.locator("[data-instrument=fidelity]")
    table.scroll_into_view_if_needed()
    table.locator("polyline").wait_for(state="attached")
    assert len(table.locator("polyline").get_attribute("points").split()) == 5


def test_a_live_page_follows_over_it(browser, tmp_path):
    page, folder = browser, PageFolder(tmp_path / "page")
    for step in (0, 1, 2):
        folder.write(list(readings(step)), step)
    page.goto((folder.path / "index.html").as_uri())
    until(page, "document.getElementById('stepname')?.textContent", "step 0")
    until(page, "tlens.data.stepsOf('fidelity/kl')", [0, 1, 2])
    # The axis reaches to what lies after the last stop.
    ends = "[document.getElementById('step').min, document.getElementById('step').max]"
    until(page, ends, ["0", "2"])
    folder.write(list(readings(10)), 10)
    until(page, NAME, "step 10")
    folder.drop(2)
    until(page, "tlens.data.stepsOf('fidelity/kl')", [0, 1])
    until(page, NAME, "step 0")
    assert page.evaluate("tlens.data.steps") == [0]
