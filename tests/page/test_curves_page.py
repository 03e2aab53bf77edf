"""What the plot of curves says: its axes, and what it shows by itself."""

from tests.browser import needs_browser, opened
from tests.page.five_steps import logged, settled, ticks_of
from tests.page.pages import page_of
from tlens_callback.reading import Reading

pytestmark = needs_browser()


def test_noise_in_a_share_does_not_fill_the_plot(tmp_path):
    def of(step):
        noise = [[0.7305 + step / 1e4]]
        yield Reading(key="head_scores/induction", values=noise, axes=("layer", "head"),
                      unit="probability", limits=(0, 1))  # fmt: skip
        yield Reading(key="target_scores/loss/p", values=2.3401 + step / 1e5, unit="nats")

    address = page_of(tmp_path, {step: list(of(step)) for step in (0, 10)})
    with opened(f"{address}#curves=target_scores/loss/p") as (page, faults):
        page.wait_for_selector("#curves path[stroke]", state="attached")
        assert ticks_of(page, "right") == ["0", "0.5", "1.0"]
        heights = page.evaluate("""[...document.querySelectorAll("#curves path[stroke]")]
          .map((path) => path.getAttribute("d")).filter((d) => d.includes("L"))
          .map((d) => d.split(/[ML ]/).filter(Boolean).filter((_, i) => i % 2).map(Number))""")
        drops = sorted(abs(a - b) for a, b in heights)
        assert drops[0] < 1 < 50 < drops[1]  # a loss has no end above: its range fills the plot
        # Numbers at an axis tell themselves apart.
        assert ticks_of(page, "left") == ["2.34010", "2.34015", "2.34020"]
        assert faults == []


def test_the_usual_curves_are_of_the_training_and_of_the_answer(tmp_path):
    def of(step):
        for name in "ab":
            yield Reading(key=f"target_scores/probability/{name}", values=step / 20, limits=(0, 1),
                          unit="probability")  # fmt: skip
        if step:
            yield logged("reward", {step: 0.25})
            yield logged("loss", {step: 1.5})

    address = page_of(tmp_path, {step: list(of(step)) for step in (0, 10)})
    with opened(f"{address}#step=0") as (page, faults):
        page.wait_for_selector("#curvelist .curve")
        told = page.locator("#curvelist .curve").all_inner_texts()
        names = ["trainer/loss", "trainer/reward", "target_scores/probability/a"]
        assert [text.split()[0] for text in told] == names
        # What was not there yet at the slider's step says when it was.
        assert "1.50 (step 10)" in told[0] and "(step" not in told[2]
        page.evaluate("tlens.set({ probe: 'b', step: 10 })")
        settled(page)
        told = page.locator("#curvelist .curve").all_inner_texts()
        assert told[2].startswith("target_scores/probability/b") and "(step" not in told[0]
        assert faults == []
