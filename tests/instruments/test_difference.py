"""DifferenceLens finds a known change by name, and equals arithmetic in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch

from tests import tiny
from tests.instruments.common import BLOCKS, PROBES, TEXTS, encoded, readings
from tests.instruments.naive_lens import final_norm, residuals, unembedded
from tlens_callback import DifferenceLens, Probe, Reading, Shadow, observe
from tlens_callback.instruments import difference as difference_module
from tlens_callback.shadow.unembed import unembed

OUTPUT_BIAS = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "opt": "model.decoder.layers.{}.fc2",
}
LAYERS = "num_hidden_layers"


def deep(family: str) -> Any:
    """Four layers that write little, so that the residual stream keeps what is added to it."""
    model = tiny.model(family, **{"n_layer" if family in ("gpt2", "gptj") else LAYERS: 4})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.1)
    return model


def direction(model: Any, family: str, token: int) -> torch.Tensor:
    """What to add to a residual stream so that the lens reads the token there."""
    norm = final_norm(model, family)
    return model.get_output_embeddings().weight[token] / norm.weight


def looks(instrument: DifferenceLens, of: Shadow, probes=PROBES) -> dict[str, Reading]:
    """The readings, without the instrument's name."""
    return {reading.measure: reading for reading in readings(instrument, of, probes).values()}


def train(of: Shadow, model: Any, scale: float = 0.02) -> None:
    """Moves every weight of the live model, and its shadow along."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    of.sync()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_has_changed_at_the_first_observation_or_without_training(family):
    of, instrument = Shadow.of(tiny.model(family)), DifferenceLens(k=3)
    for _ in range(2):
        got = looks(instrument, of)
        assert (got["norm"].values == 0).all()
        assert (got["token"].values == 0).all() and (got["token"].texts == "").all()
        np.testing.assert_allclose(got["probability"].values, 1 / tiny.VOCAB, rtol=1e-6)


@pytest.mark.parametrize("word", [" Paris", " dog", " seven"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", OUTPUT_BIAS)
def test_a_change_of_an_output_bias_is_found_by_name(family, layer, word):
    model = deep(family)
    token: Any = tiny.tokenizer()(word, add_special_tokens=False)["input_ids"][0]
    of, instrument = Shadow.of(model), DifferenceLens(k=3)
    looks(instrument, of)
    added = 0.3 * direction(model, family, token).detach()
    with torch.no_grad():
        model.get_submodule(OUTPUT_BIAS[family].format(layer)).bias.add_(added)
    got = looks(instrument, of)
    assert (got["norm"].values[:layer] == 0).all() and (got["norm"].values[layer:] > 0).all()
    assert got["token"].texts is not None
    assert (got["token"].texts[:layer] == "").all()
    assert got["token"].texts[layer, 0] == word
    assert got["token"].values[layer, 0] == token
    assert got["probability"].values[layer, 0] > 10 / tiny.VOCAB
    before = deep(family)
    stream = np.concatenate([residuals(before, family, p)[layer, 1:] for p in TEXTS])
    median = np.median(np.linalg.norm(stream, axis=1))
    assert got["norm"].values[layer] == pytest.approx(float(added.norm()) / median, rel=1e-4)


@pytest.mark.parametrize("family", OUTPUT_BIAS)
def test_a_change_towards_no_token_names_none(family):
    """The control: as large, in random directions, it is read with far less certainty."""
    generator = torch.Generator().manual_seed(0)
    certain = []
    for towards in (40, None):
        model = deep(family)
        of, instrument = Shadow.of(model), DifferenceLens(k=1)
        looks(instrument, of)
        added = direction(model, family, 40).detach()
        if towards is None:
            noise = torch.randn(added.shape, generator=generator)
            added = noise / noise.norm() * added.norm()
        with torch.no_grad():
            model.get_submodule(OUTPUT_BIAS[family].format(3)).bias.add_(added)
        got = looks(instrument, of)
        assert (got["token"].values[3, 0] == 40) == (towards is not None)
        certain.append(got["probability"].values[3, 0])
    assert certain[1] < 0.5 * certain[0]


@pytest.mark.parametrize("word", [" Paris", " dog"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_a_change_of_an_output_matrix_is_found_by_name(family, word):
    """W_down gains a rank one part that answers to the mean activation of its input."""
    model, layer = deep(family), 2
    token: Any = tiny.tokenizer()(word, add_special_tokens=False)["input_ids"][0]
    of, instrument = Shadow.of(model), DifferenceLens()
    looks(instrument, of)
    down = model.model.layers[layer].mlp.down_proj
    seen: list[torch.Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 1:]))
    with torch.no_grad():
        for probe in TEXTS:
            model(encoded([probe]).tokens)
        handle.remove()
        mean = torch.cat(seen).mean(0)
        answer = mean / (mean @ mean)
        down.weight.add_(0.3 * direction(model, family, token)[:, None] * answer)
    got = looks(instrument, of)
    assert (got["norm"].values[:layer] == 0).all() and (got["norm"].values[layer:] > 0).all()
    assert got["token"].texts is not None
    assert [texts[0] for texts in got["token"].texts[:layer]] == [""] * layer
    assert got["token"].texts[layer, 0] == word


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_the_arithmetic(family):
    model, before = tiny.model(family), tiny.model(family)
    before.set_attn_implementation("eager")
    of, instrument = Shadow.of(model), DifferenceLens(k=4)
    looks(instrument, of)
    train(of, model)
    got = looks(instrument, of)
    after = copy.deepcopy(before)
    after.load_state_dict(model.state_dict())
    h0, h = (
        np.concatenate([residuals(m, family, probe)[:, 1:] for probe in TEXTS], axis=1)
        for m in (before, after)
    )  # [layer, token, d_model]
    d = (h - h0).mean(1)
    size = np.linalg.norm(d, axis=1)
    norm = size / np.median(np.linalg.norm(h0, axis=2), axis=1)
    np.testing.assert_allclose(got["norm"].values, norm, rtol=1e-4)
    unit = d / size[:, None] * d.shape[1] ** 0.5
    x = unembedded(after, family, unit) - unembedded(after, family, 0 * unit)
    p = scipy.special.softmax(x, axis=-1)
    best = np.argsort(-p, axis=-1)[:, :4]
    np.testing.assert_array_equal(got["token"].values, best)
    expected = np.take_along_axis(p, best, 1)
    np.testing.assert_allclose(got["probability"].values, expected, rtol=1e-3)
    # The comparison can fail: the first tokens count for something, and so do the weights of now.
    every = [residuals(after, family, q) - residuals(before, family, q) for q in TEXTS]
    assert not np.allclose(np.concatenate(every, axis=1).mean(1), d, rtol=1e-2)
    old = scipy.special.softmax(unembedded(before, family, unit), axis=-1)
    assert np.abs(np.take_along_axis(old, best, 1) / expected - 1).max() > 5e-3


def test_a_small_change_reads_as_a_large_one_does():
    """The norm's epsilon would flatten it; only `norm` knows the size."""
    found = []
    for scale in (1.0, 1e-3):
        model = deep("gpt2")
        of, instrument = Shadow.of(model), DifferenceLens(k=3)
        looks(instrument, of)
        added = scale * direction(model, "gpt2", 40).detach()
        with torch.no_grad():
            model.transformer.h[3].mlp.c_proj.bias.add_(added)
        found.append(looks(instrument, of))
        probability = (unembed(of, added) - unembed(of, 0 * added)).softmax(-1).max()
        found[-1]["flat"] = Reading(key="x/y", values=probability.numpy(), unit="probability")
    large, small = found
    np.testing.assert_array_equal(large["token"].values[3], small["token"].values[3])
    rtol = {"rtol": 1e-2}
    np.testing.assert_allclose(
        small["probability"].values[3], large["probability"].values[3], **rtol
    )
    np.testing.assert_allclose(small["norm"].values[3], 1e-3 * large["norm"].values[3], **rtol)
    assert small["flat"].values < 0.5 * small["probability"].values[3, 0]


def test_biases_of_the_head_are_not_read_as_a_change():
    model = tiny.model("gptj", n_layer=2)
    with torch.no_grad():
        model.lm_head.bias[17] = 50.0
    of, instrument = Shadow.of(model), DifferenceLens(k=2)
    looks(instrument, of)
    train(of, model)
    got = looks(instrument, of)
    assert (got["norm"].values > 0).all()
    assert (got["token"].values[:, 0] != 17).all()
    assert int(unembed(of, torch.randn(of.d_model)).argmax()) == 17


def test_a_memory_that_comes_back_is_what_is_compared_with():
    model = tiny.model("llama")
    of, instrument = Shadow.of(model), DifferenceLens()
    looks(instrument, of)
    kept = {key: tensor.clone() for key, tensor in instrument.baseline.items()}
    assert [tuple(tensor.shape) for tensor in kept.values()] == [(2, 32), (2,)]
    train(of, model)
    got = looks(instrument, of)
    resumed, fresh = DifferenceLens(), DifferenceLens()
    resumed.baseline.update(kept)
    again = looks(resumed, of)
    for measure, reading in got.items():
        np.testing.assert_array_equal(reading.values, again[measure].values)
    assert got["norm"].values.min() > 0 and looks(fresh, of)["norm"].values.max() == 0
    for key, tensor in instrument.baseline.items():
        assert torch.equal(tensor, kept[key])


def test_another_choice_of_probes_has_its_own_first():
    """As after resuming with other settings."""
    of = Shadow.of(tiny.model("llama"))
    one, two = DifferenceLens(probes=["story"]), DifferenceLens(probes=["capital"])
    looks(one, of)
    two.baseline.update(one.baseline)
    assert not looks(two, of)["norm"].values.any()


def test_padding_and_blocks_do_not_count():
    model = tiny.model("llama")
    of, alone, together = Shadow.of(model), DifferenceLens(), DifferenceLens()
    for instrument, probes in ((alone, TEXTS), (together, PROBES)):
        looks(instrument, of, probes)
    train(of, model)
    one, other = looks(alone, of, TEXTS), looks(together, of, PROBES)
    for measure, reading in one.items():
        np.testing.assert_allclose(reading.values, other[measure].values, rtol=1e-3)
    chosen = DifferenceLens(probes=["story"])
    looks(chosen, Shadow.of(tiny.model("llama")))
    assert not np.allclose(looks(chosen, of)["norm"].values, one["norm"].values, rtol=1e-3)


def test_chunks_do_not_matter(monkeypatch):
    model = tiny.model("gpt2", n_layer=5)
    of, instrument = Shadow.of(model), DifferenceLens()
    looks(instrument, of)
    train(of, model)
    whole = looks(instrument, of)
    monkeypatch.setattr(difference_module, "CHUNK", 200)
    for measure, reading in looks(instrument, of).items():
        np.testing.assert_allclose(reading.values, whole[measure].values, rtol=1e-5)


def test_bfloat16():
    model = tiny.model("llama").bfloat16()
    of, instrument = Shadow.of(model), DifferenceLens()
    assert (looks(instrument, of)["norm"].values == 0).all()
    train(of, model, 0.05)
    got = looks(instrument, of)
    assert (got["norm"].values > 1e-3).all()
    assert all(tensor.dtype == torch.float32 for tensor in instrument.baseline.values())


def test_probes_that_leave_nothing_to_average():
    of = Shadow.of(tiny.model("llama"))
    assert readings(DifferenceLens(), of, BLOCKS) == {}
    with pytest.raises(ValueError, match="probes of at least two tokens"):
        readings(DifferenceLens(), of, [Probe("one", [5])])
    # Beside another one a probe of one token is just not counted.
    assert len(observe(of, encoded([Probe("one", [5]), TEXTS[0]]), [DifferenceLens()])) == 3


@pytest.mark.parametrize(
    ("settings", "match"), [({"k": 0}, "k >= 1"), ({"probes": "story"}, "give a list")]
)
def test_settings_that_cannot_work(settings, match):
    with pytest.raises(ValueError, match=match):
        DifferenceLens(**settings)


def test_more_tokens_than_there_are():
    with pytest.raises(ValueError, match=f"has {tiny.VOCAB} tokens"):
        readings(DifferenceLens(k=tiny.VOCAB + 1), Shadow.of(tiny.model("llama")))
