"""`LocalSink`: writes readings to a directory that pandas and safetensors can read."""

import json
import logging
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tlens_callback.page import PageFolder, page
from tlens_callback.reading import Reading
from tlens_callback.store.atomic import (
    may_run,
    remove_leftovers,
    this_process,
    write_new,
    write_whole,
)
from tlens_callback.store.format import (
    FORMAT,
    MANIFEST,
    arrays_file,
    is_store,
    manifest,
    pack,
    scores_file,
    steps_in,
)
from tlens_callback.store.numbered import newest, of_run, unused
from tlens_callback.store.parquet import arrow, parquet
from tlens_callback.store.store import read_store
from tlens_callback.store.tables import long_frame

logger = logging.getLogger("tlens_callback")

_PACKAGES = "tlens-callback torch transformers peft trl transformer-lens numpy safetensors".split()
_MOST_AXES, _MOST_VALUES = 3, 100_000

PAGE = "page.html"
"""The file with the whole page of a run, in its directory."""


class LocalSink:
    """Writes every reading of a run into one directory; `read_store` reads them back.

    `tlens_callback.store.format` describes the files. If the process is killed, every completed
    step can be read (nothing is synced to disk; a power cut may lose the last steps).

    Attention patterns (axes ending in "query", "key", zeros above the diagonal, magnitude at most
    1) are packed: lower triangle, float16. A value is off by at most 2**-12, relatively by 2**-11
    (below 2**-14 by at most 2**-25, so that the smallest become 0). Everything else is exact.

    A step that is not greater than the last one makes the run begin again from that step: it and
    all later steps are removed first. For a sink that is new or was closed, step 0 begins a new
    run, in `<path>-2`, `<path>-3`, ... if `path` holds a run already; a later step resumes from
    that step the run whose identity `begin` has told, or the last of these runs if none was told
    and if its store is of an older version. If no store holds it, a new one begins.

    With `page`, the directory also has the page of the run: page/index.html, which shows each new
    step while the run goes on, and page.html, one file of at most 15 MB, which `close` makes (60
    MB where the scores of all heads at all steps need it). If the live page fails, that is logged
    and the page is not updated any more; the store goes on. A later run that resumes this one
    updates the page again.

    Args:
        path: the directory; made at the first write.
        exact: keep attention patterns in float32, at twice the size.
        page: make the page too. It takes about as much disk again, and 30 ms per step.

    Attributes:
        path: the directory of this run; known after the first write.

    Raises:
        ValueError: if `path` is a file, or has a `manifest.json` that is not of a store.
    """

    def __init__(self, path: str | Path, *, exact: bool = False, page: bool = True) -> None:
        if (
            not isinstance(path, str | os.PathLike)
            or os.fspath(path) in ("", b"")
            or "\0" in str(path)
        ):
            raise ValueError(
                f"LocalSink needs the path of a directory of its own, such as "
                f"LocalSink('out/tlens'), got {path!r}."
            )
        self._base = Path(path).expanduser().absolute()
        self.path, self.exact = self._base, exact
        self._last: int | None = None
        self._about: dict[str, Any] = {}
        self._has_path = False
        self._with_page = page
        self._folder: PageFolder | None = None
        if self._base.exists() and not self._base.is_dir():
            raise ValueError(f"{self._base} is a file, but LocalSink needs a directory.")
        if (self._base / MANIFEST).exists() and not is_store(self._base):
            raise ValueError(
                f"{self._base / MANIFEST} belongs to something else. Give LocalSink a directory of "
                f"its own."
            )

    def begin(self, about: Mapping[str, Any]) -> None:
        """Keeps what is known of the run, for the manifest; see `Sink`."""
        self._about = dict(about)

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Writes a step.

        Raises:
            ValueError: for a negative step, or two readings with the same key.
            OSError: if it cannot be written (the disk is full); earlier steps are unchanged.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}.")
        counts = Counter(reading.key for reading in readings)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"Step {step} has two readings with the key {min(twice)!r}.")
        if self._last is None:
            self._open_run(step)
        elif step <= self._last:
            self._remove_from(step)
        write_whole(arrays_file(self.path, step), pack(readings, exact=self.exact))
        self._write_scores(readings, step)
        self._last = step
        # After the step is complete, so that the store is never behind the page.
        self._update_page(lambda folder: folder.write(readings, step))

    def page(self) -> Path:
        """Makes the page of all steps in one HTML file, unless it is up to date; returns its path.

        Raises:
            ValueError: if nothing was written yet.
            OSError: if it cannot be written (the disk is full).
        """
        path = self.path if self._has_path else newest(self._base, is_store)[1]
        if not is_store(path):
            raise ValueError(f"{path} is no store yet; the first write makes it one.")
        if not _is_packed(path):
            text = page(read_store(path))
            write_whole(path / PAGE, text.encode())
        return path / PAGE

    def close(self) -> None:
        """Makes the page in one file. A `write` after it acts like one of a new sink.

        Raises:
            OSError: if the page cannot be written. All steps are written by then.
        """
        wrote, self._last = self._last is not None, None
        if wrote and self._with_page:
            self._update_page(PageFolder.finish)
            self._folder = None
            self.page()

    def __str__(self) -> str:
        text = f"local store {self.path}, for tlens_callback.read_store"
        if not self._with_page:
            return text
        packed = self._last is None and _is_packed(self.path)
        return f"{text}; page {self.path / PAGE if packed else self.path / 'page' / 'index.html'}"

    def _update_page(self, act: Callable[[PageFolder], None]) -> None:
        """Calls `act` on the live page; if that fails, logs it and gives the page up.

        It must not raise: a sink that raises is not used any more, and the readings would be lost.
        """
        if self._folder is None:
            return
        try:
            act(self._folder)
        except Exception as error:
            logger.warning(
                "tlens: the page %s failed (%s: %s) and is not updated any more. The store goes "
                "on; LocalSink(page=False) makes no page.",
                self._folder.path,
                type(error).__name__,
                error,
                exc_info=error,
            )
            self._folder = None

    def _open_run(self, step: int) -> None:
        """Chooses the directory, clears what an interrupted run left, and writes the manifest."""
        self._has_path = True
        if step > 0:
            self.path = of_run(self._base, is_store, _run_in, self._about.get("run"))
            self._claim()
        else:
            self._begin_store()
        folders = [self.path / name for name in ("arrays", "scores")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        remove_leftovers([self.path, *folders])
        self._say_what_is_taken_back(step)
        self._folder = PageFolder(self.path / "page") if self._with_page else None
        self._remove_from(step)
        self._update_page(self._catch_up)

    def _begin_store(self) -> None:
        """Chooses a directory in which no other run has begun, and writes its manifest."""
        number, self.path = newest(self._base, is_store)
        if steps_in(self.path / "scores"):
            self.path = unused(self._base, number)
        while not self._claim():
            if not _begins_elsewhere(self.path):
                # A run that ended before its first step has left it.
                write_whole(self.path / MANIFEST, self._manifest())
                break
            self.path = unused(self._base, number)

    def _claim(self) -> bool:
        """Writes the manifest of a new store; returns whether this call has made it one."""
        self.path.mkdir(parents=True, exist_ok=True)
        return write_new(self.path / MANIFEST, self._manifest())

    def _manifest(self) -> bytes:
        about = {
            "tlens_callback": FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "process": this_process(),
            **self._about,
        }
        return json.dumps(about, indent=1, default=str).encode()

    def _say_what_is_taken_back(self, step: int) -> None:
        """Says what a resumed run removes, or that none of the stores here is its own."""
        if step > 0 and self.path != self._base and not steps_in(self.path / "scores"):
            logger.warning(
                "tlens: no store at %s holds the run that goes on at step %d, so a new one begins "
                "at %s.",
                *(self._base, step, self.path),
            )
        later = [at for at in steps_in(self.path / "scores") if at > step]
        if later:
            logger.warning(
                "tlens: the run in %s goes on at step %d; what it had at %d later step%s, up to "
                "step %d, is taken back.",
                *(self.path, step, len(later), "s" * (len(later) > 1), later[-1]),
            )

    def _catch_up(self, folder: PageFolder) -> None:
        """Gives the page the steps of the store that it lacks: a run may have gone on without
        it."""
        store = read_store(self.path)
        folder.keep(store.steps)
        for step in sorted(set(store.steps) - set(folder.steps)):
            folder.write(store.readings(step), step)

    def _remove_from(self, first: int) -> None:
        """Removes the steps from `first` on; the scores first, so that no half step looks
        complete."""
        self._update_page(lambda folder: folder.drop(first))
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
        for step_before in steps_in(self.path / "scores"):
            # pandas reads the folder as one table with only the columns of its first file.
            first = scores_file(self.path, step_before)
            try:
                known = pq.read_schema(first).names if first.is_file() else []
            except (OSError, pa.ArrowException):
                known = []
            if not known:
                continue  # it is damaged, and readers leave it out
            if not set(wanted) <= set(known):
                table = pq.read_table(first)
                columns = {name: table[name] for name in table.column_names}
                write_whole(first, parquet(columns, [*known, *wanted]))
            break
        columns = {str(name): arrow(column) for name, column in frame.items()}
        write_whole(scores_file(self.path, step), parquet(columns, wanted))


def _run_in(path: Path) -> str | None:
    """The identity of the run that this store holds; None in a store of an older version."""
    run = (manifest(path) or {}).get("run")
    return run if isinstance(run, str) else None


def _begins_elsewhere(path: Path) -> bool:
    """Whether another process, which may still run, has made this store."""
    process = (manifest(path) or {}).get("process")
    return isinstance(process, str) and process != this_process() and may_run(process)


def _is_packed(path: Path) -> bool:
    """Whether the page in one file is newer than the last change of the steps."""
    try:
        return (path / PAGE).stat().st_mtime_ns > (path / "scores").stat().st_mtime_ns
    except OSError:
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
