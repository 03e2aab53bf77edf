"""`Waiting`: the observations that wait to be written, bounded in number and in bytes."""

import contextvars
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tlens_callback.interfaces import Sink

MOST, MOST_BYTES = 2, 256 * 2**20
"""Observations that may wait while one is being written, and bytes that all of these may have. One
that is larger by itself waits until nothing else is there."""


class Job(NamedTuple):
    """Holds calls that are still to be made, in order, and the context to make them in."""

    step: int | None
    """The step of the observation to write; None: the calls close the sinks."""

    size: int
    """Bytes of its readings."""

    calls: deque[tuple[Sink, Callable[[], None]]]
    context: contextvars.Context


class Waiting(deque[Job]):
    """The jobs that wait, the next one first. `current` is the job that is being done."""

    def has_room(self, size: int, current: Job | None) -> bool:
        """Whether an observation of so many bytes may wait too."""
        held = self._bytes(current)
        return len(self) < MOST and (not held or held + size <= MOST_BYTES)

    def drop_old(self, current: Job | None) -> int:
        """Drops the oldest observations that are too many, but not the last; returns how many."""
        dropped = 0
        while len(self) > 1 and (len(self) > MOST or self._bytes(current) > MOST_BYTES):
            self.popleft()
            dropped += 1
        return dropped

    def _bytes(self, current: Job | None) -> int:
        return sum(job.size for job in self) + (current.size if current else 0)
