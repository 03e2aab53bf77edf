"""A model of more than 4,000 heads, and a probe of a thousand tokens, through all that there is."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.browser import needs_browser, opened, until
from tlens_callback import LocalSink, Probe, ProbeBatch, Shadow, fast, observe, read_store
from tlens_callback.page.pack import MOST_BYTES
from tlens_callback.probes.builtin import repeated_blocks
from tlens_callback.sinks.shown import pictures
from tlens_callback.sinks.wandb.rows import media, numbers

LAYERS, HEADS = 65, 64

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def gone_through(live, probes, folder, *, context):
    """Two observations, in a store with its page."""
    shadow = Shadow.of(live)
    batch = ProbeBatch.encode(probes, tiny.tokenizer(), vocab_size=tiny.VOCAB, context=context)
    sink, instruments = LocalSink(folder / "tlens"), fast()
    for step in (0, 10):
        readings = observe(shadow, batch, instruments)
        sink.write(readings, step=step)
        # Another model at the next observation.
        live.get_input_embeddings().weight.data *= 1.1
        shadow.sync()
    sink.close()
    return SimpleNamespace(readings={r.key: r for r in readings}, path=sink.path)


@pytest.fixture(scope="module")
def many_heads(tmp_path_factory, one_thread):
    live = tiny.model("llama", hidden_size=64, intermediate_size=8, num_hidden_layers=LAYERS,
                      num_attention_heads=HEADS, num_key_value_heads=8, head_dim=2)  # fmt: skip
    probes = [Probe("capital", "The capital of France is", target=" Paris"), *repeated_blocks(64)]
    return gone_through(live, probes, tmp_path_factory.mktemp("heads"), context=64)


@pytest.fixture(scope="module")
def long_probe(tmp_path_factory, one_thread):
    live = tiny.model("llama", max_position_embeddings=1024)
    ids = np.random.default_rng(0).integers(7, tiny.VOCAB, 1000).tolist()
    probes = [Probe("long", ids, target=" Paris"), *repeated_blocks(64)]
    return gone_through(live, probes, tmp_path_factory.mktemp("tokens"), context=1024)


@pytest.fixture(params=["many_heads", "long_probe"])
def run(request):
    return request.getfixturevalue(request.param)


def test_the_shapes_are_what_they_are_said_to_be(many_heads, long_probe):
    assert many_heads.readings["head_scores/induction"].values.shape == (LAYERS, HEADS)
    pattern = long_probe.readings["attention_patterns/pattern/long"]
    assert pattern.values.shape == (2, 4, 1000, 1000)
    np.testing.assert_allclose(pattern.values.sum(-1), 1, atol=1e-4)


def test_pairs_among_more_heads_than_a_float_counts_are_named(many_heads):
    """There are 4,160 heads, and float32 does not hold every number up to their square."""
    pairs = many_heads.readings["virtual_heads/induction_pair"].texts.ravel().tolist()
    for pair in pairs:
        later, _, earlier, _ = map(int, re.fullmatch(r"L(\d+)H(\d+)\*L(\d+)H(\d+)", pair).groups())
        assert earlier < later < LAYERS
    assert len(set(pairs)) == len(pairs) > 0


def test_the_store_gives_back_what_was_read(run):
    store = read_store(run.path)
    assert store.steps == (0, 10)
    for reading in store.readings(10):
        put = run.readings[reading.key]
        assert reading.values.shape == put.values.shape
        off = 2**-12 if put.axes[-2:] == ("query", "key") else 0
        np.testing.assert_allclose(reading.values, put.values, rtol=0, atol=off)


def test_pictures_are_small(run):
    """None is too large to look at, and each shows something: it has many colours."""
    readings = list(run.readings.values())
    drawn = {one.name: one.make() for one in media(readings, {}, step=10, everything=True)
             if one.kind == "picture"}  # fmt: skip
    drawn |= dict(pictures(readings, 10))
    assert any(name.startswith("attention_patterns") for name in drawn)
    assert any(name.startswith("head_scores") for name in drawn)
    for name, png in drawn.items():
        picture = Image.open(io.BytesIO(png))
        width, height = picture.size
        assert width <= 4096 and height <= 4096 and len(png) < 10_000_000, name
        assert len(picture.convert("RGB").resize((200, 200), 0).getcolors(40_000)) > 20


def test_curves_in_wandb_are_few(run):
    single, _ = numbers(list(run.readings.values()), everything=False)
    assert 5 < len(single) < 40


def test_the_packed_page_is_below_its_bound(run):
    assert (run.path / "page.html").stat().st_size <= MOST_BYTES


@needs_browser()
@pytest.mark.parametrize("which", ["page.html", "page/index.html"])
def test_the_page_opens(run, which):
    address = (run.path / which).as_uri()
    with opened(address, allowed=run.path.as_uri()) as (page, faults):
        until(page, "tlens.data.steps.length", 2)
        page.wait_for_selector("#stepname:not(:empty)")
        key = next(key for key in run.readings if key.startswith("attention_patterns"))
        ready = page.evaluate(
            """async (key) => {
              const here = tlens.data.latest(key, 10);
              return here !== null && await tlens.data.ready(key, here);
            }""",
            key,
        )
        notes = page.locator("#notes li").all_text_contents()
        assert ready or any("ttention patterns" in note for note in notes), notes
        assert page.locator(".error:visible").count() == 0
        assert faults == []
