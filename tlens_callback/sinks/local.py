"""`LocalSink`: every reading in one directory, readable with pandas and safetensors."""

import json
import logging
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tlens_callback.page import PageFolder, page
from tlens_callback.reading import Reading
from tlens_callback.store.atomic import write_whole
from tlens_callback.store.format import (
    FORMAT,
    MANIFEST,
    arrays_file,
    is_store,
    pack,
    scores_file,
    steps_in,
)
from tlens_callback.store.numbered import newest, unused
from tlens_callback.store.store import read_store
from tlens_callback.store.tables import NAMES, long_frame

logger = logging.getLogger("tlens_callback")

_PACKAGES = "tlens-callback torch transformers peft trl transformer-lens numpy safetensors".split()
_MOST_AXES, _MOST_VALUES = 3, 100_000

PAGE = "page.html"
"""The page of a run in one file, in its directory."""


class LocalSink:
    """Writes every reading into one directory a run; `read_store` gives them back.

    Layout: see `tlens_callback.store.format`. A process that is killed leaves every completed step
    readable (nothing is synced to disk; a power cut may cost the last steps).

    Attention patterns (axes ending in "query", "key", nothing above the diagonal, magnitude at
    most 1) are packed: lower triangle, float16. That is off by at most 2**-12, relatively by 2**-11
    (2**-25 below 2**-14, so that what is smaller becomes 0). All else is kept exactly.

    A step that is not greater than the last one makes the run begin again from there: the steps
    from it on are removed first. A sink that is new or was closed looks at what is there: step 0
    begins a new run, in `<path>-2`, `<path>-3`, ... if `path` holds one already; a later step
    goes on with the last of these, from that step.

    With `page`, the directory also has the page of the run, to look at: page/index.html, which
    picks up each step by itself while the run goes on, and page.html, one file of at most 15 MB,
    which is made by `close`. If the live page fails, that is logged and it stays as it is; the
    store goes on, and so does the page of a later run that resumes it.

    Args:
        path: the directory; made at the first write.
        exact: keep attention patterns in float32, at twice the size.
        page: keep the page too. About as much disk again, and 30 ms a step.

    Attributes:
        path: where this run is written; known after the first write.

    Raises:
        ValueError: if `path` is a file, or holds a `manifest.json` of something else.
    """

    def __init__(self, path: str | Path, *, exact: bool = False, page: bool = True) -> None:
        self._base = Path(path).expanduser().absolute()
        self.path, self.exact = self._base, exact
        self._last: int | None = None
        self._entered = False
        self._with_page = page
        self._folder: PageFolder | None = None
        if self._base.exists() and not self._base.is_dir():
            raise ValueError(f"{self._base} is a file; LocalSink needs a directory.")
        if (self._base / MANIFEST).exists() and not is_store(self._base):
            raise ValueError(
                f"{self._base / MANIFEST} belongs to something else; give LocalSink a directory "
                f"of its own."
            )

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Writes a step.

        Raises:
            ValueError: for a negative step, or two readings of one key.
            OSError: a full disk, say; the steps before are as they were.
        """
        if step < 0:
            raise ValueError(f"A step is 0 or more, got {step}.")
        counts = Counter(reading.key for reading in readings)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"Step {step} has two readings of the key {min(twice)!r}.")
        if self._last is None:
            self._enter(step)
        elif step <= self._last:
            self._drop(step)
        write_whole(arrays_file(self.path, step), pack(readings, exact=self.exact))
        self._write_scores(readings, step)
        self._last = step
        # After the step is complete, so that the store is never behind.
        self._on_page(lambda folder: folder.write(readings, step))

    def page(self) -> Path:
        """Packs what is there into one HTML file, unless the file has all of it, and says where.

        Raises:
            ValueError: where nothing was written yet.
            OSError: a full disk, say.
        """
        path = self.path if self._entered else newest(self._base, is_store)[1]
        if not is_store(path):
            raise ValueError(f"{path} is no store yet: the first write makes it.")
        if not _is_packed(path):
            text = page(read_store(path))
            write_whole(path / PAGE, text.encode())
        return path / PAGE

    def close(self) -> None:
        """Packs the page; a `write` after it looks at the directory anew.

        Raises:
            OSError: if the page does not fit on the disk, say. All steps are written by then.
        """
        wrote, self._last = self._last is not None, None
        if wrote and self._with_page:
            self._on_page(PageFolder.finish)
            self._folder = None
            self.page()

    def __str__(self) -> str:
        text = f"local store {self.path}, for tlens_callback.read_store"
        if not self._with_page:
            return text
        packed = self._last is None and _is_packed(self.path)
        return f"{text}; page {self.path / PAGE if packed else self.path / 'page' / 'index.html'}"

    def _on_page(self, act: Callable[[PageFolder], None]) -> None:
        """Does something to the live page, and gives it up with a word if it fails: the readings
        are what must not be lost, and whatever a sink raises sets it aside."""
        if self._folder is None:
            return
        try:
            act(self._folder)
        except Exception as error:
            logger.warning(
                "tlens: the page %s failed (%s: %s) and stays as it is. The store goes on; "
                "LocalSink(page=False) does without.",
                self._folder.path,
                type(error).__name__,
                error,
                exc_info=error,
            )
            self._folder = None

    def _enter(self, step: int) -> None:
        """Chooses the directory, clears what an interrupted run left, and writes the manifest."""
        self._entered = True
        number, self.path = newest(self._base, is_store)
        if step == 0 and steps_in(self.path / "scores"):
            self.path = unused(self._base, number)
        for folder in ("arrays", "scores"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for left in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
            left.unlink()
        self._folder = PageFolder(self.path / "page") if self._with_page else None
        self._drop(step)
        if not is_store(self.path):
            about = {
                "tlens_callback": FORMAT,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "python": platform.python_version(),
                "packages": {name: _version(name) for name in _PACKAGES},
            }
            write_whole(self.path / MANIFEST, json.dumps(about, indent=1).encode())
        self._on_page(self._catch_up)

    def _catch_up(self, folder: PageFolder) -> None:
        """Gives the page the steps of the store: a run may have gone on without it."""
        store = read_store(self.path)
        folder.keep(store.steps)
        for step in sorted(set(store.steps) - set(folder.steps)):
            folder.write(store.readings(step), step)

    def _drop(self, first: int) -> None:
        """Removes the steps from `first` on; scores first, so that no half is taken for a whole."""
        self._on_page(lambda folder: folder.drop(first))
        for folder, file in (("scores", scores_file), ("arrays", arrays_file)):
            for step in steps_in(self.path / folder):
                if step >= first:
                    file(self.path, step).unlink()

    def _write_scores(self, readings: Sequence[Reading], step: int) -> None:
        frame = long_frame(
            [r for r in readings if len(r.axes) <= _MOST_AXES and r.values.size <= _MOST_VALUES]
        )
        frame.insert(0, "step", step)
        wanted = [str(name) for name in frame.columns]
        if earlier := steps_in(self.path / "scores"):
            # Who reads the folder as one table gets the columns of its first file, no others.
            first = scores_file(self.path, earlier[0])
            known = pq.read_schema(first).names
            if not set(wanted) <= set(known):
                table = pq.read_table(first)
                columns = {name: table[name] for name in table.column_names}
                write_whole(first, _parquet(columns, [*known, *wanted]))
        columns = {str(name): _arrow(column) for name, column in frame.items()}
        write_whole(scores_file(self.path, step), _parquet(columns, wanted))


def _is_packed(path: Path) -> bool:
    """Whether the packed page is younger than the last step that came or went."""
    try:
        return (path / PAGE).stat().st_mtime_ns > (path / "scores").stat().st_mtime_ns
    except OSError:
        return False


_NOT_AXES = {"step", *NAMES, "value", "text"}


def _arrow(column: pd.Series) -> pa.Array:
    if not isinstance(column.array, pd.Categorical):
        return pa.array(column.array)
    codes = column.array.codes
    names = pa.array(list(column.array.categories), pa.large_string())
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), names)


def _parquet(columns: Mapping[str, Any], names: Sequence[str]) -> bytes:
    """A parquet file of these columns and of the axes among `names`, empty where not given."""
    schema = _schema(tuple(dict.fromkeys(name for name in names if name not in _NOT_AXES)))
    length = len(columns["value"])
    arrays = [
        columns[field.name].cast(field.type)
        if field.name in columns
        else pa.nulls(length, field.type)
        for field in schema
    ]
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), out)
    return out.getvalue().to_pybytes()


@lru_cache
def _schema(axes: tuple[str, ...]) -> pa.Schema:
    """Column types; pandas's own note on them, which makes it read axes as whole numbers."""
    types = {
        "step": "int64",
        **dict.fromkeys(NAMES, "str"),
        **dict.fromkeys(axes, "Int32"),
        "value": "float32",
        "text": "str",
    }
    empty = pd.DataFrame({name: pd.array([], dtype=type_) for name, type_ in types.items()})
    return pa.Schema.from_pandas(empty, preserve_index=False)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
