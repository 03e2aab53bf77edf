"""LogitLens equals norm and unembedding in float64 of Hugging Face's own residual streams."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import transformers

from tests import tiny
from tests.instruments.common import (
    BLOCKS,
    PROBES,
    TEXTS,
    encoded,
    hugging_face,
    ids,
    of_layers,
    played,
    readings,
    shadow,
)
from tests.instruments.naive_lens import residuals, unembedded
from tlens_callback import LogitLens, Probe, Shadow, TargetScores, observe
from tlens_callback.instruments import lens as lens_module
from tlens_callback.shadow import stacks
from tlens_callback.shadow import unembed as unembed_module

TOKEN: Any = tiny.tokenizer().convert_tokens_to_ids
ANSWERS = {
    "capital": (TOKEN("\u0120Paris"), TOKEN("\u0120London")),
    "story": (TOKEN("\u0120Mary"), None),
}
CLOSE: Any = {"atol": 3e-5, "rtol": 3e-5}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_arithmetic_compared_with_is_the_models(family):
    model = hugging_face(family)
    for probe in TEXTS:
        logits = unembedded(model, family, residuals(model, family, probe)[-1])
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(ids(probe)).logits[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layer_equals_the_arithmetic(family):
    model, got = hugging_face(family), readings(LogitLens(k=4), shadow(family))
    for probe in TEXTS:
        logits = unembedded(model, family, residuals(model, family, probe)[:, -1])
        log_p = scipy.special.log_softmax(logits, axis=-1)
        p = np.exp(log_p)

        def values(measure, probe=probe.name):
            return got[f"logit_lens/{measure}/{probe}"].values

        best = np.argsort(-logits, axis=-1)[:, :4]
        np.testing.assert_array_equal(values("token"), best)
        np.testing.assert_allclose(values("top"), np.take_along_axis(p, best, 1), **CLOSE)
        np.testing.assert_allclose(values("entropy"), scipy.stats.entropy(p, axis=-1), **CLOSE)
        kl = scipy.special.rel_entr(p[-1], p).sum(-1)
        np.testing.assert_allclose(values("kl"), kl, atol=5e-6, rtol=3e-5)
        if probe.name in ANSWERS:
            target, foil = ANSWERS[probe.name]
            np.testing.assert_allclose(values("probability"), p[:, target], **CLOSE)
            rank = [sorted(row, reverse=True).index(row[target]) for row in logits.tolist()]
            np.testing.assert_array_equal(values("rank"), rank)
            if foil is not None:
                ahead = logits[:, target] - logits[:, foil]
                np.testing.assert_allclose(values("logit_diff"), ahead, **CLOSE)
    assert len(got) == 3 * 4 + 2 * 3 + 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_layer_is_the_models_output(family):
    """What TargetScores reads, and KL exactly 0; not so at the layers before."""
    scores, got = readings(TargetScores(), shadow(family)), readings(LogitLens(), shadow(family))
    for probe in TEXTS:
        assert got[f"logit_lens/kl/{probe.name}"].values[-1] == 0.0
        assert got[f"logit_lens/kl/{probe.name}"].values[-2] > 5e-5
        with torch.no_grad():
            best = hugging_face(family)(ids(probe)).logits[0, -1].topk(5).indices
        np.testing.assert_array_equal(got[f"logit_lens/token/{probe.name}"].values[-1], best)
    shared = {key for key in scores if "loss" not in key}
    assert len(shared) == 5
    for key in shared:
        lens = got[key.replace("target_scores", "logit_lens")]
        np.testing.assert_allclose(lens.values[-1], scores[key].values, rtol=1e-6, atol=1e-7)
        if lens.measure != "rank":
            assert lens.values[0] != scores[key].values


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2"])
def test_gain_and_cap_matter(family):
    """The comparisons above can fail."""
    model = hugging_face(family)
    h = residuals(model, family, TEXTS[0])[:, -1]
    right = unembedded(model, family, h)
    assert np.abs(unembedded(model, family, h, gain=False) - right).max() > 0.1
    if family == "gemma2":
        assert np.abs(unembedded(model, family, h, cap=False) - right).max() > 1e-3


def first_layer(rank) -> int:
    first = len(rank)
    for layer in reversed(range(len(rank))):
        if rank[layer] != 0:
            break
        first = layer
    return first


def test_first_layer_in_a_deep_model():
    """Targets from the top of the output: known from some layer on, and not from the same one."""
    model = tiny.model("llama", num_hidden_layers=6, seed=3)
    with torch.no_grad():
        for layer in model.model.layers:  # writes little, so that early layers know the answer
            layer.mlp.down_proj.weight.mul_(0.25)
            layer.self_attn.o_proj.weight.mul_(0.25)
    texts = ["the cat", "what is", " red blue", "John went to", "one two three", "yes no"]
    ends = []
    for text in texts:
        with torch.no_grad():
            ends.append(int(model(ids(Probe("x", text))).logits[0, -1].argmax()))
    probes = [
        Probe(f"p{i}", text, target=end)
        for i, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]
    probes.append(Probe("wrong", texts[0], target=(ends[0] + 1) % tiny.VOCAB))
    got = readings(LogitLens(), Shadow.of(model), probes)
    found = []
    for probe in probes:
        rank = got[f"logit_lens/rank/{probe.name}"].values
        found.append(int(got[f"logit_lens/first_layer/{probe.name}"].values))
        assert found[-1] == first_layer(rank)
    assert found[-1] == 6
    assert len(set(found)) >= 3 and max(found[:-1]) <= 5


@pytest.mark.parametrize(
    ("rank", "first"),
    [([3, 0, 1, 0, 0], 3), ([0, 0, 0, 0, 0], 0), ([0, 0, 0, 0, 1], 5), ([9, 9, 9, 9, 0], 4)],
)
def test_first_layer_of_made_up_ranks(rank, first):
    batch = encoded(TEXTS[1:2])
    logits = torch.zeros(5, *batch.tokens.shape, tiny.VOCAB)
    for layer, above in enumerate(rank):
        others = [token for token in range(tiny.VOCAB) if token != batch.targets[0]]
        logits[layer, ..., others[:above]] = 2.0
    logits[..., batch.targets[0]] = 1.0
    of = Shadow.of(tiny.model("llama", num_hidden_layers=5))
    streams = of_layers("hook_resid_post", logits)
    made = played(LogitLens(), batch, streams, logits[-1], of=of)
    assert made["logit_lens/rank/story"].values.tolist() == rank
    assert made["logit_lens/first_layer/story"].values == first


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt"])
def test_every_token(family):
    model = hugging_face(family)
    got = readings(LogitLens(every_token=True), shadow(family))
    for probe in TEXTS:
        logits = unembedded(model, family, residuals(model, family, probe))
        p = scipy.special.softmax(logits, axis=-1)

        def values(measure, probe=probe.name):
            return got[f"logit_lens/{measure}/{probe}"].values

        np.testing.assert_array_equal(values("token_by_pos"), logits.argmax(-1))
        np.testing.assert_allclose(values("top_by_pos"), p.max(-1), **CLOSE)
        np.testing.assert_allclose(
            values("entropy_by_pos"), scipy.stats.entropy(p, axis=-1), **CLOSE
        )
        kl = scipy.special.rel_entr(p[-1], p).sum(-1)
        np.testing.assert_allclose(values("kl_by_pos"), kl, **CLOSE)
        assert (values("kl_by_pos")[-1] == 0).all() and (values("kl_by_pos")[0] > 1e-4).all()
        np.testing.assert_allclose(values("kl_by_pos")[:, -1], values("kl"), **CLOSE)
        texts = got[f"logit_lens/token_by_pos/{probe.name}"].texts
        assert texts is not None and texts.shape == values("token_by_pos").shape


@pytest.mark.parametrize("chunk", [1, 200, 300, 1000])
@pytest.mark.parametrize("inner", [1, 200, 2**20])
def test_chunks_do_not_matter(chunk, inner, monkeypatch):
    """Of one row, of the two layers of a probe, and of one probe's rows with some of another's."""
    of = shadow("gpt2")
    whole = readings(LogitLens(every_token=True), of)
    for module in (lens_module, unembed_module):
        monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(unembed_module, "IN_CACHE", inner)
    monkeypatch.setattr(stacks, "_ON_CPU", inner)
    for key, reading in readings(LogitLens(every_token=True), of).items():
        np.testing.assert_allclose(reading.values, whole[key].values, atol=2e-6, rtol=2e-6)


def test_tokens_have_their_texts():
    got = readings(LogitLens(k=7), shadow("qwen2"))["logit_lens/token/story"]
    tokenizer = tiny.tokenizer()
    assert got.texts is not None and got.texts.shape == (2, 7)
    for token, text in zip(got.values.flat, got.texts.flat, strict=True):
        assert tokenizer.decode([int(token)]) == text


def test_padding_and_company_do_not_matter():
    alone = readings(LogitLens(every_token=True), shadow("llama"), TEXTS[:1])
    together = readings(LogitLens(every_token=True), shadow("llama"))
    for key, reading in alone.items():
        np.testing.assert_allclose(reading.values, together[key].values, atol=2e-6, rtol=1e-5)


def test_other_listeners_at_the_norm_and_head_hear_nothing_of_it():
    of = shadow("gemma2")
    names = [name for name in of.hooks if name.startswith(("ln_final", "unembed"))]
    heard: list[str] = []

    def listen(name, value, hook):
        heard.append(name)

    points: list[Any] = [of.hook(name) for name in names]
    handles = [p.add_hook(partial(listen, n)) for p, n in zip(points, names, strict=True)]
    try:
        readings(LogitLens(every_token=True), of)
        assert sorted(heard) == sorted(set(heard)) and "ln_final.hook_scale" in heard
        heard.clear()
        of.bridge.ln_final(torch.ones(1, 1, of.d_model))  # would have been heard
        assert heard
    finally:
        for point, handle in zip(points, handles, strict=True):
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


SCALED = {
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
}


def scaled(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": tiny.VOCAB, **tiny._IDS, **tiny._MODERN, **SCALED[name]}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        tiny._randomise(model)
    return model.eval()


@pytest.mark.parametrize("name", SCALED)
def test_families_that_scale_their_logits(name):
    model = scaled(name)
    got = readings(LogitLens(every_token=True), Shadow.of(model), TEXTS[:1])
    with torch.no_grad():
        logits = model(ids(TEXTS[0])).logits[0].double().numpy()
    p = scipy.special.softmax(logits, axis=-1)
    # At every token the last layer is made by the lens itself.
    np.testing.assert_allclose(
        got["logit_lens/top_by_pos/capital"].values[-1], p.max(-1), rtol=1e-5
    )
    assert got["logit_lens/top/capital"].values[-1, 0] == pytest.approx(p[-1].max(), rel=1e-5)


def test_a_family_that_makes_its_output_otherwise_is_refused():
    of = Shadow.of(scaled("Cohere"))
    config: Any = of.bridge.original_model.config
    config.logit_scale = 1.0  # the model itself has read it already
    with pytest.raises(ValueError, match="away from this CohereForCausalLM's output"):
        readings(LogitLens(), of, TEXTS[:1])


@pytest.mark.slow
def test_gemma_4():
    """Its final norm has no scale to listen to; each layer multiplies its output by a scalar."""
    settings: Any = {**tiny._IDS, **tiny._MODERN, "head_dim": 8, "final_logit_softcapping": 9.0}
    config = transformers.Gemma4TextConfig(vocab_size=tiny.VOCAB, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.Gemma4ForCausalLM(config).eval()
        tiny._randomise(model)
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.7)
    got = readings(LogitLens(every_token=True), Shadow.of(model), TEXTS[:1])
    with torch.no_grad():
        p = model(ids(TEXTS[0])).logits[0].softmax(-1)
    np.testing.assert_allclose(
        got["logit_lens/top_by_pos/capital"].values[-1], p.amax(-1), rtol=1e-5
    )


@pytest.mark.parametrize("before", [True, False])
def test_opt_with_a_projection(before):
    """OPT-350m's kind: no final norm, and a head narrower than the residual stream."""
    model = tiny.model("opt", word_embed_proj_dim=16, do_layer_norm_before=before)
    got = readings(LogitLens(), Shadow.of(model), TEXTS[:1])
    with torch.no_grad():
        states = model(ids(TEXTS[0]), output_hidden_states=True)
        logits = states.logits[0, -1].double().numpy()
    assert got["logit_lens/entropy/capital"].values[-1] == pytest.approx(
        scipy.stats.entropy(scipy.special.softmax(logits)), rel=1e-5
    )


def test_one_layer():
    model = tiny.model("llama", num_hidden_layers=1)
    got = readings(LogitLens(every_token=True), Shadow.of(model), TEXTS[:1])
    assert got["logit_lens/kl/capital"].values.tolist() == [0.0]
    assert got["logit_lens/token_by_pos/capital"].values.shape == (1, len(ids(TEXTS[0])[0]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_bfloat16(family):
    of = Shadow.of(tiny.model(family).bfloat16())
    got, wide = readings(LogitLens(), of), readings(LogitLens(), shadow(family))
    for key, reading in got.items():
        if reading.measure in ("kl", "entropy", "probability"):
            assert np.abs(reading.values - wide[key].values).max() < 0.1, key
    assert (got["logit_lens/kl/story"].values[-1:] == 0).all()


def test_named_probes_and_none():
    got = readings(LogitLens(probes=["repeat-5-0"]), shadow("llama"))
    assert {reading.probe for reading in got.values()} == {"repeat-5-0"}
    assert "logit_lens/rank/repeat-5-0" not in got
    assert readings(LogitLens(), shadow("llama"), BLOCKS) == {}
    with pytest.raises(ValueError, match="no probe 'nobody'"):
        readings(LogitLens(probes=["nobody"]), shadow("llama"))


def test_two_in_one_pass_do_not_mix():
    two = [LogitLens(probes=["story"]), LogitLens(probes=["capital"], name="other")]
    got = {reading.key: reading for reading in observe(shadow("llama"), encoded(PROBES), two)}
    alone = readings(LogitLens(), shadow("llama"))
    for key, other in (("story", "logit_lens"), ("capital", "other")):
        np.testing.assert_array_equal(
            got[f"{other}/token/{key}"].values, alone[f"logit_lens/token/{key}"].values
        )


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"k": 0}, "k >= 1"), ({"every": 0}, "every >= 1"), ({"probes": []}, "selects nothing")],
)
def test_settings_that_cannot_work(settings, match):
    with pytest.raises(ValueError, match=match):
        LogitLens(**settings)


def test_more_tokens_than_there_are():
    with pytest.raises(ValueError, match=f"has {tiny.VOCAB} tokens"):
        readings(LogitLens(k=tiny.VOCAB + 1), shadow("llama"))
