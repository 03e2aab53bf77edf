"""Distances equal plain float64, keep digits where little moves, and are exactly 0 for equals."""

import numpy as np
import pytest
import torch

from tlens_callback.instruments.parts.distance import (
    cka_distance,
    cosine_distance,
    distances,
    js_terms,
    unit_gram,
)


def unbiased_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012, equation (5)."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    cross = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + cross - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def cka(x: np.ndarray, y: np.ndarray) -> float:
    k, m = x @ x.T, y @ y.T
    return unbiased_hsic(k, m) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))


def made(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cka_apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cka_distance(unit_gram(x), unit_gram(y))


def test_cka_is_blind_to_rotation_scale_and_shift_and_to_nothing_else():
    x = made(40, 16, 0) * torch.linspace(0.2, 3, 16)
    rotation = torch.linalg.qr(made(16, 16, 1))[0]
    assert cka_apart(x, x.clone()) == 0
    assert cka_apart(x, 7 * x @ rotation + 3) < 1e-10
    assert cka_apart(x, x * torch.linspace(3, 0.2, 16)) > 0.1
    assert cosine_distance(x, x @ rotation).mean() > 0.1


def test_cka_of_shuffled_tokens_is_low_however_few_they_are():
    """The biased estimator calls them alike where there are more dimensions than tokens."""
    for n, d in ((40, 8), (30, 600)):
        x, shuffled = made(n, d, 0), made(n, d, 0).roll(1, 0)
        assert cka_apart(x, shuffled) == pytest.approx(1, abs=0.15)
        assert cka_apart(x, shuffled) == pytest.approx(
            1 - cka(x.double().numpy(), shuffled.double().numpy()), abs=1e-6
        )
    a, b = (h.double() - h.double().mean(0) for h in (x, shuffled))
    biased = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert biased > 0.9


def test_digits_are_kept_where_activations_hardly_move():
    x = made(5, 32, 0)
    moved = x + 1e-5 * made(5, 32, 1)
    a, b = x.double(), moved.double()
    expected = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert expected.max() < 1e-9
    np.testing.assert_allclose(cosine_distance(x, moved), expected, rtol=0.02)


def test_divergence_of_near_and_of_far_patterns():
    """Digits are kept where a difference is small, and the bound is reached where it is total."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50, generator=generator, dtype=torch.float64)
    for step in (1e-2, 1e-3):
        q = p * (1 + step * torch.randn(50, generator=generator, dtype=torch.float64))
        q = (q / q.sum()).float()
        small = (p / p.sum()).float()
        expected = sum(
            a * np.log2(2 * a / (a + b)) / 2 + b * np.log2(2 * b / (a + b)) / 2
            for a, b in zip(small.double().tolist(), q.double().tolist(), strict=True)
        )
        assert js_terms(small, q).sum().item() == pytest.approx(expected, rel=1e-3)
    apart = js_terms(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.25, 0.75]))
    assert apart.sum().item() == pytest.approx(1, abs=1e-6)
    assert not js_terms(small, small.clone()).any()
    assert not js_terms(torch.zeros(2), torch.zeros(2)).any()


def test_a_zero_vector_is_half_way_from_any_other_and_equal_to_itself():
    x, zero = made(3, 8, 0), torch.zeros(3, 8)
    assert cosine_distance(x, zero).tolist() == pytest.approx([0.5] * 3)
    assert not cosine_distance(zero, zero.clone()).any()


def test_cosine_and_relative_distance_of_many_at_once():
    first, now = made(6, 32, 0), made(6, 32, 0) + 0.3 * made(6, 32, 1)
    first[4], now[5], now[2] = 0, 0, first[2]
    turned, relative = distances(now.reshape(2, 3, 32), first.reshape(2, 3, 32))
    assert turned.shape == relative.shape == (2, 3)
    np.testing.assert_allclose(turned.flatten(), cosine_distance(now, first), rtol=1e-5)
    a, b = now.double().numpy(), first.double().numpy()
    with np.errstate(divide="ignore"):
        far = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(relative.flatten(), far, rtol=1e-5)
    assert turned[0, 2] == relative[0, 2] == 0 and relative[1, 1] == np.inf
    for zero in (torch.zeros(2, 8), torch.zeros(2, 8).bfloat16()):
        assert not torch.stack(distances(zero, zero.clone())).any()
    halves = distances(now.bfloat16(), first.bfloat16())
    assert all(part.dtype == torch.float32 for part in halves)
    np.testing.assert_allclose(halves[1], distances(now.bfloat16().float(), first.bfloat16())[1])


def test_cka_of_many_at_once_is_that_of_each():
    x, y = (
        torch.stack([made(9, 4, i) for i in (0, 1)]),
        torch.stack([made(9, 4, i) for i in (2, 1)]),
    )
    both = cka_apart(x, y)
    assert both.shape == (2,) and both[1] == 0
    assert float(both[0]) == pytest.approx(1 - cka(x[0].double().numpy(), y[0].double().numpy()))
