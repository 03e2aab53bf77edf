"""Drift equals what scipy and plain float64 make of Hugging Face's patterns and activations."""

import copy
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine, jensenshannon

from tests import tiny
from tests.instruments.common import (
    BLOCKS,
    PROBES,
    TEXTS,
    attentions,
    hugging_face,
    ids,
    readings,
    shadow,
)
from tests.instruments.naive_parts import layers_of
from tests.instruments.parts.test_distance import cka
from tests.shadow.test_other_families import OTHERS
from tests.shadow.test_other_families import model as other_model
from tlens_callback import ActivationDrift, AttentionDrift, PatternChange, Probe, Shadow
from tlens_callback.instruments import activations as activations_module
from tlens_callback.instruments import drift
from tlens_callback.render import is_mosaic

LONG = [Probe(f"long{i}", (np.random.default_rng(i).integers(4, 90, 60))) for i in range(5)]
DRIFTS = (AttentionDrift, ActivationDrift, PatternChange)
PARTED = ("llama", "gpt2", "gemma2", "mixtral")


def twice(instrument: Any, family: str, probes=PROBES) -> tuple[dict, dict]:
    """The readings at a first observation, and at a second of quite other weights."""
    return readings(instrument, shadow(family), probes), readings(
        instrument, shadow(family, seed=1), probes
    )


def divergence(now: np.ndarray, first: np.ndarray, queries: Any = None) -> np.ndarray:
    """[layer, head], of [layer, head, query, key], over some queries or all but the first."""
    out = np.zeros(now.shape[:2])
    for layer, head in np.ndindex(out.shape):
        rows = [
            jensenshannon(now[layer, head, q], first[layer, head, q], base=2) ** 2
            for q in (range(1, now.shape[2]) if queries is None else queries)
        ]
        out[layer, head] = sum(rows) / len(rows)
    return out


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_drift_equals_scipys_divergence(family):
    _, got = twice(AttentionDrift(), family)
    each = []
    for probe in TEXTS:
        now, first = (attentions(hugging_face(family, seed), probe) for seed in (1, 0))
        each.append(divergence(now, first))
        np.testing.assert_allclose(
            got[f"attention_drift/js/{probe.name}"].values, each[-1], atol=2e-5
        )
    mean = np.mean(each, 0)
    np.testing.assert_allclose(got["attention_drift/js"].values, mean, atol=2e-5)
    assert got["attention_drift/max"].values == pytest.approx(mean.max(), abs=2e-5)
    assert got["attention_drift/mean"].values == pytest.approx(mean.mean(), abs=2e-5)
    assert len(got) == 3 + len(TEXTS)
    # Heads and probes differ by more than that, so that one in another's place would be seen.
    assert np.ptp(each, axis=(0, 2)).min() > 1e-2


@pytest.mark.parametrize("kind", DRIFTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_exactly_zero_until_something_moves(kind, family):
    """The same keys each time."""
    instrument = kind()
    first, moved = twice(instrument, family)
    again = readings(instrument, shadow(family))
    assert list(first) == list(again) == list(moved)
    for key in first:
        assert not first[key].values.any() and not again[key].values.any(), key
        assert np.abs(moved[key].values).max() > 1e-2, key
        assert first[key].limits == moved[key].limits


@pytest.mark.parametrize("kind", DRIFTS)
def test_half_precision_is_kept_as_it_is(kind):
    instrument, of = kind(), Shadow.of(tiny.model("llama").bfloat16())
    first = readings(instrument, of)
    assert all(not reading.values.any() for reading in first.values())
    kept = {key: first.dtype for key, first in instrument.baseline.items()}
    # Gram matrices are in float64 from the start: they are few numbers.
    assert {dtype for key, dtype in kept.items() if "gram" not in key} == {torch.bfloat16}
    assert {dtype for key, dtype in kept.items() if "gram" in key} <= {torch.float64}
    wide = twice(kind(), "llama")[1]
    moved = readings(instrument, Shadow.of(tiny.model("llama", seed=1).bfloat16()))
    for key, reading in moved.items():
        np.testing.assert_allclose(reading.values, wide[key].values, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("kind", DRIFTS)
def test_what_is_remembered_is_what_is_compared_with(kind):
    """As after resuming: the memory in another instrument goes on from the first observation."""
    instrument = kind()
    _, moved = twice(instrument, "qwen2")
    assert all(
        kept.untyped_storage().nbytes() == kept.nbytes for kept in instrument.baseline.values()
    )
    resumed, fresh = kind(), kind()
    resumed.baseline.update({key: kept.clone() for key, kept in instrument.baseline.items()})
    for key, reading in readings(resumed, shadow("qwen2", seed=1)).items():
        np.testing.assert_array_equal(reading.values, moved[key].values)
    for reading in readings(fresh, shadow("qwen2", seed=1)).values():
        assert not reading.values.any()


@pytest.mark.parametrize("kind", DRIFTS)
def test_memory_is_of_the_chosen_probes_real_tokens(kind):
    instrument = kind()
    readings(instrument, shadow("llama"))
    lengths = [len(ids(probe)[0]) for probe in TEXTS]
    after_first = sum(n - 1 for n in lengths)
    numbers = {
        # Query q sees q + 1 keys, and query 0 is left out.
        AttentionDrift: 2 * 4 * sum(n * (n + 1) // 2 - 1 for n in lengths),
        ActivationDrift: 2 * 3 * (32 * after_first + after_first**2),
        PatternChange: 2 * 4 * sum(n * n for n in lengths),
    }
    assert sum(kept.numel() for kept in instrument.baseline.values()) == numbers[kind]


@pytest.mark.parametrize("kind", (AttentionDrift, ActivationDrift))
def test_memory_does_not_grow_with_long_probes(kind, monkeypatch):
    """Of so many tokens at most, and of one probe's pattern so many queries."""
    monkeypatch.setattr(drift, "QUERIES", 7)
    monkeypatch.setattr(activations_module, "TOKENS", 50)
    monkeypatch.setattr(activations_module, "CKA_TOKENS", 6)
    instrument = kind()
    readings(instrument, shadow("llama"), LONG)
    queries = np.round(np.linspace(1, 59, 7)).astype(int)
    numbers = {
        AttentionDrift: 2 * 4 * len(LONG) * int((queries + 1).sum()),
        ActivationDrift: 2 * 3 * (32 * 50 + 6**2),
    }
    assert sum(kept.numel() for kept in instrument.baseline.values()) == numbers[kind]
    assert all(
        kept.untyped_storage().nbytes() == kept.nbytes for kept in instrument.baseline.values()
    )


def test_of_long_patterns_evenly_spaced_queries_are_compared(monkeypatch):
    monkeypatch.setattr(drift, "QUERIES", 7)
    _, got = twice(AttentionDrift(), "gpt2", LONG[:2])
    queries = np.round(np.linspace(1, 59, 7)).astype(int)
    for probe in LONG[:2]:
        now, first = (attentions(hugging_face("gpt2", seed), probe) for seed in (1, 0))
        expected, every = divergence(now, first, queries), divergence(now, first)
        js = got[f"attention_drift/js/{probe.name}"].values
        np.testing.assert_allclose(js, expected, atol=2e-5)
        assert np.abs(expected - every).max() > 1e-3


def test_as_many_queries_and_tokens_are_compared_as_is_documented():
    assert [drift._queries(n) for n in (2, 3, 129)] == [[1], [1, 2], list(range(1, 129))]
    many = drift._queries(1000)
    assert len(many) == 128 and (many[0], many[-1]) == (1, 999)
    assert set(np.diff(many)) == {7, 8}
    assert (activations_module.TOKENS, activations_module.CKA_TOKENS) == (256, 64)


@pytest.mark.parametrize("kind", DRIFTS)
def test_another_choice_of_probes_has_its_own_first(kind):
    one, two = kind(probes=["story"]), kind(probes=["capital"])
    readings(one, shadow("llama"))
    two.baseline.update(one.baseline)
    for reading in readings(two, shadow("llama", seed=1)).values():
        assert not reading.values.any()


@pytest.mark.parametrize("kind", DRIFTS)
def test_padding_and_company_do_not_matter(kind):
    alone = twice(kind(probes=["capital"]), "mistral", TEXTS[:1])[1]
    together = twice(kind(probes=["capital"]), "mistral")[1]
    for key, reading in alone.items():
        np.testing.assert_allclose(reading.values, together[key].values, atol=1e-5, rtol=1e-4)


def test_blocks_only_where_there_is_nothing_else():
    assert "attention_drift/js/repeat-5-0" not in readings(AttentionDrift(), shadow("llama"))
    assert "attention_drift/js/repeat-5-0" in readings(AttentionDrift(), shadow("llama"), BLOCKS)
    assert "pattern_change/pattern/repeat-5-0" in readings(PatternChange(), shadow("llama"), BLOCKS)


def test_what_an_attention_sink_takes_is_a_key_of_its_own():
    models = []
    for scale in (0.0, 2.0):
        model = other_model(*OTHERS["gpt_oss"])
        model.set_attn_implementation("eager")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.add_(scale)
        models.append(model)
    instrument = AttentionDrift(probes=["story"])
    readings(instrument, Shadow.of(models[0]))
    got = readings(instrument, Shadow.of(models[1]))["attention_drift/js"].values
    first, now = (attentions(model, TEXTS[1]) for model in models)
    full = [np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1) for p in (now, first)]
    np.testing.assert_allclose(got, divergence(*full), atol=2e-5)
    # scipy scales rows to one: among the keys alone the first layer's attention is the same.
    assert divergence(now, first)[0].max() < 1e-6 < 1e-2 < got[0].min()


def parts_of(family: str, layer: Any) -> dict[str, Any]:
    """The modules of Hugging Face whose output each part is."""
    if family == "gemma2":
        attn, mlp = layer.post_attention_layernorm, layer.post_feedforward_layernorm
    else:
        attn = layer.attn if family == "gpt2" else layer.self_attn
        mlp = layer.mlp
    return {"resid": layer, "attn": attn, "mlp": mlp}


@torch.no_grad()
def activations(family: str, seed: int, probes) -> dict[tuple[int, str], np.ndarray]:
    """(layer, part) -> [token, d_model], without first tokens; the residual stream alone where a
    family's parts are not spelled out."""
    model, seen, handles = hugging_face(family, seed), defaultdict(list), []

    def keep(place):
        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            seen[place].append(h.reshape(-1, h.shape[-1])[1:].double())

        return hook

    for i, layer in enumerate(layers_of(model)):
        parts = parts_of(family, layer) if family in PARTED else {"resid": layer}
        handles += [m.register_forward_hook(keep((i, part))) for part, m in parts.items()]
    for probe in probes:
        model(ids(probe), use_cache=False)
    for handle in handles:
        handle.remove()
    return {place: torch.cat(rows).numpy() for place, rows in seen.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_activation_drift_equals_plain_arithmetic(family):
    _, got = twice(ActivationDrift(), family)
    first, now = (activations(family, seed, TEXTS) for seed in (0, 1))
    names = list(got["activation_drift/cosine"].labels["part"])
    assert names == ["resid", "attn", "mlp"]
    assert len(first) == (6 if family in PARTED else 2)
    for (layer, part), h0 in first.items():
        h = now[layer, part]
        pairs = list(zip(h, h0, strict=True))
        norm = np.linalg.norm
        turned = np.mean([1 - a @ b / (norm(a) * norm(b)) for a, b in pairs])
        relative = np.mean([norm(a - b) / norm(b) for a, b in pairs])
        for measure, value in (
            ("cosine", turned),
            ("relative", relative),
            ("cka", 1 - cka(h, h0)),
        ):
            at = got[f"activation_drift/{measure}"].values[layer, names.index(part)]
            assert at == pytest.approx(value, rel=1e-3, abs=1e-4), (measure, layer, part)
    values = got["activation_drift/cosine"].values
    assert len(np.unique(values.round(4))) == values.size


def test_some_of_many_tokens_are_compared_by_cka_fewer_and_four_at_least():
    _, got = twice(ActivationDrift(), "gpt2", LONG)
    first, now = (activations("gpt2", seed, LONG) for seed in (0, 1))
    some = np.round(np.linspace(0, 5 * 59 - 1, 256)).astype(int)
    fewer = some[np.round(np.linspace(0, 255, 64)).astype(int)]
    apart = []
    for (layer, part), h0 in first.items():
        at, h = ["resid", "attn", "mlp"].index(part), now[layer, part]
        far = np.linalg.norm(h - h0, axis=1) / np.linalg.norm(h0, axis=1)
        apart.append(abs(far[some].mean() - far.mean()))
        for measure, expected in (
            ("cosine", np.mean([cosine(a, b) for a, b in zip(h[some], h0[some], strict=True)])),
            ("relative", far[some].mean()),
            ("cka", 1 - cka(h[fewer], h0[fewer])),
        ):
            value = got[f"activation_drift/{measure}"].values[layer, at]
            assert value == pytest.approx(expected, abs=1e-5), (measure, layer, part)
    assert max(apart) > 1e-3  # of all tokens it would be another number
    few = readings(ActivationDrift(), shadow("gpt2"), [Probe("few", [5, 6, 7, 8])])
    assert list(few) == ["activation_drift/cosine", "activation_drift/relative"]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "opt"])
def test_pattern_change_equals_hugging_face(family):
    first, got = twice(PatternChange(), family)
    for probe in TEXTS:
        reading = got[f"pattern_change/pattern/{probe.name}"]
        change = attentions(hugging_face(family, 1), probe)
        change -= attentions(hugging_face(family, 0), probe)
        np.testing.assert_allclose(reading.values, change, atol=2e-5)
        assert reading.limits == (-1, 1) and is_mosaic(reading)
        np.testing.assert_allclose(reading.values.sum(-1), 0, atol=1e-5)
        assert reading.values.min() < -0.1 and reading.values.max() > 0.1
    assert list(first) == [f"pattern_change/pattern/{probe.name}" for probe in TEXTS]


def test_pattern_change_of_some_layers_and_probes():
    chosen = PatternChange(probes=["bare", "repeat-5-0"], layers=[1])
    got, every = twice(chosen, "llama")[1], twice(PatternChange(), "llama")[1]
    assert list(got) == ["pattern_change/pattern/bare", "pattern_change/pattern/repeat-5-0"]
    one = got["pattern_change/pattern/bare"]
    assert one.labels["layer"] == ("1",)
    np.testing.assert_array_equal(one.values[0], every["pattern_change/pattern/bare"].values[1])


@pytest.mark.parametrize("kind", (AttentionDrift, ActivationDrift))
def test_refuses_what_has_no_second_token(kind):
    short = [Probe("short", [5]), Probe("long", [5, 6, 7, 8, 9, 10])]
    assert readings(kind(), shadow("llama"), short)
    with pytest.raises(ValueError, match="'short' has no other"):
        readings(kind(probes=["short"]), shadow("llama"), short)
    with pytest.raises(ValueError, match="each of them has no other"):
        readings(kind(), shadow("llama"), short[:1])


@pytest.mark.parametrize("kind", DRIFTS)
def test_refuses_probes_that_are_not_there(kind):
    with pytest.raises(ValueError, match="no probe 'nobody'"):
        readings(kind(probes=["nobody"]), shadow("llama"))
    with pytest.raises(ValueError, match="selects nothing"):
        kind(probes=[])
    with pytest.raises(ValueError, match="one string"):
        kind(probes="story")


def test_the_live_model_moves_and_drift_follows():
    """Aliased weights: what is kept of the first observation is not changed with them."""
    model = copy.deepcopy(tiny.model("llama"))
    of, instrument = Shadow.of(model), ActivationDrift()
    readings(instrument, of)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    of.sync()
    got = readings(instrument, of)
    relative = got["activation_drift/relative"].values
    assert not relative[0].any() and relative[1, 1] == 0
    assert relative[1, 2] == pytest.approx(0.5, rel=1e-5) and relative[1, 0] > 0
    assert got["activation_drift/cosine"].values[1, 2] < 1e-12
