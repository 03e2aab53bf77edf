"""`OpenedStep`: what the arrays file of a step says, read once for all that is asked of it."""

import json
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tlens_callback.meaning import Description
from tlens_callback.reading import Reading
from tlens_callback.store.damage import demand_readable
from tlens_callback.store.format import described_in, texts_of, unpack

_KEPT = 4
"""Steps of which this is kept: the first and the last, which are compared, and those beside one."""

_DTYPES = {
    **{"BOOL": "?", "F16": "<f2", "F32": "<f4", "F64": "<f8"},
    **{f"{letter}{8 * n}": f"<{letter.lower()}{n}" for letter in "IU" for n in (1, 2, 4, 8)},
}
"""Types of numbers in a safetensors file that numpy has too."""

Stamp = tuple[int, ...]
"""Changes when a file is written again: its inode, size and time."""


def stamp_of(at: os.stat_result) -> Stamp:
    """Returns the stamp of a file."""
    return at.st_ino, at.st_size, at.st_mtime_ns


class OpenedStep:
    """The readings of one step, whose file is open only while numbers are read.

    A header has all keys of a step, so that to read it for each of many numbers would take a time
    that grows with the square of their number.

    Args:
        checked: whether the file was found whole before, as it is now.

    Attributes:
        stamp: of the file.
        about: key -> what the file says about a reading, in the order in which they were written.

    Raises:
        OSError, SafetensorError, ValueError, KeyError, RecursionError: if the file is damaged, or
            a reading could not be made of it.
    """

    def __init__(self, path: Path, stamp: Stamp, *, checked: bool) -> None:
        self.stamp, self._path = stamp, path
        if not checked:
            # Compares the header with the length of the file and with itself.
            with safe_open(path, "np"):
                pass
        with path.open("rb") as file:
            self._demand_same(file)
            (length,) = struct.unpack("<Q", file.read(8))
            self._tensors: dict[str, Any] = json.loads(file.read(length))
        self._begin = 8 + length
        self._metadata: dict[str, str] = self._tensors.pop("__metadata__", {})
        self.about: dict[str, Any] = json.loads(self._metadata["readings"])
        if not checked:
            demand_readable(self._tensors, self._metadata, self.about, known=_DTYPES)

    @cached_property
    def descriptions(self) -> dict[str, Description]:
        """Instrument -> description, for the instruments that describe themselves."""
        return described_in(self._metadata)

    def readings(self, keys: Collection[str]) -> list[Reading]:
        """Returns the readings of these keys, which the step must have, in the order given."""
        with self._path.open("rb") as file:
            self._demand_same(file)
            found = [
                unpack(key, self._read(file, key), self.about[key], self._metadata.get(texts))
                for key, texts in ((key, texts_of(key)) for key in keys)
            ]
        said = self.descriptions
        return [r.described(said[r.instrument]) if r.instrument in said else r for r in found]

    def stored(
        self, keys: Collection[str]
    ) -> Iterator[tuple[str, dict[str, Any], np.ndarray | None]]:
        """Yields what `Store.stored` does."""
        with self._path.open("rb") as file:
            self._demand_same(file)
            for key in keys:
                about = self.about[key]
                lower = about["packing"] == "tril" and texts_of(key) not in self._metadata
                yield key, about, self._read(file, key) if lower else None

    def _read(self, file: Any, key: str) -> np.ndarray:
        about = self._tensors[key]
        begin, end = about["data_offsets"]
        file.seek(self._begin + begin)
        array = np.frombuffer(file.read(end - begin), _DTYPES[about["dtype"]])
        if array.size != math.prod(about["shape"]):
            raise ValueError(f"{self._path} was cut short while it was read.")
        return array.reshape(about["shape"])

    def _demand_same(self, file: Any) -> None:
        if stamp_of(os.fstat(file.fileno())) != self.stamp:
            raise ValueError(f"{self._path} was written again while it was read. Ask once more.")


class LastOpened(OrderedDict[int, OpenedStep]):
    """The steps that were asked for last, at most four: a run has more than may stay open."""

    def keep(self, step: int, opened: OpenedStep) -> None:
        """Keeps this step, and lets go of those that were asked for longest ago."""
        self[step] = opened
        self.move_to_end(step)
        while len(self) > _KEPT:
            self.popitem(last=False)
