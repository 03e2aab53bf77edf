"""`Writer`: gives readings to the sinks on a thread of its own, so that training need not wait."""

import atexit
import contextvars
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from tlens_callback.interfaces import Sink
from tlens_callback.reading import Reading
from tlens_callback.run.printing import print_lines, report, sink_lines, warn
from tlens_callback.run.waiting import Job, Waiting

OnError = Literal["warn", "raise"]
Writing = Literal["wait", "drop_old", "inline"]

_CLOSING_FACTOR = 5
"""Closing a sink may take this many times as long as another call."""

_LOOK_AT_THREAD = 1.0
"""Seconds after which somebody who waits looks whether the thread is still there."""

_AT_EXIT = 30.0
"""Seconds that the end of the program waits for what is not written yet; one call may take a third
of them."""


class SinkHangs(TimeoutError):
    """Raised if a call of a sink takes so long that the sink is given up."""


class Writer:
    """Calls the sinks of one run, in the order of the list, one observation after the other.

    All calls come from one daemon thread, in the contextvars context of the caller. A sink that
    raises is not used any more, and the others go on; the training thread learns of it at its next
    call of the writer. If a call takes longer than `patience` while somebody waits, its sink is
    given up: a new thread goes on with the other sinks, and whatever the old thread still does is
    ignored. Closing a sink, which may upload files or make a page, may take five times as long.

    When the program ends, everything is written and the sinks are closed within 30 seconds; one
    call may take 10 of them.

    Args:
        writing: "wait": at most two observations wait beside the one being written, and at most
            256 MiB; the caller waits until there is room. "drop_old": the oldest waiting
            observation is dropped instead. "inline": everything is written on the caller's thread,
            before a call returns, and no sink is given up.
        on_error: "warn": a sink that fails is reported once. "raise": its error is raised on the
            training thread, at its next call of the writer.
        patience: seconds that one call of a sink may take.

    Attributes:
        sinks: the sinks that are still used.
        dropped: how many observations were dropped so far.
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
        self._waiting = Waiting()
        self._current: Job | None = None
        self._busy: tuple[Sink, float] | None = None
        self._thread: threading.Thread | None = None
        self._held: tuple[Sequence[Reading], int, Callable[[], Sequence[Reading]]] | None = None
        self._failures: list[tuple[str, BaseException]] = []
        self._closed = self._exiting = False
        self._local = threading.local()
        self._process = os.getpid()
        self._about: Mapping[str, Any] | None = None
        for sink in sinks:
            self.add(sink)

    def add(self, sink: Sink) -> None:
        """Adds a sink, which gets the observations from now on."""
        with self._changed:
            self.sinks.append(sink)
        if (before_finish := getattr(sink, "before_finish", None)) is not None:
            before_finish(self._wait_until_written)
        if self._about is not None:
            _tell(sink, self._about)

    def begin(self, about: Mapping[str, Any]) -> None:
        """Tells all sinks, also later ones, about the run whose observations come next."""
        self._about = about
        for sink in list(self.sinks):
            _tell(sink, about)

    def put(self, readings: Sequence[Reading], *, step: int) -> None:
        """Hands over one observation to be written."""
        self.hold(readings, step=step, more=tuple)
        self.release()

    def hold(
        self, readings: Sequence[Reading], *, step: int, more: Callable[[], Sequence[Reading]]
    ) -> None:
        """Keeps one observation until `release`, which adds the readings that `more` returns.

        Every other call of the writer releases it too, and so does the end of the program. `more`
        is kept until then, with everything it refers to; it must not raise.
        """
        self._report()
        self._release()
        self._watch_exit()
        self._closed = False
        self._held = readings, step, more

    def release(self) -> None:
        """Hands over the observation that `hold` kept."""
        self._release()
        self._report()

    def _release(self) -> None:
        with self._changed:
            held, self._held = self._held, None
        if held is not None:
            readings, step, more = held
            kept = tuple(readings)
            try:
                kept += tuple(more())
            except Exception as error:  # the observation itself is whole
                if self.on_error == "raise":
                    raise
                report("the reading of the trainer's log", error)
            calls = [(sink, partial(sink.write, kept, step=step)) for sink in self.sinks]
            self._submit(step, calls, size=sum(reading.values.nbytes for reading in kept))

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until everything is written; returns False if `timeout` seconds were not enough."""
        done = self._wait_until_written(timeout)
        # Again, so that it runs before the exit functions that sinks have registered meanwhile.
        self._watch_exit()
        self._report()
        return done

    def close(self) -> None:
        """Writes everything, closes the sinks and ends the thread. It may be called twice, and
        `put` may follow it."""
        self._close(None)
        self._report()

    def _submit(
        self,
        step: int | None,
        calls: Sequence[tuple[Sink, Callable[[], None]]],
        size: int = 0,
    ) -> None:
        if self.writing == "inline":
            for sink, act in calls:
                try:
                    act()
                except Exception as error:
                    self._fail(sink, error)
            return
        job = Job(step, size, deque(calls), contextvars.copy_context())
        with self._changed:
            if self._thread is None:
                self._start()
            if self._thread is None:
                return
            try:
                # The end of the program has a time limit of its own.
                if step is not None and self.writing == "wait" and not self._exiting:
                    self._wait_for(lambda: self._waiting.has_room(size, self._current))
            finally:  # Ctrl-C ends this wait; the observation is written all the same
                self._waiting.append(job)
                self._changed.notify_all()
            self._give_up_hung()
            if step is not None and self.writing == "drop_old":
                self.dropped += self._waiting.drop_old(self._current)

    def _wait_until_written(self, timeout: float | None = None) -> bool:
        """Waits until everything is written, without reporting failures; on the writing thread it
        returns at once."""
        # A forked process has a copy of the jobs but no thread; its parent writes them.
        if getattr(self._local, "writes", False) or os.getpid() != self._process:
            return True
        self._release()
        with self._changed:
            return self._wait_for(lambda: not self._waiting and self._current is None, timeout)

    def _wait_for(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits, with the lock held, until `done`; gives up a sink that hangs."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not done():
            self._give_up_hung()
            left = min(end, self._deadline()) - time.monotonic()
            if time.monotonic() >= end:
                return False
            self._changed.wait(min(_LOOK_AT_THREAD, max(0.0, left)))
            self._replace_dead()
        return True

    def _replace_dead(self) -> None:
        """Gives up what waits if the writing thread itself has failed; call it with the lock held.

        It would otherwise be waited for without end.
        """
        if self._thread is not None and not self._thread.is_alive():
            warn("tlens: the thread that writes has failed, so some steps are lost.")
            self._waiting.clear()
            self._current = self._busy = self._thread = None

    def _deadline(self) -> float:
        """Returns when the current call is to be given up."""
        if self._busy is None or self._current is None:
            return math.inf
        return self._busy[1] + self.patience * (
            _CLOSING_FACTOR if self._current.step is None else 1
        )

    def _give_up_hung(self) -> None:
        if self._busy is None or self._current is None or time.monotonic() < self._deadline():
            return
        (sink, began), step = self._busy, self._current.step
        about = "closing" if step is None else f"writing step {step}"
        limit = f"{self._deadline() - began:.3g} s"
        self._busy = None
        self._fail(
            sink,
            SinkHangs(
                f"sink {type(sink).__name__} is given up: {about} has taken more than {limit}"
            ),
        )
        self._start()

    def _start(self) -> None:
        """Starts the writing thread; call it with the lock held."""
        thread = threading.Thread(target=self._run_calls, name="tlens-writer", daemon=True)
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # from Python 3.12 on no thread can start while the program ends
            self._thread, self._current = None, None
            self._waiting.clear()
            warn(
                "tlens: the program is ending and no thread can be started to write, so some "
                "steps are lost."
            )

    def _run_calls(self) -> None:
        me = threading.current_thread()
        self._local.writes = True
        while (call := self._next_call(me)) is not None:
            sink, act, context = call
            failed: BaseException | None = None
            try:
                context.run(act)
            except BaseException as error:  # the training thread decides what to do about it
                failed = error
            with self._changed:
                if self._thread is not me:
                    return
                self._busy = None
                if failed is not None:
                    self._fail(sink, failed)
            del call, sink, act, context, failed  # they would keep readings alive while it waits

    def _next_call(
        self, me: threading.Thread
    ) -> tuple[Sink, Callable[[], None], contextvars.Context] | None:
        """Waits for the next call to make; returns None if this thread is to end."""
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
                        # A copy: a call that is given up never leaves its context.
                        return sink, act, self._current.context.copy()
                self._changed.notify_all()
        return None

    def _fail(self, sink: Sink, error: BaseException) -> None:
        with self._changed:
            self.sinks = [other for other in self.sinks if other is not sink]
            self._failures.append((type(sink).__name__, error))

    def _report(self) -> None:
        """Reports, on the training thread, what has failed since the last call."""
        with self._changed:
            failures, self._failures = self._failures, []
        if failures and self.on_error == "raise":
            (name, first), *others = failures
            if not isinstance(first, SinkHangs):
                first.add_note(f"(raised by the sink {name})")
            for name, error in others:
                first.add_note(f"(the sink {name} raised too: {type(error).__name__}: {error})")
            raise first
        for name, error in failures:
            if isinstance(error, SinkHangs):
                warn("tlens: %s. The other sinks and training go on.", error)
            else:
                report(f"sink {name}", error)

    def _close(self, timeout: float | None) -> bool:
        self._release()
        if self._closed:
            return True
        self._submit(None, [(sink, sink.close) for sink in self.sinks])
        done = self._wait_until_written(timeout)
        with self._changed:
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None and done:
            thread.join(1)  # a Ctrl-C may have left the lock with this thread
        self._closed = True
        atexit.unregister(self._at_exit)
        return done

    def _watch_exit(self) -> None:
        """Registers `_at_exit`, so that it runs before all exit functions registered earlier."""
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
            warn(
                "tlens: not everything could be written within %g s after the end of the program.",
                _AT_EXIT,
            )
        self.on_error = "warn"
        self._report()


def _tell(sink: Sink, about: Mapping[str, Any]) -> None:
    if (begin := getattr(sink, "begin", None)) is not None:
        begin(about)
