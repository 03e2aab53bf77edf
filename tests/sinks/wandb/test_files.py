"""How many files a run has, when it ends, and what is written when somebody else ends it."""

import gc
import logging
import threading
import time

import numpy as np
import pytest
import wandb

from tests.sinks.samples import pattern
from tests.sinks.wandb.wandb_file import history, run_file
from tlens_callback import Reading, WandbSink
from tlens_callback.sinks.wandb.file_budget import FileBudget

# An artifact of wandb 0.31, which a table makes, leaves its directory to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

STEP = "train/global_step"
MOSAIC, FIGURE, TABLE = "tlens/a/pattern/p", "tlens/a/heads", "tlens/a/rank_table"


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


class Paged:
    """A store that makes a page."""

    def __init__(self, folder):
        self.path = folder / "page.html"
        self.calls = 0

    def page(self):
        self.calls += 1
        self.path.write_text(f"<script>{self.calls}</script>\n")
        return self.path


def observation(step):
    """A number and three files: a picture, a figure and a table."""
    whole = pattern(0, "p", layers=1, heads=1)
    tiny = Reading(
        key="a/pattern/p", values=whole.values[..., :2, :2], axes=whole.axes, unit="probability"
    )
    return [
        Reading(key="a/number", values=float(step), unit="x"),
        tiny,
        Reading(key="a/matrix", values=np.full((1, 1), step), axes=("layer", "head"), unit="x"),
        Reading(key="a/list", values=[step], axes=("rank",), unit="x"),
    ]


def words(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "tlens_callback"]


def files_of(offline):
    folder = run_file(offline).parent / "files"
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_long_run_stays_below_a_thousand_files(offline, caplog, tmp_path):
    sink = WandbSink(store=Paged(tmp_path))
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        for step in range(2_000):
            sink.write(observation(step), step=step)
        sink.close()
    wandb.teardown()
    assert len(files_of(offline)) < 1_000
    media = [path for path in files_of(offline) if "media" in path.parts]
    assert 700 < len(media) <= 900
    rows = history(run_file(offline))
    assert [r["tlens/a/number"] for r in rows if "tlens/a/number" in r] == list(range(2_000))
    for key in (MOSAIC, FIGURE, TABLE):
        steps = [row[STEP] for row in rows if key in row]
        assert steps[:100] == list(range(100)) and steps[-1] == 1_999 and steps[-2] < 1_999
        assert len([step for step in steps if step > 1_000]) > 10
    assert sum(key in row for row in rows for key in (MOSAIC, FIGURE, TABLE)) + 1 == len(media)
    assert [row[STEP] for row in rows if "tlens/page" in row] == [1_999]
    (said,) = words(caplog)
    assert "from step 151 on, only some observations" in said and "below 900 files" in said


@pytest.mark.parametrize("most", [None, 5_000])
@pytest.mark.slow
def test_a_setting_that_passes_a_thousand_is_told_of_at_once(offline, caplog, most):
    sink = WandbSink(most_files=most)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        for step in range(3):
            sink.write(observation(step), step=step)
    (said,) = words(caplog)
    assert "logs 3 files" in said and "333 observations" in said
    sink.close()


@pytest.mark.parametrize("most", [None, 40, 4, 3, 0])
@pytest.mark.slow
def test_a_bound_is_one(offline, tmp_path, most):
    sink = WandbSink(most_files=most, store=Paged(tmp_path))
    for step in range(30):
        sink.write(observation(step), step=step)
    sink.close()
    wandb.teardown()
    media = [path for path in files_of(offline) if "media" in path.parts]
    assert len(media) == 91 if most is None else len(media) <= most
    rows = history(run_file(offline))
    assert sum("tlens/a/number" in row for row in rows) == 30
    assert [row[STEP] for row in rows if MOSAIC in row][-1:] == ([29] if most != 0 else [])
    assert sum("tlens/page" in row for row in rows) == (most != 0)


def test_two_trainings_in_one_run_have_one_bound(offline):
    run = wandb.init(project="test")
    sink = WandbSink(most_files=12)
    for step in range(20):
        sink.write(observation(step), step=step)
        if step == 9:
            sink.close()
    sink.close()
    run.finish()
    wandb.teardown()
    assert 9 <= len([path for path in files_of(offline) if "media" in path.parts]) <= 12


def test_what_was_held_back_is_not_logged_after_what_came_later(offline):
    budget = FileBudget(40, page=0)
    shown = [step for step in range(30) if budget.take(3)]
    assert len(shown) <= shown[-1], "some were held back"
    sink = WandbSink(most_files=40)
    for step in range(shown[-1] + 1):
        sink.write(observation(step), step=step)
    sink.close()
    wandb.teardown()
    assert [row[STEP] for row in history(run_file(offline)) if MOSAIC in row] == shown


def test_the_page_comes_once_and_last(offline, tmp_path):
    run = wandb.init(project="test")
    store = Paged(tmp_path)
    sink = WandbSink(store=store)
    sink.close()
    assert store.calls == 0, "nothing was seen"
    for last in (7, 12):
        sink.write(observation(last - 1), step=last - 1)
        sink.write(observation(last), step=last)
        sink.close()
        sink.close()
    run.finish()
    wandb.teardown()
    rows = history(run_file(offline))
    assert [row[STEP] for row in rows] == [6, 7, 7, 11, 12, 12]
    pages = [row for row in rows if "tlens/page" in row]
    assert [row[STEP] for row in pages] == [7, 12] and rows[2] is pages[0] and store.calls == 2
    for number, row in enumerate(pages, 1):
        assert {key for key in row if key[0] != "_"} == {"tlens/page", STEP}
        assert row["tlens/page"]["_type"] == "html-file"
        shown = run_file(offline).parent / "files" / row["tlens/page"]["path"]
        # As it was made: nothing of W&B's is put into it.
        assert shown.read_text() == f"<script>{number}</script>\n"


def test_without_a_store_there_is_no_page(offline):
    sink = WandbSink()
    sink.write(observation(1), step=1)
    sink.close()
    wandb.teardown()
    assert not [row for row in history(run_file(offline)) if "tlens/page" in row]


class Slow:
    """A thread that still has to write when training is over, as the callback's does."""

    def __init__(self, sink):
        self.thread = threading.Thread(target=self.write, args=(sink,))
        self.go = threading.Event()
        self.lost = None

    def write(self, sink):
        self.go.wait(120)
        time.sleep(0.2)
        try:
            for step in (1, 2):
                sink.write(observation(step), step=step)
        except RuntimeError as error:
            self.lost = error

    def wait(self):
        self.go.set()
        self.thread.join()


def by_finish(run):
    run.finish()


def by_wandb(run):
    wandb.finish()


def by_leaving(run):
    with run:
        pass


def by_the_next_run(run):
    wandb.init(project="other", settings=wandb.Settings(reinit="finish_previous")).finish()


@pytest.mark.parametrize(
    ("finish", "asked"),
    [
        (by_finish, True),
        (by_wandb, True),
        (by_leaving, True),
        (by_the_next_run, True),
        (by_finish, False),
    ],
)
@pytest.mark.slow
def test_whoever_finishes_the_run_waits_for_what_is_not_written(offline, tmp_path, finish, asked):
    run = wandb.init(project="test")
    sink = WandbSink(store=Paged(tmp_path), most_files=7)
    slow = Slow(sink)
    if asked:
        sink.before_finish(slow.wait)
    slow.thread.start()
    finish(run)
    slow.go.set()
    slow.thread.join()
    sink.close()
    wandb.teardown()
    (path,) = offline.glob(f"wandb/offline-run-*/run-{run.id}.wandb")
    rows = history(path)
    if asked:
        assert slow.lost is None
        assert [(row[STEP], "tlens/page" in row) for row in rows] == [
            (1, False),
            (2, False),
            (2, False),
            (2, True),
        ]
        assert MOSAIC in rows[2] and MOSAIC not in rows[1], "files that had been held back"
    else:
        assert rows == []


def test_the_run_that_waits_is_the_one_that_is_written_to(offline, tmp_path):
    """Another was active when training began."""
    before = wandb.init(project="before")
    sink = WandbSink(store=Paged(tmp_path))
    sink.before_finish(lambda: None)
    before.finish()
    run = wandb.init(project="test")
    sink.write(observation(1), step=1)
    run.finish()
    wandb.teardown()
    (path,) = offline.glob(f"wandb/offline-run-*/run-{run.id}.wandb")
    assert ["tlens/page" in row for row in history(path)] == [False, True]


def test_a_run_without_hooks_waits_too():
    """Where wandb changes what is private to it."""

    class Run:
        name = id = "run"
        url, dir = None, "."

        def __init__(self):
            self.said = []

        def define_metric(self, *_, **__):
            pass

        def log(self, row):
            self.said.append(row["tlens/a/number"])

        def finish(self, code=None):
            self.said.append(f"finished {code}")

    run = Run()
    sink = WandbSink(run, most_files=0)
    sink.before_finish(lambda: sink.write(observation(3), step=3))
    sink.write(observation(2), step=2)
    assert "finish" in vars(run)
    run.finish(5)
    assert run.said == [2, 3, "finished 5"] and "finish" not in vars(run)


def test_a_closed_sink_leaves_the_run_as_it_was(offline):
    run = wandb.init(project="test")
    before = list(run._teardown_hooks)
    calls = []
    first, second = WandbSink(), WandbSink(name="second")
    for sink in (first, second):
        sink.before_finish(lambda: calls.append(1))
        sink.write(observation(1), step=1)
    assert len(run._teardown_hooks) == len(before) + 2
    first.close()
    second.close()
    assert run._teardown_hooks == before
    run.finish()
    assert calls == []


def test_what_fails_at_the_end_is_in_nobodys_way(offline, tmp_path, caplog):
    class Broken(Paged):
        def page(self):
            raise OSError("disk full")

    run = wandb.init(project="test")
    sink = WandbSink(store=Broken(tmp_path))
    sink.write(observation(1), step=1)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run.finish()
    assert "disk full" in words(caplog)[0] and wandb.run is None
    sink.close()

    sink = WandbSink(store=Broken(tmp_path))
    sink.write(observation(1), step=1)
    with pytest.raises(OSError, match="disk full"):
        sink.close()
    assert wandb.run is None, "its own run is finished all the same"
