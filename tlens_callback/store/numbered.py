"""Finds numbered directories of runs: `path`, `path-2`, `path-3`, ..."""

from collections.abc import Callable
from pathlib import Path


def newest(base: Path, holds_run: Callable[[Path], bool]) -> tuple[int, Path]:
    """Returns number and path of the last directory that holds a run; `base` if none does."""
    beside = base.parent.iterdir() if base.parent.is_dir() else ()
    start = f"{base.name}-"
    numbers = [
        int(path.name.removeprefix(start))
        for path in beside
        if path.name.startswith(start)
        and path.name.removeprefix(start).isdecimal()
        and holds_run(path)
    ]
    number = max(numbers, default=1)
    return number, base if number == 1 else base.with_name(f"{start}{number}")


def unused(base: Path, number: int) -> Path:
    """Returns the first directory after this number that does not exist."""
    while (path := base.with_name(f"{base.name}-{number + 1}")).exists():
        number += 1
    return path
