"""`TensorBoardSink`: shows readings as curves, pictures, histograms and tables in TensorBoard."""

import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlens_callback.reading import Reading
from tlens_callback.sinks.event_file import EventFile
from tlens_callback.sinks.markdown import best_and_worst_text, escaped, markdown_table
from tlens_callback.sinks.rollouts import TEXTS, overview
from tlens_callback.sinks.shown import (
    HasPage,
    Keys,
    by_instrument,
    check_store,
    histograms,
    pictures,
    scalars,
    tables,
    without_trainer_logs,
)
from tlens_callback.store.atomic import write_whole
from tlens_callback.store.numbered import newest, of_run, unused

_FILES = "events.out.tfevents.*"
_RUN = "tlens-run.txt"
"""The file in a run's folder that holds its identity."""


class TensorBoardSink:
    """Writes each observation into event files, at the trainer's step.

    If the process is killed, every completed step stays readable. A step that is not greater than
    the last one makes the run begin again from there: TensorBoard hides what it had from this step
    on. A sink that is new, or was closed, first looks for runs at `path`: step 0 begins a new run,
    in `<path>-2`, `<path>-3`, ... if `path` holds one already; a later step continues the last of
    these runs from that step.

    Keys:
        tlens/<key>: a number for each reading without axes and texts; a histogram for each
            ("layer", "head") reading, without spreads; a picture for each ("layer", "head",
            "query", "key") reading.
        tlens/<instrument>/heads: picture of its ("layer", "head") readings, with a panel for each.
        tlens/<instrument>/experts, by_<axis>, feature_by_<axis>: the same for ("layer", "expert"),
            ("layer", <axis>), ("feature", <axis>).
        tlens/<instrument>/by_layer: picture of its ("layer",) readings, with a panel for each
            measure and a row for each probe.
        tlens/<instrument>/table: text, a table of its ("layer", "rank", ...) readings.
        tlens/<instrument>/<axis>_rank_table: the same for another axis and "rank".
        tlens/<instrument>/<axis>_table: the same for its readings of any other single axis, such as
            events ("event_table").
        tlens/<instrument>/rollout_table: text, a table of the rollouts, without their texts.
        tlens/<instrument>/best_and_worst: text, the best and the worst rollout of each group, with
            their prompt and numbers.
        tlens/page: text that says where the page is, since TensorBoard cannot show it.

    A table has at most about 100 rows, those of the lowest ranks, and says how many it leaves out.
    Of winners against losers, contrasts and their false discovery rates are shown. Only the local
    store has other readings, and those of the axis "update", which are in the
    trainer's own curves.

    Args:
        path: a directory for this sink alone; made at the first write. It must not be the
            trainer's: TensorBoard takes all files in a directory for one run, so that both would
            begin again together.
        name: first segment of the keys, instead of "tlens".
        store: the `LocalSink` of the same readings. At the end the sink says where its page is.

    Attributes:
        path: the directory of this run, known after the first write.

    Raises:
        ImportError: where tensorboard is not installed.
        ValueError: if `path` is a file, or `store` has no page.
    """

    def __init__(
        self, path: str | Path, *, name: str = "tlens", store: HasPage | None = None
    ) -> None:
        try:
            # Not torch.utils.tensorboard, whose import takes seconds and whose add_image encodes
            # each picture again.
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.plugins.histogram.summary_v2 import histogram_pb
            from tensorboard.plugins.text.summary_v2 import text_pb
        except ImportError as error:
            message = "TensorBoardSink needs tensorboard: pip install tensorboard"
            raise ImportError(message) from error
        self._base = Path(path).expanduser().absolute()
        if self._base.exists() and not self._base.is_dir():
            raise ValueError(f"{self._base} is a file, but TensorBoardSink needs a directory.")
        check_store(store)
        self.path = self._base
        self._events, self._summaries = event_pb2, summary_pb2
        self._histogram, self._text = histogram_pb, text_pb
        self._keys = Keys(name)
        self._store = store
        self._file: EventFile | None = None
        self._last: int | None = None
        self._run: str | None = None

    def begin(self, about: Mapping[str, Any]) -> None:
        """Keeps the identity of the run, which a file in its folder has; see `Sink`."""
        self._run = about["run"]

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        """Writes a step.

        Raises:
            ValueError: for a negative step.
        """
        if step < 0:
            raise ValueError(f"A step must be 0 or more, got {step}.")
        summary = self._summary(overview(without_trainer_logs(readings)), step)
        events = [self._event(step, summary=summary)]
        if self._file is None:
            again = self._choose_folder(step)
            self._file = EventFile(self.path)
            self._file.add([self._event(0, file_version="brain.Event:2")])
        else:
            again = self._last is not None and step <= self._last
        if again:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            events.insert(0, self._event(step, session_log=start))
        self._file.add(events)
        self._last = step

    def close(self) -> None:
        """Writes where the page is. A later `write` looks for runs in the directory again."""
        file, step = self._file, self._last
        if file is None:
            return
        try:
            if self._store is not None and step is not None:
                said = f"Open in a browser: {escaped(str(self._store.page()))}"
                file.add([self._event(step, summary=self._text(self._keys("page"), said))])
        finally:
            self._file = self._last = None
            file.close()

    def __str__(self) -> str:
        return f"tensorboard --logdir {self.path} --samples_per_plugin images=1000,text=1000"

    def _choose_folder(self, step: int) -> bool:
        """Chooses the directory, and says whether it holds a run."""
        if step > 0:
            self.path = of_run(self._base, _holds_run, _run_in, self._run)
        else:
            number, self.path = newest(self._base, _holds_run)
            if _holds_run(self.path):
                self.path = unused(self._base, number)
        again = _holds_run(self.path)
        if self._run is not None and not again:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / _RUN, self._run.encode())
        return again

    def _event(self, step: int, **what: Any) -> bytes:
        event = self._events.Event(wall_time=time.time(), step=step, **what)
        return event.SerializeToString()

    def _summary(self, readings: Sequence[Reading], step: int) -> Any:
        """Makes the summary of a whole observation."""
        summary = self._summaries.Summary()
        for reading in scalars(readings):
            summary.value.add(tag=self._keys(reading.key), simple_value=reading.values.item())
        for key, values in histograms(readings):
            summary.MergeFrom(self._histogram(self._keys(key), values))
        for key, png in pictures(readings, step):
            # A PNG has its size at a fixed place.
            width, height = struct.unpack(">II", png[16:24])
            picture = self._summaries.Summary.Image(
                encoded_image_string=png, width=width, height=height, colorspace=3
            )
            summary.value.add(tag=self._keys(key), image=picture)
        for key, _, table in tables(readings, step):
            frame = table().drop(columns=[*TEXTS], errors="ignore")
            summary.MergeFrom(self._text(self._keys(key), markdown_table(frame)))
        for instrument, own in by_instrument(readings).items():
            if text := best_and_worst_text(step, own):
                summary.MergeFrom(self._text(self._keys(f"{instrument}/best_and_worst"), text))
        return summary


def _run_in(path: Path) -> str | None:
    """The identity of the run in this folder; None for a folder of an older version."""
    try:
        return (path / _RUN).read_text()
    except OSError:
        return None


def _holds_run(path: Path) -> bool:
    return any(path.glob(_FILES))
