"""Files of every layout give what the papers say, computed in float64 by loops."""

import json

import numpy as np
import pytest
import torch

from tests.sae import layouts
from tests.sae.layouts import D_IN, N, decode, extra, inputs, saelens, sparsify, weights
from tlens_callback import load_sae

HOOK = "blocks.1.hook_resid_pre"
OLD = {"d_in": D_IN, "d_sae": N, "dtype": "float32", "hook_point": HOOK, "hook_point_layer": 1}
MIDDLE = {
    "d_in": D_IN,
    "d_sae": N,
    "dtype": "float32",
    "hook_name": HOOK,
    "hook_layer": 1,
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "context_size": 128,
    "model_from_pretrained_kwargs": {},
    "neuronpedia_id": None,
    "prepend_bos": True,
}
NEW = {
    "d_in": D_IN,
    "d_sae": N,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.5.0", "hook_name": HOOK, "hook_head_index": None},
}
SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": N,
    "k": 5,
    "multi_topk": True,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}


def check(sae, x, features, rebuilt):
    x = torch.tensor(x, dtype=torch.float32)
    got_features, got = sae.reconstruct(x)
    np.testing.assert_allclose(got_features.numpy(), features, atol=2e-6)
    np.testing.assert_allclose(sae.encode(x).numpy(), features, atol=2e-6)
    np.testing.assert_allclose(got.numpy(), rebuilt, atol=5e-6)
    on = (features > 0).mean()
    assert 0.05 < on < 0.95, "the case says nothing"


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("config", [OLD, MIDDLE, NEW], ids=["old", "middle", "new"])
def test_standard(tmp_path, config, subtract):
    w, x = weights(), inputs()
    config = {**config, "apply_b_dec_to_input": subtract}
    if config["d_sae"] and "metadata" in config:
        config["architecture"] = "standard"
    sae = load_sae(saelens(tmp_path, config, w))
    features = layouts.standard(w, x, subtract)
    check(sae, x, features, decode(w, features))
    assert (sae.architecture, sae.hook, sae.d_in, sae.n_features) == ("standard", HOOK, D_IN, N)
    # The flag matters.
    other = layouts.standard(w, x, not subtract)
    assert np.abs(sae.encode(torch.tensor(x)).numpy() - other).max() > 0.1


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {**MIDDLE, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
        {
            **MIDDLE,
            "architecture": "topk",
            "activation_fn": "topk",
            "activation_fn_kwargs": {"k": 5},
        },
        {**NEW, "architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": False},
    ],
    ids=["standard with topk", "middle", "new"],
)
def test_topk(tmp_path, config, subtract):
    w, x = weights(), inputs()
    sae = load_sae(saelens(tmp_path, {**config, "apply_b_dec_to_input": subtract}, w))
    features = layouts.topk(w, x, 5, subtract)
    check(sae, x, features, decode(w, features))
    assert (sae.architecture, sae.k) == ("topk", 5)
    assert ((features > 0).sum(1) <= 5).all()


def test_topk_keeps_no_negative_feature(tmp_path):
    """Where fewer than k are positive, fewer fire."""
    w, x = weights(), inputs()
    w["b_enc"] = w["b_enc"] - 2.0
    sae = load_sae(saelens(tmp_path, {**NEW, "architecture": "topk", "k": 12}, w))
    features = layouts.topk(w, x, 12)
    assert (features > 0).sum(1).min() < 12 <= (features > 0).sum(1).max() + 12
    np.testing.assert_allclose(
        sae.encode(torch.tensor(x, dtype=torch.float32)).numpy(), features, atol=2e-6
    )
    assert (sae.encode(torch.tensor(x)) >= 0).all()


def test_topk_by_what_a_feature_writes(tmp_path):
    """With rescale_acts_by_decoder_norm the choice, the size and the decoder row change."""
    w, x = weights(), inputs()
    w["W_dec"] = w["W_dec"] * np.linspace(0.2, 3, N)[:, None]
    config = {**NEW, "architecture": "topk", "k": 5}
    sae = load_sae(saelens(tmp_path / "a", {**config, "rescale_acts_by_decoder_norm": True}, w))
    norm = np.sqrt((w["W_dec"] ** 2).sum(1))
    scaled = np.array(layouts.pre(w, x)) * norm
    features = np.zeros_like(scaled)
    for t, row in enumerate(scaled):
        for n in sorted(range(N), key=lambda n: -row[n])[:5]:
            features[t, n] = max(row[n], 0)
    check(sae, x, features, decode(w, features / norm))
    plain = load_sae(saelens(tmp_path / "b", config, w))
    assert (
        np.abs(plain.reconstruct(torch.tensor(x))[1].numpy() - decode(w, features / norm)).max()
        > 0.1
    )


@pytest.mark.parametrize("config", [MIDDLE, NEW], ids=["middle", "new"])
def test_jumprelu(tmp_path, config):
    w = weights(threshold=extra(1))
    x = inputs()
    sae = load_sae(saelens(tmp_path, {**config, "architecture": "jumprelu"}, w))
    features = layouts.jumprelu(w, x)
    check(sae, x, features, decode(w, features))
    assert sae.architecture == "jumprelu"
    assert np.abs(layouts.standard(w, x) - features).max() > 0.3, "no threshold cut anything"


def test_jumprelu_at_the_threshold_is_off(tmp_path):
    """h > threshold, strictly; and a negative threshold lets no negative feature through."""
    w = weights(threshold=np.full(N, 0.5))
    w["W_enc"], w["b_dec"] = np.zeros((D_IN, N)), np.zeros(D_IN)
    w["b_enc"] = np.full(N, 0.5)
    w["b_enc"][0] = np.nextafter(np.float32(0.5), np.float32(1))
    w["threshold"][1], w["b_enc"][1] = -1.0, -0.5
    sae = load_sae(saelens(tmp_path, {**NEW, "architecture": "jumprelu"}, w))
    assert (sae.encode(torch.ones(D_IN)) > 0).tolist() == [True] + [False] * (N - 1)


def test_jumprelu_with_a_log_threshold(tmp_path):
    w = weights(log_threshold=np.log(extra(1, 0.1, 0.9)))
    sae = load_sae(saelens(tmp_path, {**MIDDLE, "architecture": "jumprelu"}, w))
    x = inputs()
    features = layouts.jumprelu({**w, "threshold": np.exp(w["log_threshold"])}, x)
    check(sae, x, features, decode(w, features))


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("config", [MIDDLE, NEW], ids=["middle", "new"])
def test_gated(tmp_path, config, subtract):
    w = weights(b_gate=extra(1), r_mag=extra(2), b_mag=extra(3, -0.4, 0.4))
    del w["b_enc"]
    x = inputs()
    config = {**config, "architecture": "gated", "apply_b_dec_to_input": subtract}
    sae = load_sae(saelens(tmp_path, config, w))
    features = layouts.gated(w, x, subtract)
    check(sae, x, features, decode(w, features))
    assert sae.architecture == "gated"


def test_a_gate_at_zero_is_closed(tmp_path):
    w = weights(b_gate=np.zeros(N), r_mag=np.zeros(N), b_mag=np.ones(N))
    del w["b_enc"]
    w["W_enc"], w["b_dec"] = np.zeros((D_IN, N)), np.zeros(D_IN)
    w["b_gate"][0] = 1e-6
    sae = load_sae(saelens(tmp_path, {**NEW, "architecture": "gated"}, w))
    assert sae.encode(torch.ones(D_IN)).tolist() == [1.0] + [0.0] * (N - 1)


def test_activations_scaled_to_one_norm(tmp_path):
    w, x = weights(), inputs()
    config = {**MIDDLE, "normalize_activations": "constant_norm_rescale"}
    sae = load_sae(saelens(tmp_path, config, w))
    size = np.sqrt((x**2).sum(1, keepdims=True)) / D_IN**0.5
    features = layouts.standard(w, x / size)
    check(sae, x, features, decode(w, features) * size)


def test_activations_normalised_as_by_a_layer(tmp_path):
    w, x = weights(), inputs()
    sae = load_sae(saelens(tmp_path, {**NEW, "normalize_activations": "layer_norm"}, w))
    mean = x.mean(1, keepdims=True)
    std = x.std(1, ddof=1, keepdims=True)
    features = layouts.standard(w, (x - mean) / (std + 1e-5))
    check(sae, x, features, decode(w, features) * std + mean)


def test_activations_scaled_by_a_factor_that_is_in_no_file(tmp_path):
    w, x = weights(), inputs()
    for said in ("expected_average_only_in", True):
        path = saelens(tmp_path, {**MIDDLE, "normalize_activations": said}, w)
        with pytest.raises(ValueError, match="scale"):
            load_sae(path)
        features = layouts.standard(w, x * 0.7)
        check(load_sae(path, scale=0.7), x, features, decode(w, features) / 0.7)
    with pytest.raises(ValueError, match="leave it out"):
        load_sae(saelens(tmp_path, MIDDLE, w), scale=0.7)


@pytest.mark.parametrize("given", [None, False])
def test_activations_without_their_mean(tmp_path, given):
    """Trained on a model with centred writing weights; the argument has the last word."""
    w, x = weights(), inputs()
    config = {**MIDDLE, "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    sae = load_sae(saelens(tmp_path, config, w), centred=given)
    mean = 0 if given is False else x.mean(1, keepdims=True)
    features = layouts.standard(w, x - mean)
    check(sae, x, features, decode(w, features) + mean)


@pytest.mark.parametrize(
    ("hook", "centred"),
    [
        ("blocks.1.hook_resid_mid", True),
        ("blocks.1.hook_mlp_out", True),
        ("hook_embed", True),
        ("blocks.1.attn.hook_z", False),
        ("blocks.1.ln1.hook_normalized", False),
    ],
)
def test_only_writes_to_the_residual_stream_are_centred(tmp_path, hook, centred):
    """Centring changes W_E, W_O and W_out: what is in heads and neurons keeps its mean."""
    made = {"center_writing_weights": True}
    config = {**MIDDLE, "hook_name": hook, "model_from_pretrained_kwargs": made}
    path = saelens(tmp_path, config, weights())
    assert load_sae(path).centred is centred
    assert load_sae(path, centred=True).centred


def test_the_metadata_of_a_release_candidate(tmp_path):
    said = {"hook_name": HOOK, "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    sae = load_sae(saelens(tmp_path, {**NEW, "metadata": None, "meta": said}, weights()))
    assert sae.hook == HOOK and sae.centred


def test_a_scaling_factor_of_fine_tuning(tmp_path):
    w, x = weights(), inputs()
    features = layouts.standard(w, x)
    ones = saelens(tmp_path / "a", MIDDLE, {**w, "scaling_factor": np.ones(N)})
    check(load_sae(ones), x, features, decode(w, features))
    factor = {**w, "scaling_factor": extra(4, 0.5, 1.5)}
    with pytest.raises(ValueError, match="scaling_factor"):
        load_sae(saelens(tmp_path / "b", MIDDLE, factor))
    used = saelens(tmp_path / "c", {**MIDDLE, "finetuning_scaling_factor": True}, factor)
    check(load_sae(used), x, features, decode(w, features * factor["scaling_factor"]))


@pytest.mark.parametrize("seeds", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_sparsify(tmp_path, old, seeds):
    w, x = weights(), inputs()
    config = {k: SPARSIFY[k] for k in ("expansion_factor", "num_latents", "k", "d_in")}
    path = tmp_path / "layers.1.mlp" / ("seed3" if seeds else "")
    sae = load_sae(sparsify(path, {**config, "signed": False} if old else SPARSIFY, w))
    features = layouts.topk(w, x, 5)
    check(sae, x, features, decode(w, features))
    assert sae.hook == "blocks.1.mlp.hook_out"


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("layers.10", "blocks.10.hook_resid_post"),
        ("h.3", "blocks.3.hook_resid_post"),
        ("h.3.attn", "blocks.3.attn.hook_out"),
        ("layers.0.self_attn", "blocks.0.attn.hook_out"),
        ("layers.4.attention", "blocks.4.attn.hook_out"),
        ("model.layers.4", "blocks.4.hook_resid_post"),
        ("embed_tokens", "hook_embed"),
        ("layers.4.mlp.gate_proj", None),
        ("best", None),
    ],
)
def test_where_sparsify_was_trained(tmp_path, name, hook):
    assert load_sae(sparsify(tmp_path / name, SPARSIFY, weights())).hook == hook


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({**NEW, "architecture": "transcoder"}, "transcoder"),
        ({**NEW, "architecture": "jumprelu"}, "threshold"),
        ({**NEW, "architecture": "topk"}, "k=None"),
        ({**NEW, "metadata": {"hook_head_index": 3}}, "single head"),
        ({**NEW, "metadata": {"hook_name": HOOK, "hook_name_out": "x"}}, "transcoder to 'x'"),
        ({**NEW, "normalize_activations": "batch"}, "'batch'"),
        ({**MIDDLE, "activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({**MIDDLE, "d_in": 5}, "d_in 5"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, config, match):
    with pytest.raises(ValueError, match=match):
        load_sae(saelens(tmp_path, config, weights()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"activation": "groupmax"}, "groupmax"),
        ({"transcode": True}, "transcode"),
        ({"skip_connection": True}, "skip"),
        ({"signed": True}, "negative"),
        ({"gram_lookup": True, "lookup_max_order": 4}, "gram_lookup"),
        ({"d_in": 3}, "d_in 3"),
    ],
)
def test_what_sparsify_adds_is_refused(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        load_sae(sparsify(tmp_path, {**SPARSIFY, **change}, weights()))


def test_a_tensor_too_many_is_refused(tmp_path):
    with pytest.raises(ValueError, match="W_skip"):
        load_sae(saelens(tmp_path, NEW, weights(W_skip=np.zeros((2, 2)))))


def test_another_directory(tmp_path):
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(NEW))
    with pytest.raises(ValueError, match="folder for each"):
        load_sae(tmp_path)


def test_a_layer_in_braces(tmp_path):
    config = {**OLD, "hook_point": "blocks.{layer}.hook_resid_pre"}
    assert load_sae(saelens(tmp_path, config, weights())).hook == HOOK
