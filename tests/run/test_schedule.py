"""Which instruments are asked at an observation, also of a run that was cut and resumed."""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tlens_callback.run.schedule import Schedule, has_rare


@dataclass(frozen=True)
class Every:
    """An instrument, as far as a schedule looks at it."""

    every: int
    name: str = "every"


@dataclass(frozen=True)
class Plain:
    """One that says nothing of how often: it is asked at each observation."""

    name: str = "plain"


INSTRUMENTS = [Plain(), Every(1), Every(2), Every(3), Every(7)]


def asked(schedule: Schedule, steps: Sequence[int], *, last: int) -> dict[int, set[int]]:
    """Step -> the instruments that are asked there, by their numbers."""
    return {
        step: {
            INSTRUMENTS.index(one)
            for one in schedule.due(INSTRUMENTS, step=step, last=step == last)
        }
        for step in steps
    }


def naive(steps: Sequence[int], *, last: int) -> dict[int, set[int]]:
    """From the words of `Instrument.every`: at every n-th observation, and at the last one."""
    found = {}
    for number, step in enumerate(steps):
        found[step] = {0}
        for i, one in enumerate(INSTRUMENTS[1:], start=1):
            if number % one.every == 0 or step == last:
                found[step].add(i)
    return found


def resumed(schedule: Schedule, at: int) -> Schedule:
    """The schedule of a run that goes on from a checkpoint at this step."""
    schedule.remember(at)
    other = Schedule()
    other.baseline.update({name: kept.clone() for name, kept in schedule.baseline.items()})
    other.start()
    return other


def test_a_run_that_is_resumed_where_it_was_observed_counts_that_observation_once():
    steps = [0, 10, 20, 30, 40, 50, 60, 70]
    whole = asked(Schedule(), steps, last=70)
    assert whole == naive(steps, last=70)
    first = Schedule()
    asked(first, steps[:4], last=70)
    assert asked(resumed(first, 30), steps[3:], last=70) == {at: whole[at] for at in steps[3:]}


def test_a_run_that_is_resumed_between_observations_goes_on_with_the_next():
    first = Schedule()
    asked(first, [0, 10, 20, 30], last=70)
    # A run that is resumed observes first of all, at step 35: the fifth observation.
    found = asked(resumed(first, 35), [35, 40, 50], last=70)
    assert found == {35: {0, 1, 2}, 40: {0, 1}, 50: {0, 1, 2, 3}}


@given(
    steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True).map(sorted),
    cuts=st.lists(st.integers(0, 39), max_size=4),
)
def test_a_run_cut_anywhere_asks_the_same_instruments_at_the_same_steps(steps, cuts):
    """Each cut is a checkpoint at an observed step, which the resumed run observes anew."""
    whole = naive(steps, last=steps[-1])
    schedule, found, begin = Schedule(), {}, 0
    for cut in sorted({cut for cut in cuts if cut < len(steps)}):
        got = asked(schedule, steps[begin : cut + 1], last=steps[-1])
        assert all(found.get(step, there) == there for step, there in got.items())
        found |= got
        schedule, begin = resumed(schedule, steps[cut]), cut
    found |= asked(schedule, steps[begin:], last=steps[-1])
    assert found == whole


@given(
    observed=st.integers(1, 30),
    later=st.integers(1, 30),
    every=st.integers(1, 12),
    lost=st.integers(0, 5),
)
def test_what_was_observed_behind_the_checkpoint_is_counted_again(observed, later, every, lost):
    """A checkpoint is written, the run goes on and dies, and is resumed from the checkpoint."""
    one = [Every(every)]
    schedule = Schedule()
    for step in range(observed):
        schedule.due(one, step=step, last=False)
    second = resumed(schedule, observed - 1)
    for step in range(observed, observed + lost):
        schedule.due(one, step=step, last=False)
    for step in range(observed - 1, observed + later):
        due = second.due(one, step=step, last=False)
        assert bool(due) == (step % every == 0)


def test_an_instrument_is_new_at_its_first_time_since_the_start():
    schedule, new = Schedule(), []
    for step in range(5):
        schedule.due(INSTRUMENTS, step=step, last=False)
        new.append([schedule.is_new(one) for one in INSTRUMENTS])
    assert new == [[True] * 5, *[[False] * 5] * 4]
    late = resumed(schedule, 5)  # the sixth observation: those of every second are not asked
    seen = []
    for step in range(5, 8):
        late.due(INSTRUMENTS, step=step, last=False)
        seen.append([late.is_new(one) for one in INSTRUMENTS])
    assert seen == [
        [True, True, False, False, False],
        [False, False, True, True, False],
        [False, False, False, False, True],
    ]


def test_what_is_rare():
    assert has_rare([Plain(), Every(2)])
    assert not has_rare([Plain(), Every(1)]) and not has_rare([])
