"""`Writer`: hands readings to the sinks on a thread of its own, so that training need not wait."""

import atexit
import contextvars
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from tlens_callback.interfaces import Sink
from tlens_callback.reading import Reading
from tlens_callback.run.printing import print_lines, sink_lines

logger = logging.getLogger("tlens_callback")

OnError = Literal["warn", "raise"]
Writing = Literal["wait", "drop_old", "inline"]

_ROOM = 2
"""Observations that may wait while one is being written."""

_CLOSING = 5
"""Times the patience that closing a sink has."""

_AT_EXIT = 30.0
"""Seconds that the interpreter's end waits for what is not written yet; a third of it for one
call."""


class SinkHangs(TimeoutError):
    """A sink's call has taken longer than others can wait."""


class _Job(NamedTuple):
    """Calls that are still to be made, in order, in the context of the thread that asked."""

    step: int | None
    """Of the observation; None: the sinks are closed."""

    calls: deque[tuple[Sink, Callable[[], None]]]
    context: contextvars.Context


class Writer:
    """Runs the sinks of one run, in the order of the list, one observation after the other.

    All calls come from one daemon thread, in the contextvars context that the caller had. A sink
    that raises is set aside and the others go on; the training thread hears of it at its next call
    here. A call that takes longer than `patience` while somebody waits is given up: another thread
    goes on with the other sinks, and what the old one still does is not looked at. Closing, which
    may upload or make a page, has five times as long.

    At the interpreter's end, what was handed over is written and the sinks are closed, within 30
    seconds; one call may take 10 of them.

    Args:
        writing: "wait": at most two observations wait beside the one being written, and the caller
            waits for room. "drop_old": the oldest that waits is dropped instead, with all that it
            holds. "inline": all is written on the caller's thread, before a call returns, and
            nothing is given up.
        on_error: "warn": a sink that fails is reported once. "raise": its error raises on the
            training thread, at its next call here.
        patience: seconds that one call of a sink may take.

    Attributes:
        sinks: those that are not set aside.
        dropped: observations that were dropped so far.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        writing: Writing = "wait",
        on_error: OnError = "warn",
        patience: float = 60.0,
    ) -> None:
        self.sinks: list[Sink] = []
        self.writing, self.on_error, self.patience = writing, on_error, patience
        self.dropped = 0
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._current: _Job | None = None
        self._busy: tuple[Sink, float] | None = None
        self._thread: threading.Thread | None = None
        self._held: tuple[Sequence[Reading], int, Callable[[], Sequence[Reading]]] | None = None
        self._failures: list[tuple[str, BaseException]] = []
        self._closed = self._exiting = False
        self._local = threading.local()
        self._process = os.getpid()
        for sink in sinks:
            self.add(sink)

    def add(self, sink: Sink) -> None:
        """One more sink, which gets what is handed over from now on."""
        with self._changed:
            self.sinks.append(sink)
        if (seam := getattr(sink, "before_finish", None)) is not None:
            seam(self._settle)

    def put(self, readings: Sequence[Reading], *, step: int) -> None:
        """Hands one observation over."""
        self.hold(readings, step=step, more=tuple)
        self.release()

    def hold(
        self, readings: Sequence[Reading], *, step: int, more: Callable[[], Sequence[Reading]]
    ) -> None:
        """Keeps one observation until `release`, which asks for `more` readings of it.

        Every other call here releases it too, and so does the interpreter's end. Until then `more`
        lives, with all that it refers to; it is not to raise.
        """
        self._report()
        self._release()
        self._watch_exit()
        self._closed = False
        self._held = readings, step, more

    def release(self) -> None:
        """Hands over what is held."""
        self._release()
        self._report()

    def _release(self) -> None:
        with self._changed:
            held, self._held = self._held, None
        if held is not None:
            readings, step, more = held
            kept = (*readings, *more())
            calls = [(sink, partial(sink.write, kept, step=step)) for sink in self.sinks]
            self._submit(step, calls)

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until everything is written; False where `timeout` seconds were not enough."""
        done = self._settle(timeout)
        # What a sink registered for the exit meanwhile is to come after this.
        self._watch_exit()
        self._report()
        return done

    def close(self) -> None:
        """Writes everything, closes the sinks and ends the thread. May be called twice, and `put`
        may follow."""
        self._close(None)
        self._report()

    def _submit(self, step: int | None, calls: Sequence[tuple[Sink, Callable[[], None]]]) -> None:
        if self.writing == "inline":
            for sink, act in calls:
                try:
                    act()
                except Exception as error:
                    self._fail(sink, error)
            return
        job = _Job(step, deque(calls), contextvars.copy_context())
        with self._changed:
            if self._thread is None:
                self._start()
            if self._thread is None:
                return
            try:
                # The interpreter's end has a limit of its own.
                if step is not None and self.writing == "wait" and not self._exiting:
                    self._wait_for(lambda: len(self._waiting) < _ROOM)
            finally:  # Ctrl-C ends the waiting, not what waits
                self._waiting.append(job)
                self._changed.notify_all()
            self._give_up_hung()
            while step is not None and self.writing == "drop_old" and len(self._waiting) > _ROOM:
                self._waiting.popleft()
                self.dropped += 1

    def _settle(self, timeout: float | None = None) -> bool:
        """Waits until everything is written, and reports nothing; on the thread that writes, not at
        all."""
        # A forked process has the jobs and not the thread; they are its parent's to write.
        if getattr(self._local, "writes", False) or os.getpid() != self._process:
            return True
        self._release()
        with self._changed:
            return self._wait_for(lambda: not self._waiting and self._current is None, timeout)

    def _wait_for(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits with the lock held, and gives up a sink that hangs."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not done():
            self._give_up_hung()
            left = min(end, self._until()) - time.monotonic()
            if time.monotonic() >= end:
                return False
            self._changed.wait(None if left == math.inf else max(0.0, left))
        return True

    def _until(self) -> float:
        """When the call that is being made is given up."""
        if self._busy is None or self._current is None:
            return math.inf
        return self._busy[1] + self.patience * (_CLOSING if self._current.step is None else 1)

    def _give_up_hung(self) -> None:
        if self._busy is None or self._current is None or time.monotonic() < self._until():
            return
        (sink, began), step = self._busy, self._current.step
        about = "closing" if step is None else f"writing step {step}"
        limit = f"{self._until() - began:.3g} s"
        self._busy = None
        self._fail(
            sink,
            SinkHangs(
                f"sink {type(sink).__name__} is given up: {about} has taken more than {limit}"
            ),
        )
        self._start()

    def _start(self) -> None:
        """With the lock held, which the thread waits for."""
        thread = threading.Thread(target=self._work, name="tlens-writer", daemon=True)
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # from Python 3.12 on none starts while the interpreter ends
            self._thread, self._current = None, None
            self._waiting.clear()
            logger.warning("tlens: no thread can be started to write, so some steps are lost.")

    def _work(self) -> None:
        me = threading.current_thread()
        self._local.writes = True
        while (call := self._next(me)) is not None:
            sink, act, context = call
            failed: BaseException | None = None
            try:
                context.run(act)
            except BaseException as error:  # what ends a thread is for the training to decide
                failed = error
            with self._changed:
                if self._thread is not me:
                    return
                self._busy = None
                if failed is not None:
                    self._fail(sink, failed)
            del call, sink, act, context, failed  # readings, while it waits for others

    def _next(
        self, me: threading.Thread
    ) -> tuple[Sink, Callable[[], None], contextvars.Context] | None:
        """The call to make now; None where another thread makes them, or none is to be made."""
        with self._changed:
            while self._thread is me:
                if self._current is None and self._waiting:
                    self._current = self._waiting.popleft()
                elif self._current is None:
                    self._changed.wait()
                elif not self._current.calls:
                    self._current = None
                else:
                    sink, act = self._current.calls.popleft()
                    if any(sink is other for other in self.sinks):
                        self._busy = sink, time.monotonic()
                        self._changed.notify_all()
                        # A copy: who is given up is inside the context for ever.
                        return sink, act, self._current.context.copy()
                self._changed.notify_all()
        return None

    def _fail(self, sink: Sink, error: BaseException) -> None:
        with self._changed:
            self.sinks = [other for other in self.sinks if other is not sink]
            self._failures.append((type(sink).__name__, error))

    def _report(self) -> None:
        """On the training thread: what went wrong since the last call."""
        with self._changed:
            failures, self._failures = self._failures, []
        if failures and self.on_error == "raise":
            (name, first), *others = failures
            if not isinstance(first, SinkHangs):
                first.add_note(f"(raised by the sink {name})")
            for name, error in others:
                first.add_note(f"(so did the sink {name}: {type(error).__name__}: {error})")
            raise first
        for name, error in failures:
            if isinstance(error, SinkHangs):
                logger.warning("tlens: %s. The others and training go on.", error)
            else:
                report(f"sink {name}", error)

    def _close(self, timeout: float | None) -> bool:
        self._release()
        if self._closed:
            return True
        self._submit(None, [(sink, sink.close) for sink in self.sinks])
        done = self._settle(timeout)
        with self._changed:
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None and done:
            thread.join(1)  # a Ctrl-C may have left the lock with this thread
        self._closed = True
        atexit.unregister(self._at_exit)
        return done

    def _watch_exit(self) -> None:
        """To be asked at the interpreter's end, before all who were registered earlier."""
        atexit.unregister(self._at_exit)
        if not self._exiting:
            atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        if os.getpid() != self._process:
            return
        self._exiting = True
        self.patience = min(self.patience, _AT_EXIT / 3)
        if self._close(_AT_EXIT):
            print_lines(sink_lines(self.sinks))
        else:
            logger.warning(
                "tlens: not everything was written %g s after the end of the program.", _AT_EXIT
            )
        self.on_error = "warn"
        self._report()


def report(what: str, error: BaseException) -> None:
    """Says that something failed during training and is set aside."""
    logger.warning(
        "tlens: %s raised %s: %s. It is set aside; training goes on.",
        what,
        type(error).__name__,
        error,
        exc_info=error,
    )
