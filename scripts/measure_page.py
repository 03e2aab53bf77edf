"""Measures the size of a run's page, and the time to make it, open it and go to the next step.

    python scripts/measure_page.py
    python scripts/measure_page.py --steps 200 --heads 32 --layers 32 --tokens 128

Attention drifts as it does in training: a causal softmax of logits that move from one state to
another, with noise. The other readings are those of the fast instruments on a model of SmolLM2's
shapes with random weights, slightly changed at each step. Needs Chromium and Playwright.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measure_overhead import lora_model
from playwright.sync_api import sync_playwright

from tlens_callback import LocalSink, Probe, ProbeBatch, Reading, Shadow, fast, observe
from tlens_callback.probes.builtin import repeated_blocks

# Times the frames that the page asks for, from their script's begin to the end of their rendering.
STOPWATCH = """
window.frames_ = []; window.first_ = null;
const ask = window.requestAnimationFrame.bind(window);
window.requestAnimationFrame = (act) => ask((time) => {
  const began = performance.now();
  act(time);
  const after = new MessageChannel();
  after.port1.onmessage = () => {
    window.frames_.push(performance.now() - began);
    if (!window.first_ && window.tlens?.data.steps.length) window.first_ = performance.now();
  };
  after.port2.postMessage(0);
});
"""
GO = """async (steps) => {
  const taken = [];
  for (const step of steps) {
    window.frames_.length = 0;
    tlens.set({ step });
    await new Promise((done) => setTimeout(done, 150));
    taken.push(Math.max(...window.frames_));
  }
  return taken;
}"""


def drifting(args: argparse.Namespace) -> Iterator[list[Reading]]:
    """The attention patterns of every probe, at one step after another."""
    rng = np.random.default_rng(0)
    shape = (args.layers, args.heads, args.tokens, args.tokens)
    names = {axis: [f" word{i}" for i in range(args.tokens)] for axis in ("query", "key")}
    hidden = np.triu(np.full(shape[2:], -np.inf, np.float32), 1)
    here, there = (rng.normal(0, 1.5, (args.probes, *shape)).astype(np.float32) for _ in range(2))
    here[..., 0] += rng.normal(2, 1.5, (args.probes, *shape[:3])).astype(np.float32)
    speed = 0.05 * rng.lognormal(0, 0.7, (*shape[:2], 1, 1)).astype(np.float32)
    for step in range(args.steps):
        way = 10 * (1 - np.exp(-step / 40))
        readings = []
        for probe in range(args.probes):
            noise = 0.3 * rng.standard_normal(shape, np.float32)
            logits = here[probe] + speed * (way * there[probe] + noise) + hidden
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            readings.append(
                Reading(
                    key=f"attention_patterns/pattern/probe{probe}",
                    values=weights / weights.sum(-1, keepdims=True),
                    axes=("layer", "head", "query", "key"),
                    unit="probability",
                    labels=names,
                    limits=(0, 1),
                )
            )
        yield readings


def others(probes: int) -> list[Reading]:
    """What the fast instruments read besides, on a model of SmolLM2's shapes."""
    shadow = Shadow.of(lora_model("smollm2-135m", "cpu", torch.float32).eval())
    rng = np.random.default_rng(0)
    asked = [Probe(f"probe{i}", rng.integers(3, 40_000, 48).tolist()) for i in range(probes)]
    batch = ProbeBatch.encode(asked + repeated_blocks(1024), vocab_size=shadow.vocab_size)
    found = observe(shadow, batch, fast())
    return [reading for reading in found if reading.instrument != "attention_patterns"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(steps=40, probes=3, layers=30, heads=9, tokens=48).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sink = LocalSink(Path(folder) / "store")
        rest, rng, writing = others(args.probes), np.random.default_rng(1), []
        for step, patterns in enumerate(drifting(args)):
            readings = patterns + [shaken(reading, rng) for reading in rest]
            began = time.perf_counter()
            sink.write(readings, step=10 * step)
            writing.append(1e3 * (time.perf_counter() - began))
        began = time.perf_counter()
        file = sink.page()
        packing = time.perf_counter() - began
        first, steps, jumps, notes = opened(file.as_uri(), args.steps)
        print(f"{args.steps} steps x {args.probes} probes x {args.layers * args.heads} heads x "
              f"{args.tokens} tokens: {file.stat().st_size / 1e6:.1f} MB\n"
              f"store and live page, ms a step: {summary(writing)}\n"
              f"packing: {packing:.1f} s\nfirst frame: {first:.0f} ms\n"
              f"a step on, ms: {summary(steps)}\na jump, ms: {summary(jumps)}\n"
              f"notes: {notes}")  # fmt: skip


def opened(address: str, steps: int) -> tuple[float, list[float], list[float], list[str]]:
    """First frame, a step on, a jump, in milliseconds; and the page's notes."""
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking"]
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        # The stopwatch is put in before the page, which allows no script but its own.
        page = browser.new_page(bypass_csp=True, viewport={"width": 1400, "height": 1000})
        page.add_init_script(STOPWATCH)
        page.goto(address)
        page.wait_for_function("window.first_ !== null", timeout=60_000)
        page.wait_for_timeout(2000)
        first = page.evaluate("window.first_")
        there = page.evaluate("tlens.data.steps")
        walked = page.evaluate(GO, there)
        jumped = page.evaluate(GO, [there[(17 * i + 9) % len(there)] for i in range(12)])
        notes = page.evaluate("tlens.data.about.notes")
        browser.close()
    assert len(there) <= steps
    return first, walked, jumped, notes


def shaken(reading: Reading, rng: np.random.Generator) -> Reading:
    """The reading with values that are a little different."""
    if reading.unit in ("index", "event"):
        return reading
    values = reading.values * (1 + 0.02 * rng.standard_normal(reading.values.shape))
    about = {name: getattr(reading, name) for name in ("key", "axes", "unit", "labels", "limits")}
    return Reading(values=values, texts=reading.texts, **about)


def summary(values: list[float]) -> str:
    return f"median {statistics.median(values):.1f}, largest {max(values):.1f}"


if __name__ == "__main__":
    main()
