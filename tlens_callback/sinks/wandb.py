"""`WandbSink`: readings as curves, figures, pictures and tables of a Weights & Biases run."""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tlens_callback.reading import Reading
from tlens_callback.render import is_matrix, is_mosaic, mosaic, neuron_table, score_figure

STEP = "train/global_step"
"""The x axis: the key that the Hugging Face trainer logs its own rows under."""

_MOST_ROWS = 10_000


class WandbSink:
    """Logs each observation as one row of a W&B run, beside the trainer's own rows.

    Rows carry `train/global_step` themselves and are never merged with others, so that they land
    on their step in whatever order and from whatever thread they come.

    Keys:
        tlens/<key>: a number, for each reading without axes.
        tlens/<instrument>/heads: interactive figure of its ("layer", "head") readings.
        tlens/<instrument>/experts: the same of ("layer", "expert").
        tlens/<instrument>/by_<axis>: the same of ("layer", <axis>), any other but "rank".
        tlens/<key>: picture of a ("layer", "head", "query", "key") reading, all heads.
        tlens/<instrument>/table: table of its ("layer", "rank", ...) readings, a row per neuron; of
            more than 10000 rows the lowest ranks.

    Characters of a probe's name other than letters, digits, space and `_ - + =` become "_" in
    keys. Readings of other axes fit no picture and are left to the local store.

    Args:
        run: the run to log to. None: the one that is active at the first write (the trainer's,
            with `report_to="wandb"`), or else one that this sink starts, in the project
            WANDB_PROJECT or "tlens_callback". Only a run started here is finished here.

    Raises:
        ImportError: where wandb is not installed.
        ValueError: if `run` is no run.
    """

    def __init__(self, run: Any = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("WandbSink needs wandb: pip install wandb") from error
        if run is not None and not callable(getattr(run, "define_metric", None)):
            raise ValueError(f"run is what wandb.init() returns, got {run!r}.")
        self._wandb: Any = wandb
        self._given = run
        self._run: Any = None
        self._started_here = False
        self._keys: dict[str, str] = {}
        self._place = "W&B, no run yet"

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Logs one row.

        Raises:
            RuntimeError: if the run was finished by its owner.
        """
        run = self._resolve()
        with tempfile.TemporaryDirectory(prefix="tlens-", ignore_cleanup_errors=True) as folder:
            row = self._row(readings, step, Path(folder))
            try:
                run.log({**row, STEP: step})
            except self._wandb.errors.UsageError as error:
                raise RuntimeError(_finished(run)) from error

    def close(self) -> None:
        """Finishes the run if this sink started it; the next `write` looks for a run anew."""
        run, started_here = self._run, self._started_here
        self._run, self._started_here = None, False
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
            run.define_metric("tlens/*", step_metric=STEP)
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
            for axis in dict.fromkeys(reading.axes[1] for reading in own if is_matrix(reading)):
                matrices = [r for r in own if is_matrix(r) and r.axes[1] == axis]
                name = f"{axis}s" if axis in ("head", "expert") else f"by_{axis}"
                row[self._key(f"{instrument}/{name}")] = self._wandb.Plotly(score_figure(matrices))
            if ranked := [r for r in own if r.axes[:2] == ("layer", "rank")]:
                row[self._key(f"{instrument}/table")] = self._table(ranked)
        return row

    def _table(self, readings: Sequence[Reading]) -> Any:
        frame = neuron_table(readings)
        if len(frame) > _MOST_ROWS:
            ranks = frame["rank"].nunique()
            frame = frame[frame["rank"] < max(1, _MOST_ROWS * ranks // len(frame))]
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
        """The key under "tlens/", as W&B and a file system can take it."""
        if key not in self._keys:
            parts = [re.sub(r"[^\w +=-]", "_", part).encode()[:160] for part in key.split("/")]
            safe = base = "tlens/" + "/".join(part.decode(errors="ignore") for part in parts)
            number = 2
            while safe in self._keys.values():
                safe, number = f"{base}_{number}", number + 1
            self._keys[key] = safe
        return self._keys[key]


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
