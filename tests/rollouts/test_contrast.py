"""Winners against losers: scipy's permutations and rates, uniform p-values, planted differences."""

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from tlens_callback.rollouts import contrast as module
from tlens_callback.rollouts.contrast import (
    contrast,
    false_discovery_rates,
    over_observations,
    tails,
)


def drawn(groups=4, size=8, numbers=50, seed=0):
    draw = torch.Generator().manual_seed(seed)
    f = torch.randn(groups * size, numbers, generator=draw)
    f += torch.randn(groups, 1, numbers, generator=draw).expand(-1, size, -1).reshape(f.shape) * 5
    gain = torch.randn(groups * size, generator=draw)
    group = torch.arange(groups).repeat_interleave(size)
    gain -= torch.stack([gain[group == g].mean() for g in range(groups)])[group]
    length = torch.randint(5, 50, (groups * size,), generator=draw).float()
    return f, gain, group, length


def compared(f, gain, group, length, permutations=2000, seed=1):
    return contrast(f, gain, group, length, permutations=permutations, seed=seed)


def test_the_contrast_is_the_sum_of_its_definition():
    f, gain, group, length = drawn()
    found = compared(f, gain, group, length)
    for number in range(5):
        total = sum(float(gain[i]) * float(f[i, number]) for i in range(len(gain)))
        wanted = total / sum(abs(float(a)) for a in gain)
        assert float(found.value[number]) == pytest.approx(wanted, abs=1e-6)
        each = [(f[group == g, number], length[group == g]) for g in range(4)]
        inside = [
            np.concatenate([x - x.mean() for x in map(np.asarray, of)])
            for of in zip(*each, strict=True)
        ]
        assert float(found.length[number]) == pytest.approx(np.corrcoef(*inside)[0, 1], abs=1e-6)


def test_p_values_are_those_of_all_permutations():
    """Two groups of four have 576 of them, which can be counted one by one."""
    f, gain, group, length = drawn(groups=2, size=4, numbers=20, seed=3)
    found = compared(f, gain, group, length, permutations=40_000)
    centred = f - torch.stack([f[group == g].mean(0) for g in range(2)])[group]
    for number in range(20):
        x, a = centred[:, number].double().numpy(), gain.double().numpy()
        observed, count, n = abs(a @ x), 0, 0
        for one in itertools.permutations(range(4)):
            for other in itertools.permutations(range(4, 8)):
                count += abs(a[[*one, *other]] @ x) >= observed - 1e-9
                n += 1
        assert float(found.p[number]) == pytest.approx(count / n, abs=0.012)


def test_scipy_gives_the_same_p_values():
    f, gain, group, length = drawn(groups=1, size=12, numbers=3, seed=5)
    found = compared(f, gain, group, length, permutations=20_000)
    for number in range(3):
        a, x = gain.numpy(), (f[:, number] - f[:, number].mean()).numpy()
        theirs: Any = scipy.stats.permutation_test(
            (a,),
            lambda one, x=x: one @ x,
            permutation_type="pairings",
            n_resamples=20_000,
            rng=np.random.default_rng(0),
            alternative="two-sided",
        )
        assert float(found.p[number]) == pytest.approx(theirs.pvalue, abs=0.02)


def test_scipy_gives_the_same_rates():
    p = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    p[:40] /= 1000
    p[7] = p[11]
    theirs = scipy.stats.false_discovery_control(p.numpy())
    np.testing.assert_allclose(false_discovery_rates(p), theirs, rtol=1e-12)


@pytest.mark.slow
def test_p_values_of_a_shuffled_reward_are_uniform_and_find_nothing():
    found, discoveries = [], 0
    for seed in range(200):
        of = compared(*drawn(seed=seed, numbers=30), permutations=499, seed=seed)
        found.append(float(of.p[seed % 30]))
        discoveries += bool((of.q <= 0.05).any())
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.01
    # Where nothing is to be found, a rate of 5 % is a false discovery in 5 % of the families.
    assert discoveries <= scipy.stats.binom.ppf(0.999, 200, 0.05)


@pytest.mark.slow
def test_p_values_that_are_too_small_are_found_out(monkeypatch):
    """The control of the test above: across groups, prompts count as if they were chance."""
    monkeypatch.setattr(module, "_groups", lambda group: [torch.ones_like(group, dtype=torch.bool)])
    found = []
    for seed in range(200):
        f, gain, group, length = drawn(seed=seed, numbers=30)
        shifted = gain + group.float()
        found.append(float(compared(f, shifted, group, length, 499, seed).p[seed % 30]))
    assert scipy.stats.kstest(found, "uniform").pvalue < 1e-3


def test_a_planted_number_is_found_among_many():
    f, gain, group, length = drawn(numbers=3000, seed=2)
    f[:, 1234] += 5 * gain
    found = compared(f, gain, group, length)
    assert (found.q <= 0.05).nonzero().flatten().tolist() == [1234]
    assert float(found.value[1234]) > 0 and float(found.p[1234]) <= 1 / 2000


def test_the_rate_is_that_of_its_definition():
    """Expected false discoveries over discoveries, at the threshold of each number."""
    f, gain, group, length = drawn(groups=2, size=4, numbers=40, seed=8)
    f[:, :3] += torch.tensor([30.0, 8, 6]) * gain[:, None]
    found = compared(f, gain, group, length, permutations=40_000)
    centred = (f - torch.stack([f[group == g].mean(0) for g in range(2)])[group]).double().numpy()
    a, every = gain.double().numpy(), []
    for one in itertools.permutations(range(4)):
        for other in itertools.permutations(range(4, 8)):
            every.append(a[[*one, *other]] @ centred)
    z = np.abs(every) / np.std(every, 0)
    observed = np.abs(a @ centred) / np.std(every, 0)
    far = np.flatnonzero(observed > 2)
    assert len(far) >= 3
    rates = [(z >= t - 1e-9).sum(1).mean() / (observed >= t - 1e-9).sum() for t in observed]
    for number in far:
        wanted = min(rates[j] for j in far if observed[j] <= observed[number])
        assert float(found.q[number]) == pytest.approx(min(wanted, 1), abs=0.02)


def test_of_many_numbers_there_are_fewer_permutations(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 50 * 99)
    monkeypatch.setattr(module, "AT_ONCE", 50 * 10)
    found = compared(*drawn(), permutations=2000)
    assert float(found.p.min()) >= 0.999 / 100
    assert torch.allclose(found.p * 100, (found.p * 100).round(), atol=1e-4)


def test_a_reward_that_is_length_is_told_as_length():
    f, _, group, length = drawn(seed=6)
    f[:, 3] = length
    gain = length - torch.stack([length[group == g].mean() for g in range(4)])[group]
    found = compared(f, gain, group, length)
    assert float(found.length[3]) == pytest.approx(1, abs=1e-6) and found.q[3] <= 0.05


@pytest.mark.parametrize("what", ["no spread", "no rollouts differ", "NaN"])
def test_where_there_is_nothing_to_compare_nothing_is_found(what):
    f, gain, group, length = drawn(numbers=4)
    if what == "no spread":
        gain = torch.zeros_like(gain)
    elif what == "no rollouts differ":
        f[:] = 0.1
    else:
        f[3, 2] = torch.nan
    found = compared(f, gain, group, length, permutations=50)
    assert (found.q[2] == 1) and float(found.p[2]) == 1
    if what == "no rollouts differ":
        assert (found.q == 1).all() and found.value.abs().max() < 1e-6
    elif what == "NaN":
        assert found.value.isnan().tolist() == [False, False, True, False]
    else:
        assert found.value.isnan().all()


def test_no_random_number_is_drawn_from_the_training():
    before = torch.get_rng_state()
    one = compared(*drawn(), permutations=100)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.p, compared(*drawn(), permutations=100).p), "and the same at each call"


def test_z_is_the_contrast_over_its_standard_deviation_by_chance():
    f, gain, group, length = drawn(groups=2, size=4, numbers=6, seed=3)
    f[:, 5] = 0.3
    found = compared(f, gain, group, length, permutations=5)
    a, every = gain.double().numpy(), []
    centred = (f - torch.stack([f[group == g].mean(0) for g in range(2)])[group]).double().numpy()
    for one in itertools.permutations(range(4)):
        for other in itertools.permutations(range(4, 8)):
            every.append(a[[*one, *other]] @ centred)
    wanted = (a @ centred[:, :5]) / np.std(every, 0)[:5]
    np.testing.assert_allclose(found.z[:5], wanted, rtol=1e-5)
    assert found.z[5] == 0


@pytest.mark.slow
def test_a_run_without_a_difference_finds_nothing():
    """Five observations each of 100 runs: the p-values of the sums are uniform."""
    p, discoveries = [], 0
    for seed in range(100):
        z, q = together([compared(*drawn(seed=100 * seed + t), 99, t) for t in range(5)])
        p.append(float(torch.special.erfc(z[seed % 50].abs() / 2**0.5)))
        discoveries += bool((q <= 0.05).any())
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert discoveries <= scipy.stats.binom.ppf(0.999, 100, 0.05)


def together(found):
    sums, of_tails = (
        sum(each) for each in zip(*((one.z, tails(one)) for one in found), strict=True)
    )
    return over_observations(sums, of_tails, torch.full_like(sums, len(found)))


@pytest.mark.parametrize("observations", [2, 5, 10, 40])
def test_rare_numbers_are_no_discoveries_of_a_run(observations):
    """Features that differ in one or two rollouts, and one winner in each group: their sums of z
    are far from normal after few observations."""
    group, size = torch.arange(4).repeat_interleave(8), 3000
    gain = torch.where(torch.arange(32) % 8 == 0, 7.0, -1.0)
    false, by_z = 0, 0
    for seed in range(3):
        draw, found = torch.Generator().manual_seed(seed), []
        for t in range(observations):
            f = torch.zeros(32, size)
            for _ in range(1 + seed % 2):
                f[torch.randint(0, 32, (size,), generator=draw), torch.arange(size)] += 1
            found.append(compared(f, gain, group, torch.ones(32), 200, t))
        z, q = together(found)
        false += bool((q <= 0.05).any())
        normal = torch.special.erfc(z.abs() / 2**0.5)
        by_z += bool((false_discovery_rates(normal) <= 0.05).any())
    assert false == 0
    assert by_z == 3 or observations > 5, "the control: the sums of z alone find some"


def test_a_run_finds_what_no_observation_does():
    """A small difference that stays, among three thousand numbers."""
    found = []
    for t in range(12):
        f, gain, group, length = drawn(numbers=3000, seed=t)
        f[:, 1234] += 0.7 * gain
        found.append(compared(f, gain, group, length, 200, t))
    assert sum(bool(one.q[1234] <= 0.05) for one in found) <= 2
    z, q = together(found)
    assert (q <= 0.05).nonzero().flatten().tolist() == [1234] and z[1234] > 0
    theirs = scipy.stats.combine_pvalues(
        scipy.stats.norm.sf([float(one.z[7]) for one in found]), method="stouffer"
    )
    assert float(z[7]) == pytest.approx(theirs.statistic, rel=1e-5)
