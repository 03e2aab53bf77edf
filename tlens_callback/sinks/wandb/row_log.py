"""`RowLog`: logs rows to a W&B run so that no row of anybody else is lost."""

import atexit
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from tlens_callback.sinks.shown import STEP
from tlens_callback.sinks.wandb.finish import BeforeFinish

logger = logging.getLogger("tlens_callback")

_PATIENCE = 10
"""Rows that wait for a first sign of how others log."""

_MOST_FILES = 200
"""Files that wait in memory; the oldest rows lose theirs."""

_own = threading.local()
"""`_own.logs` is true on a thread while a `RowLog` logs, so that no other takes it for a user."""


class _Count:
    """Follows W&B's count of rows: the number of the open row, which the next `log` adds to."""

    def __init__(self, at: int) -> None:
        self.at = at

    def add(self, step: int | None, commit: bool | None) -> None:
        if step is not None and step < self.at:
            return  # W&B drops the row.
        self.at = self.at if step is None else step
        if commit or (commit is None and step is None):
            self.at += 1


class RowLog:
    """Logs rows to a W&B run in such a way that nobody else's rows are lost.

    Each is a row of its own, unless somebody has left theirs open with `commit=False`. A row that
    is logged without `step=` moves W&B's count by one, and W&B drops every row that is logged with
    a `step=` behind its count. So somebody who logs with `step=state.global_step` could lose all
    their rows because of ours. Our rows therefore wait at first:

    - until the trainer (or anybody else) has logged twice without `step=`, or ten of our rows wait:
      from then on, all our rows are logged at once;
    - if somebody logs with `step=`, until one of these steps leaves room for them, or the run is
      about to be finished. Its x axis is `train/global_step`, so that late rows are at their place.

    Somebody who begins with `step=` after that can still lose rows, and is told so once. `log` may
    be called on another thread than the others' `run.log`.

    Args:
        run: a run that `wandb.init()` returned. If wandb's private `Run._log` does not exist or the
            run has no count (`mode="shared"`), rows are logged at once.
        finishing: called when the run is about to be finished and can still log, before the last
            rows are logged.
        at_once: log at once from the start: nobody else is known to log to this run.
    """

    def __init__(
        self, run: Any, finishing: Callable[[], None] = lambda: None, *, at_once: bool = False
    ) -> None:
        self.run = run
        self._waiting: list[tuple[dict[str, Any], dict[str, Any], TemporaryDirectory[str]]] = []
        # `_lock` is held while somebody's row is logged, unless `_at_once`; `_counting` never.
        self._lock, self._counting = threading.RLock(), threading.Lock()
        self._at_once, self._numbered = True, False
        self._first_mark: Any = None
        self._others = 0
        self._warned: set[str] = set()
        self._log: Callable[..., None] | None = getattr(run, "_log", None)
        self._before = vars(run).get("_log")
        self._watching: Callable[..., None] | None = None
        try:
            start = run.step
        except Exception:
            self._log, start = None, 0
        # The second is what the count would be without our rows.
        self._count, self._without = _Count(start), _Count(start)
        if self._log is not None:
            self._at_once = at_once
            run._log = self._watching = self._watch
        self._finishing = finishing
        self._hook = BeforeFinish(run, self._on_finish)
        # At the end of a script, wandb does not call what `BeforeFinish` hooks on.
        atexit.register(self._at_exit)

    def log(
        self, numbers: dict[str, Any], files: dict[str, Any], folder: TemporaryDirectory[str]
    ) -> None:
        """Logs a row, or keeps it until there is room for it.

        Args:
            numbers: the row's numbers, and its `train/global_step`.
            files: its media; the oldest of more than 200 that wait are given up. A function is
                called when the row is logged, and returns the medium.
            folder: where their files are; it is removed when they are logged.
        """
        with self._lock:
            self._waiting.append((numbers, files, folder))
            if not self._numbered and len(self._waiting) >= _PATIENCE:
                self._at_once = True
            if self._at_once:
                self.flush()
                return
            if self._numbered:
                self._warn_once(
                    "somebody logs to this W&B run with step=, and W&B drops rows that are behind "
                    "its count. So that none of theirs is lost, the rows of tlens wait until there "
                    "is room between two of these steps, or for the end of the run. To see them "
                    f"during training, log without step= and put {STEP!r} into your rows."
                )
            files_waiting = sum(len(files) for _, files, _ in self._waiting)
            for _, files, folder in self._waiting[:-1]:
                if files_waiting > _MOST_FILES:
                    files_waiting -= len(files)
                    files.clear()
                    folder.cleanup()

    def flush(self) -> None:
        """Logs all rows that wait."""
        with self._lock:
            self._send(len(self._waiting))

    def leave(self, *, now: bool) -> bool:
        """Logs the rows that wait, and leaves the run as it was. Returns whether it has done so.

        Args:
            now: do so even if somebody logs with `step=`, who may go on. Otherwise these rows wait
                until the run is finished.
        """
        if self._waiting and self._numbered and not now:
            return False
        try:
            self.flush()
        finally:
            self._hook.remove()
            self._unwatch()
        return True

    def _unwatch(self) -> None:
        atexit.unregister(self._at_exit)
        watching, self._watching = self._watching, None
        if watching is not None and vars(self.run).get("_log") is watching:
            before = self._before
            # Somebody who watched the run before may have left it by now.
            while isinstance(other := getattr(before, "__self__", None), RowLog):
                if other._watching is not None:
                    break
                before = other._before
            if before is None:
                del self.run._log
            else:
                self.run._log = before
        for _, _, folder in self._waiting:
            folder.cleanup()
        self._waiting.clear()
        self._at_once = True

    def _at_exit(self) -> None:
        with _logged_not_raised():
            self.flush()
        self._at_once, self._numbered = True, False

    def _on_finish(self) -> None:
        # The hook stays: W&B is going through the list that it is in.
        with _logged_not_raised():
            self._finishing()
        with _logged_not_raised():
            self.flush()
        self._unwatch()

    def _watch(
        self, data: Any, step: int | None = None, commit: bool | None = None, **more: Any
    ) -> None:
        """Stands before the run's own `_log`, through which all rows of the run go."""
        log = self._log
        assert log is not None
        own = getattr(_own, "logs", False)
        if own or self._watching is None or (self._at_once and step is None):
            log(data=data, step=step, commit=commit, **more)
            self._add(step, commit, own)
            return
        with self._lock:
            with _logged_not_raised():
                self._make_room(data, step, commit)
            log(data=data, step=step, commit=commit, **more)
            self._add(step, commit, own)

    def _make_room(self, data: Any, step: int | None, commit: bool | None) -> None:
        """Logs rows that wait before somebody's row of this step, as many as leave it its number,
        and learns whether rows are numbered."""
        if step is not None:
            self._numbered, self._at_once = True, False
            # One number is left out: the open row may hold what somebody else has logged.
            self._send(max(0, min(len(self._waiting), step - self._count.at - 1)), apart=True)
            if self._without.at <= step < self._count.at:
                self._warn_once(
                    f"W&B drops a row that was logged with step={step}, since it is behind the "
                    f"rows of tlens in this run. Log without step= and put {STEP!r} into your "
                    f"rows, or start logging before the second row of the trainer."
                )
        elif not self._numbered and commit is not False:
            mark = data.get(STEP) if isinstance(data, Mapping) else None
            self._others += 1
            if self._others == 1:
                self._first_mark = mark
            elif mark is None or mark != self._first_mark:
                self.flush()
                self._at_once = True

    def _send(self, rows: int, *, apart: bool = False) -> None:
        """Logs the first `rows` rows that wait; `apart` from the row that may be open."""
        apart = apart or self._numbered
        for _ in range(rows):
            numbers, files, folder = self._waiting.pop(0)
            _own.logs = True
            try:
                files = {name: one() if callable(one) else one for name, one in files.items()}
                if apart and self._log is not None:
                    self.run.log(numbers | files, step=self._count.at + 1, commit=True)
                else:
                    self.run.log(numbers | files)
            finally:
                _own.logs = apart = False
                folder.cleanup()

    def _add(self, step: int | None, commit: bool | None, own: bool) -> None:
        with self._counting:
            self._count.add(step, commit)
            if not own:
                self._without.add(step, commit)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("tlens: %s", text)


@contextmanager
def _logged_not_raised() -> Iterator[None]:
    """Keeps what goes wrong with our rows from whoever logs to the run or finishes it."""
    try:
        yield
    except Exception as error:
        logger.warning("tlens: not everything was logged to W&B: %s", error, exc_info=error)
