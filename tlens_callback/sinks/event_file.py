"""Writes an event file of TensorBoard's, without TensorBoard's own writer.

That writer, and PyTorch's, which is built on it, computes the checksums byte by byte in Python: a
quarter of a second for each megabyte, in which the training thread cannot run.
"""

import itertools
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

_numbers = itertools.count()


class EventFile:
    """A new file of records in TFRecord's format: length, its checksum, the record, its checksum.

    Source: tensorflow/core/lib/io/record_writer.h.
    """

    def __init__(self, folder: Path) -> None:
        self._crc32c = find_crc32c()
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):04d}"
        self._file = (folder / f"events.out.tfevents.{name}").open("xb")

    def add(self, records: list[bytes]) -> None:
        """Writes all records and flushes the file: a process that is killed afterwards leaves them
        whole."""
        for record in records:
            length = struct.pack("<Q", len(record))
            for part in (length, record):
                self._file.write(part)
                self._file.write(struct.pack("<I", _masked(self._crc32c(part))))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def find_crc32c() -> Callable[[bytes], int]:
    """Chooses the function for CRC-32C (Castagnoli): Google's in C, or where that package is not
    installed TensorBoard's own in Python, which is more than a thousand times slower."""
    try:
        from google_crc32c import value
    except ImportError:
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as value
    return value


def _masked(crc: int) -> int:
    """The checksum in the form in which the format stores it."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
