"""The probe's tokens on the page: their colours, the panel of one of them, keys."""

import json
import re

import numpy as np
import pytest

from tests.browser import needs_browser, opened
from tests.page.pages import page_of
from tlens_callback.reading import Reading

pytestmark = needs_browser()

HOSTILE = [
    "<s>",
    " The",
    "</script><script>alert(1)</script>",
    "\n",
    "\u202eabc",
    "a\"'`",
    "x" * 2000,
    " is",
]
N = len(HOSTILE)
NEURONS = np.array([[11, 12], [21, 4096]])
WRITE = np.array([[0.5, -0.25], [1.5, 0.125]])


def readings(step):
    rng = np.random.default_rng(step)
    pattern = np.tril(rng.random((2, 3, N, N)) + 0.05)
    pattern /= pattern.sum(-1, keepdims=True)
    activation = rng.normal(0, 2, (2, 2, N))
    activation[1, 1, 3] = 40 + step  # the largest of all at token 3, L1 neuron 4096
    features = rng.random((2, N))
    loss = rng.random(N - 1) * 3
    probe = "p</script>"
    pos = {"pos": HOSTILE}
    ids = rng.integers(0, N, (2, N))
    return [
        Reading(key=f"attention_patterns/pattern/{probe}", values=pattern, unit="probability",
                axes=("layer", "head", "query", "key"), limits=(0, 1),
                labels={"query": HOSTILE, "key": HOSTILE}),
        Reading(
            key=f"top_neurons/neuron/{probe}", values=NEURONS, axes=("layer", "rank"), unit="index"
        ),
        Reading(key=f"top_neurons/activation/{probe}", values=activation, unit="activation",
                axes=("layer", "rank", "pos"), labels=pos),
        Reading(
            key=f"top_neurons/write/{probe}", values=WRITE, axes=("layer", "rank"), unit="logit"
        ),
        Reading(key=f"sparse_features/activation/{probe}", values=features, unit="activation",
                axes=("feature", "pos"), labels={**pos, "feature": ["77", "99"]}),
        Reading(key=f"token_loss/loss/{probe}", values=loss, axes=("token",), unit="nats",
                labels={"token": HOSTILE[1:]}),
        Reading(key=f"token_loss/change/{probe}", values=loss - readings_loss(), axes=("token",),
                unit="nats", labels={"token": HOSTILE[1:]}),
        Reading(key=f"logit_lens/token/{probe}", values=ids[:, :3], axes=("layer", "rank"),
                unit="index", texts=np.array(HOSTILE)[ids[:, :3]]),
        Reading(key=f"logit_lens/top/{probe}", values=rng.random((2, 3)), axes=("layer", "rank"),
                unit="probability", limits=(0, 1)),
        Reading(key="attention_patterns/pattern/every", values=pattern[..., :4, :4] * 1.0,
                axes=("layer", "head", "query", "key"), unit="probability", limits=(0, 1),
                labels={"query": HOSTILE[:4], "key": HOSTILE[:4]}),
        Reading(key="logit_lens/token_by_pos/every", values=ids[:, :4], axes=("layer", "pos"),
                unit="index", texts=np.array(HOSTILE)[ids[:, :4]], labels={"pos": HOSTILE[:4]}),
        Reading(key="logit_lens/top_by_pos/every", values=rng.random((2, 4)), axes=("layer", "pos"),
                unit="probability", limits=(0, 1), labels={"pos": HOSTILE[:4]}),
        Reading(key="logit_lens/kl_by_pos/every", values=rng.random((2, 4)), axes=("layer", "pos"),
                unit="nats", labels={"pos": HOSTILE[:4]}),
        Reading(key="target_scores/loss/bare", values=1.0, unit="nats"),
    ]  # fmt: skip


def readings_loss():
    rng = np.random.default_rng(10)
    rng.random((2, 3, N, N)), rng.normal(0, 2, (2, 2, N)), rng.random((2, N))
    return rng.random(N - 1) * 3


STEPS = (10, 20)
PROBE = "p</script>"
STORED = {step: {r.key: r for r in readings(step)} for step in STEPS}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    address = page_of(tmp_path_factory.mktemp("tokens"), {s: readings(s) for s in STEPS})
    with opened(address) as (page, faults):
        page.wait_for_selector("#strip .token")
        yield page, faults
        assert faults == []


@pytest.fixture
def page(shown):
    page, _ = shown
    page.mouse.move(2, 2)
    put(page, step=20, probe=PROBE, layer=1, head=2, query=None, other=None)
    page.select_option("#tint", "from")
    settled(page)
    return page


def put(page, **values):
    page.evaluate(f"tlens.set({json.dumps(values)})")
    settled(page)


def settled(page):
    page.evaluate("new Promise(r => requestAnimationFrame(() => setTimeout(r, 30)))")


def value(key, step=20, probe=PROBE):
    return STORED[step][f"{key}/{probe}"].values


def told(page, i):
    """What the tip says of token i."""
    page.locator("#strip .token").nth(i).hover(position={"x": 3, "y": 4})
    return page.locator("#tip").inner_text().split("\n")


def number(text):
    return float(re.search(r"[−-]?[\d.]+(?:e[−-]?\d+)?", text).group().replace("−", "-"))


def colours(page):
    return page.locator("#strip .token").evaluate_all("all => all.map(one => one.style.background)")


def rows(page, place):
    return page.locator(f"#attoken {place} li").evaluate_all(
        "all => all.map(one => [...one.children].map(part => part.textContent))"
    )


def viridis(share):
    """The page's sequential colours: ten stops of viridis."""
    stops = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725".split()
    rgb = np.array([[int(s[i : i + 2], 16) for i in (0, 2, 4)] for s in stops])
    at = np.rint(share * 255) / 255 * 9
    return [np.interp(at, range(10), rgb[:, c]) for c in range(3)]


def test_colours_and_tips_are_the_attention_from_the_query(page):
    row = value("attention_patterns/pattern")[1, 2, N - 1]
    for i in (0, 3, 5):
        assert number(told(page, i)[1]) == pytest.approx(row[i], abs=0.005)
        seen = [float(x) for x in re.findall(r"\d+", colours(page)[i])]
        assert seen == pytest.approx(viridis(np.sqrt(row[i])), abs=3)
    put(page, query=4)
    assert number(told(page, 2)[1]) == pytest.approx(
        value("attention_patterns/pattern")[1, 2, 4, 2], abs=0.005
    )
    assert told(page, 5)[1] == "masked: after the query"
    assert "from 4" in page.locator("#tintname").inner_text()
    assert colours(page)[5] == "var(--masked)"


def test_attention_received_is_the_mean_over_the_queries_that_see_a_token(page):
    page.select_option("#tint", "received")
    settled(page)
    pattern = value("attention_patterns/pattern")[1, 2]
    for i in (0, 4, N - 1):
        assert number(told(page, i)[1]) == pytest.approx(pattern[i:, i].mean(), abs=0.005)


def test_a_neuron_is_chosen_by_layer_and_rank(page):
    page.select_option("#tint", "top_neurons/activation")
    page.select_option("#lead-layer", index=0)
    page.select_option("#lead-rank", index=1)
    settled(page)
    assert "L0 neuron 12" in page.locator("#tintname").inner_text()
    assert page.locator("#lead-rank option").nth(1).inner_text() == "1: neuron 12"
    stored = [value("top_neurons/activation", step)[0, 1] for step in STEPS]
    for i in (0, 5):
        assert number(told(page, i)[1]) == pytest.approx(stored[1][i], rel=0.01)
    # Limits: the largest magnitude of this neuron over all steps, whichever step is shown.
    most = np.abs(stored).max()
    legend = page.locator("#tokens .legend")
    assert "activation, range over all steps" in legend.inner_text()
    ends = legend.locator(".ticks span").all_inner_texts()
    assert [number(ends[0]), number(ends[-1])] == pytest.approx([-most, most], rel=0.01)
    put(page, step=10)
    assert legend.locator(".ticks span").all_inner_texts() == ends
    assert number(told(page, 5)[1]) == pytest.approx(stored[0][5], rel=0.01)


def test_any_reading_with_a_token_axis_is_offered(page):
    groups = page.locator("#tint optgroup").evaluate_all(
        "all => all.map(g => [g.label, [...g.children].map(o => o.value)])"
    )
    assert dict(groups) == {
        "attention": ["from", "received"],
        "top_neurons": ["top_neurons/activation"],
        "sparse_features": ["sparse_features/activation"],
        "token_loss": ["token_loss/loss", "token_loss/change"],
    }
    page.select_option("#tint", "sparse_features/activation")
    page.select_option("#lead-feature", index=1)
    settled(page)
    assert "feature 99" in page.locator("#tintname").inner_text()
    assert number(told(page, 6)[1]) == pytest.approx(
        value("sparse_features/activation")[1, 6], rel=0.01
    )


def test_a_loss_stands_at_the_token_it_is_of(page):
    page.select_option("#tint", "token_loss/loss")
    settled(page)
    assert told(page, 0)[1] == "no value" and colours(page)[0] == "transparent"
    assert rows(page, "#numbers")[0][1] == "none"
    for i in (1, N - 1):
        loss, change = value("token_loss/loss")[i - 1], value("token_loss/change")[i - 1]
        assert number(told(page, i)[1]) == pytest.approx(loss, rel=0.01)
        shown = rows(page, "#numbers")
        assert [row[0] for row in shown] == ["loss", "change"]
        assert [number(row[1]) for row in shown] == pytest.approx([loss, change], rel=0.01)


def test_the_panel_says_where_a_token_looks_and_what_fires(page):
    told(page, 3)
    pattern = value("attention_patterns/pattern")[1, 2, 3]
    looks = rows(page, "#looksat")
    keys = np.argsort(-pattern[:4])
    assert [number(row[0]) for row in looks] == list(keys)
    assert [number(row[1]) for row in looks] == pytest.approx(pattern[keys], abs=0.005)
    # The first section after where it looks: neurons.
    title = page.locator("#attoken section h4", has_text="top neurons activation")
    strongest = (
        title.locator("xpath=following-sibling::ol/li").first.locator("> *").all_inner_texts()
    )
    assert strongest[0] == "L1 neuron 4096" and number(strongest[1]) == 60
    assert strongest[2] == "writes 0.125"


def test_the_panel_follows_the_head_and_the_query_where_nothing_is_hovered(page):
    put(page, query=2, layer=0, head=1)
    assert page.locator("#whichtoken").inner_text().startswith("2 ")
    assert "L0H1" in page.locator("#looksat h4").inner_text()
    assert number(rows(page, "#looksat")[0][1]) == pytest.approx(
        value("attention_patterns/pattern")[0, 1, 2].max(), abs=0.005
    )


def test_what_the_lens_reads_at_the_last_token_and_at_others(page):
    told(page, N - 1)
    read = rows(page, "#lensread")
    top = value("logit_lens/top")[:, 0]
    assert [number(row[1]) for row in read] == pytest.approx(top, rel=0.01)
    told(page, 1)
    assert rows(page, "#lensread") == []
    assert "LogitLens(every_token=True)" in page.locator("#lensread").inner_text()
    put(page, probe="every")
    told(page, 1)
    read = rows(page, "#lensread")
    assert [number(row[1]) for row in read] == pytest.approx(
        value("logit_lens/top_by_pos", probe="every")[:, 1], rel=0.01
    )
    assert number(read[0][2]) == pytest.approx(
        value("logit_lens/kl_by_pos", probe="every")[0, 1], rel=0.01
    )
    assert "logit_lens/kl_by_pos" in page.locator("#tint").inner_html()


def test_keys_move_through_the_tokens_and_choose_the_query(page):
    page.locator("#strip .token").nth(N - 1).focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    focused = "document.activeElement.dataset.i"
    assert page.evaluate(focused) == "2"
    assert page.locator("#strip .token[tabindex='0']").count() == 1
    assert page.locator("#say").inner_text().startswith("2 </script>")
    step = page.evaluate("tlens.state.step")
    page.keyboard.press("Enter")
    settled(page)
    assert page.evaluate("tlens.state.query") == 2
    assert page.locator("#strip [aria-selected='true']").get_attribute("data-i") == "2"
    page.keyboard.press("ArrowDown")
    assert int(page.evaluate(focused)) > 3  # behind the line break of token 3
    page.keyboard.press("ArrowUp")
    assert int(page.evaluate(focused)) <= 3
    page.keyboard.press("Escape")
    settled(page)
    assert page.evaluate("tlens.state.query") is None
    assert page.evaluate("tlens.state.step") == step
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#strip')") is None


def test_a_click_chooses_the_query_and_another_lets_go(page):
    one = page.locator("#strip .token").nth(2)
    one.click(position={"x": 3, "y": 4})
    settled(page)
    assert page.evaluate("tlens.state.query") == 2
    one.click(position={"x": 3, "y": 4})
    settled(page)
    assert page.evaluate("tlens.state.query") is None


def test_hostile_tokens_are_text(page):
    texts = page.locator("#strip .token").all_text_contents()
    assert texts[2] == HOSTILE[2] and texts[3] == "↵" and texts[4] == "\\u202eabc"
    assert len(texts[6]) == 40  # the whole of it is in the tip
    assert told(page, 6)[0] == f"6 {'x' * 2000}"
    assert page.locator("#strip script, #attoken script").count() == 0


def test_elements_stay_from_one_step_to_the_next(page):
    page.evaluate("window.kept = [...document.querySelectorAll('#strip .token, #attoken li')]")
    before = colours(page)
    put(page, step=10)
    assert page.evaluate("kept.every(one => one.isConnected)")
    assert colours(page) != before


def test_a_probe_without_such_readings_says_so(page):
    put(page, probe="bare")
    assert page.locator("#notokens").is_visible() and not page.locator("#strip").is_visible()
    assert "no readings for its tokens" in page.locator("#notokens").inner_text()
