"""`OpenedStep`: what the arrays file of a step says, read once for all that is asked of it."""

import gc
import json
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

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
            _demand_same(file, stamp)
            header = _header(file)
        self._begin = 8 + len(header)
        with _collector_paused():
            self._tensors: dict[str, Any] = json.loads(header)
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
            _demand_same(file, self.stamp)
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
            _demand_same(file, self.stamp)
            for key in keys:
                about = self.about[key]
                lower = about["packing"] == "tril" and texts_of(key) not in self._metadata
                yield key, about, self._read(file, key) if lower else None

    def _read(self, file: BinaryIO, key: str) -> np.ndarray:
        return _numbers(file, self._begin, self._tensors[key])


def one_reading(path: Path, stamp: Stamp, key: str) -> Reading | None:
    """Reads one reading, without its description, and takes apart no more of the header than that:
    it may have ten thousand keys. Returns None if the step does not have the key.

    The file must have been found whole before, as `stamp` says it is now.

    Raises:
        OSError, ValueError: if it was written again meanwhile.
        LookupError: if the whole header has to be read for it.
    """
    with path.open("rb") as file:
        _demand_same(file, stamp)
        header = _header(file)
        text = header.decode()
        about_all = _value_of(text, "readings")
        if not isinstance(about_all, str):
            raise LookupError("the metadata of the readings is not where it is looked for")
        if json.dumps(key) not in about_all:
            return None
        about = _value_of(about_all, key, ensure_ascii=True)
        array, texts = _value_of(text, key), _value_of(text, texts_of(key))
        # A text that looks like another's name has a value of another kind.
        if not (isinstance(about, dict) and isinstance(array, dict) and "packing" in about):
            raise LookupError(f"{key!r} is not where it is looked for")
        if not isinstance(texts, str | None):
            raise LookupError(f"the texts of {key!r} are not where they are looked for")
        return unpack(key, _numbers(file, 8 + len(header), array), about, texts)


def _value_of(text: str, name: str, *, ensure_ascii: bool = False) -> Any:
    """Returns the value of the first entry with this name in a JSON text; None if there is none.

    In a text inside it, the quotation marks around a name have backslashes before them.
    """
    start = f"{json.dumps(name, ensure_ascii=ensure_ascii)}:"
    at = text.find(start)
    if at < 0:
        return None
    at += len(start)
    return json.JSONDecoder().raw_decode(text, at + text.startswith(" ", at))[0]


def _header(file: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length)


def _numbers(file: BinaryIO, first: int, about: Mapping[str, Any]) -> np.ndarray:
    begin, end = about["data_offsets"]
    file.seek(first + begin)
    array = np.frombuffer(file.read(end - begin), _DTYPES[about["dtype"]])
    if array.size != math.prod(about["shape"]):
        raise ValueError(f"{file.name} was cut short while it was read.")
    return array.reshape(about["shape"])


def _demand_same(file: BinaryIO, stamp: Stamp) -> None:
    if stamp_of(os.fstat(file.fileno())) != stamp:
        raise ValueError(f"{file.name} was written again while it was read. Ask once more.")


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keeps Python from looking for garbage while a header is parsed.

    It would look through all objects of the process again and again, since a header has many: that
    takes several times as long as the parsing.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class LastOpened(OrderedDict[int, OpenedStep]):
    """The steps that were asked for last, at most four: a run has more than may stay open."""

    def keep(self, step: int, opened: OpenedStep) -> None:
        """Keeps this step, and lets go of those that were asked for longest ago."""
        self[step] = opened
        self.move_to_end(step)
        while len(self) > _KEPT:
            self.popitem(last=False)
