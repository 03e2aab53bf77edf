"""Measures how the cost of a run grows, by doubling one thing at a time.

    python scripts/measure_growth.py            # the tables of docs/growth.md
    python scripts/measure_growth.py --quick    # small sizes, in seconds
    python scripts/measure_growth.py --only keys --only rows

The readings are real ones with values that drift as in training; only the vocabulary needs a model,
a tiny one. Beside each number is its ratio to the one before. Needs Chromium and Playwright for the
column of the browser, and Linux for that of the memory.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from growth_parts import Growing, Memory, Rows, observed, readings

from tlens_callback import LocalSink, read_store
from tlens_callback.offline.changes import own_descriptions
from tlens_callback.offline.summary import summary
from tlens_callback.page import page

SIZES: dict[str, list[Growing]] = {
    "observations": [Growing(observations=n) for n in (125, 250, 500)],
    "heads": [
        Growing(layers=layers, heads=heads, observations=20)
        for layers, heads in ((20, 32), (40, 32), (80, 32), (80, 64))
    ],
    "probes": [Growing(probes=n, observations=20) for n in (6, 12, 25, 50)],
    "keys": [
        Growing(keys=n, observations=20, layers=4, probes=2) for n in (1250, 2500, 5000, 10_000)
    ],
    "steps with 80 x 64 heads": [
        Growing(layers=80, heads=64, probes=1, observations=n) for n in (125, 250, 500)
    ],
}
QUICK: dict[str, list[Growing]] = {
    "observations": [Growing(observations=n, keys=20) for n in (3, 6)],
    "heads": [Growing(layers=4, heads=n, observations=2) for n in (4, 8)],
    "probes": [Growing(probes=n, observations=2) for n in (2, 4)],
    "keys": [Growing(keys=n, observations=2) for n in (60, 120)],
}
ROWS = [1_250_000, 2_500_000, 5_000_000, 10_000_000]
WORDS = [32_000, 64_000, 128_000, 256_000]

Measured = dict[str, float | None]


def of_store(growing: Growing) -> Measured:
    """Writes a run of this size, reads it back in every way, and opens its page."""
    found: Measured = {}
    with tempfile.TemporaryDirectory() as folder:
        sink, memory = LocalSink(Path(folder) / "store"), Memory()
        writing = []
        for step in range(growing.observations):
            some = readings(growing, step)
            writing.append(seconds(lambda some=some, step=step: sink.write(some, step=step)))
        # Those at the end, since what grows with the run would show there.
        found["write one, ms"] = 1e3 * float(np.median(writing[-10:]))
        files = [file for file in sink.path.rglob("*") if file.is_file()]
        live = sum(file.stat().st_size for file in files if "page" in file.parts)
        stored = sum(file.stat().st_size for file in files) - live
        found["one in the store, kB"] = stored / growing.observations / 1e3
        found["one in the live page, kB"] = live / growing.observations / 1e3
        store = read_store(sink.path)
        found["first look at all steps, s"] = seconds(lambda: store.steps)
        found["curve of one key, s"] = seconds(lambda: store.curve("head_scores/induction"))
        found["summary, s"] = seconds(lambda: summary(read_store(sink.path)))
        memory.reset()
        text = ""

        def make() -> None:
            nonlocal text
            text = page(read_store(sink.path))

        found["page, s"] = seconds(make)
        found["memory for it, MB"] = memory.more()
        found["page, MB"] = len(text) / 1e6
        file = Path(folder) / "page.html"
        file.write_text(text)
        found["browser shows it, s"] = shown(file)
    return found


def of_rows(rows: int) -> Measured:
    """Makes the order of so many training rows, and reads 32 of them."""
    memory = Memory()
    given = Rows(rows)
    took = seconds(lambda: given.read(32))
    return {"order and 32 rows, ms": 1e3 * took, "memory, MB": memory.more()}


def of_words(words: int) -> Measured:
    """Observes a model with a vocabulary of this size, with the default instruments."""
    observe = observed(words)
    kept = observe()
    took = min(seconds(observe) for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        sink = LocalSink(Path(folder) / "store", page=False)
        sink.write(kept, step=0)
        stored = sum(f.stat().st_size for f in sink.path.rglob("*") if f.is_file())
    return {
        "observe, ms": 1e3 * took,
        "one in the store, kB": stored / 1e3,
    }


def shown(file: Path) -> float | None:
    """Seconds until Chromium has read all steps of a page and has drawn it; None without one."""
    if (path := shutil.which("chromium")) is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        # The wait is put in before the page, which allows no script but its own.
        tab = browser.new_page(bypass_csp=True, viewport={"width": 1400, "height": 1000})
        tab.set_default_timeout(300_000)
        tab.goto(file.as_uri())
        tab.wait_for_function("window.tlens?.data.about.done")
        drawn = tab.evaluate(
            "() => new Promise((done) => requestAnimationFrame(() => "
            "requestAnimationFrame(() => done(performance.now()))))"
        )
        browser.close()
    return drawn / 1e3


def seconds(act: Callable[[], Any]) -> float:
    """Returns the seconds of CPU that a call takes: on a machine that does other work too, those on
    the clock would tell what else it did."""
    began = time.process_time()
    act()
    return time.process_time() - began


def table(what: str, rows: Iterator[tuple[str, Measured]]) -> None:
    """Prints a Markdown table, a row as soon as it is measured."""
    before: Measured = {}
    for name, found in rows:
        if not before:
            print(f"\n| {what} | {' | '.join(found)} |\n|{' --- |' * (len(found) + 1)}")
        cells = [cell(value, before.get(column)) for column, value in found.items()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        before = found


def cell(value: float | None, before: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
    return f"{text} (x {value / before:.1f})" if before else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--only", action="append", help="one of the tables; may be repeated")
    args = parser.parse_args()
    own_descriptions()  # imports what a summary would otherwise import while it is measured
    sizes = QUICK if args.quick else SIZES
    tables: dict[str, Callable[[], Iterator[tuple[str, Measured]]]] = {
        name: lambda each=each, name=name: ((one.said(name), of_store(one)) for one in each)
        for name, each in sizes.items()
    }
    few = slice(0, 2) if args.quick else slice(None)
    tables["training rows"] = lambda: ((f"{n:,}", of_rows(n)) for n in ROWS[few])
    tables["vocabulary"] = lambda: ((f"{n:,}", of_words(n)) for n in WORDS[few])
    if unknown := set(args.only or ()) - tables.keys():
        sys.exit(f"There is no table {min(unknown)!r}; there are {', '.join(tables)}.")
    for name, rows in tables.items():
        if not args.only or name in args.only:
            table(name, rows())


if __name__ == "__main__":
    main()
