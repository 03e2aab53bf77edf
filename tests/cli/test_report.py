"""`tlens-callback report`, as a file and as a page that is served, through the real command."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from tests.browser import needs_browser, opened
from tests.offline.test_serve import follows, goes_back
from tests.page.decode import Page
from tests.sinks.samples import pattern
from tests.sinks.test_local import fill
from tests.sinks.test_local_broken import tear
from tlens_callback.cli import main
from tlens_callback.offline.serve import PageServer
from tlens_callback.sinks import LocalSink, read_store

COMMAND = [sys.executable, "-m", "tlens_callback", "report"]
# The same, where whoever started this process ignores Ctrl-C, and so would the command.
HEARD = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("tlens_callback", run_name="__main__")
"""


def run(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def command(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "out" / "tlens", (0, 10, 20), page=False).path


# --- a file ---


@pytest.mark.slow
def test_packs_the_page_prints_where_it_is_and_opens_it(store, browser_script):
    seen, environment = browser_script
    done = command(store, "--open", env=environment)
    assert seen.read_text().strip() == (store / "page.html").as_uri()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{store / 'page.html'}\n"
    assert set(Page((store / "page.html").read_text("utf-8")).steps) == {0, 10, 20}
    assert not [file for file in store.iterdir() if file.name.startswith(".")]


def test_a_step_that_was_cut_short_is_named(store):
    tear(store / "arrays/step-00000010.safetensors")
    done = run(store, "--out", store.parent / "deep" / "a.html")
    assert done.exit_code == 3
    assert "their files are incomplete: steps 10." in done.stderr
    assert done.stdout == f"{store.parent / 'deep' / 'a.html'}\n"
    assert set(Page(Path(done.stdout.strip()).read_text("utf-8")).steps) == {0, 20}
    assert not (store / "page.html").exists()


@pytest.mark.slow
def test_what_cannot_be_shown_is_said(store):
    for step in (0, 10, 20):
        tear(store / f"scores/step-{step:08d}.parquet")
    done = command(store)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "nothing to show: all its steps are incomplete" in done.stderr
    assert not (store / "page.html").exists()
    for step in (0, 10, 20):
        (store / f"scores/step-{step:08d}.parquet").unlink()
    result = run(store)
    assert result.exit_code == 2 and "wait for its first observation" in result.stderr
    manifest = store / "manifest.json"
    manifest.write_text(json.dumps({"tlens_callback": 99}))
    result = run(store)
    assert result.exit_code == 2 and "store format 99" in result.stderr
    manifest.unlink()
    result = run(store)
    assert result.exit_code == 2 and "There is no store of a watched run in" in result.stderr
    result = run(store / "missing")
    assert result.exit_code == 2 and "There is no directory" in result.stderr


def test_a_run_directory_means_its_latest_store(store):
    fill(store, (0, 5), page=False)
    result = run(store.parent)
    assert result.exit_code == 0 and result.stdout == f"{store.parent / 'tlens-2' / 'page.html'}\n"
    assert "holds 2 stores: tlens, tlens-2. The last one, tlens-2, is used" in result.stderr
    fill(store.parent / "tlens-replay", (0,), page=False)
    result = run(store.parent)
    assert result.exit_code == 0 and "tlens-2" in result.stdout
    assert (
        "holds 3 stores: tlens-replay, tlens, tlens-2. The last one, tlens-2, is used"
        in result.stderr
    )
    fill(store.parent / "slow", (0,), page=False)
    result = run(store.parent)
    assert result.exit_code == 2 and str(store.parent / "slow") in result.stderr
    assert run(store.parent / "tlens-replay").exit_code == 0


def test_size_and_place(store, tmp_path):
    sink = LocalSink(tmp_path / "many", page=False)
    for step in range(40):
        sink.write([pattern(step), pattern(step, "other")], step=step)
    file = tmp_path / "a.html"
    assert run(sink.path, "--out", file).exit_code == 0
    most = file.stat().st_size - 25_000
    result = run(sink.path, "--out", file, "--most-mb", most / 1e6)
    assert result.exit_code == 0 and file.stat().st_size <= most
    assert "of 40 steps" in " ".join(Page(file.read_text("utf-8")).notes)
    small_one = tmp_path / "small.html"
    result = run(store, "--out", small_one, "--most-mb", 0.001)
    assert result.exit_code == 2 and "is too few" in result.stderr
    result = run(store, "--out", tmp_path)
    assert result.exit_code == 2 and "is a directory" in result.stderr
    (tmp_path / "file").write_text("")
    result = run(store, "--out", tmp_path / "file" / "page.html")
    assert result.exit_code == 1 and "file" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [["--serve", "--out", "a"], ["--serve", "--most-mb", "1"], ["--port", "1"],
                  ["--most-mb", "0"], ["--serve", "--port", "70000"]])  # fmt: skip
def test_words_that_do_not_go_together(store, arguments):
    result = run(store, *arguments)
    assert result.exit_code == 2 and "Usage:" in result.stderr


@pytest.fixture
def browser_script(tmp_path):
    """A browser that writes down what it is asked to open, and its environment."""
    seen = tmp_path / "opened"
    script = tmp_path / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" > {seen}.part && mv {seen}.part {seen}\n')
    script.chmod(0o755)
    return seen, {**os.environ, "BROWSER": f"{script} %s"}


def test_open_without_a_browser(store, monkeypatch):
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    result = run(store, "--open")
    assert result.exit_code == 0 and "No browser was found to open file://" in result.stderr


# --- served ---


@contextmanager
def served(*arguments, **options):
    """The running command, and the address it prints."""
    with subprocess.Popen(
        [sys.executable, "-c", HEARD, "report", *map(str, arguments), "--serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as child:
        try:
            address = child.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), child.stderr.read()
            yield child, address
        finally:
            child.kill()


@needs_browser()
def test_a_served_page_shows_a_new_step_by_itself(tmp_path, browser_script):
    """Of a store that has no page of its own; by the real command, up to its Ctrl-C."""
    seen, environment = browser_script
    sink = fill(tmp_path / "run", (0, 10), page=False)
    before = sorted(path.name for path in sink.path.iterdir())
    with served(sink.path, "--open", env=environment) as (child, address):
        with opened(address, allowed=address) as (tab, faults):
            follows(tab, sink)
            goes_back(tab, sink)
            assert faults == []
            tab.goto("about:blank")
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=120)
        assert (child.returncode, out) == (0, "") and "Traceback" not in err
        assert "Press Ctrl-C to end" in err
        assert seen.read_text().strip() == address
    assert sorted(path.name for path in sink.path.iterdir()) == before


def test_a_port_that_is_taken(store):
    with PageServer(read_store(store)) as server:
        port = urlsplit(server.address).port
        result = run(store, "--serve", "--port", port)
    assert result.exit_code == 1 and result.stdout == ""
    assert (
        result.stderr
        == f"Error: Port {port} of 127.0.0.1 is in use. Port 0 stands for any free port.\n"
    )
    for _ in range(5):
        try:
            with PageServer(read_store(store), port=port) as server:
                assert server.address.startswith(f"http://127.0.0.1:{port}/")
                return
        except OSError:  # another process has been given this port meanwhile
            with PageServer(read_store(store)) as server:
                port = urlsplit(server.address).port
    raise AssertionError("no port could be asked for")
