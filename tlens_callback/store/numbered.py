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


def of_run(
    base: Path,
    holds_run: Callable[[Path], bool],
    run_in: Callable[[Path], str | None],
    run: str | None,
) -> Path:
    """Returns the directory in which a resumed run goes on.

    That is the one that says it holds this run; the last one if neither says which run it is; else
    a new one.

    Args:
        run_in: the identity that a directory says it holds, or None.
        run: the identity of the resumed run, or None.
    """
    number, last = newest(base, holds_run)
    if run is None or not holds_run(last):
        return last
    numbered = (base.with_name(f"{base.name}-{n}") for n in range(number, 1, -1))
    for path in (*numbered, base):
        if run_in(path) == run:
            return path
    return last if run_in(last) is None else unused(base, number)


def unused(base: Path, number: int) -> Path:
    """Returns the first directory after this number that does not exist."""
    while (path := base.with_name(f"{base.name}-{number + 1}")).exists():
        number += 1
    return path
