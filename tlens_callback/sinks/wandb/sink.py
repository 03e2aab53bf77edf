"""`WandbSink`: readings as curves, figures, pictures and tables of a Weights & Biases run."""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tlens_callback.reading import Reading
from tlens_callback.render import is_curve
from tlens_callback.render.panels import load_plotly
from tlens_callback.sinks.shown import (
    STEP,
    HasPage,
    Keys,
    by_instrument,
    check_store,
    without_trainer_logs,
)
from tlens_callback.sinks.wandb.file_budget import FileBudget
from tlens_callback.sinks.wandb.finish import BeforeFinish
from tlens_callback.sinks.wandb.rows import (
    MOST_NUMBERS,
    Medium,
    alerts,
    head_numbers,
    made,
    media,
    numbers,
)

logger = logging.getLogger("tlens_callback")

ADVISED_FILES = 1_000
"""W&B asks for fewer files in a run: its pages become slow."""

_QUIET = 600
"""Seconds in which W&B does not repeat an alert of one title."""


class WandbSink:
    """Logs each observation as one row of a W&B run, beside the trainer's own rows.

    Rows carry `train/global_step` themselves and are never merged with others, so that they land
    on their step in whatever order and from whatever thread they come.

    A run page is for looking around in: of the package's own instruments it has the headlines, 20
    numbers or so for one probe (`wandb_rows.NUMBERS`, `wandb_rows.MEDIA`), and the store and its
    page have the rest. Of any other instrument, also of one with a name= of your own, it has what
    is below, and the first 8 numbers for each probe.

    Keys:
        tlens/<key>: a number, for a reading without axes and texts.
        tlens/heads/<key>/L05H01: a number for each head, of the readings named in `heads`; W&B
            makes no panels of them by itself.
        tlens/<key>: picture of a ("layer", "head", "query", "key") reading, all heads.
        tlens/<instrument>/heads: interactive figure of its ("layer", "head") readings.
        tlens/<instrument>/experts: the same of ("layer", "expert").
        tlens/<instrument>/by_<axis>: the same of ("layer", <axis>), any other but "rank".
        tlens/<instrument>/feature_by_<axis>: the same of ("feature", <axis>).
        tlens/<instrument>/by_layer: interactive figure of its ("layer",) readings: a panel per
            measure, a line per probe, dotted behind it that of the first observation since this
            sink was made or closed.
        tlens/<instrument>/table: table of its ("layer", "rank", ...) readings, a row per neuron or
            token; of more than 10000 rows the lowest ranks.
        tlens/<instrument>/<axis>_rank_table: the same of (<axis>, "rank", ...), any other.
        tlens/<instrument>/<axis>_table: table of its readings of any other single axis ("event",
            "rank", "token", "block"; "layer" where what was read is a token), a row per entry; of
            readings with at most 1000 entries.
        tlens/page: the page of `store`, once, when the sink is closed or its run is about to be
            finished.

    Each entry of an ("event",) reading is an alert too, of level WARN: "tlens: " and its label, or
    its text. The title is cut to 63 characters, the whole sentence and the step are below it. W&B
    does not repeat a title within 10 minutes and passes alerts on as its user's settings say; an
    offline run keeps them in its file.

    Characters of a probe's name other than letters, digits, space and `_ - + =` become "_" in
    keys. Readings of other axes fit no picture and are left to the local store; those with the axis
    "update" are the trainer's own and are in the run already.

    A picture, figure, table or page is a file, and W&B advises fewer than 1000 in a run. The first
    observations have theirs; from half of `most_files` on only some have, at growing intervals, and
    the last one, which is known when the sink is closed. Numbers are logged at every observation.

    Args:
        name: the first segment of its keys, in the place of "tlens".
        run: the run to log to. None: the one that is active at the first write (the trainer's,
            with `report_to="wandb"`), or else one that this sink starts, in the project
            WANDB_PROJECT or "tlens_callback". Only a run started here is finished here.
        store: whose page is shown: the `LocalSink` of the same training, before this sink in the
            list. None: no page.
        heads: keys of ("layer", "head") readings, such as "head_scores/induction", to be logged
            head by head: 270 numbers an observation for a model of 30 layers with 9 heads.
        everything: log all numbers and all figures and tables.
        most_files: files of this sink in a run, the page included; the rest is for W&B's own and
            the trainer's. A process that resumes a run counts anew. None: no bound. 0: numbers
            alone.

    Raises:
        ImportError: where wandb is not installed.
        ValueError: for a run, store, heads or most_files that are none.
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
            raise ValueError(f"run is what wandb.init() returns, got {run!r}.")
        check_store(store)
        if isinstance(heads, str) or not all(isinstance(k, str) and "/" in k for k in heads):
            raise ValueError(
                f"heads is a list of keys such as ['head_scores/induction'], got {heads!r}."
            )
        if most_files is not None and (not isinstance(most_files, int) or most_files < 0):
            raise ValueError(
                f"most_files is a whole number from 0 on, or None, got {most_files!r}."
            )
        # Here, and not at the first write, which is on the writer's thread.
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
        self._hook: BeforeFinish | None = None
        self._files = FileBudget(most_files, page=int(store is not None))
        self._files_of: str | None = None
        self._defined: set[str] = set()
        self._said: set[str] = set()
        self._looked = False
        # What the run lacks if it ends now: the page of this step, files that were thinned out.
        self._unpaged: int | None = None
        self._held: tuple[list[Medium], int] | None = None

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Logs one row, and sends the alerts of its events.

        Raises:
            RuntimeError: if the run was finished by its owner.
        """
        run = self._resolve()
        readings = without_trainer_logs(readings)
        shown, cut_short = numbers(readings, everything=self._everything)
        row: dict[str, Any] = {self._keys(r.key): r.values.item() for r in shown}
        row |= self._of_heads(run, readings)
        files = media(
            readings, self._before(readings, step), step=step, everything=self._everything
        )
        if files and self._files.take(len(files)):
            self._held = None
        elif files:
            self._held, files = (files, step), []
        self._say(readings, cut_short, files, step)
        self._log(run, row, files, step)
        self._unpaged = step
        for title, text in alerts(readings, step):
            level = self._wandb.AlertLevel.WARN
            run.alert(title=title, text=text, level=level, wait_duration=_QUIET)

    def before_finish(self, wait: Callable[[], None]) -> None:
        """Takes what to wait for when somebody else is about to finish the run; see `Sink`."""
        self._wait = wait
        run = self._wandb.run if self._given is None else self._given
        if run is not None:
            self._watch(run)

    def close(self) -> None:
        """Logs the page, and finishes the run if this sink started it; the next `write` looks for a
        run anew."""
        run, started_here = self._run, self._started_here
        try:
            self._end()
        finally:
            if self._hook is not None:
                self._hook.remove()
            self._hook = self._run = None
            self._started_here = False
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
        self._watch(run)
        if run.id != self._files_of:
            self._files_of = run.id
            self._files = FileBudget(self._most_files, page=self._files.page)
            self._defined.clear()
        return run

    def _watch(self, run: Any) -> None:
        """Has the run wait for what is not written yet when somebody finishes it."""
        if self._hook is not None and self._hook.run is not run:
            self._hook.remove()
            self._hook = None
        if self._hook is None:
            self._hook = BeforeFinish(run, self._before_it_is_finished)

    def _before_it_is_finished(self) -> None:
        try:
            self._wait()
            self._end()
        except Exception as error:
            # Not in the way of whoever finishes the run.
            logger.warning("tlens: not everything reached W&B: %s", error, exc_info=error)

    def _end(self) -> None:
        """Logs the files of the last observation, if they were held back, and the page."""
        held, self._held = self._held, None
        step, self._unpaged = self._unpaged, None
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
        with tempfile.TemporaryDirectory(prefix="tlens-", ignore_cleanup_errors=True) as folder:
            for i, file in enumerate(files):
                row[self._keys(file.name)] = made(self._wandb, file, Path(folder) / f"{i}.png")
            if not row:
                return
            try:
                run.log({**row, STEP: step})
            except self._wandb.errors.UsageError as error:
                raise RuntimeError(_finished(run)) from error

    def _of_heads(self, run: Any, readings: Sequence[Reading]) -> dict[str, float]:
        row = {self._keys(k): v for k, v in head_numbers(readings, self._heads).items()}
        for key in row:
            if key not in self._defined:
                # By name: of several patterns that match a key, W&B takes any.
                run.define_metric(key, step_metric=STEP, hidden=True)
                self._defined.add(key)
        return row

    def _before(
        self, readings: Sequence[Reading], step: int
    ) -> dict[str, tuple[int, list[Reading]]]:
        """Each instrument's step and lines of the first observation, which may be this one."""
        for instrument, own in by_instrument([r for r in readings if is_curve(r)]).items():
            if instrument not in self._first or step <= self._first[instrument][0]:
                self._first[instrument] = step, own
        return self._first

    def _say(
        self,
        readings: Sequence[Reading],
        cut_short: set[str],
        files: Sequence[Medium],
        step: int,
    ) -> None:
        """A word on what a setting leaves out, exceeds or does not find, once each."""
        for instrument in sorted(cut_short):
            self._once(
                f"W&B shows the first {MOST_NUMBERS} numbers of {instrument!r}; "
                f"WandbSink(everything=True) shows all."
            )
        if self._heads and not self._looked:
            known = [r.key for r in readings if r.axes == ("layer", "head")]
            for key in self._heads:
                if key not in known:
                    self._once(f"heads=[{key!r}]: there is no such reading; there are {known}.")
        self._looked = True
        if files and (self._most_files is None or self._most_files > ADVISED_FILES):
            self._once(
                f"an observation has {len(files)} files in W&B, which advises fewer than "
                f"{ADVISED_FILES} a run: {ADVISED_FILES // len(files)} observations. WandbSink() "
                f"without most_files= stays below.",
                about="files",
            )
        if self._held is not None and self._most_files:
            self._once(
                f"from step {step} on only some observations have pictures and tables in W&B, so "
                f"that the run stays below {self._most_files} files. Numbers go on, and a local "
                f"store and its page have it all.",
                about="thin",
            )

    def _once(self, text: str, about: str | None = None) -> None:
        if (about or text) not in self._said:
            self._said.add(about or text)
            logger.warning("tlens: %s", text)


def _finished(run: Any) -> str:
    return (
        f"The W&B run {run.name or run.id} was finished by whoever started it, so nothing more can "
        f"be logged to it. Call wandb.finish() after train(), or pass WandbSink(run=...) a run "
        f"that is active."
    )
