"""Writes files so that each is there whole or not at all, whoever else writes it."""

import os
import re
import secrets
import socket
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_OLD = re.compile(r"\..+\.tmp")
_OURS = re.compile(r"\..+\.([0-9a-f]{8}-[0-9]+)-[0-9a-f]{8}\.tmp")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside `path`, and then renames it to `path`.

    The temporary name is this call's alone: of several processes that write `path` at once each
    writes its own, and a reader sees one of them whole.

    Raises:
        OSError: if it cannot be written (the disk is full); the old file is unchanged.
    """
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_new(path: Path, content: bytes) -> bool:
    """Writes a file as `write_whole` does, unless it exists. Of several processes that try it at
    once, one succeeds.

    Returns:
        Whether it was written.

    Raises:
        OSError: if it cannot be written.
    """
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # this file system has no links
            with path.open("xb") as file:
                file.write(content)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Removes temporary files of processes that were killed while they wrote.

    Files of processes that still run stay, and so do those of other machines.
    """
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            if _OLD.fullmatch(path.name) and not _may_be_written(path.name):
                with suppress(OSError):
                    path.unlink()


def _temporary(path: Path) -> Path:
    # A name may have 255 bytes; the end of a long one is cut off.
    start = path.name.encode()[:200].decode(errors="ignore")
    return path.with_name(f".{start}.{this_process()}-{secrets.token_hex(4)}.tmp")


def _may_be_written(name: str) -> bool:
    """Whether the process that the temporary name of a file tells may still write it."""
    ours = _OURS.fullmatch(name)
    # Without it, it is a name of an older version of this package.
    return ours is not None and may_run(ours[1])


def this_process() -> str:
    """Identifies this process among those of all machines."""
    return f"{_machine()}-{os.getpid()}"


def may_run(process: str) -> bool:
    """Whether a process that `this_process` identified may still run: it does, or it is on another
    machine."""
    machine, _, number = process.partition("-")
    if machine != _machine():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError, ValueError):
        return True
    return True


def _machine() -> str:
    """Identifies this machine, in eight hexadecimal digits."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"
