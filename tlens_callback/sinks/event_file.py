"""An event file of TensorBoard's, written at once.

TensorBoard's own writer, and PyTorch's, which is built on it, computes the checksums byte by byte
in Python: a tenth of a second for each megabyte, in which the training thread cannot run.
"""

import itertools
import os
import socket
import struct
import time
from functools import lru_cache
from pathlib import Path

import numpy as np

_numbers = itertools.count()


class EventFile:
    """Records of TFRecord's format: length, its checksum, the record, its checksum.

    Source: tensorflow/core/lib/io/record_writer.h (format), RFC 3720, appendix B.4 (CRC-32C).
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):04d}"
        self._file = (folder / f"events.out.tfevents.{name}").open("xb")

    def add(self, records: list[bytes]) -> None:
        """Writes them all, so that a killed process has left them whole."""
        for record in records:
            length = struct.pack("<Q", len(record))
            for part in (length, record):
                self._file.write(part)
                self._file.write(struct.pack("<I", _masked(crc32c(part))))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli).

    The sum of a text is linear in its bits but for the ones that it begins with. So pieces of
    `_PIECE` bytes are summed side by side, and each sum is taken on over the zeros that stand for
    the pieces after it.
    """
    text = np.frombuffer(data, np.uint8).copy()
    pieces = 1 << max(0, -(-len(text) // _PIECE) - 1).bit_length()
    # The ones it begins with, as a change of the first bytes; zeros before a text change nothing.
    short = max(0, 4 - len(text))
    text[:4] ^= 255
    lanes = np.zeros((pieces, _PIECE), np.uint8)
    lanes.reshape(-1)[pieces * _PIECE - len(text) :] = text
    sums = np.zeros(pieces, np.uint32)
    table = _table()
    for column in np.ascontiguousarray(lanes.T):
        sums = table[(sums ^ column) & 255] ^ (sums >> 8)
    level = 0
    while len(sums) > 1:
        sums = _over_zeros(sums[::2], level) ^ sums[1::2]
        level += 1
    # Of the ones, those that a text of less than four bytes leaves over.
    left = 0xFFFFFFFF >> (8 * (4 - short)) if short else 0
    return int(sums[0]) ^ left ^ 0xFFFFFFFF


_PIECE = 256


@lru_cache
def _table() -> np.ndarray:
    """[byte] -> what it makes of an empty sum."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1)
    return table


def _over_zeros(sums: np.ndarray, level: int) -> np.ndarray:
    """The sums after `_PIECE * 2**level` more zeros."""
    shift = _shift(level)
    parts = [shift[i][sums >> 8 * i & 255] for i in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]


@lru_cache
def _shift(level: int) -> np.ndarray:
    """[byte of a sum, its value] -> the sum that it becomes over the zeros."""
    if level:
        return _over_zeros(_shift(level - 1), level - 1)
    sums = np.arange(256, dtype=np.uint32)[None] << (8 * np.arange(4, dtype=np.uint32))[:, None]
    for _ in range(_PIECE):
        sums = _table()[sums & 255] ^ (sums >> 8)
    return sums


def _masked(crc: int) -> int:
    """As the format keeps a checksum."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
