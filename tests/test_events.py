"""Events in a run: printed once, among the readings, and the end of none."""

import logging

import pytest

from tests.training import CAPITAL, trainer
from tlens_callback import HeadScores, MemorySink, Reading, Rule, TLensCallback, Watch


class Steps:
    """1 up to the third observation, 5 from then on."""

    name = "steps"

    def __init__(self):
        self.looks = 0

    def taps(self, shadow, batch):
        self.looks += 1
        return {}

    def read(self, taken, shadow, batch):
        yield Reading(key="steps/value", values=1.0 if self.looks < 4 else 5.0, unit="count")


def test_an_event_is_printed_once_and_is_a_reading(tmp_path, capsys):
    sink = MemorySink()
    callback = TLensCallback(
        [CAPITAL],
        instruments=[Steps(), HeadScores()],
        sinks=[sink],
        watch=Watch([Rule("steps/value", above=2)]),
        every_n_steps=1,
        on_error="raise",
    )
    trainer(tmp_path, callback).train()
    said = "steps/value above 2: (1 -> 5), count"
    assert capsys.readouterr().out.count(f"tlens: step 3: {said}") == 1
    assert {s: list(r.labels["event"]) for s, r in sink.readings["watch/events"].items()} == {
        3: [said]
    }
    steps, counts = sink.curve("watch/count")
    assert steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert counts.tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_without_a_watch_there_is_none(tmp_path):
    sink = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[sink], watch=False, on_error="raise")
    trainer(tmp_path, callback).train()
    assert not [key for key in sink.readings if key.startswith("watch/")]


def test_the_default_watch_follows_the_default_instruments(tmp_path):
    sink = MemorySink()
    trainer(tmp_path, TLensCallback([CAPITAL], sinks=[sink], on_error="raise")).train()
    assert [key for key in sink.readings if key.startswith("watch/induction_L")]


def test_a_head_that_is_not_there_raises_when_training_begins(tmp_path):
    callback = TLensCallback([CAPITAL], sinks=[], watch=Watch(heads=[(7, 0)]))
    with pytest.raises(ValueError, match=r"no head \(7, 0\)"):
        trainer(tmp_path, callback).train()


def test_a_watch_that_fails_is_set_aside(tmp_path, caplog, monkeypatch):
    look, looks = Watch.look, []

    def fails(self, readings):
        looks.append(1)
        if len(looks) == 3:
            raise RuntimeError("broken")
        return look(self, readings)

    monkeypatch.setattr(Watch, "look", fails)
    sink = MemorySink()
    callback = TLensCallback([CAPITAL], instruments=[Steps()], sinks=[sink], every_n_steps=1)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        trainer(tmp_path, callback).train()
    assert sink.curve("steps/value")[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert sink.curve("watch/count")[0].tolist() == [0, 1]
    assert caplog.text.count("the watch raised RuntimeError: broken") == 1


@pytest.mark.parametrize("watch", [True, "induction", [Watch()]])
def test_what_is_no_watch_is_refused(watch):
    with pytest.raises(ValueError, match="watch is a Watch, False or None"):
        TLensCallback([CAPITAL], watch=watch)
