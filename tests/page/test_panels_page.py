"""What the page draws of every instrument, this package's or another's, in a real browser."""

import numpy as np
import pytest

from tests.browser import drawn, needs_browser, opened
from tests.page.pages import page_of
from tlens_callback.reading import Reading

pytestmark = needs_browser()

TOKENS = ["<s>", "</script><script>alert(1)</script>", " city", "\n"]
HOSTILE = '"><img src=x onerror=alert(1)>'


def readings(step):
    """Of three instruments, one of them nobody knows; numbers that depend on the step."""
    rng = np.random.default_rng(step)
    layers = ("layer",)
    head = rng.normal(0, 1, (3, 2))
    return [
        Reading(key="target_scores/loss/one", values=np.array(2.5 - step / 8), unit="nats"),
        Reading(key="target_scores/loss/two", values=np.array(7.5), unit="nats"),
        Reading(
            key="logit_attribution/head/one", values=head, axes=("layer", "head"), unit="logit"
        ),
        Reading(
            key="logit_attribution/mlp/one", values=rng.normal(0, 1, 3), axes=layers, unit="logit"
        ),
        Reading(key="logit_attribution/bias/one", values=np.array(-9.0), unit="logit"),
        Reading(
            key="logit_attribution/attention/one", values=head.sum(1), axes=layers, unit="logit"
        ),
        Reading(
            key="top_neurons/neuron/one",
            values=[[5, 7], [1, 0]],
            axes=("layer", "rank"),
            unit="index",
        ),
        Reading(
            key="top_neurons/activation/one",
            values=np.arange(16).reshape(2, 2, 4) + step,
            axes=("layer", "rank", "pos"),
            unit="activation",
            labels={"pos": TOKENS},
        ),
        Reading(
            key="top_neurons/peak/one",
            values=[[0, 1], [2, 3]],
            axes=("layer", "rank"),
            unit="index",
        ),
        Reading(
            key="somebodys/spin",
            values=rng.normal(0, 1, (2, 3, 4)),
            axes=("season", "planet", "moon"),
            unit="turns",
            labels={"season": ["dry", "wet"], "planet": [HOSTILE, "Mars", "Venus"]},
        ),
        Reading(
            key="somebodys/mass",
            values=[1.5, np.nan, -np.inf],
            axes=("planet",),
            unit="tons",
            labels={"planet": [HOSTILE, "Mars", "Venus"]},
        ),
        Reading(
            key="features/top",
            values=[[0.5, 0.25], [3.0, 0.0]],
            axes=("feature", "rank"),
            unit="activation",
            texts=np.array([[" a[[ city]] by", "<b>[[x]]"], ["[[y]]", ""]]),
            labels={"feature": ["12", "90"]},
        ),
        *(
            Reading(
                key=key,
                values=np.full((3, 2), step / 200),
                axes=("layer", "head"),
                unit=unit,
                limits=(0, 1),
            )
            for key, unit in (
                ("drift/js", "bits"),
                ("drift/js/one", "bits"),
                ("drift/share", "fraction"),
            )
        ),
        Reading(
            key="blank/word",
            values=[0, 1, 2],
            axes=("rank",),
            unit="index",
            texts=np.array(["\u00a0", "\u3000 x", "\u2009"]),
        ),
        Reading(
            key="token_loss/change/one",
            values=[-1e-7, 0],
            axes=("token",),
            unit="nats",
            labels={"token": TOKENS[2:]},
        ),
        *(
            [Reading(key="late/norm", values=rng.random(3), axes=layers, unit="norm")]
            if step
            else []
        ),
        *(
            [
                Reading(
                    key="watch/events",
                    values=[0.5],
                    axes=("event",),
                    unit="event",
                    texts=np.array([f"new induction head {HOSTILE}"]),
                )
            ]
            if step == 4
            else []
        ),
    ]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    steps = {step: readings(step) for step in (0, 4, 8)}
    address = page_of(tmp_path_factory.mktemp("page"), steps)
    with opened(f"{address}#step=8&probe=one") as (page, faults):
        page.wait_for_selector("[data-instrument=somebodys] .body, [data-instrument=somebodys] td")
        yield page, faults


def section(page, instrument):
    there = page.locator(f"[data-instrument={instrument}]")
    there.scroll_into_view_if_needed()
    drawn(page)
    return there


def rows(section):
    return [
        [cell.inner_text() for cell in row.locator("td").all()]
        for row in section.locator("tbody tr").all()
    ]


def number(text):
    return float(text.replace("−", "-").replace("∞", "inf"))


def test_numbers_of_the_chosen_probe_with_their_first(shown):
    page, _ = shown
    (row,) = rows(section(page, "target_scores"))
    assert (row[0], row[1], row[2], row[4]) == ("loss", "1.50", "2.50", "nats")


def test_attribution_bars_are_the_largest_parts_in_order(shown):
    page, _ = shown
    bars = section(page, "logit_attribution").locator(".bar-line")
    got = [
        (bar.locator(".name").inner_text(), number(bar.locator(".number").inner_text()))
        for bar in bars.all()
    ]
    by_key = {r.measure: r.values for r in readings(8) if r.instrument == "logit_attribution"}
    want = {f"L{i}H{j}": by_key["head"][i, j] for i in range(3) for j in range(2)}
    want |= {f"L{i} mlp": by_key["mlp"][i] for i in range(3)} | {"bias": by_key["bias"]}
    assert [name for name, _ in got] == sorted(want, key=lambda name: -abs(want[name]))
    assert all(abs(value - want[name]) <= 0.006 for name, value in got)
    # Its own width says the value: the longest bar is half of the track.
    width = bars.first.locator("i").evaluate("node => node.style.width")
    assert width == "50%"


def test_no_token_is_blank_and_none_is_numbered_as_another(shown):
    page, _ = shown
    assert [row[1] for row in rows(section(page, "blank"))] == ["\\u00a0", "\\u3000·x", "\\u2009"]
    # The first loss is of the second token: its place in the list is not that in the text.
    assert [row[0] for row in rows(section(page, "token_loss"))] == ["·city", "↵"]
    assert rows(section(page, "token_loss"))[0][1] == "−1.00e−7"


def test_bars_keep_their_scale_from_one_step_to_the_next(shown):
    page, _ = shown
    part = section(page, "logit_attribution")
    of = {s: {r.measure: r.values for r in readings(s) if r.instrument == "logit_attribution"}
          for s in (0, 8)}  # fmt: skip
    most = max(np.abs(one[name]).max() for one in of.values() for name in ("head", "mlp", "bias"))
    for step in (0, 8):
        page.evaluate(f"tlens.set({{ step: {step} }})")
        drawn(page)
        assert "outline: at step 0" in part.inner_text()
        for bar in part.locator(".bar-line", has_text="L1 mlp").all():
            share = float(bar.locator("i").evaluate("node => parseFloat(node.style.width)")) / 50
            assert share == pytest.approx(abs(of[step]["mlp"][1]) / most, rel=1e-3)


def test_lines_maps_and_their_probes_are_told_apart(shown):
    page, _ = shown
    mlp = section(page, "logit_attribution").locator("figure", has_text="mlp").last
    assert mlp.locator(".legends .curve").all_inner_texts() == ["step 0", "step 8"]
    titles = section(page, "drift").locator("figcaption").all_inner_texts()
    assert titles == ["js", "js of one", "share"]
    assert section(page, "drift").locator("summary").inner_text() == "drift"
    # All of it is far below the limits: the colours are of what there is, and say so; but a share
    # of all says something by being small. The same in the matrix.
    matrix = page.locator("#matrix").locator("xpath=../..").locator(".legend")
    for i, score in ((0, "drift/js"), (2, "drift/share")):
        page.evaluate("score => tlens.set({ score })", score)
        drawn(page)
        for bar in (section(page, "drift").locator(".legend").nth(i), matrix):
            ends = bar.locator(".ticks span").all_inner_texts()
            assert ends == (["0", "0.0200", "0.0400"] if i == 0 else ["0", "0.50", "1"])
            assert ("range of all steps" in bar.inner_text()) == (i == 0)
    assert section(page, "drift").locator(".axes").first.inner_text() == "layer ↓ head →"
    page.evaluate("tlens.set({ step: 0 })")
    drawn(page)
    assert not section(page, "late").locator("svg[role=img]").is_visible()
    page.evaluate("tlens.set({ step: 8 })")
    drawn(page)
    assert section(page, "late").locator("svg[role=img]").is_visible()


def test_ranked_lists_show_the_value_at_the_peak(shown):
    page, _ = shown
    got = rows(section(page, "top_neurons"))
    assert [row[:3] for row in got] == [
        ["L0", "0", "5"],
        ["L0", "1", "7"],
        ["L1", "0", "1"],
        ["L1", "1", "0"],
    ]
    assert [row[3] for row in got] == [
        "8 at 0 <s>",
        "13 at 1 </script><script>alert(1)</script>",
        "18 at 2 ·city",
        "23 at 3 ↵",
    ]


def test_a_click_on_a_columns_name_sorts(shown):
    page, _ = shown
    neurons = section(page, "top_neurons")
    neurons.get_by_role("button", name="neuron").click()
    assert [row[2] for row in rows(neurons)] == ["7", "5", "1", "0"]
    neurons.get_by_role("button", name="neuron").click()
    assert [row[2] for row in rows(neurons)] == ["0", "1", "5", "7"]


def test_contexts_of_features_have_their_token_marked(shown):
    page, _ = shown
    features = section(page, "features")
    assert features.locator("mark").all_inner_texts() == ["·city", "x", "y"]
    assert [row[2] for row in rows(features)] == ["·a·city·by 0.50", "<b>x 0.25", "y 3", "∅ 0"]


def test_an_instrument_that_the_page_does_not_know(shown):
    page, _ = shown
    theirs = section(page, "somebodys")
    assert [row[1] for row in rows(theirs)] == ["1.50", "not a number", "−∞"]
    assert rows(theirs)[0][0] == HOSTILE
    values = next(r.values for r in readings(8) if r.key == "somebodys/spin")
    for season, name in enumerate(["dry", "wet"]):
        theirs.locator("select").select_option(name)
        told = hovered(theirs.locator("canvas"), 3, 4)
        assert np.allclose(told, values[season], atol=0.006)


def hovered(canvas, n_rows, n_columns):
    """[row, column], the numbers that the tooltip says over the cells of a map."""
    # The cells are squares of one size, of 9 px at least, at the lower right of the canvas.
    found = canvas.evaluate("""(canvas) => {
      const box = canvas.getBoundingClientRect(), tip = document.getElementById("tip"), found = {};
      for (let y = 2; y < box.height; y += 8) {
        for (let x = 2; x < box.width; x += 8) {
          const place = { clientX: box.left + x, clientY: box.top + y };
          canvas.dispatchEvent(new MouseEvent("mousemove", place));
          const lines = tip.checkVisibility() ? [...tip.children] : [];
          if (lines.length) found[lines[0].textContent] ??= lines[1].textContent;
        }
      }
      return found;
    }""")
    assert len(found) == n_rows * n_columns
    return np.array([number(text) for text in found.values()]).reshape(n_rows, n_columns)


def test_an_event_leads_to_its_step(shown):
    page, _ = shown
    page.locator("#events button").click()
    drawn(page)
    assert page.evaluate("tlens.state.step") == 4
    assert page.locator("#events li").inner_text() == f"step 4 new induction head {HOSTILE}"
    (row,) = rows(section(page, "target_scores"))
    assert row[1] == "2"


def test_another_probe_and_what_it_lacks(shown):
    page, _ = shown
    page.evaluate("tlens.set({probe: 'two'})")
    (row,) = rows(section(page, "target_scores"))
    assert row[1] == "7.50"
    assert "no readings of two" in section(page, "top_neurons").inner_text()
    page.evaluate("tlens.set({probe: 'one'})")


def test_nothing_was_run_asked_for_or_complained_about(shown):
    _, faults = shown
    assert faults == []
