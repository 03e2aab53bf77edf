"""Events in a run: printed once, among the readings, and the end of none."""

import io
import logging

import pytest

from tests.training import CAPITAL, trainer
from tlens_callback import (
    HeadScores,
    MemorySink,
    Reading,
    Rule,
    TLensCallback,
    Watch,
    read_store,
)


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
    assert {s: list(r.texts) for s, r in sink.readings["watch/events"].items()} == {3: [said]}
    steps, counts = sink.curve("watch/count")
    assert steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert counts.tolist() == [0, 0, 0, 1, 0, 0, 0]


@pytest.mark.slow
def test_an_event_at_the_checkpoint_is_raised_again_by_the_run_that_resumes_there(tmp_path):
    """The store writes that step anew, and has to hold it still."""

    def train(resume=None):
        steps = Steps()
        steps.looks = 3 if resume else 0
        callback = TLensCallback(
            [CAPITAL], instruments=[steps], watch=Watch([Rule("steps/value", above=2)]),
            every_n_steps=1, on_error="raise",
        )  # fmt: skip
        run = trainer(tmp_path, callback, save_strategy="steps", save_steps=1)
        run.train(resume_from_checkpoint=resume)
        frame = read_store(tmp_path / "tlens").frame()
        return frame[frame.key == "watch/events"]

    said = "steps/value above 2: (1 -> 5), count"
    for step in (None, 3, 5):
        events = train(step and str(tmp_path / f"checkpoint-{step}"))
        assert events.step.tolist() == [3] and events.text.tolist() == [said]


def test_a_terminal_without_the_letters_ends_nothing(tmp_path, monkeypatch):
    class Odd(Steps):
        def read(self, taken, shadow, batch):
            (value,) = super().read(taken, shadow, batch)
            yield Reading(
                key="steps/value", values=[value.values], axes=("pos",), unit="é",
                labels={"pos": ["中 \n"]},
            )  # fmt: skip

    sink = MemorySink()
    callback = TLensCallback(
        [CAPITAL], instruments=[Odd()], sinks=[sink], watch=Watch([Rule("steps/value", above=2)]),
        every_n_steps=1,
    )  # fmt: skip
    run, out = trainer(tmp_path, callback), io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", io.TextIOWrapper(out, encoding="ascii", write_through=True))
        run.train()
        said = out.getvalue().decode()
    assert sink.steps == (0, 1, 2, 3, 4, 5, 6)
    assert "step 3: steps/value above 2: pos '\\u4e2d \\n' (1 -> 5), \\xe9\n" in said


def test_costs_can_have_a_rule_and_a_key_that_nothing_reads_is_refused(tmp_path):
    rules = [Rule("cost/share", above=0.5), Rule("fidelity/kl", above=1)]
    callback = TLensCallback([CAPITAL], instruments=[Steps()], sinks=[], watch=Watch(rules))
    trainer(tmp_path, callback).train()
    callback = TLensCallback(
        [CAPITAL], instruments=[Steps()], sinks=[], watch=Watch([Rule("step/value", above=2)])
    )
    with pytest.raises(
        ValueError, match=r"no reading is 'step/value'; the nearest are \['steps/value"
    ):
        trainer(tmp_path, callback).train()


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
    with pytest.raises(ValueError, match="watch must be a Watch, False or None"):
        TLensCallback([CAPITAL], watch=watch)
