"""What is looked at, in the address."""

import pytest

from tests.browser import needs_browser
from tests.page.five_steps import STEPS, settled, step_of, words_of

pytestmark = needs_browser()


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
    settled(page)
    assert inside.locator("#stepname").inner_text() == "step 10"
    page.keyboard.press("?")
    assert inside.locator("#keys").is_visible()
    assert faults == []
