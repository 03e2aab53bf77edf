"""Finds the store that a path names: the path itself, or a store in that directory."""

import re
from collections.abc import Sequence
from pathlib import Path

from tlens_callback.store.format import is_store
from tlens_callback.store.store import Store, read_store


def find_store(path: str | Path) -> tuple[Store, Sequence[str]]:
    """Returns the store at a path or in that directory, and the names of other stores there.

    In the directory of a run, `<name>-2`, `<name>-3`, ... are later runs of `<name>`: the last is
    chosen. `<name>-replay` is a replay of `<name>` at fewer steps: `<name>` itself is chosen.

    Raises:
        ValueError: if there is no store, one of a newer format, or several with different names.
    """
    path = Path(path).expanduser()
    if not path.is_dir() or is_store(path):
        return read_store(path), []
    stores = [each.name for each in path.iterdir() if is_store(each)]
    if not stores:
        inside = ", ".join(sorted(each.name for each in path.iterdir())[:12]) or "nothing"
        raise ValueError(
            f"There is no store of a watched run in {path}, which holds {inside}. A store is the "
            f"directory that TLensCallback writes, <output_dir>/tlens; the command tlens-callback "
            f"replay makes one from saved checkpoints."
        )
    runs = {name: _run(name) for name in stores}
    names = {name for name, _ in runs.values()}
    names -= {f"{name}-replay" for name in names}
    if len(names) > 1:
        raise ValueError(
            f"{path} holds several stores: name one of them, "
            f"{', '.join(str(path / name) for name in sorted(stores))}."
        )
    *others, last = sorted(stores, key=lambda name: (runs[name][0] in names, runs[name][1]))
    return read_store(path / last), others


def _run(name: str) -> tuple[str, int]:
    """Splits the name of a store into the name and number of the run: "tlens-3" is
    ("tlens", 3)."""
    numbered = re.fullmatch(r"(.+)-([1-9]\d*)", name)
    return (numbered[1], int(numbered[2])) if numbered else (name, 1)
