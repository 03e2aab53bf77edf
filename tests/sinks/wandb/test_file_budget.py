"""How the files of a run are thinned."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(
    most=st.integers(0, 300),
    page=st.integers(0, 3),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=120),
)
def test_no_run_has_more_files_than_it_may(most, page, sizes):
    """However many files each observation wants, and wherever the run ends."""
    budget = FileBudget(most, page=page)
    shown, spent, largest = [], 0, 0
    for at, wanted in enumerate(sizes):
        largest = max(largest, wanted)
        if budget.take(wanted):
            shown.append(at)
            spent += wanted
            assert spent + largest + page <= most, "the last observation and the page have room"
        assert budget.spent == spent and budget.seen == at + 1
    last = budget.last(sizes[-1], page=page)
    assert last == min(sizes[-1], max(0, most - page - spent))
    assert budget.last(page, page=0) == min(page, most - spent - last) == min(page, most)
    assert budget.spent == spent + last + min(page, most) <= most


@given(
    most=st.integers(10, 1000),
    page=st.integers(0, 1),
    wanted=st.integers(1, 40),
    observations=st.integers(1, 2000),
)
def test_gaps_grow_and_begin_when_half_is_spent(most, page, wanted, observations):
    budget = FileBudget(most, page=page)
    shown = [at for at in range(observations) if budget.take(wanted)]
    if most < 2 * wanted + page:
        assert shown == []
        return
    # The one that comes to more than half is the last of those that come as they are.
    whole = min(observations, max(1, int(most / 2) // wanted))
    assert shown[:whole] == list(range(whole))
    gaps = [later - at for at, later in itertools.pairwise(shown)]
    assert gaps == sorted(gaps)
    # What is left is for twice as many further observations as there were: one of them has some.
    behind = [*shown[1:], observations]
    assert all(later <= max(3 * at, at + 1, 2) for at, later in zip(shown, behind, strict=True)
               if most - page - wanted - wanted * (shown.index(at) + 1) >= wanted)  # fmt: skip
    assert budget.last(wanted, page=page) == wanted
    assert budget.last(page, page=0) == page
