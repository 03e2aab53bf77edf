"""`FileBudget`: which observations of a run of unknown length have files, within a number."""

import math


class FileBudget:
    """Counts files, and thins them out so that they stay within a number however long a run is.

    Half of them go to the observations as they come. Then what is left is spread evenly over twice
    as many further observations as there were so far, again after each one that had some: intervals
    grow as the run does. So much stays free that the last observation and the page have their own.

    Args:
        most: files in all. None: no bound.
        page: files to keep free besides those of the last observation.

    Attributes:
        spent: files so far.
        seen: observations so far that had something to show.
    """

    def __init__(self, most: int | None, *, page: int) -> None:
        self.most, self.page = most, page
        self.spent = self.seen = 0
        self._largest = self._next = 0

    def take(self, wanted: int) -> bool:
        """Whether the next observation has its files, this many; they are counted if so."""
        at, self.seen = self.seen, self.seen + 1
        self._largest = max(self._largest, wanted)
        if self.most is not None:
            left = self.most - self.page - self._largest - self.spent
            if wanted > left or at < self._next:
                return False
            if self.spent + wanted > self.most / 2:
                more = max(1, left // self._largest)
                self._next = at + max(1, math.ceil(2 * at / more))
        self.spent += wanted
        return True

    def last(self, wanted: int, *, page: int) -> int:
        """How many of these files, of the last observation or the page, there is room for; they are
        counted.

        Args:
            page: files to keep free beyond them.
        """
        room = wanted if self.most is None else max(0, self.most - page - self.spent)
        taken = min(wanted, room)
        self.spent += taken
        return taken
