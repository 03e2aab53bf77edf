"""`read_store`: reads back what a `LocalSink` wrote; `format` describes the files."""

import logging
import stat
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError

from tlens_callback.meaning import Description
from tlens_callback.reading import Reading
from tlens_callback.store.damage import demand_columns, whole_table
from tlens_callback.store.format import (
    FORMAT,
    MANIFEST,
    arrays_file,
    is_store,
    manifest,
    scores_file,
    steps_in,
)
from tlens_callback.store.opened import LastOpened, OpenedStep, Stamp, one_reading, stamp_of

logger = logging.getLogger("tlens_callback")

if TYPE_CHECKING:
    # For the method that looks up.
    from tlens_callback.page.notebook import PageView


def _suggest_keys(key: str, keys: Collection[str]) -> str:
    """Says which keys exist for a key that does not: all if they are few, else the nearest."""
    if len(keys) <= 12:
        return f"it has {sorted(keys)}"
    near = get_close_matches(key, keys, n=5, cutoff=0.4)
    return f"of its {len(keys)} keys the nearest are {near}" if near else f"it has {len(keys)} keys"


def curve(key: str, readings: Mapping[int, Reading]) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [step] and values [step, *axes] of one reading at several steps.

    For `trainer/<name>` it returns the steps at which the trainer logged, [update], and the values
    there, [update].
    """
    if key.startswith("trainer/"):
        logged = {
            int(at): value
            for reading in readings.values()
            for at, value in zip(reading.labels["update"], reading.values, strict=True)
        }
        order = sorted(logged)
        return np.array(order, np.int64), np.array([logged[at] for at in order], np.float32)
    if len(shapes := {r.values.shape for r in readings.values()}) > 1:
        raise ValueError(
            f"{key!r} changes shape between steps: {sorted(shapes)}. Ask for one reading at a time."
        )
    steps = np.array(list(readings), dtype=np.int64)
    return steps, np.stack([r.values for r in readings.values()])


def read_store(path: str | Path) -> "Store":
    """Opens a store that a `LocalSink` wrote. The run may still be going on: every access reads the
    files again.

    Raises:
        ValueError: if there is no such directory, or it holds no store or one of a newer format.
    """
    path = Path(path)
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.glob("*") if is_store(p))
        raise ValueError(f"There is no directory {path}; stores beside it: {near}.")
    if not is_store(path):
        inside = sorted(p.name for p in path.glob("*"))
        stores = [name for name in inside if is_store(path / name)]
        raise ValueError(
            f"{path} is not a tlens_callback store: it has no {MANIFEST} of a store. "
            + (
                f"It holds the stores {', '.join(repr(str(path / name)) for name in stores)}."
                if stores
                else f"It holds {inside[:20]}."
            )
        )
    version = (manifest(path) or {}).get("tlens_callback")
    if type(version) is not int or version > FORMAT:
        raise ValueError(
            f"{path} has store format {version}, but this version of tlens_callback reads formats "
            f"up to {FORMAT}: upgrade tlens_callback."
        )
    return Store(path)


class Store:
    """Reads the complete steps of one run from disk; `read_store` opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._readable: dict[int, Stamp] = {}
        self._opened = LastOpened()

    @property
    def steps(self) -> tuple[int, ...]:
        """The complete steps, in order. A step with a torn file (a copy cut short) is left out."""
        return tuple(step for step in steps_in(self.path / "scores") if self._is_complete(step))

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all complete steps, in order of appearance."""
        found: dict[str, None] = {}
        for step in steps_in(self.path / "scores"):
            if (opened := self._open(step)) is not None:
                found |= dict.fromkeys(opened.about)
        return tuple(found)

    def reading(self, key: str, step: int) -> Reading:
        """Returns one reading.

        Raises:
            ValueError: if the store does not have this step, or the step this key.
        """
        opened = self._open_complete(step)
        if key not in opened.about:
            raise ValueError(
                f"Step {step} of {self.path} has no {key!r}; {_suggest_keys(key, opened.about)}."
            )
        return opened.readings([key])[0]

    def readings(self, step: int, keys: Collection[str] | None = None) -> list[Reading]:
        """Returns the readings of a step as they were written, or only those with these keys.

        Raises:
            ValueError: if the store does not have this step.
        """
        opened = self._open_complete(step)
        return opened.readings([key for key in opened.about if keys is None or key in keys])

    def about(self, step: int) -> dict[str, dict[str, Any]]:
        """Returns key -> axes, unit, labels, limits, shape, packing of a step's readings, in the
        order in which they were written, without reading values.

        Raises:
            ValueError: if the store does not have this step.
        """
        return dict(self._open_complete(step).about)

    def stored(
        self, step: int, keys: Collection[str]
    ) -> Iterator[tuple[str, dict[str, Any], np.ndarray | None]]:
        """Yields for each of these readings its key, what `about` says of it, and its array.

        The array is [..., n (n + 1) / 2], float16 or float32, as it is in the file, if the reading
        is stored as lower triangles and has no texts; else it is None.
        """
        opened = self._open_complete(step)
        yield from opened.stored([key for key in opened.about if key in keys])

    def descriptions(self, step: int) -> dict[str, Description]:
        """Returns instrument -> description, for the instruments that describe themselves.

        Raises:
            ValueError: if the store does not have this step.
        """
        return dict(self._open_complete(step).descriptions)

    @property
    def torn(self) -> tuple[int, ...]:
        """The steps that were complete once and are not any more: a copy was cut short, or a file
        is damaged."""
        steps = steps_in(self.path / "scores")
        return tuple(step for step in steps if not self._is_complete(step))

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns steps [step] and values [step, *axes] of one reading, at the steps that have it;
        for `trainer/<name>` the steps at which it was logged, and the values there.

        Raises:
            ValueError: if no step has this key, or the values change shape.
        """
        return curve(key, self._at_all_steps(key))

    def frame(self, key: str | None = None) -> pd.DataFrame:
        """Returns a tidy table with one row per number.

        With a key, it has this reading at all complete steps; attention patterns are possible too.
        Without a key, it has all small readings: those of at most 3 axes and 100,000 numbers.
        Patterns have 4 axes and are left out.

        With a key the columns are: step, int64; key, category; for each axis its numbers, int32
        (counted from 0, or its labels if these are whole numbers, as for a selection of layers);
        if an axis has labels that say more than its numbers, such as tokens, "<axis>_name",
        category; value, float32, in the order of `curve`; text, category, if the reading has texts.
        The axis "key" is "key_index" and "key_name". A pattern takes 33 bytes per number; `curve`
        takes 4.

        Without a key: `step` and the columns of `tlens_callback.render.long_frame`, as in
        `pandas.read_parquet(store.path / "scores")`.

        Raises:
            ValueError: if no step has this key, or its axes change between steps.
        """
        if key is not None:
            return self._frame_of(key)
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = []
        for step in self.steps:
            try:
                table = pq.read_table(scores_file(self.path, step))
                demand_columns(table.schema)
            except (OSError, ValueError, pa.ArrowException) as error:
                logger.warning(
                    "tlens: step %d of %s is left out, because its table in scores/ is damaged: %s",
                    *(step, self.path, error),
                )
                continue
            tables.append(table)
        if not tables:
            return pd.DataFrame({"step": [], "key": [], "value": []})
        # "permissive", as pandas 2 makes other texts of a table that somebody rewrites with it.
        return pa.concat_tables(tables, promote_options="permissive").to_pandas()

    def rollouts(self, step: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Returns the rollouts that were looked at with the weights of a step: a table with one row
        per rollout, and one with a row per sampled token.

        The columns of the first are: step; rollout, "<group>.<number>"; group, counted from 1;
        prompt and completion, texts, if they were kept; what was measured of each rollout, such as
        advantage, length, mean_entropy; and "reward_<function>" for each reward function.

        Those of the second are: step; rollout; pos, counted from 0; token_id and token, if they
        were kept; what was measured of each token, such as logp, log_ratio, entropy, js. Features
        that are shown have columns "mean_feature/<name>" in the first and "feature/<name>" here.

        Raises:
            ValueError: if the store does not have this step, or the step no rollouts.
        """
        from tlens_callback.store.rollouts import rollout_frames

        found = rollout_frames(step, self.readings(step))
        if found is None:
            raise ValueError(
                f"Step {step} of {self.path} has no rollouts. A callback sees them with "
                f".attach(trainer), of a trainer that samples; at the last step none are sampled."
            )
        return found

    def _frame_of(self, key: str) -> pd.DataFrame:
        from tlens_callback.store.tidy import tidy

        found = self._at_all_steps(key)
        if len(axes := {reading.axes for reading in found.values()}) > 1:
            raise ValueError(f"{key!r} changes its axes between steps: {sorted(axes)}.")
        return tidy(list(found), list(found.values()))

    def _at_all_steps(self, key: str) -> dict[int, Reading]:
        """Returns step -> reading, for the complete steps that have it.

        Raises:
            ValueError: if no step has it.
        """
        found: dict[int, Reading] = {}
        for step in steps_in(self.path / "scores"):
            if (reading := self._one(step, key)) is not None:
                found[step] = reading
        if not found:
            raise ValueError(f"{self.path} has no {key!r}; {_suggest_keys(key, self.keys)}.")
        return found

    def page(self, *, most_bytes: int | None = None, view: str = "") -> "PageView":
        """Makes the interactive page of the steps so far. Jupyter shows it as the last line of a
        cell; its `save(path)` writes it as one HTML file.

        Args:
            most_bytes: largest size of that file; by default 15 MB, or up to 60 MB where the
                scores of all heads at all steps need it; see `tlens_callback.page.page`.
            view: what the page shows first, such as "step=1&other=0&change=1"; see
                `tlens_callback.page.page` too.

        Raises:
            ValueError: if the store has no complete step, or most_bytes is too small.
        """
        # Imports a higher room, late: users expect a store to make its page.
        from tlens_callback.page import page
        from tlens_callback.page.notebook import PageView

        return PageView(page(self, most_bytes=most_bytes, view=view))

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {len(self.steps)} steps, {len(self.keys)} keys)"

    def _open_complete(self, step: int) -> OpenedStep:
        opened = self._open(step)
        if opened is None:
            raise ValueError(
                f"{self.path} has no complete step {step}; its steps are {self.steps}."
            )
        return opened

    def _one(self, step: int, key: str) -> Reading | None:
        """Returns a reading; None if the step is not complete, or does not have it."""
        stamp = self._stamp(step)
        # The first look at a file is at all of it, since a damaged step is left out.
        if stamp is not None and self._readable.get(step) == stamp and step not in self._opened:
            try:
                return one_reading(arrays_file(self.path, step), stamp, key)
            except (OSError, ValueError, LookupError):
                pass
        opened = self._open(step)
        return opened.readings([key])[0] if opened and key in opened.about else None

    def _is_complete(self, step: int) -> bool:
        stamp = self._stamp(step)
        # A file that was read once needs no second look until it changes.
        return stamp is not None and (
            self._readable.get(step) == stamp or self._open(step) is not None
        )

    def _open(self, step: int) -> OpenedStep | None:
        """Opens a step; returns None if it is not complete, or damaged."""
        stamp = self._stamp(step)
        if stamp is None:
            return None
        opened = self._opened.get(step)
        try:
            if opened is None or opened.stamp != stamp:
                checked = self._readable.get(step) == stamp
                opened = OpenedStep(arrays_file(self.path, step), stamp, checked=checked)
                self._readable[step] = stamp
        except (OSError, SafetensorError, ValueError, KeyError, RecursionError):
            return None
        self._opened.keep(step, opened)
        return opened

    def _stamp(self, step: int) -> Stamp | None:
        """Identifies the file of a step as it is now; None if one of its files is not there."""
        try:
            if not whole_table(scores_file(self.path, step)):
                return None
            at = arrays_file(self.path, step).stat()
        except (OSError, ValueError):
            return None
        # A pipe would be waited for without end.
        return stamp_of(at) if stat.S_ISREG(at.st_mode) else None
