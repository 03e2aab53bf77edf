"""How the files of a run are thinned."""

import random

import pytest

from tlens_callback.sinks.wandb.file_budget import FileBudget


@pytest.mark.parametrize("wanted", [1, 4, 12, 45])
def test_a_run_of_any_length_stays_within(wanted):
    budget = FileBudget(900, page=1)
    shown = [at for at in range(20_000) if budget.take(wanted)]
    assert budget.last(wanted, page=1) == wanted, "the last observation has its files"
    assert budget.last(1, page=0) == 1, "and so has the page"
    assert budget.spent == wanted * (len(shown) + 1) + 1 <= 900
    whole = 450 // wanted
    assert shown[:whole] == list(range(whole)), "no thinning before half is spent"
    gaps = [later - at for at, later in zip(shown[whole:], shown[whole + 1 :], strict=False)]
    assert gaps == sorted(gaps) and gaps[0] <= 4


def test_a_long_run_has_files_from_all_of_it():
    budget = FileBudget(900, page=1)
    shown = [at for at in range(2_000) if budget.take(12)]
    assert 60 < len(shown) < 74 and max(shown) > 1_400
    assert len([at for at in shown if at >= 200]) >= 8


def test_observations_of_uneven_size():
    for seed in range(50):
        rng = random.Random(seed)
        most = rng.choice([0, 1, 5, 30, 200])
        budget = FileBudget(most, page=1)
        sizes = [rng.randint(1, 30) for _ in range(300)]
        for size in sizes:
            budget.take(size)
        budget.last(max(sizes), page=1)
        budget.last(1, page=0)
        assert budget.spent <= most
        assert most == 0 or budget.spent > 0


def test_without_a_bound_all_have_theirs():
    budget = FileBudget(None, page=1)
    assert all(budget.take(12) for _ in range(1_000))
    assert budget.last(12, page=1) == 12 and budget.spent == 12_012
