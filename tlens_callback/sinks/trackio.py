"""`TrackioSink`: shows readings as curves, pictures and tables of a trackio run."""

import functools
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tlens_callback.reading import Reading
from tlens_callback.sinks.rollouts import TEXTS, about_rollouts, overview
from tlens_callback.sinks.shown import (
    STEP,
    HasPage,
    Keys,
    cells,
    check_store,
    events,
    excerpt,
    histograms,
    pictures,
    scalars,
    tables,
    without_trainer_logs,
)

logger = logging.getLogger("tlens_callback")


class TrackioSink:
    """Logs each observation as one row of a trackio run, at the trainer's step.

    The run is the one that is active at the first write (the trainer's, with
    `report_to="trackio"`). If there is none, this sink starts one, in the project TRACKIO_PROJECT
    or "tlens_callback", and finishes it in `close`. After it has logged to a run that somebody else
    started, it starts none of its own: what comes after the end of that run is left out, with one
    warning.

    Choose `train/global_step` as the x axis; every row has it. trackio's own step is no use: it
    counts on from the last row, and the trainer gives none with its rows.

    Keys:
        tlens/<key>: a number for each reading without axes and texts; a histogram for each
            ("layer", "head") reading, without spreads; a picture for each ("layer", "head",
            "query", "key") reading.
        tlens/<instrument>/heads: picture of its ("layer", "head") readings, with a panel for each.
        tlens/<instrument>/experts, by_<axis>, feature_by_<axis>: the same for ("layer", "expert"),
            ("layer", <axis>), ("feature", <axis>).
        tlens/<instrument>/by_layer: picture of its ("layer",) readings, with a panel for each
            measure and a row for each probe.
        tlens/<instrument>/table: table of its ("layer", "rank", ...) readings.
        tlens/<instrument>/<axis>_rank_table: the same for another axis and "rank".
        tlens/<instrument>/<axis>_table: table of its readings of any other single axis.
        tlens/<instrument>/rollout_table: traces, one for each rollout: the messages are its prompt
            and completion, the metadata its group, advantage, rewards and the like. A table if this
            trackio has no traces, or if no texts are kept.
        tlens/page: the page of the store, once, at the end.

    A table has at most about 100 rows, those of the lowest ranks, since the dashboard loads all
    tables of all steps at once. Each entry of an ("event",) reading is also an alert, of level
    WARN. Of winners against losers, contrasts and their false discovery rates are shown. Only the
    local store has other readings, and those of the axis "update", which are in the trainer's own
    rows.

    Args:
        name: first segment of the keys, instead of "tlens".
        store: the `LocalSink` of the same readings, whose page is logged at the end; it has to be
            closed before this sink. Without it no page is logged.

    Raises:
        ImportError: where trackio is not installed.
        ValueError: if `store` has no page.
    """

    def __init__(self, *, name: str = "tlens", store: HasPage | None = None) -> None:
        try:
            import trackio
        except ImportError as error:
            raise ImportError("TrackioSink needs trackio: pip install trackio") from error
        check_store(store)
        self._trackio: Any = trackio
        self._traces = hasattr(trackio, "Trace")
        self._keys = Keys(name)
        self._store = store
        self._run: Any = None
        self._started_here = self._joined = self._warned = False
        self._last: int | None = None
        self._wait: Callable[[], None] = lambda: None
        self._hook: Any = None
        self._place = "trackio, no run yet"

    def before_finish(self, wait: Callable[[], None]) -> None:
        """Keeps a function that waits for unfinished writes, for when the run is finished."""
        self._wait = wait

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Logs one row, and sends the alerts of its events."""
        run = self._resolve()
        if run is None:
            self._warn_once("later readings are not logged there")
            return
        with tempfile.TemporaryDirectory(prefix="tlens-", ignore_cleanup_errors=True) as folder:
            row = self._row(overview(without_trainer_logs(readings)), step, Path(folder))
            # Copies the pictures, which can be removed then.
            run.log({**row, STEP: step}, step=step)
        for sentence, about in events(readings):
            level = self._trackio.AlertLevel.WARN
            run.alert(title=f"tlens: {sentence}", text=about, level=level, step=step)
        self._last = step

    def close(self) -> None:
        """Logs the page, and finishes the run if this sink started it. The next `write` looks for a
        run again."""
        run, started_here = self._run, self._started_here
        if run is None:
            return
        try:
            self._log_page()
        finally:
            self._run, self._started_here = None, False
            self._unhook(run)
            if started_here and not _finished(run):
                run.finish()
            if started_here and self._trackio.context_vars.current_run.get() is run:
                self._trackio.context_vars.current_run.set(None)

    def __str__(self) -> str:
        return self._place

    def _resolve(self) -> Any:
        """Finds the run to log to; None where it was finished."""
        active = self._trackio.context_vars.current_run.get()
        runs = [run for run in (self._run, active) if run is not None and not _finished(run)]
        if not runs and (self._joined or self._run is not None):
            return None
        if runs and runs[0] is self._run:
            return self._run
        if runs:
            self._run, self._started_here, self._joined = runs[0], False, True
        else:
            project = os.environ.get("TRACKIO_PROJECT") or "tlens_callback"
            self._run = self._trackio.init(project=project, auto_log_cpu=False, auto_log_gpu=False)
            self._started_here = True
        run = self._run
        self._place = f'trackio run {run.name}: trackio show --project "{run.project}"'
        run.finish = self._hook = _before(run.finish, lambda: self._complete(run))
        return run

    def _complete(self, run: Any) -> None:
        """Waits for unfinished writes and logs the page, if this sink still logs to the run."""
        if self._run is not run:
            return
        try:
            self._wait()
            self._log_page()
        except Exception as error:
            logger.warning("tlens: the page could not be logged to trackio: %s", error)

    def _unhook(self, run: Any) -> None:
        # Where somebody else has hooked in since, it stays and does nothing.
        if vars(run).get("finish") is self._hook:
            run.finish = self._hook.__wrapped__

    def _log_page(self) -> None:
        if self._store is None or self._last is None:
            return
        if _finished(self._run):
            self._warn_once("the page could not be logged there")
            return
        step, self._last = self._last, None
        file = self._store.page()
        page = self._trackio.Html(file, inject=False, caption=f"To see it larger: {file}")
        self._run.log({self._keys("page"): page, STEP: step}, step=step)

    def _warn_once(self, what: str) -> None:
        if not self._warned:
            logger.warning("tlens: the trackio run was finished by whoever started it; %s.", what)
        self._warned = True

    def _row(self, readings: Sequence[Reading], step: int, folder: Path) -> dict[str, Any]:
        row = {self._keys(r.key): r.values.item() for r in scalars(readings)}
        for key, values in histograms(readings):
            row[self._keys(key)] = self._trackio.Histogram(values, num_bins=32)
        for number, (key, png) in enumerate(pictures(readings, step)):
            file = folder / f"{number}.png"
            file.write_bytes(png)
            row[self._keys(key)] = self._trackio.Image(file)
        for key, own, table in tables(readings, step):
            frame = table()
            if self._traces and about_rollouts(own) and frame.columns.isin(TEXTS).any():
                row[self._keys(key)] = self._made_traces(frame)
                continue
            columns = excerpt(frame)
            data = [list(each) for each in zip(*columns.values(), strict=True)]
            row[self._keys(key)] = self._trackio.Table(columns=list(columns), data=data)
        return row

    def _made_traces(self, frame: pd.DataFrame) -> list[Any]:
        """Makes a trace of each rollout: prompt and completion, and its numbers as metadata."""
        columns = cells(frame)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [
            self._trackio.Trace(
                [
                    {"role": role, "content": row.pop(text)}
                    for role, text in (("user", "prompt"), ("assistant", "completion"))
                ],
                metadata=row,
            )
            for row in rows
        ]


def _before(finish: Callable[[], None], first: Callable[[], None]) -> Callable[[], None]:
    """Makes a `finish` that calls `first` before it.

    trackio 0.43 has no hook at the end of a run, but trackio.finish() and everything else call the
    run's own `finish`.
    """

    @functools.wraps(finish)
    def both() -> None:
        first()
        finish()

    return both


def _finished(run: Any) -> bool:
    # trackio 0.43 says so nowhere else; what is logged to a finished run may be lost.
    return run._stop_flag.is_set()
