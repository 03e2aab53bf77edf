"""Rules: events about any number that is read."""

import re
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.events.test_watch import number, sentences
from tlens_callback import Reading, Rule, Watch


def test_a_rule_on_a_crossing():
    watch = Watch([Rule("target_scores/probability/x", above=0.5, below=0.1)])
    values = (0.2, 0.4, 0.6, 0.7, 0.05, 0.03)
    raised = [sentences(watch, [number("target_scores/probability/x", v)]) for v in values]
    assert [bool(found) for found in raised] == [False, False, True, False, True, False]
    assert raised[2] == ["target_scores/probability/x above 0.5: (0.4 -> 0.6), 1"]


def test_a_rule_on_a_jump_against_its_own_history():
    """A noisy curve has to move further than a still one."""
    rng = np.random.default_rng(0)
    for noise, raised in ((0.001, True), (0.2, False)):
        watch = Watch([Rule("loss/mean", jump=0.1)])
        for _ in range(20):
            assert sentences(watch, [number("loss/mean", 1 + noise * rng.uniform(-1, 1))]) == []
        assert bool(sentences(watch, [number("loss/mean", 1.4)])) is raised


@pytest.mark.parametrize("new", [0.0, 10.0])
def test_a_jump_is_from_the_last_twenty(new):
    """Ten of them are 0 and ten are 10; of 19 or of 21, one of the two values would be a jump."""
    watch = Watch([Rule("loss/mean", jump=0.1)], cooldown=0)
    for value in [*[0.0] * 15, *[10.0] * 10]:
        sentences(watch, [number("loss/mean", value)])
    assert sentences(watch, [number("loss/mean", new)]) == []


def test_a_rule_on_an_entry_names_it():
    def matrix(value):
        values = np.zeros((2, 3))
        values[1, 2] = value
        return [
            Reading(
                key="attention_drift/js",
                values=values,
                axes=("layer", "head"),
                unit="bits",
                labels={"layer": ["4", "9"]},
            )
        ]

    watch = Watch([Rule("attention_drift/js", above=0.5)])
    assert sentences(watch, matrix(0.1)) == []
    (said,) = sentences(watch, matrix(0.9))
    assert said == "attention_drift/js above 0.5: layer 9 head 2 (0.1 -> 0.9), bits"


def test_a_rule_on_many_entries_is_one_sentence():
    watch = Watch([Rule("attention_patterns/pattern/x", above=0.5)])
    axes = ("layer", "head", "query", "key")
    for value, events in ((0, 0), (1, 1), (0, 0)):
        values = np.full((30, 9, 48, 48), value)
        reading = Reading(key="attention_patterns/pattern/x", values=values, axes=axes, unit="1")
        found = sentences(watch, [reading])
        assert len(found) == events
        assert not found or found[0].endswith(f"and {values.size - 8} more, 1")
    assert len(watch.baseline) == 3


def test_a_number_that_is_none_any_more():
    """It is said once, and later jumps are found beside it."""
    watch = Watch([Rule("loss/mean", jump=1)], cooldown=0)
    values = (1, 1.1, 1, 1.1, np.nan, np.inf, 1, -np.inf, 1, 9)
    raised = [sentences(watch, [number("loss/mean", value)]) for value in values]
    assert [i for i, found in enumerate(raised) if found] == [4, 7, 9]
    assert raised[4] == ["loss/mean not finite: (1.1 -> nan), 1"]
    assert raised[9] == ["loss/mean jumped: (1 -> 9), 1"]


def naive(rule: Rule, past: list[float], new: float) -> set[str]:
    """What has happened to one number, from the words of `Rule`; `past`: all that came before."""
    happened = set()
    if past and rule.above is not None and new > rule.above and past[-1] <= rule.above:
        happened.add(f"above {rule.above:g}")
    if past and rule.below is not None and new < rule.below and past[-1] >= rule.below:
        happened.add(f"below {rule.below:g}")
    if rule.jump is not None:
        if past and np.isfinite(past[-1]) and not np.isfinite(new):
            happened.add("not finite")
        finite = [value for value in past[-20:] if np.isfinite(value)]
        if len(past) >= 3 and finite and np.isfinite(new):
            middle = statistics.median(finite)
            spread = statistics.median([abs(value - middle) for value in finite])
            if abs(new - middle) > max(rule.jump, 6 * 1.4826 * spread):
                happened.add("jumped")
    return happened


# Quarters, so that a number meets a threshold often and its arithmetic is exact.
quarters = st.integers(-12, 12).map(lambda number: number / 4)
measured = quarters | st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38])
steady = st.sampled_from([0.0, 0.25]) | measured


@given(
    above=st.none() | quarters,
    below=st.none() | quarters,
    jump=st.sampled_from([0.25, 0.75, 2.0]),
    cooldown=st.integers(0, 3),
    looks=st.lists(st.tuples(steady, steady, steady), max_size=40),
)
def test_any_numbers_raise_what_a_loop_over_them_raises(above, below, jump, cooldown, looks):
    rule = Rule("a/b", above=above, below=below, jump=jump)
    watch = Watch([rule], cooldown=cooldown)
    raised: dict[tuple[str, int], int] = {}
    for now, values in enumerate(looks):
        expected = set()
        for i, new in enumerate(values):
            for what in naive(
                rule, [float(np.float32(look[i])) for look in looks[:now]], float(np.float32(new))
            ):
                if now - raised.get((what, i), -99) > cooldown:
                    raised[what, i] = now
                    expected.add((what, i))
        reading = Reading(key="a/b", values=values, axes=("pos",), unit="1")
        said = set()
        for sentence in sentences(watch, [reading]):
            what = re.match(r"a/b (.*?): pos", sentence)[1]
            said |= {(what, int(i)) for i in re.findall(r"pos (\d) \(", sentence)}
        assert said == expected
