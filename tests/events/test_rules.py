"""Rules: events about any number that is read."""

import numpy as np

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
    assert len(watch.memory) == 3


def test_a_number_that_is_none_any_more():
    """It is said once, and later jumps are found beside it."""
    watch = Watch([Rule("loss/mean", jump=1)], cooldown=0)
    values = (1, 1.1, 1, 1.1, np.nan, np.inf, 1, -np.inf, 1, 9)
    raised = [sentences(watch, [number("loss/mean", value)]) for value in values]
    assert [i for i, found in enumerate(raised) if found] == [4, 7, 9]
    assert raised[4] == ["loss/mean not finite: (1.1 -> nan), 1"]
    assert raised[9] == ["loss/mean jumped: (1 -> 9), 1"]
