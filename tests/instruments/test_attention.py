"""AttentionPatterns equals Hugging Face's own attention, cropped, selected and labelled."""

from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.instruments.common import (
    BLOCKS,
    PROBES,
    TEXTS,
    attentions,
    encoded,
    hugging_face,
    readings,
    shadow,
)
from tlens_callback import AttentionPatterns, Probe
from tlens_callback.instruments import PatternChange


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_hugging_face(family):
    """Each probe alone and unpadded in Hugging Face; all together, padded, in the shadow."""
    names = [probe.name for probe in PROBES]
    got = readings(AttentionPatterns(probes=names), shadow(family))
    assert len(got) == len(PROBES)
    for probe in PROBES:
        reading = got[f"attention_patterns/pattern/{probe.name}"]
        np.testing.assert_allclose(
            reading.values, attentions(hugging_face(family), probe), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_equals_hugging_face_with_padding(family):
    """The same rectangle of tokens in both, Hugging Face with its attention mask."""
    batch = encoded(PROBES)
    with torch.no_grad():
        patterns = hugging_face(family)(
            batch.tokens, attention_mask=batch.mask.long(), output_attentions=True, use_cache=False
        ).attentions
    got = readings(AttentionPatterns(probes=[p.name for p in PROBES]), shadow(family))
    for row, (probe, n) in enumerate(zip(PROBES, batch.lengths, strict=True)):
        expected = torch.stack([layer[row, :, :n, :n] for layer in patterns])
        values = got[f"attention_patterns/pattern/{probe.name}"].values
        np.testing.assert_allclose(values, expected.numpy(), atol=1e-6, rtol=0)


def test_another_model_is_told_apart():
    """The comparison above can fail: other weights give other patterns."""
    got = readings(AttentionPatterns(), shadow("llama"))["attention_patterns/pattern/capital"]
    other = attentions(hugging_face("llama", seed=1), TEXTS[0])
    assert np.abs(got.values - other).max() > 1e-2


def test_an_uncropped_pattern_is_told_apart():
    """Padding queries attend too: cropping is what keeps them out."""
    rows: list[torch.Tensor] = []
    hook = "blocks.0.attn.hook_pattern"
    shadow("llama").run(encoded(), [{hook: lambda pattern: rows.append(pattern) or pattern[0]}])
    n = encoded().lengths[0]
    assert (rows[0][0, :, n:].sum(-1) > 0.99).all()


def test_default_selection():
    got = readings(AttentionPatterns(), shadow("llama"))
    expected = [*(probe.name for probe in TEXTS), "repeat-9-0"]
    assert list(got) == [f"attention_patterns/pattern/{name}" for name in expected]
    only_blocks = readings(AttentionPatterns(), shadow("llama"), BLOCKS)
    assert list(only_blocks) == ["attention_patterns/pattern/repeat-9-0"]
    only_text = readings(AttentionPatterns(), shadow("llama"), TEXTS[:1])
    assert list(only_text) == ["attention_patterns/pattern/capital"]


def test_selected_layers_and_order():
    chosen = AttentionPatterns(probes=["bare", "capital"], layers=[1, 0], name="mine")
    got = readings(chosen, shadow("llama"))
    assert list(got) == ["mine/pattern/bare", "mine/pattern/capital"]
    reading = got["mine/pattern/capital"]
    assert reading.labels["layer"] == ("1", "0")
    expected = attentions(hugging_face("llama"), TEXTS[0])[[1, 0]]
    np.testing.assert_allclose(reading.values, expected, atol=1e-6, rtol=0)


def test_labels_are_the_tokens():
    reading = readings(AttentionPatterns(), shadow("llama"))["attention_patterns/pattern/capital"]
    tokens = ("<bos>", "The", " capital", " of", " France", " is")
    assert reading.axes == ("layer", "head", "query", "key")
    assert reading.labels == {"query": tokens, "key": tokens}
    assert (reading.unit, reading.limits) == ("probability", (0.0, 1.0))


def test_only_what_is_selected_leaves_the_device():
    taps = AttentionPatterns(probes=["bare"], layers=[1]).taps(shadow("llama"), encoded())
    taken: dict[Any, Any]
    (taken,) = shadow("llama").run(encoded(), [taps])
    ((stack, (pattern,)),) = taken.items()
    assert stack.hooks == ["blocks.1.attn.hook_pattern"]
    assert pattern.shape == (1, 4, 4, 4)
    assert pattern.untyped_storage().nbytes() == pattern.nbytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": ["nobody"]}, "no probe 'nobody'; the probes are"),
        ({"layers": [0, 2]}, "no layer 2; the model's layers are 0 to 1"),
        ({"layers": [-1]}, "no layer -1"),
    ],
)
def test_what_is_not_there(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionPatterns(**settings).taps(shadow("llama"), encoded())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": "capital"}, r"probes='capital' is one string; give a list"),
        ({"probes": []}, "selects nothing"),
        ({"layers": [1, 1]}, "names something twice"),
    ],
)
def test_selections_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionPatterns(**settings)


def test_probe_of_one_token():
    got = readings(AttentionPatterns(), shadow("gpt2"), [Probe("one", [7]), TEXTS[1]])
    assert (got["attention_patterns/pattern/one"].values == 1).all()


@pytest.mark.parametrize("tokens", [17, 16, 9])
@pytest.mark.parametrize("kind", [AttentionPatterns, PatternChange])
def test_large_patterns_are_pooled(kind, tokens):
    """Each block of queries attends to each block of keys as its queries do on average."""
    probes = [Probe("long", list(range(5, 5 + tokens))), Probe("short", [5, 6, 7])]
    heads = shadow("llama").n_layers * shadow("llama").n_heads
    looks = []
    for instrument in (kind(), kind(most=heads * 25)):
        for seed in (0, 1):  # the second is compared with the first
            looks.append(readings(instrument, shadow("llama", seed=seed), probes))
    (_, whole), (_, pooled) = looks[:2], looks[2:]
    key = f"{kind().name}/pattern/long"
    blocks = [range(tokens)[i : i + 4] for i in range(0, tokens, 4)] if tokens > 9 else None
    blocks = blocks or [range(tokens)[i : i + 2] for i in range(0, tokens, 2)]
    expected = [
        [whole[key].values[:, :, q][..., k].sum(-1).mean(-1) for k in blocks] for q in blocks
    ]
    np.testing.assert_allclose(pooled[key].values, np.transpose(expected, (2, 3, 0, 1)), atol=1e-6)
    names = whole[key].labels["key"]
    wanted = [f"{names[b[0]]}..{names[b[-1]]}" if len(b) > 1 else names[b[0]] for b in blocks]
    assert list(pooled[key].labels["query"]) == list(pooled[key].labels["key"]) == wanted
    short = f"{kind().name}/pattern/short"
    np.testing.assert_array_equal(pooled[short].values, whole[short].values)
    with pytest.raises(ValueError, match="most"):
        kind(most=0)
