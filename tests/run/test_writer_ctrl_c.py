"""Ctrl-C inside the writer's calls: nothing waits for ever, and what waits is written."""

import threading

import pytest

from tests.run.test_writer import Notes, one
from tlens_callback.run.writer import Writer


def test_ctrl_c_while_training_waits_for_room_loses_nothing(monkeypatch):
    sink = Notes(takes=0.1)
    writer = Writer([sink])

    def interrupted(*args):
        raise KeyboardInterrupt

    for step in range(3):
        writer.put(one(), step=step)
    with monkeypatch.context() as patched:
        patched.setattr(writer, "_wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.put(one(), step=3)
    writer.close()
    assert sink.wrote == [0, 1, 2, 3, "close"]


def test_ctrl_c_while_the_thread_starts_lets_the_next_observation_start_it(monkeypatch):
    def interrupted(thread):
        raise KeyboardInterrupt

    sink = Notes()
    writer = Writer([sink])
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.put(one(), step=0)
    writer.put(one(), step=1)
    assert writer.drain(60) and sink.wrote == [1]
    writer.close()


def test_ctrl_c_that_leaves_the_lock_taken_does_not_hold_up_the_end_for_ever():
    """It may come between the taking of a lock and the block that gives it back."""
    sink = Notes()
    writer = Writer([sink])
    writer.put(one(), step=0)
    thread = writer._thread
    writer._changed.acquire()
    writer.close()
    assert thread.is_alive(), "it waits for the lock"
    writer._changed.release()
    assert sink.wrote == [0, "close"]
    thread.join(60)
    assert not thread.is_alive()
