"""The page of a run in progress: a folder that is written while it is open, by file and http."""

import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.browser import needs_browser, opened, until
from tests.page.five_steps import addressed
from tlens_callback.page import PageFolder
from tlens_callback.page.template import html
from tlens_callback.reading import Reading

pytestmark = needs_browser()

# The page asks every two seconds; a test has no time for that. What it asked for is kept.
FASTER = """
  window.delays = [];
  const slow = window.setTimeout;
  window.setTimeout = (act, delay, ...rest) => {
    if (delay >= 500) window.delays.push(delay);
    return slow(act, delay >= 500 ? delay / 40 : delay, ...rest);
  };
"""
KEY = "attention_patterns/pattern/capital"


def readings(step, seed=0):
    """A matrix and patterns of so many values that they are a blob of their own."""
    rng = np.random.default_rng([step, seed])
    raw = np.tril(np.exp(rng.normal(0, 2, (2, 10, 48, 48))))
    return [
        Reading(
            key=KEY,
            values=raw / raw.sum(-1, keepdims=True),
            axes=("layer", "head", "query", "key"),
            unit="probability",
            limits=(0, 1),
        ),
        Reading(
            key="head_scores/induction",
            values=rng.random((2, 10)),
            axes=("layer", "head"),
            unit="probability",
            limits=(0, 1),
        ),
        Reading(key="cost/seconds", values=float(step + seed), unit="seconds"),
    ]


@pytest.fixture
def folder(tmp_path):
    made = PageFolder(tmp_path / "store" / "page")
    for step in (0, 10):
        made.write(readings(step), step)
    return made


@pytest.fixture(scope="module")
def browser():
    with opened("about:blank", allowed="file:///") as (page, faults):
        page.add_init_script(FASTER)
        yield page, faults


@pytest.fixture
def tab(browser, folder):
    page, faults = browser
    faults.clear()
    page.goto("about:blank")
    page.goto((folder.path / "index.html").as_uri())
    page.wait_for_selector("#stepname:not(:empty)")
    yield page, faults
    page.goto("about:blank")


STEP = "document.getElementById('stepname').textContent"
STATUS = "document.getElementById('status').textContent"


def test_follows_the_end(tab, folder):
    page, faults = tab
    until(page, STEP, "step 10")
    folder.write(readings(20), 20)
    until(page, STEP, "step 20")
    assert page.get_attribute("#step", "max") == "20"
    assert re.fullmatch(r"last step 20, updated \d+ s ago", page.evaluate(STATUS))
    assert "step=" not in page.evaluate("location.hash")
    page.keyboard.press("ArrowLeft")
    until(page, STEP, "step 10")
    folder.write(readings(30), 30)
    until(page, "tlens.data.steps", [0, 10, 20, 30])
    until(page, "document.getElementById('step').max", "30")
    assert page.evaluate(STEP) == "step 10"  # who looks at a step is left there
    addressed(page)
    assert "step=10" in page.evaluate("location.hash")
    folder.finish()
    until(page, STATUS, "ended, last step 30")
    assert set(page.evaluate("delays")) <= {2000, 10_000, 500}
    until(page, "delays.at(-1)", 10_000)  # a finished run may go on, but need not hurry
    folder.write(readings(40), 40)
    until(page, "tlens.data.steps.at(-1)", 40)
    assert page.evaluate(STATUS).startswith("last step 40, updated")
    assert faults == []


def test_address_names_a_step(browser, folder):
    page, faults = browser
    faults.clear()
    for step in range(20, 60, 10):
        folder.write(readings(step), step)
    page.goto("about:blank")
    page.goto((folder.path / "index.html").as_uri() + "#step=20&other=0&head=1.7")
    until(page, STEP, "step 20, beside step 0")
    until(page, "tlens.data.steps", [0, 10, 20, 30, 40, 50])
    folder.write(readings(60), 60)
    until(page, "tlens.data.steps.length", 7)
    assert page.evaluate("[tlens.state.step, tlens.state.layer, tlens.state.head]") == [20, 1, 7]
    assert faults == []


def test_written_anew_and_dropped(tab, folder):
    page, faults = tab
    decoded = f"""async (step) => {{
      await tlens.data.ready("{KEY}", step);
      return [...(tlens.data.slice("{KEY}", step, 13) ?? [])];
    }}"""
    first = np.array(page.evaluate(decoded, 10)).reshape(48, 48)
    np.testing.assert_allclose(first, readings(10)[0].values[1, 3], atol=1 / 127)
    folder.write(readings(10, seed=5), 10)
    until(page, "tlens.data.number('cost/seconds', 10, 0)", 15)
    second = np.array(page.evaluate(decoded, 10)).reshape(48, 48)
    np.testing.assert_allclose(second, readings(10, 5)[0].values[1, 3], atol=1 / 127)
    assert abs(first - second).max() > 0.1
    folder.write(readings(20), 20)
    until(page, STEP, "step 20")
    folder.drop(10)
    until(page, STEP, "step 0")
    assert page.evaluate("tlens.data.steps") == [0]
    assert page.evaluate("tlens.data.stepsOf('cost/seconds')") == [0]
    assert not page.evaluate(f"tlens.data.decoded.has('20 {KEY}')")
    folder.drop(0)
    until(page, "document.getElementById('empty').hidden", False)
    page.wait_for_selector("#step", state="hidden")  # the views follow in the next frame
    folder.write(readings(10), 10)
    until(page, STEP, "step 10")
    assert page.is_visible("#step") and page.is_hidden("#empty")
    assert faults == []


def test_a_step_that_is_dropped_while_it_is_decoded(tab, folder):
    """What waits for the step finds it gone, before the next frame draws what is left."""
    page, faults = tab
    until(page, STEP, "step 10")
    page.evaluate("""() => {
      const { data } = tlens, { decode } = data;
      data.decoded.clear();
      data.decode = async (entry) => {
        data.decode = decode;
        await data.decode(entry);
        data.drop(entry.step);
      };
    }""")
    page.keyboard.press("ArrowLeft")
    until(page, "tlens.data.steps.length", 1)
    page.wait_for_timeout(100)
    assert faults == []


def test_missing_files_are_asked_for_again(tab, folder):
    page, faults = tab
    until(page, STEP, "step 10")
    hidden = folder.path / "hidden"
    (folder.path / "data").rename(hidden)
    until(page, f"{STATUS}.includes('cannot be read')", True)
    folder_again = PageFolder(folder.path)
    hidden.rename(folder.path / "data")
    folder_again.write(readings(20), 20)
    until(page, STEP, "step 20")
    assert not page.evaluate(f"{STATUS}.includes('cannot be read')")
    folder_again.write(readings(30), 30)
    chunk = folder.path / "data" / "00000030.js"
    text = chunk.read_text()
    chunk.unlink()
    page.wait_for_timeout(300)
    there = page.evaluate("tlens.data.steps.includes(30)")
    chunk.write_text(text)
    until(page, "tlens.data.steps.includes(30)", True)
    assert faults and all("ERR_FILE_NOT_FOUND" in fault for fault in faults), (faults, there)


def test_nothing_yet(browser, tmp_path):
    page, faults = browser
    faults.clear()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.js").write_text(
        'tlens.index({"title":"a run","notes":["a note"],"done":false,"steps":[]})'
    )
    (tmp_path / "index.html").write_text(html({"title": "a run", "live": True, "notes": []}))
    page.goto("about:blank")
    page.goto((tmp_path / "index.html").as_uri())
    until(page, STATUS, "no step yet")
    assert "No step has been observed yet" in page.inner_text("#empty")
    until(page, "[...document.querySelectorAll('#notes li')].map((n) => n.textContent)", ["a note"])
    assert faults == []


@pytest.mark.parametrize("minutes, said", [
    ([-9, -7, -5], "updated 5 min ago"),  # silence for as long as two steps take says nothing
    ([-9, -8.5, -8], "no news for 8 min"),
    ([-90, -31, -30, -29, -28, -8], "no news for 8 min"),
    ([-9], "updated 9 min ago"),  # nothing says how long a step takes
])  # fmt: skip
def test_silence_is_told_where_it_is_unusual(browser, tmp_path, monkeypatch, minutes, said):
    page, _ = browser
    folder, now = PageFolder(tmp_path / "page"), time.time_ns()
    for step, at in enumerate(minutes):
        monkeypatch.setattr(time, "time_ns", lambda at=at: now + int(at * 60e9))
        folder.write([Reading(key="cost/seconds", values=1.0, unit="seconds")], step)
    monkeypatch.undo()
    page.goto("about:blank")
    page.goto((folder.path / "index.html").as_uri())
    until(page, STATUS, f"last step {len(minutes) - 1}, {said}")
    folder.finish()
    until(page, STATUS, f"ended, last step {len(minutes) - 1}")


def test_memory_of_polling(tab):
    page, faults = tab
    session = page.context.new_cdp_session(page)

    def heap():
        session.send("HeapProfiler.collectGarbage")
        return session.send("Runtime.getHeapUsage")["usedSize"]

    def polls(n):
        until(page, f"delays.filter((delay) => delay === 2000).length >= {n}", True, 15)

    polls(20)
    before = heap()
    polls(70)
    # 50 polls; a script element, or a promise with its text, of each would be far more.
    assert heap() - before < 60_000
    assert page.evaluate("document.querySelectorAll('head script').length") <= 1
    assert faults == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def test_over_http(browser, folder):
    page, faults = browser
    faults.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder.path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        page.goto(address)
        until(page, STEP, "step 10")
        folder.write(readings(20), 20)
        until(page, STEP, "step 20")
        assert page.evaluate(f"tlens.data.ready('{KEY}', 20)")
        page.goto("about:blank")
    finally:
        server.shutdown()
        server.server_close()
    assert [fault for fault in faults if not fault.startswith(f"request: {address}")] == []
