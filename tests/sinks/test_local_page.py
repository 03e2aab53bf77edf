"""The page beside the store: live while the run goes on, packed at its end, never in the way."""

import errno
import logging
import shutil

import pytest

from tests.page.decode import Page, near
from tests.page.test_folder import index_of, shown
from tests.sinks.samples import everything, pattern, small
from tests.sinks.test_local import fill
from tlens_callback.page import PageFolder
from tlens_callback.sinks import LocalSink, local, read_store


def packed(path):
    return Page((path / "page.html").read_text("utf-8"))


def test_the_page_follows_the_store_and_is_packed_at_the_end(tmp_path):
    sink = LocalSink(tmp_path / "run")
    live = tmp_path / "run/page/index.html"
    for step in (0, 10, 20):
        sink.write(everything(step), step=step)
        assert set(shown(sink.path / "page")) == set(read_store(sink.path).steps)
        assert str(sink).endswith(f"; page {live}") and live.is_file()
        assert not index_of(sink.path / "page")["done"] and not (sink.path / "page.html").exists()
    sink.close()
    assert index_of(sink.path / "page")["done"]
    assert str(sink).endswith(f"; page {tmp_path / 'run/page.html'}")
    for step in (0, 10, 20):
        for reading in everything(step):
            assert near(shown(sink.path / "page")[step][reading.key], reading)
            assert near(packed(sink.path).readings[step][reading.key], reading, more=2**-12)
    made = (sink.path / "page.html").stat().st_mtime_ns
    sink.close()
    assert (sink.path / "page.html").stat().st_mtime_ns == made
    assert packed(sink.path).about["title"] == f"{tmp_path.name}/run"


def test_a_run_that_begins_again_drops_steps_from_the_page(tmp_path):
    sink = fill(tmp_path / "run", (0, 10, 20, 30))
    assert set(packed(sink.page().parent).steps) == {0, 10, 20, 30}
    sink.write(small(99), step=20)
    assert set(shown(sink.path / "page")) == {0, 10, 20}
    assert near(shown(sink.path / "page")[20]["cost/seconds"], small(99)[0])
    sink.close()
    assert set(packed(sink.path).steps) == {0, 10, 20}


def test_page_packs_what_is_there_if_it_is_not_up_to_date(tmp_path):
    sink = LocalSink(tmp_path / "run")
    with pytest.raises(ValueError, match="is no store yet"):
        sink.page()
    for step in (0, 10):
        sink.write(small(step), step=step)
        file = sink.page()
        assert file == tmp_path / "run/page.html"
        assert set(packed(sink.path).steps) == set(range(0, step + 1, 10))
        made = file.stat().st_mtime_ns
        assert sink.page() == file and file.stat().st_mtime_ns == made
        assert str(sink).endswith("page/index.html")  # it is still going on
    sink.close()
    assert file.stat().st_mtime_ns == made
    # One that has written nothing itself takes the newest run.
    fill(tmp_path / "run", (0,)).close()
    (tmp_path / "run-2/page.html").unlink()
    assert LocalSink(tmp_path / "run").page() == tmp_path / "run-2/page.html"
    assert set(packed(tmp_path / "run-2").steps) == {0}


def test_without_a_page_there_is_none(tmp_path):
    sink = fill(tmp_path / "run", (0, 10), page=False)
    sink.close()
    assert sorted(p.name for p in sink.path.iterdir()) == ["arrays", "manifest.json", "scores"]
    assert str(sink).endswith("for tlens_callback.read_store")
    assert set(packed(sink.page().parent).steps) == {0, 10}


def test_nothing_written_nothing_packed(tmp_path):
    LocalSink(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_goes_on_with_its_page(tmp_path):
    fill(tmp_path / "run", (0, 10, 20)).close()
    page = tmp_path / "run/page"
    before = {step: stamp for step, stamp, _ in index_of(page)["steps"]}
    sink = fill(tmp_path / "run", (20, 30))
    after = {step: stamp for step, stamp, _ in index_of(page)["steps"]}
    assert list(after) == [0, 10, 20, 30]
    assert [after[step] == before[step] for step in before] == [True, True, False]
    assert not index_of(page)["done"]
    sink.close()
    assert set(packed(sink.path).steps) == {0, 10, 20, 30} and index_of(page)["done"]
    # A new run has its own.
    assert fill(tmp_path / "run", (0,)).path == tmp_path / "run-2"
    assert set(shown(tmp_path / "run-2/page")) == {0} and set(shown(page)) == {0, 10, 20, 30}


def test_a_store_without_a_page_gets_that_of_its_earlier_steps(tmp_path):
    fill(tmp_path / "run", (0, 10, 20), page=False).close()
    sink = fill(tmp_path / "run", (20, 30))
    got = shown(sink.path / "page")
    assert set(got) == {0, 10, 20, 30}
    assert all(near(got[10][r.key], r, more=2**-12) for r in everything(10))


def test_a_page_that_is_not_that_of_the_store_is_set_right(tmp_path):
    """As a run killed between the two, or one that went on without a page, leaves it."""
    sink = fill(tmp_path / "run", (0, 10, 20, 30))
    for name in (10, 20):
        (sink.path / f"scores/step-{name:08d}.parquet").unlink()
    sink = fill(tmp_path / "run", (15,), page=False)
    resumed = fill(tmp_path / "run", (40,))
    assert set(shown(resumed.path / "page")) == {0, 15, 40}
    (resumed.path / "page/data/.00000040.js.tmp").write_bytes(b"half")
    shutil.rmtree(resumed.path / "page/data")
    assert set(shown(fill(tmp_path / "run", (50,)).path / "page")) == {0, 15, 40, 50}


def test_a_page_that_fails_loses_no_reading(tmp_path, monkeypatch, caplog):
    sink = LocalSink(tmp_path / "run")
    sink.write(everything(0), step=0)
    write = PageFolder.write

    def full(self, readings, step):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PageFolder, "write", full)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        for step in (10, 20):
            sink.write(everything(step), step=step)
        assert len(caplog.records) == 1
        assert "the page" in caplog.text and "No space" in caplog.text
        sink.write(everything(10), step=10)
    assert len(caplog.records) == 1
    store = read_store(sink.path)
    assert store.steps == (0, 10) and len(store.readings(10)) == len(everything(10))
    assert set(shown(sink.path / "page")) == {0}
    monkeypatch.setattr(PageFolder, "write", write)
    # The file is made all the same, and who resumes the run has the live page whole again.
    sink.close()
    assert set(packed(sink.path).steps) == {0, 10}
    sink.write(everything(20), step=20)
    assert set(shown(sink.path / "page")) == {0, 10, 20}


def test_a_page_that_cannot_be_packed_is_said_when_all_steps_are_safe(tmp_path, monkeypatch):
    sink = fill(tmp_path / "run", (0, 10))

    def broken(store):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "page", broken)
    with pytest.raises(OSError, match="No space"):
        sink.close()
    sink.close()
    monkeypatch.undo()
    assert read_store(sink.path).steps == (0, 10) and not (sink.path / "page.html").exists()
    assert str(sink).endswith("page/index.html")
    assert set(packed(sink.page().parent).steps) == {0, 10}


def test_a_large_store_is_cut_and_the_page_says_so(tmp_path, monkeypatch):
    page = local.page
    monkeypatch.setattr(local, "page", lambda store: page(store, most_bytes=bare + 30_000))
    sink = LocalSink(tmp_path / "run")
    sink.write([], step=0)
    bare = len(page(read_store(sink.path)))
    for step in range(1, 40):
        sink.write([pattern(step), pattern(step, "other")], step=step)
    sink.close()
    made = packed(sink.path)
    here = [step for step, of in made.readings.items() if pattern().key in of]
    assert list(made.steps) == list(range(40)) and len(here) < 39
    assert any(f"at {len(here)} of 39 steps" in note for note in made.notes)
