"""The thread that writes: order, overload, failure and the end, with slow sinks."""

import contextvars
import logging
import os
import signal
import threading
import time

import numpy as np
import pytest

from tlens_callback import MemorySink, Reading
from tlens_callback.run.waiting import MOST_BYTES
from tlens_callback.run.writer import Writer

NAME = contextvars.ContextVar("NAME", default="nobody")


def one(value=1.0) -> list[Reading]:
    return [Reading(key="constant/mean", values=value, unit="1")]


class Notes:
    """A sink that notes what it is asked.

    It takes its time, and at the steps of `hangs` (None: at all) it waits until the gate is opened.
    """

    def __init__(self, log=None, *, takes=0.0, gate=None, hangs=None, error=None):
        self.log = [] if log is None else log
        self.takes, self.gate, self.hangs, self.error = takes, gate, hangs, error
        self.asked, self.began = [], threading.Event()

    def write(self, readings, *, step):
        self.asked.append((step, threading.current_thread(), NAME.get()))
        self.began.set()
        time.sleep(self.takes)
        if self.gate is not None and (self.hangs is None or step in self.hangs):
            assert self.gate.wait(120), "nobody opens the gate"
        if self.error is not None and step >= 2:
            raise self.error
        self.log.append((self, step))

    def close(self):
        self.asked.append(("close", threading.current_thread(), NAME.get()))
        self.log.append((self, "close"))

    @property
    def wrote(self):
        return [what for sink, what in self.log if sink is self]


class Closes(Notes):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.wait = None

    def before_finish(self, wait):
        self.wait = wait


def test_waiting_loses_nothing_and_holds_training_up_only_for_room(gate):
    sink = Notes(gate=gate)
    writer = Writer([sink], writing="wait")
    for step in range(3):
        writer.put(one(step), step=step)
    assert sink.wrote == [], "training is ahead"
    went_on = threading.Event()

    def more():
        for step in range(3, 10):
            writer.put(one(step), step=step)
            went_on.set()

    training = threading.Thread(target=more)
    training.start()
    assert not went_on.wait(0.2), "there is no room"
    gate.set()
    training.join(60)
    writer.close()
    assert went_on.is_set()
    assert sink.wrote == [*range(10), "close"] and writer.dropped == 0


def test_dropping_the_oldest_never_holds_training_up_and_counts(gate):
    sink = Notes(gate=gate)
    writer = Writer([sink], writing="drop_old")
    writer.put(one(), step=0)
    assert sink.began.wait(60)
    for step in range(1, 10):
        writer.put(one(step), step=step)
    assert sink.wrote == [], "none of these calls waited for it"
    gate.set()
    writer.close()
    assert sink.wrote == [0, 8, 9, "close"] and writer.dropped == 7


def test_inline_is_done_when_the_call_returns():
    """The control of the two tests above: the same sink without a thread."""
    sink, before = Notes(takes=0.02), threading.active_count()
    writer = Writer([sink], writing="inline")
    for step in range(3):
        writer.put(one(), step=step)
        assert sink.wrote == list(range(step + 1)) and threading.active_count() == before
    assert {thread for _, thread, _ in sink.asked} == {threading.current_thread()}
    writer.close()
    assert sink.wrote == [0, 1, 2, "close"]


@pytest.mark.parametrize("writing", ["wait", "drop_old", "inline"])
def test_the_sinks_of_an_observation_come_in_the_order_of_the_list(writing):
    log = []
    sinks = [Notes(log, takes=0.01), Notes(log), Notes(log)]
    writer = Writer(sinks[:2], writing=writing)
    writer.put(one(), step=0)
    writer.add(sinks[2])
    writer.put(one(), step=1)
    writer.close()
    first, second, late = sinks
    assert log == [
        *((first, 0), (second, 0)),
        *((first, 1), (second, 1), (late, 1)),
        *((first, "close"), (second, "close"), (late, "close")),
    ]


def test_all_calls_come_from_one_thread_with_the_caller_s_context():
    sink = Notes()
    writer = Writer([sink])
    for step, name in enumerate(["Ada", "Grace"]):
        NAME.set(name)
        writer.put(one(), step=step)
    NAME.set("Emmy")
    writer.close()
    assert [(what, name) for what, _, name in sink.asked] == [
        (0, "Ada"),
        (1, "Grace"),
        ("close", "Emmy"),
    ]
    (thread,) = {thread for _, thread, _ in sink.asked}
    assert thread.daemon and not thread.is_alive() and thread is not threading.current_thread()


def test_a_plain_thread_has_not_the_context():
    """The control of the test above."""
    NAME.set("Ada")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(NAME.get()))
    thread.start()
    thread.join()
    assert seen == ["nobody"]


@pytest.mark.parametrize("writing", ["wait", "drop_old", "inline"])
def test_an_error_is_reported_once_and_the_others_go_on(caplog, writing):
    bad, good = Notes(error=OSError("no space")), Notes()
    writer = Writer([bad, good], writing=writing)
    reported_by = set()
    note = logging.Handler()
    note.emit = lambda record: reported_by.add(record.thread)
    logging.getLogger("tlens_callback").addHandler(note)
    try:
        with caplog.at_level(logging.WARNING, "tlens_callback"):
            for step in range(6):
                writer.put(one(), step=step)
                writer.drain()
            writer.close()
    finally:
        logging.getLogger("tlens_callback").removeHandler(note)
    said = [r.getMessage() for r in caplog.records]
    assert said == [
        "tlens: sink Notes raised OSError: no space. It is not used any more; training goes on."
    ]
    assert reported_by == {threading.get_ident()}
    assert [what for what, *_ in bad.asked] == [0, 1, 2] and good.wrote == [*range(6), "close"]
    assert writer.sinks == [good]


@pytest.mark.parametrize("writing", ["wait", "drop_old", "inline"])
def test_with_raise_an_error_raises_on_the_training_thread(writing):
    bad, good = Notes(error=OSError("no space")), Notes()
    writer = Writer([bad, good], writing=writing, on_error="raise")
    writer.put(one(), step=0)
    with pytest.raises(OSError, match="no space") as raised:
        writer.put(one(), step=2)
        writer.drain()
    writer.drain()
    assert raised.value.__notes__ == ["(raised by the sink Notes)"]
    assert good.wrote == [0, 2]
    writer.put(one(), step=3)
    writer.close()
    assert good.wrote == [0, 2, 3, "close"], "raised once"


def test_with_raise_the_error_tells_of_the_others_too():
    writer = Writer(
        [Notes(error=OSError("no space")), Notes(error=KeyError("run"))], on_error="raise"
    )
    writer.hold(one(), step=2, more=list)
    with pytest.raises(OSError, match="no space") as raised:
        writer.drain()
    assert raised.value.__notes__ == [
        "(raised by the sink Notes)",
        "(the sink Notes raised too: KeyError: 'run')",
    ]
    writer.close()


def test_what_would_end_a_thread_does_not_end_the_writing(caplog):
    bad, good = Notes(error=SystemExit(3)), Notes()
    writer = Writer([bad, good])
    for step in range(4):
        writer.put(one(), step=step)
    writer.close()
    assert good.wrote == [0, 1, 2, 3, "close"]
    assert "sink Notes raised SystemExit" in caplog.text


def test_drain_waits_and_says_when_the_time_was_not_enough(gate):
    sink = Notes(gate=gate)
    writer = Writer([sink])
    writer.put(one(), step=0)
    assert not writer.drain(0.05)
    gate.set()
    assert writer.drain() and sink.wrote == [0]
    writer.close()


def test_close_comes_once_ends_the_thread_and_lets_a_write_follow():
    before, sink = threading.active_count(), Notes()
    writer = Writer([sink])
    writer.put(one(), step=0)
    assert threading.active_count() == before + 1
    writer.close()
    writer.close()
    assert sink.wrote == [0, "close"] and threading.active_count() == before
    writer.put(one(), step=1)
    writer.close()
    assert sink.wrote == [0, "close", 1, "close"] and threading.active_count() == before


def test_where_no_thread_starts_nobody_waits_for_ever(caplog, monkeypatch):
    def refused(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    sink = Notes()
    writer = Writer([sink])
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        writer.put(one(), step=0)
        assert writer.drain(60)
    assert "some steps are lost" in caplog.text
    writer.put(one(), step=1)
    writer.close()
    assert sink.wrote == [1, "close"]


def test_a_forked_process_waits_for_nothing(gate):
    """It has no thread that writes; what ends it may be a script that finishes a run."""
    sink = Closes(gate=gate)
    writer = Writer([sink])
    writer.put(one(), step=0)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends it if it waits for the gate, which nobody opens there
        writer._at_exit()
        sink.wait()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    gate.set()
    writer.close()
    assert sink.wrote == [0, "close"]


def test_inline_an_error_of_what_was_held_raises_when_it_is_released():
    writer = Writer([Notes(error=OSError("no space"))], writing="inline", on_error="raise")
    writer.hold(one(), step=2, more=list)
    with pytest.raises(OSError, match="no space"):
        writer.release()
    writer.close()


def test_what_is_held_gets_more_readings_when_it_is_released():
    memory = MemorySink()
    writer, more = Writer([memory]), []
    writer.hold(one(), step=3, more=lambda: more)
    time.sleep(0.05)
    assert memory.steps == ()
    more.append(Reading(key="trainer/loss", values=[2.0], axes=("update",), unit="as logged"))
    writer.release()
    writer.drain()
    assert set(memory.readings) == {"constant/mean", "trainer/loss"}
    writer.release()
    writer.hold(one(), step=4, more=list)
    writer.put(one(), step=5)
    writer.close()
    assert memory.steps == (3, 4, 5)


@pytest.mark.parametrize("writing", ["wait", "inline"])
def test_a_sink_can_wait_before_somebody_else_finishes_its_run(writing):
    sink = Closes(takes=0.05)
    writer = Writer([sink], writing=writing)
    writer.put(one(), step=0)
    writer.hold(one(), step=1, more=list)
    sink.wait()
    assert sink.wrote == [0, 1]
    writer.close()
    sink.wait()


def test_waiting_on_the_thread_that_writes_is_no_deadlock():
    class FinishesItself(Closes):
        def close(self):
            self.wait()
            super().close()

    sink = FinishesItself()
    writer = Writer([sink], patience=20)
    writer.put(one(), step=0)
    writer.close()
    assert sink.wrote == [0, "close"], "it was not given up"


def sized(step, mib=100) -> list[Reading]:
    return [Reading(key="a/b", values=np.zeros(mib * 2**18), axes=("x",), unit="1")]


def bytes_held(writer):
    return writer._waiting._bytes(writer._current)


def test_what_waits_is_bounded_in_bytes_and_the_caller_waits_for_room():
    gate, sink = threading.Event(), Notes()
    sink.gate = gate
    writer, held = Writer([sink]), []

    def put():
        for step in range(4):
            writer.put(sized(step), step=step)
            held.append(bytes_held(writer))

    caller = threading.Thread(target=put)
    caller.start()
    assert sink.began.wait(120)
    wait_until(lambda: len(held) == 2)
    time.sleep(0.2)
    assert len(held) == 2, "100 MiB are being written, 100 wait, and 256 are the most"
    gate.set()
    caller.join(120)
    writer.close()
    assert sink.wrote == [0, 1, 2, 3, "close"] and max(held) <= MOST_BYTES


def test_one_that_is_too_large_by_itself_is_written_alone():
    sink = Notes()
    writer = Writer([sink])
    for step in range(3):
        writer.put(sized(step, mib=300), step=step)
        assert bytes_held(writer) <= 300 * 2**20
    writer.close()
    assert sink.wrote == [0, 1, 2, "close"] and writer.dropped == 0


def test_drop_old_drops_by_bytes_too():
    gate, sink = threading.Event(), Notes()
    sink.gate = gate
    writer = Writer([sink], writing="drop_old")
    writer.put(sized(0), step=0)
    assert sink.began.wait(120)
    for step in (1, 2):
        writer.put(sized(step), step=step)
    gate.set()
    writer.close()
    assert sink.wrote == [0, 2, "close"] and writer.dropped == 1


def wait_until(done):
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)
