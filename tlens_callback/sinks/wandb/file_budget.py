"""`FileBudget`: decides which observations may write files when their number is limited."""

import math


class FileBudget:
    """Counts files, and spaces them out so that a run of any length stays within the limit.

    All observations have files until half of the limit is used. The rest is then spread evenly over
    twice as many further observations as there were so far. This is computed again after each
    observation with files, so that the intervals grow with the run. Enough is kept free for the
    last observation and the page.

    Args:
        most: files in all. None: no limit.
        page: files to keep free besides those of the last observation.

    Attributes:
        spent: files so far.
        seen: observations so far that had files to show.
    """

    def __init__(self, most: int | None, *, page: int) -> None:
        self.most, self.page = most, page
        self.spent = self.seen = 0
        self._largest = self._next = 0

    def take(self, wanted: int) -> bool:
        """Whether the next observation may write this many files; if so, they are counted."""
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
        """Counts as many of the last observation's files, or of the page, as there is room for, and
        returns their number.

        Args:
            page: files to keep free beside them.
        """
        room = wanted if self.most is None else max(0, self.most - page - self.spent)
        taken = min(wanted, room)
        self.spent += taken
        return taken
