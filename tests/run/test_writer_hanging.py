"""A sink that does not come back is given up with a word, and the others complete."""

import threading
import time

import pytest

from tests.run.test_writer import Notes, handed, one
from tlens_callback.run import writer as module
from tlens_callback.run.writer import Writer


@pytest.fixture(autouse=True)
def none_is_left():
    """What hangs here comes back; the next test counts threads."""
    yield
    for thread in threading.enumerate():
        if thread.name == "tlens-writer":
            thread.join(5)


def test_a_sink_that_hangs_is_given_up_with_a_word_and_the_others_complete(caplog):
    hangs, good = Notes(takes=0.6, slow=[1]), Notes()
    writer = Writer([hangs, good], patience=0.15)
    began = time.monotonic()
    for step in range(6):
        writer.put(one(), step=step)
    writer.close()
    assert time.monotonic() - began < 0.5
    assert good.wrote == [*range(6), "close"]
    assert [r.getMessage() for r in caplog.records] == [
        "tlens: sink Notes is given up: writing step 1 has taken more than 0.15 s. The others and "
        "training go on."
    ]
    thread = hangs.asked[-1][1]
    thread.join(2)
    assert [what for what, *_ in hangs.asked] == [0, 1], "asked for nothing more when it was back"
    assert not thread.is_alive() and good.wrote == [*range(6), "close"]


def test_a_sink_that_is_slow_is_not_given_up(caplog):
    """The control of the test above: each of its calls is shorter than the patience."""
    slow, good = Notes(takes=0.1), Notes()
    writer = Writer([slow, good], patience=0.5)
    for step in range(8):
        writer.put(one(), step=step)
    writer.close()
    assert slow.wrote == good.wrote == [*range(8), "close"] and not caplog.records


def test_one_that_hangs_and_later_raises_says_nothing_more(caplog):
    hangs = Notes(takes=0.3, slow=[2], error=OSError("late"))
    writer = Writer([hangs], patience=0.05)
    writer.put(one(), step=2)
    writer.drain()
    hangs.asked[-1][1].join(2)
    writer.drain()
    writer.close()
    assert len(caplog.records) == 1 and "given up" in caplog.text


def test_dropping_gives_a_hanging_sink_up_too(caplog):
    hangs, good = Notes(takes=0.5, slow=[0]), Notes()
    writer = Writer([hangs, good], writing="drop_old", patience=0.1)
    handed(writer, steps=4, pause=0.08)
    writer.close()
    assert good.wrote[0] == 0 and good.wrote[-2:] == [3, "close"]
    assert caplog.text.count("given up") == 1


def test_closing_has_longer(caplog):
    class Uploads(Notes):
        def close(self):
            time.sleep(self.takes)
            super().close()

    for takes, wrote in ((0.2, [0, "close"]), (0.8, [0])):
        sink, other = Uploads(takes=takes, slow=["none"]), Notes()
        writer = Writer([sink, other], patience=0.1)
        writer.put(one(), step=0)
        writer.close()
        assert sink.wrote == wrote and other.wrote == [0, "close"]
    assert [r.getMessage() for r in caplog.records] == [
        "tlens: sink Uploads is given up: closing has taken more than 0.5 s. The others and "
        "training go on."
    ]


def test_with_raise_the_error_says_who_hangs_in_what():
    hangs = Notes(takes=0.3, slow=[1])
    writer = Writer([hangs], patience=0.1, on_error="raise")
    writer.put(one(), step=1)
    with pytest.raises(TimeoutError, match="sink Notes is given up: writing step 1 has taken"):
        writer.drain()
    writer.close()


@pytest.mark.parametrize("hangs_at", [0, None])
def test_the_end_of_the_interpreter_is_not_held_up_by_one_that_hangs(monkeypatch, hangs_at):
    """With all room taken and one observation held; None: the control, with none that hangs."""
    monkeypatch.setattr(module, "_AT_EXIT", 0.6)
    hangs, good = Notes(takes=1.5, slow=[hangs_at]), Notes()
    writer = Writer([hangs, good], patience=60)
    for step in range(3):
        writer.put(one(), step=step)
    writer.hold(one(), step=3, more=list)
    began = time.monotonic()
    writer._at_exit()
    assert time.monotonic() - began < 0.7
    assert good.wrote == [0, 1, 2, 3, "close"]
    assert hangs.wrote == ([] if hangs_at == 0 else [0, 1, 2, 3, "close"])
