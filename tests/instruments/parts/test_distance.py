"""Distances equal plain float64, keep digits where little moves, and are exactly 0 for equals."""

import numpy as np
import pytest
import torch

from tlens_callback.instruments.parts.distance import cka_distance, cosine_distance, js_terms


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


def test_cka_is_blind_to_rotation_scale_and_shift_and_to_nothing_else():
    x = made(40, 16, 0) * torch.linspace(0.2, 3, 16)
    rotation = torch.linalg.qr(made(16, 16, 1))[0]
    assert cka_distance(x, x.clone()) == 0
    assert cka_distance(x, 7 * x @ rotation + 3) < 1e-10
    assert cka_distance(x, x * torch.linspace(3, 0.2, 16)) > 0.1
    assert cosine_distance(x, x @ rotation).mean() > 0.1


def test_cka_of_shuffled_tokens_is_low_however_few_they_are():
    """The biased estimator calls them alike where there are more dimensions than tokens."""
    for n, d in ((40, 8), (30, 600)):
        x, shuffled = made(n, d, 0), made(n, d, 0).roll(1, 0)
        assert cka_distance(x, shuffled) == pytest.approx(1, abs=0.15)
        assert cka_distance(x, shuffled) == pytest.approx(
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
