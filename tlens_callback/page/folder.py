"""`PageFolder`: the page of a run that is going on, a directory that a browser reads from file://.

    index.html           the page; it loads the rest by adding <script src="data/...">
    data/index.js        tlens.index({title, notes, done, steps: [[step, stamp, large blobs], ...],
                         instruments: {instrument: its description}})
    data/00000100.js     tlens.chunk(100, stamp, "a step's blob in base64")
    data/00000100-0.js   tlens.blob(100, stamp, 0, "its first large blob")

All files that the index names exist. The stamp of a step changes when the step is written again.
"""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tlens_callback.page.encode import Part, Track, blobs, code
from tlens_callback.page.heads import heads_of, interleave, is_score, keep_largest
from tlens_callback.page.template import html, title_of
from tlens_callback.reading import Reading, descriptions
from tlens_callback.store.atomic import remove_leftovers, write_whole
from tlens_callback.store.triangle import is_pattern

MOST_LARGE = 4_000_000
"""Most bytes of large blobs per step, in base64; if there are more, only some heads are kept."""


class PageFolder:
    """Keeps the page of a run up to date while it runs.

    A step takes more disk than in the packed page, because each step is encoded by itself. If the
    patterns of a step would take more than `MOST_LARGE`, only those of some heads are kept, the
    heads with the highest scores at that step, and the page says so.

    Args:
        path: the directory; made at the first write. A page that is there already is continued.
        title: the title of the page; by default the name of the directory around `path`.
    """

    def __init__(self, path: Path, *, title: str | None = None) -> None:
        self.path = path
        self._title = title or title_of(path.parent)
        self._index: dict[str, Any] | None = None
        self._is_ready = False

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that the page has, in order."""
        return tuple(step for step, _, _ in self._read_index()["steps"])

    def begin(self) -> None:
        """Makes the page before there is a step."""
        self._prepare()
        self._write_index()

    def write(self, readings: Sequence[Reading], step: int, *, at: float | None = None) -> None:
        """Writes a step, and replaces it if it is there. `at`: when it was observed, in seconds
        since 1970; by default now."""
        self._prepare()
        self._remove_steps({step})
        parts, note = _parts(readings, step)
        small, *large = blobs(parts)
        index = self._read_index()
        # In milliseconds, so that a stamp never repeats, even after steps were dropped.
        now = time.time_ns() // 1_000_000 if at is None else int(at * 1000)
        stamp = max([now, *(was + 1 for _, was, _ in index["steps"])])
        for i, blob in enumerate(large):
            self._write_data(f"{step:08d}-{i}.js", f'tlens.blob({step},{stamp},{i},"{blob}")\n')
        self._write_data(f"{step:08d}.js", f'tlens.chunk({step},{stamp},"{small}")\n')
        index["steps"] = sorted([*index["steps"], [step, stamp, len(large)]])
        index["done"] = False
        index["instruments"] |= {k: one.as_json() for k, one in descriptions(readings).items()}
        if note:
            index["notes"] = [note]
        self._write_index()

    def drop(self, first_step: int) -> None:
        """Removes this step and all later ones."""
        self._remove_steps({step for step in self.steps if step >= first_step})

    def keep(self, steps: Iterable[int]) -> None:
        """Removes all steps except these."""
        self._remove_steps(set(self.steps) - set(steps))

    def finish(self) -> None:
        """Marks the run as over, so that the page stops looking for steps; a `write` undoes it."""
        index = self._read_index()
        if index["steps"] and not index["done"]:
            index["done"] = True
            self._write_index()

    def _prepare(self) -> None:
        """Makes the directory and the page in it; replaces a page of another version."""
        if self._is_ready:
            return
        data = self.path / "data"
        data.mkdir(parents=True, exist_ok=True)
        remove_leftovers([self.path, data])
        text = html({"title": self._title, "live": True, "notes": []}).encode()
        page = self.path / "index.html"
        if not (page.is_file() and page.read_bytes() == text):
            write_whole(page, text)
        self._is_ready = True

    def _read_index(self) -> dict[str, Any]:
        """Returns the index; an empty one if there is none that can be read."""
        if self._index is None:
            empty = {"title": self._title, "notes": [], "done": False, "instruments": {}}
            try:
                file = self.path / "data" / "index.js"
                # A pipe would be waited for without end.
                text = file.read_text("ascii") if file.is_file() else ""
                stored = json.loads(text.removeprefix("tlens.index(").rstrip().removesuffix(")"))
                steps = [[int(step), int(stamp), int(n)] for step, stamp, n in stored["steps"]]
                steps = [entry for entry in steps if self._has_step(entry[0])]
                self._index = {
                    **empty,
                    "notes": [str(note) for note in stored["notes"]],
                    "done": bool(stored["done"]),
                    "instruments": dict(stored.get("instruments", {})),
                    "steps": steps,
                }
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
                self._index = {**empty, "steps": []}
        return self._index

    def _has_step(self, step: int) -> bool:
        return (self.path / "data" / f"{step:08d}.js").is_file()

    def _remove_steps(self, steps: set[int]) -> None:
        index = self._read_index()
        gone = [entry for entry in index["steps"] if entry[0] in steps]
        if not gone:
            return
        index["steps"] = [entry for entry in index["steps"] if entry[0] not in steps]
        self._write_index()
        for step, _, large in gone:
            for name in (f"{step:08d}", *(f"{step:08d}-{i}" for i in range(large))):
                (self.path / "data" / f"{name}.js").unlink(missing_ok=True)

    def _write_index(self) -> None:
        self._write_data("index.js", f"tlens.index({json.dumps(self._read_index())})\n")

    def _write_data(self, name: str, text: str) -> None:
        write_whole(self.path / "data" / name, text.encode("ascii"))


def _parts(readings: Sequence[Reading], step: int) -> tuple[list[Part], str | None]:
    """Returns the parts of a step, within `MOST_LARGE`, and a note on what is left out."""
    track = Track(deltas=False)
    parts = [track.part(code(reading)) for reading in readings]
    if _base64_size(parts) <= MOST_LARGE:
        return parts, None
    heads = {
        reading.key: at
        for reading, part in zip(readings, parts, strict=True)
        if part.blob
        and is_pattern(reading.axes)
        and (at := heads_of(reading.axes, reading.values.shape, reading.labels))
    }
    if not heads:
        return parts, None
    order = _ranked_heads(readings, [head for at in heads.values() for head in at])
    others = _base64_size(part for part in parts if part.entry["key"] not in heads)
    share = (MOST_LARGE - others) / (_base64_size(parts) - others)
    n = len(order)
    while n > 0 and _base64_size(parts) > MOST_LARGE:
        # Heads differ in size, so the share may be too large; then a smaller one is tried.
        n = min(n - 1, int(len(order) * share * 0.98))
        share *= 0.9
        chosen = set(order[: max(n, 0)])
        for i, reading in enumerate(readings):
            if at := heads.get(reading.key):
                select = [k for k, head in enumerate(at) if head in chosen]
                parts[i] = track.part(code(reading, select), blob=True)
    scored = any(is_score(reading.axes, reading.unit) for reading in readings)
    which = (
        "those with the highest head scores at that step"
        if scored
        else "the first ones, since there are no head scores"
    )
    return parts, (
        f"Where all attention patterns of a step would take more than {MOST_LARGE / 1e6:.3g} MB, "
        f"this page has those of some heads only: at step {step} of {max(n, 0)} of {len(order)} "
        f"heads, {which}. The packed page chooses again, from all heads."
    )


def _ranked_heads(readings: Sequence[Reading], heads: Sequence[tuple[str, str]]) -> list:
    """Sorts heads by their scores: the highest of each score, then the second of each, ..."""
    rankings = []
    for reading in readings:
        if is_score(reading.axes, reading.unit):
            rankings.append({})
            keep_largest(rankings[-1], reading)
    known = set(heads)
    order = dict.fromkeys([*interleave(rankings), *heads])
    return [head for head in order if head in known]


def _base64_size(parts: Iterable[Part]) -> int:
    """Returns how many characters the large blobs of these parts are in base64."""
    return sum(-(-len(part.content) // 3) * 4 for part in parts if part.blob)
