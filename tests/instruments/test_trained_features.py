"""TrainedFeatures: a buffer, steps, and what is said of the autoencoder that comes of it."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from tests import tiny
from tests.instruments.common import PROBES, TEXTS, encoded, shadow
from tests.sae.by_hand import HOOK, D, by_hand, look, numbers, random_sae
from tlens_callback import Probe, Shadow, SparseFeatures, TrainedFeatures, observe
from tlens_callback.sae.splice import activations, counted_tokens
from tlens_callback.sae.training import autoencoder


def rows_of(n_rows, length=20, seed=0):
    """A source of training rows, as the trainer's."""
    generator = torch.Generator().manual_seed(seed)

    def take(n):
        return [
            [1, *torch.randint(7, tiny.VOCAB, (length - 1,), generator=generator).tolist()]
            for _ in range(min(n, n_rows))
        ]

    return take


def with_rows(source, probes=PROBES):
    return dataclasses.replace(encoded(probes), training=source)


def test_trained_readings_are_those_of_the_autoencoder_in_memory():
    of = shadow("llama")
    instrument = TrainedFeatures(HOOK, n_features=64, steps=20, k=5)
    got = look(instrument, of)
    sae = autoencoder(instrument.baseline)
    x, *_ = by_hand("llama", sae)
    flat = torch.tensor(np.concatenate(x), dtype=torch.float32)
    features, rebuilt = sae.reconstruct(flat)
    fvu = float((flat - rebuilt).square().sum() / (flat - flat.mean(0)).square().sum())
    assert got["fvu"].values == pytest.approx(fvu, rel=1e-4)
    assert got["l0"].values == pytest.approx(float((features > 0).sum(1).float().mean()), abs=0.1)
    _, _, _, loss = by_hand("llama", sae)
    for kind, value in loss.items():
        assert got[f"loss_{kind}"].values == pytest.approx(value, abs=1e-4), kind
    np.testing.assert_allclose(got["cosine"].values, 1, atol=1e-6)
    assert (instrument.baseline["W_dec"].norm(dim=1) - 1).abs().max() < 1e-6
    # Without rows of training data the buffer is the probes'.
    torch.testing.assert_close(instrument.baseline["buffer"], flat, atol=2e-5, rtol=1e-4)


def test_training_goes_on_and_helps():
    of = shadow("llama")
    batch = with_rows(rows_of(8))
    instrument = TrainedFeatures(HOOK, n_features=128, steps=150, lr=3e-3, l1=0.02, k=4)
    runs = []
    for _ in range(3):
        got = {r.key.partition("/")[2]: r for r in observe(of, batch, [instrument])}
        runs.append({k: float(r.values) for k, r in got.items() if not r.axes})
    assert runs[2]["fvu"] < runs[0]["fvu"] < runs[0]["fvu_before"]
    assert runs[2]["fvu_before"] < runs[1]["fvu_before"] < 0.7  # rows it has not seen
    assert runs[2]["recovered"] > 0.9
    assert int(instrument.baseline["steps"]) == 450
    texts = sum(n - 1 for n in encoded(TEXTS).lengths)
    assert len(instrument.baseline["buffer"]) == 3 * (8 * 19 + texts)


def test_fvu_before_is_of_the_new_rows_alone():
    of = shadow("llama")
    instrument = TrainedFeatures(HOOK, n_features=64, steps=5, rows=3, length=10)
    source = rows_of(3, seed=4)
    observe(of, with_rows(source), [instrument])
    sae = autoencoder(copy.deepcopy(instrument.baseline))
    again = rows_of(3, seed=4)
    again(3)
    rows = [row[:10] for row in again(3)]
    got = observe(of, with_rows(source), [instrument])
    batch = encoded([Probe(f"row-{i}", row) for i, row in enumerate(rows)])
    x = activations(of, HOOK, batch.tokens, counted_tokens(batch, range(3)))
    far = (x - sae.reconstruct(x)[1]).square().sum() / (x - x.mean(0)).square().sum()
    before = next(float(r.values) for r in got if r.measure == "fvu_before")
    assert before == pytest.approx(float(far), rel=1e-4)


def test_the_buffer_is_bounded():
    of, batch = shadow("llama"), with_rows(rows_of(8))
    instrument = TrainedFeatures(HOOK, n_features=64, steps=1, buffer=50)
    for _ in range(2):
        observe(of, batch, [instrument])
        assert instrument.baseline["buffer"].shape == (50, D)


@pytest.mark.parametrize("resample", [True, False])
def test_dead_features_come_back(resample):
    of = shadow("llama")
    instrument = TrainedFeatures(HOOK, n_features=64, steps=30, resample=resample, l1=0.02)
    observe(of, encoded(), [instrument])
    instrument.baseline["b_enc"][:20] = -1e4
    killed = numbers(instrument, of)
    assert killed["dead"] >= 20 / 64
    for _ in range(3):
        later = numbers(instrument, of)
    assert (later["dead"] < 0.1) == resample
    assert (killed["resampled"], numbers(SparseFeatures(random_sae()), of).get("resampled")) == (
        0,
        None,
    )


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    of, batch = shadow("llama"), encoded()
    one = TrainedFeatures(HOOK, n_features=64, steps=10)
    observe(of, batch, [one])
    other = TrainedFeatures(HOOK, n_features=64, steps=10)
    other.baseline.update(load(save(one.baseline)))
    for a, b in zip(observe(of, batch, [one]), observe(of, batch, [other]), strict=True):
        np.testing.assert_array_equal(a.values, b.values)
    assert int(other.baseline["steps"]) == 20
    # Another size begins anew.
    smaller = TrainedFeatures(HOOK, n_features=32, steps=10)
    smaller.baseline.update(copy.deepcopy(other.baseline))
    observe(of, batch, [smaller])
    assert smaller.baseline["W_enc"].shape == (D, 32) and int(smaller.baseline["steps"]) == 10


def test_leaves_no_trace():
    """Neither gradients nor weights of the live model, nor the global random state."""
    model = tiny.model("llama").train()
    of = Shadow.of(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    batch = with_rows(rows_of(4))
    observe(
        of, batch, [TrainedFeatures(HOOK, n_features=64, steps=5), SparseFeatures(random_sae())]
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all((p.grad == 2).all() and p.requires_grad for p in model.parameters())
    assert not any(point.fwd_hooks for point in of.hooks.values())
