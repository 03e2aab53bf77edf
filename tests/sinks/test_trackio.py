"""trackio without a network: its own SQLite file and media are read back and compared."""

import contextvars
import logging
import re
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import needs_browser, opened
from tests.sinks import trackio_run
from tests.sinks.samples import EVENT, everything, named, pattern, small
from tests.sinks.trackio_run import alerts, media, rows
from tests.training import CAPITAL, Interrupts, trainer
from tlens_callback import LocalSink, TLensCallback
from tlens_callback.instruments import AttentionPatterns, HeadScores, LogitLens
from tlens_callback.reading import Reading
from tlens_callback.render import axis_table, mosaic
from tlens_callback.render.score_panels import curves_as_rows
from tlens_callback.render.scores_png import score_picture
from tlens_callback.sinks import TrackioSink

trackio = pytest.importorskip("trackio")

STEP = "train/global_step"
PAGE = "<!doctype html><p id=p>no script</p><script>p.textContent = 'it runs'</script>"


class PageOnly:
    """Of a LocalSink its page."""

    def __init__(self, folder):
        self.file, self.asked = folder / "page.html", 0

    def page(self):
        self.asked += 1
        self.file.write_text(PAGE)
        return self.file


@pytest.fixture
def project(request, monkeypatch):
    """The name of a project of the test's own, where the sink and the trainer log."""
    assert Path(trackio.utils.TRACKIO_DIR) == trackio_run.DIR, "trackio was imported too early"
    name = re.sub(r"\W", "_", request.node.name)
    monkeypatch.setenv("TRACKIO_PROJECT", name)
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"):
        monkeypatch.delenv(variable, raising=False)
    yield name
    if trackio.context_vars.current_run.get() is not None:
        trackio.finish()


def begun(project):
    """A run that somebody else started."""
    return trackio.init(project=project, auto_log_cpu=False, auto_log_gpu=False)


def test_what_an_observation_becomes(project, tmp_path):
    store = PageOnly(tmp_path)
    sink = TrackioSink(store=store)
    for step in (5, 9):
        sink.write(everything(step), step=step)
    assert f'trackio show --project "{project}"' in str(sink)
    sink.close()
    sink.close()
    assert trackio.context_vars.current_run.get() is None, "it started this run and finishes it"
    *written, last = rows(project)
    assert [(step, row[STEP]) for _, step, row in written] == [(5, 5), (9, 9)]
    for _, step, row in written:
        readings = everything(step)
        assert set(row) == {
            "tlens/cost/seconds",
            "tlens/target_scores/loss/capital",
            "tlens/head_scores/max_induction",
            "tlens/head_scores/induction",
            "tlens/head_scores/change",
            "tlens/head_scores/heads",
            "tlens/top_neurons/table",
            "tlens/logit_lens/table",
            "tlens/logit_lens/by_layer",
            "tlens/virtual_heads/rank_table",
            "tlens/watch/event_table",
            "tlens/attention_patterns/pattern/capital",
            "tlens/attention_patterns/pattern/other probe",
            STEP,
        }
        assert row["tlens/cost/seconds"] == step + 0.25
        assert row["tlens/target_scores/loss/capital"] == "NaN"
        by_key = {reading.key: reading for reading in readings}
        scores = [r for r in readings if r.axes == ("layer", "head") and r.values.size]
        pictures = {
            "attention_patterns/pattern/capital": mosaic(pattern(step), step=step),
            "head_scores/heads": score_picture(scores, step=step),
            "logit_lens/by_layer": score_picture(
                curves_as_rows([by_key["logit_lens/kl/capital"]]), step=step
            ),
        }
        for key, png in pictures.items():
            assert row[f"tlens/{key}"]["_type"] == "trackio.image"
            assert media(row[f"tlens/{key}"]).read_bytes() == png
        histogram = row["tlens/head_scores/induction"]
        values = by_key["head_scores/induction"].values
        counts, edges = np.histogram(values, bins=32)
        assert histogram["values"] == counts.tolist()
        assert np.allclose(histogram["bins"], edges)
        frame = axis_table([r for r in named(step) if r.instrument == "virtual_heads"], "rank")
        table = row["tlens/virtual_heads/rank_table"]["_value"]
        assert [cells["lag_pair"] for cells in table] == frame["lag_pair"].tolist()
        assert [cells["lag_pair_id"] for cells in table] == frame["lag_pair_id"].tolist()
        assert "probe" not in table[0], "it would be empty"
        tokens = row["tlens/logit_lens/table"]["_value"]
        texts = by_key["logit_lens/token/capital"].texts
        assert [cells["token"] for cells in tokens] == texts.ravel().tolist()
    _, step, row = last
    assert (step, set(row), store.asked) == (9, {"tlens/page", STEP}, 1)
    assert media(row["tlens/page"]).read_text() == PAGE
    assert str(store.file) in row["tlens/page"]["caption"]
    sentence = " ".join(EVENT.split())
    assert alerts(project) == [
        (step, "warn", f"tlens: {title}", text)
        for step in (5, 9)
        for title, text in (
            (f"L1H2 has become an induction head ({step})", "watch/events 0.31"),
            (sentence, "watch/events"),
        )
    ]


def test_a_long_table_has_its_lowest_ranks(project):
    sink = TrackioSink()
    ranks = np.arange(500).reshape(10, 50)
    reading = Reading(
        key="top_neurons/activation/p", values=ranks, axes=("layer", "rank"), unit="activation"
    )
    sink.write([reading], step=1)
    sink.close()
    table = rows(project)[0][2]["tlens/top_neurons/table"]["_value"]
    assert [(row["layer"], row["rank"]) for row in table] == [
        (i, j) for i in range(10) for j in range(10)
    ]


def test_a_histogram_of_numbers_that_are_almost_one(project):
    """In float32 there is no room for 32 bins between them."""
    values = np.array([[0.5, np.nextafter(np.float32(0.5), 1)]], np.float32)
    if np.lib.NumpyVersion(np.__version__) >= "2.2.0":  # before it the bins were of no width
        with pytest.raises(ValueError, match="Too many bins"):
            trackio.Histogram(values, num_bins=32)
    sink = TrackioSink()
    sink.write([Reading(key="x/y", values=values, axes=("layer", "head"), unit="1")], step=1)
    sink.close()
    assert sum(rows(project)[0][2]["tlens/x/y"]["values"]) == 2


def test_what_the_trainer_logs_is_left_to_its_own_rows(project):
    sink = TrackioSink(name="mine")
    theirs = Reading(
        key="trainer/loss",
        values=[1, 2],
        axes=("update",),
        unit="as logged",
        labels={"update": ["1", "2"]},
    )
    sink.write([theirs, *small()[:1]], step=2)
    sink.close()
    assert [set(row) for _, _, row in rows(project)] == [{"mine/cost/seconds", STEP}]


def in_a_thread(job, context):
    thread = threading.Thread(target=context.run, args=(job,))
    thread.start()
    thread.join()


def test_the_writer_threads_context_leads_to_the_trainers_run(project):
    run = begun(project)
    sink = TrackioSink()
    for step in (1, 2):
        context = contextvars.copy_context()
        in_a_thread(lambda step=step: sink.write(small(step), step=step), context)
    in_a_thread(sink.close, contextvars.copy_context())
    assert not run._stop_flag.is_set(), "whoever started it finishes it"
    trackio.finish()
    assert [(name, step) for name, step, _ in rows(project)] == [(run.name, 1), (run.name, 2)]


def test_without_the_context_it_is_another_run(project):
    theirs = f"{project}_theirs"
    begun(theirs).log({"loss": 1.0})
    sink = TrackioSink()
    in_a_thread(lambda: sink.write(small(1), step=1), contextvars.Context())
    sink.close()
    trackio.finish()
    assert [row for _, _, row in rows(theirs)] == [{"loss": 1.0}]
    assert [step for _, step, _ in rows(project)] == [1]


def test_the_page_comes_before_the_owner_finishes(project, tmp_path):
    begun(project)
    sink, waited = TrackioSink(store=PageOnly(tmp_path)), []
    sink.before_finish(lambda: waited.append(sink.write(small(2), step=2)))
    sink.write(small(1), step=1)
    trackio.finish()
    assert len(waited) == 1
    assert [step for _, step, _ in rows(project)] == [1, 2, 2]
    assert "tlens/page" in rows(project)[-1][2]
    sink.close()
    assert len(rows(project)) == 3


def test_after_the_owner_finished_it_says_so_once(project, tmp_path, caplog):
    begun(project)
    sink = TrackioSink(store=PageOnly(tmp_path))
    sink.write(small(1), step=1)
    sink.close()
    trackio.finish()
    before = rows(project)
    for step in (2, 3):
        with caplog.at_level(logging.WARNING, "tlens_callback"):
            sink.write(small(step), step=step)
            sink.close()
    assert rows(project) == before
    assert trackio.context_vars.current_run.get() is None
    assert [r.message for r in caplog.records if "was finished" in r.message] == [
        "tlens: the trackio run was finished by whoever started it; later readings are not logged "
        "there."
    ]
    again = begun(project)
    sink.write(small(4), step=4)
    sink.close()
    trackio.finish()
    assert rows(project)[-1][:2] == (again.name, 4)


def test_a_page_that_fails_does_not_keep_the_run_from_ending(project, caplog):
    class Broken:
        def page(self):
            raise OSError("no space left")

    run = begun(project)
    sink = TrackioSink(store=Broken())
    sink.write(small(1), step=1)
    trackio.finish()
    assert run._stop_flag.is_set()
    assert "no space left" in caplog.text


def test_a_closed_sink_leaves_the_run_as_it_was(project):
    run = begun(project)
    sink = TrackioSink()
    sink.write(small(1), step=1)
    assert run.finish != type(run).finish.__get__(run)
    sink.close()
    assert run.finish == type(run).finish.__get__(run)


def test_two_sinks_on_one_run(project, tmp_path):
    run = begun(project)
    first, second = (TrackioSink(name=name, store=PageOnly(tmp_path)) for name in "ab")
    first.write(small(1), step=1)
    second.write(small(1), step=1)
    first.close()
    trackio.finish()
    pages = [key for _, _, row in rows(project) for key in row if key.endswith("/page")]
    assert pages == ["a/page", "b/page"]
    second.close()
    assert run._stop_flag.is_set()


def train(tmp_path, project, *more, **args):
    """A run of the trainer's own, watched every third step, with more callbacks."""
    store = LocalSink(tmp_path / "store")
    sink = TrackioSink(store=store)
    callback = TLensCallback(
        [CAPITAL],
        instruments=[AttentionPatterns(), HeadScores(), LogitLens()],
        sinks=[store, sink],
        every_n_steps=3,
        on_error="raise",
    )
    settings = dict(report_to="trackio", project=project, logging_steps=2) | args
    run = trainer(tmp_path, callback, **settings)
    for one in more:
        run.add_callback(one)
    run.train()
    return sink


def test_beside_the_trainers_own_rows(project, tmp_path, one_thread):
    sink = train(
        tmp_path, project, eval_strategy="steps", eval_steps=3, trackio_static_space_id=False
    )
    found = rows(project)
    assert len({name for name, _, _ in found}) == 1, "one run"
    ours = [
        (step, row) for _, step, row in found if "tlens/attention_patterns/pattern/capital" in row
    ]
    assert [step for step, _ in ours] == [row[STEP] for _, row in ours] == [0, 3, 6]
    theirs = [row[STEP] for _, _, row in found if "train/loss" in row]
    assert theirs == [2, 4, 6]
    assert [row[STEP] for _, _, row in found if "eval/loss" in row] == [3, 6]
    assert sum("tlens/page" in row for _, _, row in found) == 1
    # The trainer has finished it.
    count = len(found)
    sink.write(small(7), step=7)
    sink.close()
    assert len(rows(project)) == count


def test_after_ctrl_c_the_page_comes_when_the_run_is_finished(project, tmp_path, one_thread):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, project, Interrupts(at=5))
    trackio.finish()
    ours = [(step, row) for _, step, row in rows(project) if step in (0, 3)]
    assert sum("tlens/head_scores/heads" in row for _, row in ours) == 2
    assert sum("tlens/page" in row for _, _, row in rows(project)) == 1


@needs_browser()
def test_its_dashboard_shows_picture_and_page(project, tmp_path, one_thread):
    train(tmp_path, project)
    app, address, *_ = trackio.show(
        project=project, open_browser=False, block_thread=False, host="127.0.0.1"
    )
    try:
        where = f"{address}media?project={urllib.parse.quote(project)}"
        with opened(where, allowed=address) as (page, faults):
            card = page.locator(".gallery-item").filter(has_text="tlens/head_scores/heads").first
            picture = card.locator("img")
            picture.wait_for(timeout=60_000)
            picture.scroll_into_view_if_needed()
            page.wait_for_function("i => i.naturalWidth > 0", arg=picture.element_handle())
            written = [row for _, step, row in rows(project) if step == 6]
            file = media(written[0]["tlens/head_scores/heads"])
            with Image.open(file) as image:
                assert picture.evaluate("i => [i.naturalWidth, i.naturalHeight]") == [*image.size]
            frame = page.locator("iframe.html-frame")
            frame.scroll_into_view_if_needed()
            inside = page.frame_locator("iframe.html-frame")
            inside.locator("input[type=range]").first.wait_for()
            assert "step 6" in inside.locator("body").inner_text()
            assert faults == []
    finally:
        app.close()
