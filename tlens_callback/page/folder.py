"""The page of a run that is going on: a directory that a browser reads from file://.

    index.html           the page; it loads the rest by adding <script src="data/...">
    data/index.js        tlens.index({title, notes, done, steps: [[step, stamp, large blobs], ...],
                         instruments: {instrument: what it says about itself}})
    data/00000100.js     tlens.chunk(100, stamp, "a step's blob in base64")
    data/00000100-0.js   tlens.blob(100, stamp, 0, "its first large blob")

What the index names is there. A stamp is another one when a step is written again.
"""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tlens_callback.page.encode import Part, Track, blobs, code
from tlens_callback.page.heads import in_turn, is_score, places, take_largest
from tlens_callback.page.template import html, title_of
from tlens_callback.reading import Reading, descriptions
from tlens_callback.store.atomic import write_whole
from tlens_callback.store.triangle import is_pattern

MOST_LARGE = 4_000_000
"""Bytes of large blobs a step, in base64: beyond it only some heads' patterns are kept."""


class PageFolder:
    """Keeps the page of a run up to date while it runs.

    A step takes about as much disk as the page takes of it, without the savings of a packed page:
    each step stands by itself. Patterns that would be more than `MOST_LARGE` a step are kept of
    some heads, those of the highest head scores at that step, which the page says.

    Args:
        path: the directory; made at the first write. What is there goes on.
        title: what the page is called; by default as the directory around `path`.
    """

    def __init__(self, path: Path, *, title: str | None = None) -> None:
        self.path = path
        self._title = title or title_of(path.parent)
        self._index: dict[str, Any] | None = None
        self._is_ready = False

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are there, in order."""
        return tuple(step for step, _, _ in self._read()["steps"])

    def begin(self) -> None:
        """Makes the page, where there is no step yet."""
        self._ready()
        self._write_index()

    def write(self, readings: Sequence[Reading], step: int, *, at: float | None = None) -> None:
        """Writes a step, in the place of what there is of it. `at`: when it was observed, in
        seconds since 1970; by default now."""
        self._ready()
        self._remove({step})
        parts, note = _parts(readings, step)
        small, *large = blobs(parts)
        index = self._read()
        # Milliseconds: a number of its own also after steps were dropped.
        now = time.time_ns() // 1_000_000 if at is None else int(at * 1000)
        stamp = max([now, *(was + 1 for _, was, _ in index["steps"])])
        for i, blob in enumerate(large):
            self._write(f"{step:08d}-{i}.js", f'tlens.blob({step},{stamp},{i},"{blob}")\n')
        self._write(f"{step:08d}.js", f'tlens.chunk({step},{stamp},"{small}")\n')
        index["steps"] = sorted([*index["steps"], [step, stamp, len(large)]])
        index["done"] = False
        index["instruments"] |= {k: one.as_json() for k, one in descriptions(readings).items()}
        if note:
            index["notes"] = [note]
        self._write_index()

    def drop(self, first_step: int) -> None:
        """Removes the steps from this one on."""
        self._remove({step for step in self.steps if step >= first_step})

    def keep(self, steps: Iterable[int]) -> None:
        """Removes all steps but these."""
        self._remove(set(self.steps) - set(steps))

    def finish(self) -> None:
        """Says that the run is over: the page stops looking for more. A `write` takes it back."""
        index = self._read()
        if index["steps"] and not index["done"]:
            index["done"] = True
            self._write_index()

    def _ready(self) -> None:
        """Makes the directory and the page in it, anew where it is of another version."""
        if self._is_ready:
            return
        data = self.path / "data"
        data.mkdir(parents=True, exist_ok=True)
        for left in [*self.path.glob(".*.tmp"), *data.glob(".*.tmp")]:
            left.unlink()
        text = html({"title": self._title, "live": True, "notes": []}).encode()
        page = self.path / "index.html"
        if not (page.is_file() and page.read_bytes() == text):
            write_whole(page, text)
        self._is_ready = True

    def _read(self) -> dict[str, Any]:
        """The index; an empty one where there is none, or none that can be read."""
        if self._index is None:
            empty = {"title": self._title, "notes": [], "done": False, "instruments": {}}
            try:
                text = (self.path / "data" / "index.js").read_text("ascii")
                there = json.loads(text.removeprefix("tlens.index(").rstrip().removesuffix(")"))
                steps = [[int(step), int(stamp), int(n)] for step, stamp, n in there["steps"]]
                steps = [entry for entry in steps if self._has(entry[0])]
                self._index = {
                    **empty,
                    "notes": [str(note) for note in there["notes"]],
                    "done": bool(there["done"]),
                    "instruments": dict(there.get("instruments", {})),
                    "steps": steps,
                }
            except (OSError, ValueError, KeyError, TypeError):
                self._index = {**empty, "steps": []}
        return self._index

    def _has(self, step: int) -> bool:
        return (self.path / "data" / f"{step:08d}.js").is_file()

    def _remove(self, steps: set[int]) -> None:
        index = self._read()
        gone = [entry for entry in index["steps"] if entry[0] in steps]
        if not gone:
            return
        index["steps"] = [entry for entry in index["steps"] if entry[0] not in steps]
        self._write_index()
        for step, _, large in gone:
            for name in (f"{step:08d}", *(f"{step:08d}-{i}" for i in range(large))):
                (self.path / "data" / f"{name}.js").unlink(missing_ok=True)

    def _write_index(self) -> None:
        self._write("index.js", f"tlens.index({json.dumps(self._read())})\n")

    def _write(self, name: str, text: str) -> None:
        write_whole(self.path / "data" / name, text.encode("ascii"))


def _parts(readings: Sequence[Reading], step: int) -> tuple[list[Part], str | None]:
    """The parts of a step, within `MOST_LARGE`, and what is not there."""
    track = Track(deltas=False)
    parts = [track.part(code(reading)) for reading in readings]
    if _letters(parts) <= MOST_LARGE:
        return parts, None
    heads = {
        reading.key: at
        for reading, part in zip(readings, parts, strict=True)
        if part.blob
        and is_pattern(reading.axes)
        and (at := places(reading.axes, reading.values.shape, reading.labels))
    }
    if not heads:
        return parts, None
    order = _by_score(readings, [place for at in heads.values() for place in at])
    others = _letters(part for part in parts if part.entry["key"] not in heads)
    share = (MOST_LARGE - others) / (_letters(parts) - others)
    n = len(order)
    while n > 0 and _letters(parts) > MOST_LARGE:
        # Heads differ in what they take: again, where the share was too large.
        n = min(n - 1, int(len(order) * share * 0.98))
        share *= 0.9
        chosen = set(order[: max(n, 0)])
        for i, reading in enumerate(readings):
            if at := heads.get(reading.key):
                select = [k for k, place in enumerate(at) if place in chosen]
                parts[i] = track.part(code(reading, select), blob=True)
    scored = any(is_score(reading.axes, reading.unit) for reading in readings)
    which = (
        "of the highest head scores at that step"
        if scored
        else "that come first: it has no head scores"
    )
    return parts, (
        f"Attention patterns are here of some heads where all would take more than "
        f"{MOST_LARGE / 1e6:.3g} MB a step: of {max(n, 0)} of {len(order)} at step {step}, those "
        f"{which}. The packed page chooses again, from all of them."
    )


def _by_score(readings: Sequence[Reading], heads: Sequence[tuple[str, str]]) -> list:
    """These heads, those first that are first by any of their scores."""
    rankings = []
    for reading in readings:
        if is_score(reading.axes, reading.unit):
            rankings.append({})
            take_largest(rankings[-1], reading)
    there = set(heads)
    order = dict.fromkeys([*in_turn(rankings), *heads])
    return [place for place in order if place in there]


def _letters(parts: Iterable[Part]) -> int:
    """How many letters the large blobs of these are in base64."""
    return sum(-(-len(part.content) // 3) * 4 for part in parts if part.blob)
