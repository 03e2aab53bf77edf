"""`WandbSink`: shows readings as curves, figures, pictures and tables in Weights & Biases."""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tlens_callback.reading import Reading
from tlens_callback.render import is_curve
from tlens_callback.render.panels import load_plotly
from tlens_callback.sinks.rollouts import overview
from tlens_callback.sinks.shown import (
    STEP,
    HasPage,
    Keys,
    by_instrument,
    check_store,
    without_trainer_logs,
)
from tlens_callback.sinks.wandb.file_budget import FileBudget
from tlens_callback.sinks.wandb.growing import GrowingTables
from tlens_callback.sinks.wandb.row_log import RowLog
from tlens_callback.sinks.wandb.rows import (
    MOST_NUMBERS,
    Medium,
    alerts,
    head_numbers,
    media,
    numbers,
    to_wandb,
)

logger = logging.getLogger("tlens_callback")

ADVISED_FILES = 1_000
"""W&B asks for fewer files in a run: its pages become slow."""

_QUIET = 600
"""Seconds in which W&B does not repeat an alert of one title."""


class WandbSink:
    """Logs each observation as one row of a W&B run, beside the trainer's own rows.

    Each row has its own `train/global_step` and is never merged with another row, so that it is
    shown at its step, whatever the order and the thread in which rows are logged. The first rows
    wait until it is clear that nobody logs to the run with `step=`; if somebody does, rows wait as
    long as theirs would be lost otherwise, the last ones until the run is finished.

    W&B's run page shows an overview: the readings that an instrument's `description` marks as
    headlines: for the default instruments about 17 numbers, and five more per probe. The store and
    its page have the rest. If an instrument does not describe a measure, W&B shows all that is
    listed below, but only the first 8 numbers per probe.

    Keys:
        tlens/<key>: a number, for a reading without axes and texts.
        tlens/heads/<key>/L05H01: a number for each head, of the readings named in `heads`; W&B
            does not make panels for them by itself.
        tlens/<key>: picture of a ("layer", "head", "query", "key") reading, all heads.
        tlens/<instrument>/heads: interactive figure of its ("layer", "head") readings.
        tlens/<instrument>/experts: the same of ("layer", "expert").
        tlens/<instrument>/by_<axis>: the same of ("layer", <axis>), any other but "rank".
        tlens/<instrument>/feature_by_<axis>: the same of ("feature", <axis>).
        tlens/<instrument>/by_layer: interactive figure of its ("layer",) readings: a panel per
            measure, a line per probe, and behind it, dotted, the line of the first observation
            since this sink was made or closed.
        tlens/<instrument>/table: table of its ("layer", "rank", ...) readings, a row per neuron or
            token; of more than 10000 rows the lowest ranks.
        tlens/<instrument>/<axis>_rank_table: the same of (<axis>, "rank", ...), any other.
        tlens/<instrument>/<axis>_table: table of its readings of any other single axis ("event",
            "rank", "token", "block"; "layer" where what was read is a token), a row per entry; of
            readings with at most 1000 entries.
        tlens/<instrument>/rollout_table: table of the rollouts, of log mode "INCREMENTAL": each
            observation adds its rows, with its step in the column "step".
        tlens/page: the page of `store`, once, when the sink is closed or its run is about to be
            finished.

    Each entry of an ("event",) reading is also an alert of level WARN: "tlens: " and its label or
    text. The title is cut to 63 characters; the whole sentence and the step are in the alert's
    text. W&B does not repeat a title within 10 minutes, and sends alerts as the user's W&B settings
    say; an offline run keeps them in its file.

    In keys, characters of a probe's name other than letters, digits, space and `_ - + =` become
    "_". Of winners against losers it shows contrasts and their false discovery rates, unless
    `everything` is set. Readings with other axes are not shown here but only in the local store.
    Readings with the axis "update" are the trainer's own numbers, which the run has already.

    A picture, figure, table or page is a file, and W&B advises fewer than 1000 in a run. All
    observations have their files until half of `most_files` is used. Then only some have, at
    growing intervals, and the last one, whose files are logged when the sink is closed. Numbers are
    logged at every observation.

    Args:
        name: the first segment of its keys, instead of "tlens".
        run: the run to log to. None: the run that is active at the first write (the trainer's, with
            `report_to="wandb"`). If there is none, the sink starts one in the project WANDB_PROJECT
            or "tlens_callback", and finishes it when it is closed.
        store: the `LocalSink` whose page is logged. It must belong to the same training and come
            before this sink in the list. None: no page.
        heads: keys of ("layer", "head") readings, such as "head_scores/induction", to be logged
            head by head: 270 numbers an observation for a model of 30 layers with 9 heads.
        everything: log all numbers and all figures and tables.
        most_files: most files of this sink in a run, including the page; W&B itself and the trainer
            need some too. A process that resumes a run counts from 0. None: no limit. 0: only
            numbers.

    Raises:
        ImportError: if wandb is not installed.
        ValueError: if run, store, heads or most_files are of a wrong kind.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        name: str = "tlens",
        store: HasPage | None = None,
        heads: Sequence[str] = (),
        everything: bool = False,
        most_files: int | None = 900,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("WandbSink needs wandb: pip install wandb") from error
        if run is not None and not callable(getattr(run, "define_metric", None)):
            raise ValueError(f"run must be a run that wandb.init() returned, got {run!r}.")
        check_store(store)
        if isinstance(heads, str) or not all(isinstance(k, str) and "/" in k for k in heads):
            raise ValueError(
                f"heads must be a list of keys such as ['head_scores/induction'], got {heads!r}."
            )
        if most_files is not None and (not isinstance(most_files, int) or most_files < 0):
            raise ValueError(
                f"most_files must be a whole number, 0 or more, or None, got {most_files!r}."
            )
        # Now, since the first write comes on the writer's thread.
        load_plotly()
        self._wandb: Any = wandb
        self._name, self._given, self._store = name, run, store
        self._heads, self._everything, self._most_files = list(heads), everything, most_files
        self._run: Any = None
        self._started_here = False
        self._keys = Keys(name)
        self._first: dict[str, tuple[int, list[Reading]]] = {}
        self._place = "W&B, no run yet"
        self._wait: Callable[[], None] = lambda: None
        self._rows: RowLog | None = None
        self._files = FileBudget(most_files, page=int(store is not None))
        self._files_run_id: str | None = None
        self._growing = GrowingTables(wandb)
        self._defined: set[str] = set()
        self._warned: set[str] = set()
        self._checked_heads = False
        # What must still be logged if the run ends now: the page of this step, and files held back.
        self._page_step: int | None = None
        self._held_files: tuple[list[Medium], int] | None = None

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Logs one row, and sends an alert for each of its events.

        Raises:
            RuntimeError: if somebody else has finished the run.
        """
        run = self._find_run()
        readings = without_trainer_logs(readings)
        if not self._everything:
            readings = overview(readings)
        shown, cut_short = numbers(readings, everything=self._everything)
        row: dict[str, Any] = {self._keys(r.key): r.values.item() for r in shown}
        row |= self._head_row(run, readings)
        files = media(
            readings, self._first_lines(readings, step), step=step, everything=self._everything
        )
        if files and self._files.take(len(files)):
            self._held_files = None
        elif files:
            self._held_files, files = (files, step), []
        self._warn(readings, cut_short, files, step)
        self._log(run, row, files, step)
        self._page_step = step
        for title, text in alerts(readings, step):
            level = self._wandb.AlertLevel.WARN
            run.alert(title=title, text=text, level=level, wait_duration=_QUIET)

    def before_finish(self, wait: Callable[[], None]) -> None:
        """Keeps `wait`, to call it when somebody else is about to finish the run; see `Sink`."""
        self._wait = wait
        run = self._wandb.run if self._given is None else self._given
        if run is not None:
            self._join(run)

    def close(self) -> None:
        """Logs the page, and finishes the run if this sink started it; the next `write` looks for a
        run again."""
        run, started_here = self._run, self._started_here
        try:
            self._log_rest()
        finally:
            if self._rows is not None and self._rows.leave(now=started_here):
                self._rows = None
            self._run = None
            self._started_here = False
            self._first.clear()
            if started_here:
                run.finish()

    def __str__(self) -> str:
        return self._place

    def _find_run(self) -> Any:
        """Returns the run to log to, after declaring its x axis."""
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
            raise RuntimeError(_finished_text(run)) from error
        self._join(run)
        if run.id != self._files_run_id:
            self._files_run_id = run.id
            self._files = FileBudget(self._most_files, page=self._files.page)
            self._defined.clear()
            self._growing.clear()
        return run

    def _join(self, run: Any) -> None:
        """Makes the run wait for what is not written yet when somebody finishes it."""
        if self._rows is not None and self._rows.run is not run:
            self._rows.leave(now=True)
            self._rows = None
        if self._rows is None:
            self._rows = RowLog(run, self._before_run_finish, at_once=self._started_here)

    def _before_run_finish(self) -> None:
        self._wait()
        self._log_rest()

    def _log_rest(self) -> None:
        """Logs the files of the last observation if they were held back, and the page."""
        held, self._held_files = self._held_files, None
        step, self._page_step = self._page_step, None
        if self._run is None:
            return
        if held is not None:
            files, at = held
            room = self._files.last(len(files), page=self._files.page)
            self._log(self._run, {}, files[:room], at)
        if self._store is not None and step is not None and self._files.last(1, page=0):
            page = self._wandb.Html(str(self._store.page()), inject=False)
            self._log(self._run, {self._keys("page"): page}, [], step)

    def _log(self, run: Any, row: dict[str, Any], files: Sequence[Medium], step: int) -> None:
        assert self._rows is not None, "a run that is logged to is watched"
        folder = tempfile.TemporaryDirectory(prefix="tlens-", ignore_cleanup_errors=True)
        try:
            made: dict[str, Any] = {}
            for i, file in enumerate(files):
                key = self._keys(file.name)
                if file.kind == "growing":
                    made[key] = self._growing.adds(key, file.make())
                else:
                    made[key] = to_wandb(self._wandb, file, Path(folder.name) / f"{i}.png")
            if row or made:
                self._rows.log({**row, STEP: step}, made, folder)
            else:
                folder.cleanup()
        except self._wandb.errors.UsageError as error:
            raise RuntimeError(_finished_text(run)) from error
        except BaseException:
            folder.cleanup()
            raise

    def _head_row(self, run: Any, readings: Sequence[Reading]) -> dict[str, float]:
        row = {self._keys(k): v for k, v in head_numbers(readings, self._heads).items()}
        for key in row:
            if key not in self._defined:
                # By its whole name: if several patterns match a key, W&B may choose any of them.
                run.define_metric(key, step_metric=STEP, hidden=True)
                self._defined.add(key)
        return row

    def _first_lines(
        self, readings: Sequence[Reading], step: int
    ) -> dict[str, tuple[int, list[Reading]]]:
        """Returns each instrument's step and lines at the first observation; it may be this one."""
        for instrument, own in by_instrument([r for r in readings if is_curve(r)]).items():
            if instrument not in self._first or step <= self._first[instrument][0]:
                self._first[instrument] = step, own
        return self._first

    def _warn(
        self,
        readings: Sequence[Reading],
        cut_short: set[str],
        files: Sequence[Medium],
        step: int,
    ) -> None:
        """Warns, once each, of numbers that are left out, keys that do not exist and many files."""
        for instrument in sorted(cut_short):
            self._warn_once(
                f"W&B shows only the first {MOST_NUMBERS} numbers of {instrument!r}; "
                f"WandbSink(everything=True) shows all of them."
            )
        if self._heads and not self._checked_heads:
            known = [r.key for r in readings if r.axes == ("layer", "head")]
            for key in self._heads:
                if key not in known:
                    self._warn_once(
                        f"heads=[{key!r}]: there is no such reading; the readings with a value for "
                        f"each head are {known}."
                    )
        self._checked_heads = True
        if files and (self._most_files is None or self._most_files > ADVISED_FILES):
            self._warn_once(
                f"each observation logs {len(files)} files to W&B, which advises fewer than "
                f"{ADVISED_FILES} in a run: {ADVISED_FILES // len(files)} observations reach that "
                f"number. WandbSink() without most_files= stays below it.",
                about="files",
            )
        if self._held_files is not None and self._most_files:
            self._warn_once(
                f"from step {step} on, only some observations have pictures and tables in W&B, so "
                f"that the run stays below {self._most_files} files. All numbers are still logged, "
                f"and the local store has everything.",
                about="thin",
            )

    def _warn_once(self, text: str, about: str | None = None) -> None:
        if (about or text) not in self._warned:
            self._warned.add(about or text)
            logger.warning("tlens: %s", text)


def _finished_text(run: Any) -> str:
    return (
        f"The W&B run {run.name or run.id} has been finished, so nothing more can be logged to it. "
        f"Call wandb.finish() only after train(), or give WandbSink(run=...) an active run."
    )
