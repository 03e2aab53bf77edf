"""An order of the training rows that is drawn only as far as it is read."""

from array import array

import torch


class Shuffled:
    """Gives the numbers below `size` in the order of `torch.randperm` with seed 0 (which has
    another algorithm from 200 million on).

    It takes memory for the numbers that were asked for, not for all: a run reads only some of the
    rows of its training data.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(0)
        self._drawn = array("q")
        # What Fisher and Yates's shuffle has moved: place -> the number that is there now.
        self._moved: dict[int, int] = {}

    def __len__(self) -> int:
        return self._size

    def __call__(self, place: int) -> int:
        """Returns the number at this place, from 0 on."""
        assert 0 <= place < self._size
        while len(self._drawn) <= place:
            at = len(self._drawn)
            left = torch.randint(self._size - at, (), generator=self._generator, dtype=torch.int64)
            other = at + int(left)
            self._drawn.append(self._moved.get(other, other))
            self._moved[other] = self._moved.pop(at, at)
        return self._drawn[place]
