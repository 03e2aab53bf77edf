"""What a trainer logs of rewards: its names with slashes, and the curves of them on the page."""

import numpy as np
import pytest
import torch

from tests.browser import drawn, needs_browser
from tests.page.cells import tip
from tests.page.pages import page_of
from tests.training import CAPITAL
from tlens_callback import LocalSink, TargetScores, TLensCallback, read_store
from tlens_callback.reading import Reading
from tlens_callback.run.trainer_logs import TrainerLogs

pytestmark = needs_browser()

HOSTILE = '</script><script>alert(1)</script>"\u202e'


def row(step):
    """What GRPO logs at a step, with two reward functions."""
    return {
        "loss": 1 / step,
        "num_tokens": 100.0 * step,
        "completions/mean_length": 30.0 + step,
        "completions/min_length": 5.0,
        "completions/max_length": 64.0,
        "completions/mean_terminated_length": 20.0 + step,
        "completions/clipped_ratio": 0.25,
        "rewards/format/mean": step / 100,
        "rewards/format/std": 0.1,
        f"rewards/{HOSTILE}/mean": -step / 50,
        "reward": -step / 100,
        "frac_reward_zero_std": 0.5,
        "clip_ratio/low_mean": 0.0,
        "step": step,
    }


def readings(rows):
    """Step -> readings: observations at every fifth step, and a score beside them."""
    logs, found = TrainerLogs(), {}
    written: list[dict] = []
    logs.start(written, step=0)
    for step, one in enumerate(rows, start=1):
        written.append(one)
        if step % 5 == 0:
            score = Reading(key="head_scores/induction", values=np.eye(2), axes=("layer", "head"),
                            unit="probability", limits=(0, 1))  # fmt: skip
            loss = Reading(key="target_scores/loss/capital", values=1 / step, unit="nats")
            found[step] = [score, loss, *logs.take(step)]
    return found


@pytest.fixture(scope="module")
def logged(tab):
    (folder := tab[2] / "rewards").mkdir()
    return page_of(folder, readings([row(step) for step in range(1, 31)]))


@pytest.fixture
def shown(opens, logged):
    page = opens(logged)
    page.wait_for_selector("#rewards .chart")
    return page


def charts(page):
    """Title -> its lines: name -> value at the slider's step."""
    drawn(page)
    return {
        chart.locator("figcaption").inner_text(): dict(
            line.split("\n") for line in chart.locator(".curve").all_inner_texts()
        )
        for chart in page.locator("#rewards .chart").all()
    }


def test_rewards_lengths_and_truncation_are_curves_in_plain_words(shown):
    shown.evaluate("tlens.set({ step: 20 })")
    found = charts(shown)
    assert list(found) == [
        "Reward by function\nreward",
        "Completion length\ntokens",
        "Shares\nfraction",
    ]
    reward, length, shares = found.values()
    hostile = HOSTILE.replace("\u202e", "\\u202e")
    assert reward == {"format": "0.20", hostile: "−0.40", "all together, weighted": "−0.20"}
    assert length == {"mean": "50", "mean of those that ended by themselves": "40",
                      "shortest": "5", "longest": "64"}  # fmt: skip
    assert shares == {"completions cut off at the longest allowed": "0.25",
                      "groups with equal rewards, which teach nothing": "0.50"}  # fmt: skip
    shown.evaluate("tlens.set({ step: 5 })")
    assert charts(shown)["Reward by function\nreward"]["format"] == "0.0500"
    # Every value is drawn, not only those at the observed steps.
    paths = shown.evaluate("""[...document.querySelectorAll("#rewards .chart:first-child .line")]
      .map((line) => line.getAttribute("d").split(/[ML]/).length - 1)""")
    assert paths == [30, 30, 30]


def test_pointing_says_the_values_and_a_click_goes_to_the_step(shown):
    picture = shown.locator("#rewards .chart svg[role=img]").first
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    shown.mouse.move(box["x"] + box["width"] - 10, box["y"] + 50)
    assert tip(shown)[:2] == ["Reward by function, step 30", "format: 0.30"]
    picture.click(position={"x": box["width"] - 10, "y": 50})
    drawn(shown)
    assert shown.evaluate("tlens.state.step") == 30


def test_names_with_slashes_are_no_probes(shown):
    assert shown.locator("#probe option").count() == 0
    assert shown.evaluate("tlens.state.probe") == "capital"
    assert shown.locator("#tokenprobe").inner_text() == "of capital"
    # A curve of its own scale for each name: the means of two functions share none.
    keys = ["trainer/rewards/format/mean", "trainer/rewards/format/std"]
    shown.evaluate("(curves) => tlens.set({ curves })", keys)
    drawn(shown)
    places = shown.locator("#curvelist .curve small").all_inner_texts()
    assert "left axis" in places[0] and "left axis" not in places[-1]


def test_a_closed_section_is_drawn_when_it_is_opened(shown):
    shown.click("#rewards summary")
    shown.evaluate("tlens.set({ step: 10 })")
    drawn(shown)
    shown.click("#rewards summary")
    assert charts(shown)["Completion length\ntokens"]["mean"] == "40"


def test_another_trainer_has_no_such_section(opens, tab):
    def of(step):
        return {"loss": 1 / step, "reward_model_loss": 1.0, "step": step}

    (folder := tab[2] / "other").mkdir()
    page = opens(page_of(folder, readings([of(step) for step in range(1, 11)])))
    page.wait_for_selector("#matrix")
    drawn(page)
    assert not page.is_visible("#rewards")


def test_pairs_and_evaluations(opens, tab):
    """DPO's names, and those of an evaluation."""

    def of(step):
        pairs = {"rewards/chosen": 1.0, "rewards/rejected": -1.0, "rewards/margins": 2.0,
                 "rewards/accuracies": 0.75}  # fmt: skip
        evaluated = {f"eval_{name}": value / 2 for name, value in pairs.items()}
        return {**pairs, **(evaluated if step == 10 else {}), "step": step}

    (folder := tab[2] / "pairs").mkdir()
    page = opens(page_of(folder, readings([of(step) for step in range(1, 11)])))
    page.wait_for_selector("#rewards .chart")
    reward, shares = charts(page).values()
    assert reward == {"chosen": "1", "rejected": "−1", "margins": "2",
                      "chosen, in evaluation": "0.50", "rejected, in evaluation": "−0.50",
                      "margins, in evaluation": "1"}  # fmt: skip
    assert list(shares.values()) == ["0.75", "0.375"]
    page.set_viewport_size({"width": 400, "height": 800})
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    page.set_viewport_size({"width": 1400, "height": 1000})


@pytest.mark.slow
def test_a_real_run_of_grpo_has_its_rewards_and_no_invented_probe(opens, tab):
    # Late: it imports TRL's trainers, which takes seconds.
    from tests.test_grpo_merges import GRPOTrainer, grpo

    folder = tab[2] / "grpo"
    callback = TLensCallback([CAPITAL], instruments=[TargetScores()], every_n_steps=4,
                             sinks=[LocalSink(folder / "store")], on_error="raise")  # fmt: skip
    grpo(folder / "out", [callback], torch.float32, trains=GRPOTrainer)
    store = read_store(folder / "store")
    logged = [key for key in store.keys if key.startswith("trainer/")]
    assert sum(key.count("/") > 1 for key in logged) > 10, "so they could be taken for probes"
    frame = store.frame()
    assert set(frame.probe.dropna()) == {"capital"}
    of_trainer = frame[frame.instrument == "trainer"]
    assert set("trainer/" + of_trainer.measure.astype(str)) == set(logged)
    page = opens((folder / "store" / "page.html").as_uri())
    page.wait_for_selector("#rewards .chart")
    reward, length, shares = charts(page).values()
    assert list(reward) == ["<lambda>", "all together, weighted"]
    assert length["mean"] == "4" and shares["completions cut off at the longest allowed"] == "1"
    assert page.evaluate("tlens.state.probe") == "capital"
    assert page.locator("#probe option").count() <= 1
