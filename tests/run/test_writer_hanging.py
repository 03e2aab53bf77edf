"""A sink that does not come back is given up with a word, and the others complete."""

import time

import pytest

from tests.run.test_writer import Notes, one
from tlens_callback.run import writer as module
from tlens_callback.run.writer import Writer

pytestmark = pytest.mark.slow

PATIENCE = 1.0
"""Seconds; long enough for a call that does nothing, on a machine that has much else to do."""


def test_a_sink_that_hangs_is_given_up_with_a_word_and_the_others_complete(caplog, gate):
    hangs, good = Notes(gate=gate, hangs=[1]), Notes()
    writer = Writer([hangs, good], patience=PATIENCE)
    for step in range(6):
        writer.put(one(), step=step)
    writer.close()
    assert good.wrote == [*range(6), "close"]
    assert [r.getMessage() for r in caplog.records] == [
        "tlens: sink Notes is given up: writing step 1 has taken more than 1 s. The other sinks "
        "and training go on."
    ]
    gate.set()
    thread = hangs.asked[-1][1]
    thread.join(60)
    assert [what for what, *_ in hangs.asked] == [0, 1], "asked for nothing more when it was back"
    assert not thread.is_alive() and good.wrote == [*range(6), "close"]


def test_a_sink_that_is_slow_is_not_given_up(caplog):
    """The control of the test above: each of its calls is shorter than the patience, and all
    together are longer."""
    slow, good = Notes(takes=PATIENCE / 6), Notes()
    writer = Writer([slow, good], patience=PATIENCE)
    for step in range(8):
        writer.put(one(), step=step)
    writer.close()
    assert slow.wrote == good.wrote == [*range(8), "close"] and not caplog.records


def test_one_that_hangs_and_later_raises_says_nothing_more(caplog, gate):
    hangs = Notes(gate=gate, error=OSError("late"))
    writer = Writer([hangs], patience=0.05)
    writer.put(one(), step=2)
    writer.drain()
    gate.set()
    hangs.asked[-1][1].join(60)
    writer.drain()
    writer.close()
    assert len(caplog.records) == 1 and "given up" in caplog.text


def test_dropping_gives_a_hanging_sink_up_too(caplog, gate):
    hangs, good = Notes(gate=gate, hangs=[0]), Notes()
    writer = Writer([hangs, good], writing="drop_old", patience=PATIENCE)
    writer.put(one(), step=0)
    assert hangs.began.wait(60)
    time.sleep(PATIENCE)
    for step in range(1, 4):
        writer.put(one(), step=step)
    writer.close()
    assert good.wrote[0] == 0 and good.wrote[-2:] == [3, "close"]
    assert caplog.text.count("given up") == 1


@pytest.mark.slow
def test_closing_has_longer(caplog, gate):
    class Uploads(Notes):
        def close(self):
            if self.gate is not None:
                self.gate.wait(120)
            time.sleep(self.takes)
            super().close()

    for kind, wrote in (({"takes": 0.4}, [0, "close"]), ({"gate": gate, "hangs": ()}, [0])):
        sink, other = Uploads(**kind), Notes()
        writer = Writer([sink, other])
        writer.put(one(), step=0)
        writer.drain()
        writer.patience = 0.3
        writer.close()
        assert sink.wrote == wrote and other.wrote == [0, "close"]
    assert [r.getMessage() for r in caplog.records] == [
        "tlens: sink Uploads is given up: closing has taken more than 1.5 s. The other sinks "
        "and training go on."
    ]


def test_with_raise_the_error_says_who_hangs_in_what(gate):
    hangs = Notes(gate=gate)
    writer = Writer([hangs], patience=0.1, on_error="raise")
    writer.put(one(), step=1)
    with pytest.raises(TimeoutError, match="sink Notes is given up: writing step 1 has taken"):
        writer.drain()
    writer.close()


@pytest.mark.parametrize("hangs_at", [0, None])
def test_the_end_of_the_interpreter_is_not_held_up_by_one_that_hangs(monkeypatch, gate, hangs_at):
    """With all room taken and one observation held; None: the control, with none that hangs."""
    monkeypatch.setattr(module, "_AT_EXIT", 3 * PATIENCE)
    hangs, good = Notes(gate=gate, hangs=[hangs_at]), Notes()
    writer = Writer([hangs, good], patience=60)
    for step in range(3):
        writer.put(one(), step=step)
    writer.hold(one(), step=3, more=list)
    writer._at_exit()
    assert not gate.is_set(), "nobody waited for it"
    assert good.wrote == [0, 1, 2, 3, "close"]
    assert hangs.wrote == ([] if hangs_at == 0 else [0, 1, 2, 3, "close"])
