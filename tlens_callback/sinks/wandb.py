"""`WandbSink`: readings as curves, figures, pictures and tables of a Weights & Biases run."""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tlens_callback.reading import Reading
from tlens_callback.render import (
    axis_table,
    is_curve,
    is_matrix,
    is_mosaic,
    is_ranked,
    line_figure,
    mosaic,
    neuron_table,
    score_figure,
)
from tlens_callback.render.plain import cut

STEP = "train/global_step"
"""The x axis: the key that the Hugging Face trainer logs its own rows under."""

_MOST_ROWS, _MOST_ENTRIES = 10_000, 1_000

_TITLE = 63
"""Characters of an alert's title: W&B asks for less than 64."""

_QUIET = 600
"""Seconds in which W&B does not repeat an alert of one title."""


class WandbSink:
    """Logs each observation as one row of a W&B run, beside the trainer's own rows.

    Rows carry `train/global_step` themselves and are never merged with others, so that they land
    on their step in whatever order and from whatever thread they come.

    Keys:
        tlens/<key>: a number, for each reading without axes.
        tlens/<instrument>/heads: interactive figure of its ("layer", "head") readings.
        tlens/<instrument>/experts: the same of ("layer", "expert").
        tlens/<instrument>/by_<axis>: the same of ("layer", <axis>), any other but "rank".
        tlens/<instrument>/feature_by_<axis>: the same of ("feature", <axis>).
        tlens/<instrument>/by_layer: interactive figure of its ("layer",) readings: a panel per
            measure, a line per probe, dotted behind it that of the first observation since this
            sink was made or closed.
        tlens/<key>: picture of a ("layer", "head", "query", "key") reading, all heads.
        tlens/<instrument>/table: table of its ("layer", "rank", ...) readings, a row per neuron or
            token; of more than 10000 rows the lowest ranks.
        tlens/<instrument>/<axis>_rank_table: the same of (<axis>, "rank", ...), any other.
        tlens/<instrument>/<axis>_table: table of its readings of any other single axis ("event",
            "rank", "token", "block"; "layer" where what was read is a token), a row per entry; of
            readings with at most 1000 entries.

    Each entry of an ("event",) reading is an alert too, of level WARN: "tlens: " and its label, or
    its text. The title is cut to 63 characters, the whole sentence and the step are below it. W&B
    does not repeat a title within 10 minutes and passes alerts on as its user's settings say; an
    offline run keeps them in its file.

    Characters of a probe's name other than letters, digits, space and `_ - + =` become "_" in
    keys. Readings of other axes fit no picture and are left to the local store.

    Args:
        name: the first segment of its keys, in the place of "tlens".
        run: the run to log to. None: the one that is active at the first write (the trainer's,
            with `report_to="wandb"`), or else one that this sink starts, in the project
            WANDB_PROJECT or "tlens_callback". Only a run started here is finished here.

    Raises:
        ImportError: where wandb is not installed.
        ValueError: if `run` is no run.
    """

    def __init__(self, run: Any = None, *, name: str = "tlens") -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("WandbSink needs wandb: pip install wandb") from error
        if run is not None and not callable(getattr(run, "define_metric", None)):
            raise ValueError(f"run is what wandb.init() returns, got {run!r}.")
        self._wandb: Any = wandb
        self._name = name
        self._given = run
        self._run: Any = None
        self._started_here = False
        self._keys: dict[str, str] = {}
        self._first: dict[str, tuple[int, list[Reading]]] = {}
        self._place = "W&B, no run yet"

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Logs one row, and sends the alerts of its events.

        Raises:
            RuntimeError: if the run was finished by its owner.
        """
        run = self._resolve()
        with tempfile.TemporaryDirectory(prefix="tlens-", ignore_cleanup_errors=True) as folder:
            row = self._row(readings, step, Path(folder))
            try:
                run.log({**row, STEP: step})
                for title, text in _alerts(readings, step):
                    level = self._wandb.AlertLevel.WARN
                    run.alert(title=title, text=text, level=level, wait_duration=_QUIET)
            except self._wandb.errors.UsageError as error:
                raise RuntimeError(_finished(run)) from error

    def close(self) -> None:
        """Finishes the run if this sink started it; the next `write` looks for a run anew."""
        run, started_here = self._run, self._started_here
        self._run, self._started_here = None, False
        self._first.clear()
        if started_here:
            run.finish()

    def __str__(self) -> str:
        return self._place

    def _resolve(self) -> Any:
        """The run to log to, its x axis declared."""
        if self._run is not None:
            return self._run
        run = self._wandb.run if self._given is None else self._given
        if run is None:
            run = self._wandb.init(project=os.environ.get("WANDB_PROJECT") or "tlens_callback")
            self._started_here = True
        self._run = run
        self._place = f"W&B run {run.name or run.id}: {run.url or Path(run.dir).parent}"
        try:
            run.define_metric(STEP)
            run.define_metric(f"{self._name}/*", step_metric=STEP)
        except self._wandb.errors.UsageError as error:
            raise RuntimeError(_finished(run)) from error
        return run

    def _row(self, readings: Sequence[Reading], step: int, folder: Path) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for reading in readings:
            if not reading.axes:
                row[self._key(reading.key)] = reading.values.item()
            elif is_mosaic(reading):
                picture = folder / f"{len(row)}.png"
                picture.write_bytes(mosaic(reading, step=step))
                row[self._key(reading.key)] = self._wandb.Image(str(picture), caption=reading.key)
        for instrument in dict.fromkeys(reading.instrument for reading in readings):
            own = [reading for reading in readings if reading.instrument == instrument]
            for axes in dict.fromkeys(reading.axes for reading in own if is_matrix(reading)):
                figure = score_figure([r for r in own if is_matrix(r) and r.axes == axes])
                row[self._key(f"{instrument}/{_figure_name(*axes)}")] = self._wandb.Plotly(figure)
            if curves := [r for r in own if is_curve(r)]:
                row[self._key(f"{instrument}/by_layer")] = self._lines(instrument, curves, step)
            for axis in dict.fromkeys(reading.axes[0] for reading in own if is_ranked(reading)):
                name = "table" if axis == "layer" else f"{axis}_rank_table"
                row[self._key(f"{instrument}/{name}")] = self._table(neuron_table(own, axis))
            lists = [r for r in own if r.values.ndim == 1 and not is_curve(r)]
            lists = [r for r in lists if 0 < r.values.size <= _MOST_ENTRIES]
            for axis in dict.fromkeys(r.axes[0] for r in lists):
                table = self._table(axis_table(lists, axis))
                row[self._key(f"{instrument}/{axis}_table")] = table
        return row

    def _lines(self, instrument: str, curves: list[Reading], step: int) -> Any:
        """The figure of ("layer",) readings, with those of the first observation behind."""
        at, first = self._first.get(instrument, (step, curves))
        if step <= at:
            self._first[instrument], first = (step, curves), []
        return self._wandb.Plotly(line_figure(curves, first, first_name=f"step {at}"))

    def _table(self, frame: pd.DataFrame) -> Any:
        if len(frame) > _MOST_ROWS and "rank" in frame:
            ranks = frame["rank"].nunique()
            frame = frame.loc[frame["rank"] < max(1, _MOST_ROWS * ranks // len(frame))]
        numbers = frame.select_dtypes("number").columns
        table = self._wandb.Table(
            columns=list(frame.columns),
            data=[],
            dtype=[float if name in numbers else str for name in frame.columns],
        )
        # Not add_data, which infers types anew for every row: 75 ms for 1350 rows.
        columns = [
            [None if missing else value for value, missing in zip(column, gaps, strict=True)]
            for column, gaps in (
                (frame[name].astype(object), _gaps(frame[name])) for name in frame.columns
            )
        ]
        table.data = [list(cells) for cells in zip(*columns, strict=True)]
        return table

    def _key(self, key: str) -> str:
        """The key under the sink's name, as W&B and a file system can take it."""
        if key not in self._keys:
            parts = [re.sub(r"[^\w +=-]", "_", part).encode()[:160] for part in key.split("/")]
            safe = base = f"{self._name}/" + "/".join(
                part.decode(errors="ignore") for part in parts
            )
            number = 2
            while safe in self._keys.values():
                safe, number = f"{base}_{number}", number + 1
            self._keys[key] = safe
        return self._keys[key]


def _figure_name(down: str, across: str) -> str:
    if down == "layer":
        return f"{across}s" if across in ("head", "expert") else f"by_{across}"
    return f"{down}_by_{across}"


def _alerts(readings: Sequence[Reading], step: int) -> Iterator[tuple[str, str]]:
    """Title and text of every event, no title twice."""
    titles: set[str] = set()
    for reading in readings:
        if reading.axes != ("event",):
            continue
        sentences = reading.labels.get("event")
        if sentences is None and reading.texts is not None:
            sentences = reading.texts.tolist()
        for sentence, value in zip(sentences or (), reading.values, strict=False):
            whole = f"tlens: {' '.join(sentence.split())}"
            title, number = cut(whole, _TITLE), 2
            while title in titles:
                end = f" ({number})"
                title, number = cut(whole, _TITLE - len(end)) + end, number + 1
            titles.add(title)
            about = f"{reading.key} {value:.4g}" if np.isfinite(value) else reading.key
            yield title, f"{sentence}\n{about}, step {step}"


def _gaps(column: Any) -> np.ndarray:
    """Where a table has nothing to show: what is missing, and numbers that JSON has no word for."""
    missing = column.isna().to_numpy(dtype=bool)
    if column.dtype.kind == "f":
        return missing | ~np.isfinite(column.to_numpy())
    return missing


def _finished(run: Any) -> str:
    return (
        f"The W&B run {run.name or run.id} was finished by whoever started it, so nothing more can "
        f"be logged to it. Call wandb.finish() after train(), or pass WandbSink(run=...) a run "
        f"that is active."
    )
