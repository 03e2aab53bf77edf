"""The trainer finds a dictionary that is known, and keeps what it promises at every step."""

import numpy as np
import pytest
import torch

from tlens_callback.sae.autoencoder import fvu
from tlens_callback.sae.training import Training, appended, autoencoder, without_parallel

D, TRUE = 64, 96


def superposition(n=8192, seed=77):
    """[TRUE, D] unit directions, more than there are dimensions, and sparse sums of them."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(TRUE, D, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    on = torch.rand(n, TRUE, generator=generator) < 0.03
    return directions, (on * (0.5 + torch.rand(n, TRUE, generator=generator))) @ directions


def found(state, directions):
    """Mean over the true directions of the largest cosine with a decoder row."""
    return float((directions @ state["W_dec"].T).max(1).values.mean())


@pytest.mark.slow
def test_finds_the_true_dictionary():
    directions, x = superposition()
    training = Training(l1=0.2, lr=3e-3, seed=5)
    state = training.begin(x, 128)
    chance = found(state, directions)
    training.steps(state, x, 1200)
    features, rebuilt = autoencoder(state).reconstruct(x)
    assert chance < 0.35
    assert found(state, directions) > 0.95
    assert fvu(x, rebuilt) < 0.12
    assert (features > 0).sum(1).float().mean() < 10


def test_a_dictionary_of_something_else_is_not_found():
    """The score above can fail after training as well."""
    directions, x = superposition()
    other, _ = superposition(n=1, seed=78)
    training = Training(l1=0.2, lr=3e-3, seed=5)
    state = training.begin(x, 128)
    training.steps(state, x, 600)
    assert found(state, other) < 0.4 < 0.8 < found(state, directions)


def naive_step(p, x, l1, lr):
    """The first step from the formula in float64, gradients written out by hand."""
    p = {name: value.double() for name, value in p.items()}
    x = x.double()
    n, d = x.shape
    h = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    f = h.clamp(min=0)
    e = f @ p["W_dec"] + p["b_dec"] - x
    de = 2 * e / (n * d)
    df = (de @ p["W_dec"].T + l1 * d**0.5 / (n * d)) * (h > 0)
    grads = {
        "W_enc": (x - p["b_dec"]).T @ df,
        "b_enc": df.sum(0),
        "W_dec": f.T @ de,
        "b_dec": de.sum(0) - (df @ p["W_enc"].T).sum(0),
    }
    for i, row in enumerate(p["W_dec"]):
        grads["W_dec"][i] -= (grads["W_dec"][i] @ row) * row
    # Adam's first step: both moments are the gradient's, corrected.
    after = {k: p[k] - lr * grads[k] / (grads[k].abs() + 1e-8) for k in p}
    after["W_dec"] /= after["W_dec"].norm(dim=1, keepdim=True)
    return after


def test_the_first_step_is_the_formula():
    _, x = superposition(64)
    training = Training(batch=32, l1=0.3, lr=2e-3)
    state = training.begin(x, 100)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    before = {name: state[name].clone() for name in names}
    draw = torch.randint(64, (1, 32), generator=training._generator(1, state))[0]
    expected = naive_step(before, x[draw] * state["scale"], 0.3, 2e-3)
    training.steps(state, x, 1)
    for name in names:
        # Adam divides by the gradient: where that is near rounding, the step is.
        close = (state[name] - expected[name]).abs() < 1e-6
        assert close.double().mean() > 0.999, name
        assert (state[name] - before[name]).abs().max() > 1e-3, name


def test_later_steps_are_those_of_torch():
    """Moments and their correction, against torch.optim.Adam on the same batches."""
    _, x = superposition(256)
    training = Training(batch=64, l1=0.2)
    state = training.begin(x, 80)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    p = {name: state[name].clone().requires_grad_() for name in names}
    adam = torch.optim.Adam(p.values(), lr=training.lr)
    draw = torch.randint(256, (20, 64), generator=training._generator(1, state))
    for index in draw:
        at = x[index] * state["scale"]
        f = torch.relu((at - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        e = at - f @ p["W_dec"] - p["b_dec"]
        loss = (e.pow(2).sum(1) + 0.2 * D**0.5 * f.sum(1)).mean() / D
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            rows = p["W_dec"]
            rows.grad -= torch.einsum("nd,nd->n", rows.grad, rows)[:, None] * rows
        adam.step()
        with torch.no_grad():
            rows /= rows.norm(dim=1, keepdim=True)
    training.steps(state, x, 20)
    for name in names:
        np.testing.assert_allclose(state[name], p[name].detach(), atol=2e-4)
        assert (state[name] - p[name].detach()).abs().mean() < 1e-6


def test_rows_have_norm_one_after_every_step():
    _, x = superposition(512)
    training = Training(lr=1e-2)
    state = training.begin(x, 100)
    for _ in range(30):
        training.steps(state, x, 1)
        assert (state["W_dec"].double().norm(dim=1) - 1).abs().max() < 1e-6


def test_the_gradient_has_no_part_along_its_row():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(50, D, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    grad = torch.randn(50, D, generator=generator) * 10
    left = without_parallel(grad, rows)
    assert (left * rows).sum(1).abs().max() < 1e-4
    assert (grad * rows).sum(1).abs().max() > 10
    # What is left is the nearest such gradient: the rest lies along the row.
    rest = grad - left
    assert (rest - (rest * rows).sum(1, keepdim=True) * rows).abs().max() < 1e-5


@pytest.mark.parametrize("project", [True, False])
def test_what_taking_it_out_does(project, monkeypatch):
    """Where a step is along the gradient, norms stay with it, to second order, and drift without.

    Adam divides the gradient by its size elementwise, so that its step is not along it: hence the
    rows are scaled back as well. Here the step is a plain one."""
    _, x = superposition(512)
    training = Training(lr=0.05)
    state = training.begin(x, 100)
    drift = []

    def plain(state, grads):
        for name, grad in grads.items():
            state[name] -= training.lr * grad
        drift.append(float((state["W_dec"].norm(dim=1) - 1).abs().max()))

    if not project:
        monkeypatch.setattr("tlens_callback.sae.training.without_parallel", lambda grad, rows: grad)
    monkeypatch.setattr(Training, "_adam", lambda self, state, grads: plain(state, grads))
    training.steps(state, x, 5)
    assert (max(drift) < 2e-5) == project
    assert (max(drift) > 2e-4) == (not project)


@pytest.mark.parametrize("resample", [True, False])
def test_resampling_revives_the_dead(resample):
    _, x = superposition(4096)
    training = Training(lr=3e-3)
    state = training.begin(x, 120)
    state["b_enc"][:60] = -1e3
    training.steps(state, x, 100)
    assert (~state["fired"][:60]).all()
    for _ in range(4):
        if resample:
            training.resample(state, x)
        training.steps(state, x, 100)
    alive = float(state["fired"][:60].float().mean())
    assert alive > 0.9 if resample else alive == 0


def test_a_resampled_feature_points_at_a_token_of_large_loss():
    _, x = superposition(400)
    training = Training()
    state = training.begin(x, 40)
    # One token is far from all else, so its loss squared is nearly the whole of the weight.
    x[123] = 60 * torch.eye(D)[5]
    state["fired"][[3, 7]] = False
    state["first.W_dec"] += 1
    state["second.W_enc"] += 1
    living = state["W_enc"].norm(dim=0)[state["fired"]].mean()
    untouched = {name: value.clone() for name, value in state.items()}
    assert training.resample(state, x) == 2
    towards = x[123] * state["scale"] - state["b_dec"]
    towards /= towards.norm()
    for n in (3, 7):
        torch.testing.assert_close(state["W_dec"][n], towards)
        torch.testing.assert_close(state["W_enc"][:, n], 0.2 * living * towards)
        assert state["first.W_dec"][n].abs().max() == state["second.W_enc"][:, n].abs().max() == 0
    others = [n for n in range(40) if n not in (3, 7)]
    for name in ("W_dec", "first.W_dec", "b_enc"):
        assert torch.equal(state[name][others], untouched[name][others])
    assert torch.equal(state["W_enc"][:, others], untouched["W_enc"][:, others])


def test_nothing_dead_nothing_changes():
    _, x = superposition(64)
    training = Training()
    state = training.begin(x, 40)
    before = {name: value.clone() for name, value in state.items()}
    assert training.resample(state, x) == 0
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_stopped_and_resumed_is_the_same():
    """Bit for bit, from a copy of the state alone."""
    _, x = superposition(256)
    one, other = Training(), Training()
    state = one.begin(x, 50)
    one.steps(state, x, 10)
    copied = {name: value.clone() for name, value in state.items()}
    one.steps(state, x, 10)
    other.steps(copied, x, 10)
    assert all(torch.equal(state[name], copied[name]) for name in state)
    assert int(state["steps"]) == 20


def test_draws_nothing_from_the_global_generator_and_leaves_no_gradient():
    _, x = superposition(256)
    x.requires_grad_()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    training = Training()
    state = training.begin(x.detach(), 50)
    state["fired"][:4] = False
    with torch.no_grad():
        training.resample(state, x)
        training.steps(state, x, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert x.grad is None
    assert not any(value.requires_grad for value in state.values())


def test_scale_makes_the_mean_norm_root_d():
    _, x = superposition(256)
    x = x + 3 * torch.ones(D)
    state = Training().begin(x * 100, 50)
    around = (x - x.mean(0)) * 100
    assert float((around * state["scale"]).norm(dim=1).mean()) == pytest.approx(D**0.5, rel=1e-5)
    # And does not show: the autoencoder is for activations as they are.
    features, rebuilt = autoencoder(state).reconstruct(x * 100)
    scaled, inside = autoencoder(state, scaled=True).reconstruct(x * 100 * state["scale"])
    torch.testing.assert_close(features, scaled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rebuilt * state["scale"], inside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x", [torch.ones(5, D), torch.empty(0, D), torch.full((5, D), torch.nan)])
def test_where_nothing_differs_there_is_no_scale(x):
    with pytest.raises(ValueError, match="activations that differ"):
        Training().begin(x, 50)


def test_fvu_of_what_does_not_vary():
    _, x = superposition(64)
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1)
    assert np.isnan(fvu(x[:1], x[:1] + 1)) and np.isnan(fvu(x[:1], x[:1]))


def test_the_buffer_keeps_the_last():
    x = torch.arange(12.0).view(6, 2)
    assert torch.equal(appended(None, x, 4), x[2:])
    kept = appended(x[:3], x[3:], 5)
    assert torch.equal(kept, x[1:])
    kept += 1
    assert x[1, 0] == 2


@pytest.mark.parametrize("bad", [{"l1": -1.0}, {"lr": 0.0}, {"batch": 0}])
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match="l1 >= 0, lr > 0 and batch >= 1"):
        Training(**bad)
