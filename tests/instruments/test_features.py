"""SparseFeatures and TrainedFeatures, against Hugging Face's models and numpy's float64."""

import numpy as np
import pytest
import torch

from tests import tiny
from tests.instruments.common import BLOCKS, PROBES, TEXTS, encoded, hugging_face, ids, shadow
from tests.sae.by_hand import HOOK, D, by_hand, identity, layers_of, look, numbers, random_sae
from tests.sae.layouts import sparsify, weights
from tlens_callback import (
    Autoencoder,
    Probe,
    Shadow,
    SparseFeatures,
    TrainedFeatures,
    load_sae,
    observe,
)
from tlens_callback.sae.splice import SpliceResult, activations, counted_tokens, loss_with, ordinary


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_hugging_face(family):
    sae = random_sae()
    got = look(SparseFeatures(sae, k=5, tokens=3), shadow(family))
    x, f, back, loss = by_hand(family, sae)
    flat, all_f, all_back = np.concatenate(x), np.concatenate(f), np.concatenate(back)
    shown = np.argsort(-all_f.mean(0), kind="stable")[:5]
    assert got["mean"].labels["feature"] == tuple(str(n) for n in shown)
    np.testing.assert_allclose(got["mean"].values, all_f.mean(0)[shown], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["frequency"].values, (all_f > 0).mean(0)[shown], atol=1e-6)
    assert got["l0"].values == pytest.approx((all_f > 0).sum(1).mean(), abs=1e-4)
    assert got["dead"].values == pytest.approx(1 - (all_f > 0).any(0).mean(), abs=1e-6)
    fvu = ((flat - all_back) ** 2).sum() / ((flat - flat.mean(0)) ** 2).sum()
    assert got["fvu"].values == pytest.approx(fvu, rel=1e-4)
    for kind, value in loss.items():
        assert got[f"loss_{kind}"].values == pytest.approx(value, abs=3e-5), kind
    span = loss["zero"] - loss["clean"]
    share = (loss["zero"] - loss["sae"]) / span
    assert got["recovered"].values == pytest.approx(share, abs=3e-5 * (1 + abs(share)) / abs(span))
    assert abs(span) > 5e-3
    for probe, one in zip(TEXTS, f, strict=True):
        drawn = got[f"activation/{probe.name}"].values
        np.testing.assert_allclose(drawn[:, 1:], one[:, shown].T, rtol=1e-4, atol=2e-5)
        assert (drawn[:, 0] == 0).all()
    assert not any(key.endswith(block.name) for key in got for block in BLOCKS)
    best = np.sort(all_f[:, shown], axis=0)[::-1][:3].T
    np.testing.assert_allclose(got["top"].values, best, rtol=1e-4, atol=2e-5)


def test_top_tokens_are_shown_in_context():
    sae = random_sae()
    got = look(SparseFeatures(sae, k=4, tokens=40), shadow("llama"), TEXTS[:1])
    _, f, _, _ = by_hand("llama", sae, TEXTS[:1])
    labels = encoded(TEXTS[:1]).labels[0]
    for row, name in enumerate(got["top"].labels["feature"]):
        values = f[0][:, int(name)]
        order = [1 + t for t in np.argsort(-values) if values[t] > 0]
        texts = list(got["top"].texts[row])
        assert texts[len(order) :] == [""] * (len(texts) - len(order))
        for pos, text in zip(order, texts, strict=False):
            before, after = (
                "".join(labels[max(0, pos - 2) : pos]),
                "".join(labels[pos + 1 : pos + 3]),
            )
            assert text == f"{before}[[{labels[pos]}]]{after}"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_perfect_one_recovers_all_and_an_empty_one_nothing(family):
    perfect = numbers(SparseFeatures(identity()), shadow(family))
    assert perfect["fvu"] == pytest.approx(0, abs=1e-9)
    assert perfect["recovered"] == pytest.approx(1, abs=1e-5)
    empty = Autoencoder(
        W_enc=torch.zeros(D, 3), b_enc=torch.ones(3), W_dec=torch.zeros(3, D), b_dec=torch.zeros(D)
    )
    nothing = numbers(SparseFeatures(empty, hook=HOOK), shadow(family))
    assert nothing["recovered"] == 0
    assert nothing["loss_sae"] == nothing["loss_zero"] != nothing["loss_clean"]
    assert nothing["fvu"] > 1  # zeros are worse than the mean
    assert nothing["l0"] == 3 and nothing["dead"] == 0


def test_heads_are_put_side_by_side():
    got = numbers(SparseFeatures(identity(hook="blocks.1.attn.hook_z")), shadow("llama"))
    assert got["recovered"] == pytest.approx(1, abs=1e-5)
    assert got["loss_zero"] != got["loss_clean"]


def test_where_zeros_change_nothing_there_is_nothing_to_recover():
    def of(**loss):
        none = torch.zeros(1, 1)
        return SpliceResult(
            features=none, counted=none > 0, massive=0, fvu=0.0, loss=loss
        ).recovered

    assert np.isnan(of(clean=3.0, zero=3.00005, sae=3.1))
    assert of(clean=3.0, zero=5.0, sae=3.5) == 0.75


def test_a_large_batch_is_cut_into_rows(monkeypatch):
    of, batch = shadow("qwen2"), encoded()
    counted = counted_tokens(batch, range(len(PROBES)))
    arguments = (of, HOOK, batch.tokens, counted, lambda x: 2 * x)
    whole = loss_with(*arguments)
    monkeypatch.setattr("tlens_callback.sae.splice._LOGITS", 1)
    assert loss_with(*arguments) == pytest.approx(whole, abs=1e-6)
    assert abs(whole - loss_with(*arguments[:-1], lambda x: None)) > 1e-3


def test_drift_is_from_the_first_observation():
    model = tiny.model("llama")
    of, sae = Shadow.of(model), random_sae()
    instrument = SparseFeatures(sae, k=6)
    first = look(instrument, of)
    assert (first["drift"].values == 0).all() and (first["drifting_change"].values == 0).all()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.mlp.down_proj.weight.mul_(1.5)
    of.sync()
    second, fresh = look(instrument, of), look(SparseFeatures(sae, features=range(48)), of)
    start = look(SparseFeatures(sae, features=range(48)), shadow("llama"))
    assert second["mean"].labels == first["mean"].labels
    np.testing.assert_allclose(
        second["drift"].values, second["mean"].values - first["mean"].values, atol=1e-6
    )
    moved = fresh["mean"].values - start["mean"].values
    order = np.argsort(-np.abs(moved), kind="stable")[:6]
    assert second["drifting"].values.tolist() == order.tolist()
    np.testing.assert_allclose(second["drifting_change"].values, moved[order], atol=1e-6)
    assert np.abs(moved).max() > 0.05


def test_features_that_are_asked_for():
    instrument = SparseFeatures(random_sae(), k=3)
    look(instrument, shadow("llama"))
    asked = SparseFeatures(random_sae(), features=[np.int64(7), np.int64(3)])
    asked.baseline.update(instrument.baseline)  # of a run that did not ask, resumed
    for one in (SparseFeatures(random_sae(), features=[7, 3]), asked):
        assert look(one, shadow("llama"))["mean"].labels["feature"] == ("7", "3")


def test_an_autoencoder_of_another_size_begins_anew():
    instrument = SparseFeatures(random_sae(n=40), k=3)
    look(instrument, shadow("llama"))
    other = SparseFeatures(random_sae(n=20), k=3)
    other.baseline.update(instrument.baseline)
    got = look(other, shadow("llama"))
    assert (got["drift"].values == 0).all()
    assert all(int(name) < 20 for name in got["drift"].labels["feature"])


def test_the_shapes_stay_where_activations_become_massive_or_are_lost():
    model = tiny.model("llama")
    of = Shadow.of(model)
    probes = [Probe("short", "Paris and London and Rome")]
    seen = [SparseFeatures(random_sae(hook="blocks.0.hook_resid_pre"), tokens=5)]
    seen += [TrainedFeatures("blocks.0.hook_resid_pre", n_features=40, steps=3, tokens=5)]
    weight = model.get_input_embeddings().weight
    token = tiny.tokenizer().convert_tokens_to_ids("\u0120and")
    shapes = []
    for factor in (1, 1000, torch.nan):
        with torch.no_grad():
            weight[token] *= factor
        got = observe(of, encoded(probes), seen)
        shapes.append({r.key: r.values.shape for r in got})
        massive = [float(r.values) for r in got if r.measure == "massive"]
        # What is no number is not massive: it counts, and is no number.
        assert massive == [{1: 0, 1000: 2}.get(factor, 0)] * 2
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(value.isfinite().all() for value in seen[1].baseline.values())
    with torch.no_grad():
        weight[token] = 1
    later = observe(of, encoded(probes), seen)
    assert all(np.isfinite(r.values).all() for r in later), "training went on"


def test_massive_activations_are_left_out_and_left_in_place():
    """One token's embedding is a thousand times the others'; without the rule, FVU is about it."""
    model = tiny.model("llama")
    with torch.no_grad():
        token = tiny.tokenizer().convert_tokens_to_ids("\u0120and")
        model.get_input_embeddings().weight[token] *= 1000
    of, sae = Shadow.of(model), random_sae(hook="blocks.0.hook_resid_pre")
    got = look(SparseFeatures(sae, k=3), of)
    assert got["massive"].values == encoded().labels[3].count(" and") == 2
    weight = model.get_input_embeddings().weight.detach()
    batch = encoded(TEXTS)
    rows = [
        t for row, n in zip(batch.tokens, batch.lengths, strict=True) for t in row[1:n].tolist()
    ]
    x = weight[[t for t in rows if t != token]].double()
    rebuilt = sae.reconstruct(x.float())[1].double()
    fvu = float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())
    assert got["fvu"].values == pytest.approx(fvu, rel=1e-4)
    # With them the number is another.
    everything = weight[rows].double()
    far = (everything - sae.reconstruct(everything.float())[1].double()).square().sum()
    around = (everything - everything.mean(0)).square().sum()
    assert abs(float(far / around) - fvu) > 0.02
    at = batch.labels[1].index(" and")
    assert (got["activation/story"].values[:, at] == 0).all()


def test_what_is_massive():
    x = torch.ones(9, 4)
    x[3] *= 10.5
    x[4] *= 9.5
    assert ordinary(x).tolist() == [i != 3 for i in range(9)]
    x[4:] = torch.inf
    assert ordinary(x).tolist() == [i < 3 for i in range(9)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_hook_points_of_sparsify_are_the_modules_outputs(family, tmp_path):
    model, of = hugging_face(family), shadow(family)
    layer = layers_of(model)[0]
    names = {name for name, _ in layer.named_children()}
    tested = 0
    for module in ("", *sorted(names & {"mlp", "self_attn", "attn", "attention"})):
        path = tmp_path / f"layers.0.{module}".rstrip(".")
        config = {"k": 3, "d_in": 12, "num_latents": 30}
        hook = load_sae(sparsify(path, config, weights())).hook
        out = []
        handle = (getattr(layer, module) if module else layer).register_forward_hook(
            lambda m, args, output, out=out: out.append(output)
        )
        with torch.no_grad():
            model(ids(TEXTS[0]), use_cache=False)
        handle.remove()
        given = out[0][0] if isinstance(out[0], tuple) else out[0]
        batch = encoded(TEXTS[:1])
        got = activations(of, hook, batch.tokens, counted_tokens(batch, [0]))
        np.testing.assert_allclose(got, given.reshape(-1, D)[1:], atol=2e-5)
        tested += 1
    assert tested >= 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SparseFeatures(random_sae(hook=None)), "hook="),
        (lambda: SparseFeatures(random_sae(), features=[48]), "0 to 47"),
        (lambda: SparseFeatures(random_sae(), features=[1, 1]), "twice"),
        (lambda: SparseFeatures(random_sae(), k=0), "k=0"),
        (lambda: SparseFeatures(random_sae(), every=0), "every=0"),
        (lambda: TrainedFeatures(HOOK, steps=0), "steps=0"),
        (lambda: TrainedFeatures(HOOK, n_features=0), "n_features=0"),
        (lambda: TrainedFeatures(HOOK, lr=0.0), "lr > 0"),
    ],
)
def test_settings_that_cannot_be(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_is_no_autoencoder_is_refused():
    # A TypeError where the types are checked as well.
    with pytest.raises((ValueError, TypeError), match=r"[aA]utoencoder"):
        SparseFeatures("path/to/sae")
    with pytest.raises((ValueError, TypeError), match="Autoencoder"):
        SparseFeatures(3)
    with pytest.raises((ValueError, TypeError), match="hook"):
        TrainedFeatures(3)


@pytest.mark.parametrize(
    ("instrument", "match"),
    [
        (SparseFeatures(random_sae(), hook="blocks.1.hook_resid_prae"), "hook_resid_pre"),
        (SparseFeatures(random_sae(d=20)), "width 20"),
        (SparseFeatures(random_sae(), hook="blocks.1.ln1.hook_scale"), "width 32"),
        (SparseFeatures(random_sae(), hook="blocks.1.attn.hook_result"), "never reached"),
        (TrainedFeatures("blocks.1.attn.hook_result"), "never reached"),
        (TrainedFeatures("blocks.9.hook_resid_pre"), "no hook point"),
    ],
)
def test_a_hook_that_does_not_fit(instrument, match):
    with pytest.raises(ValueError, match=match):
        observe(shadow("llama"), encoded(), [instrument])


@pytest.mark.parametrize(
    "make", [lambda: SparseFeatures(random_sae()), lambda: TrainedFeatures(HOOK)]
)
def test_needs_a_text_among_the_probes(make):
    with pytest.raises(ValueError, match="probes"):
        observe(shadow("llama"), encoded(BLOCKS), [make()])
    with pytest.raises(ValueError, match="probes"):
        observe(shadow("llama"), encoded([Probe("short", [1, 5])]), [make()])


def test_fields_of_an_autoencoder_have_to_fit():
    sae = random_sae(n=6)
    fields = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    for wrong, match in (
        ({"W_dec": torch.zeros(6, 3)}, "W_dec has shape"),
        ({"W_enc": torch.zeros(6)}, "W_enc is"),
        ({"k": 7}, "1 to 6"),
        ({"k": 2, "threshold": torch.zeros(6)}, "different architectures"),
        ({"r_mag": torch.zeros(6)}, "both r_mag and b_mag"),
        ({"normalize": "unit"}, "'layer_norm'"),
    ):
        # A TypeError where the types are checked as well.
        with pytest.raises((ValueError, TypeError), match=f"{match}|Type-check"):
            Autoencoder(**{**fields, **wrong})
