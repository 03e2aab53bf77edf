"""Readings of any kind, as the page's own script reads them: number by number as the decoder of the
tests does, and within what is promised of the readings."""

import base64
from importlib.resources import files
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.browser import needs_browser
from tests.page.decode import Decoder, near
from tests.strategies import runs
from tlens_callback.page import encode
from tlens_callback.page.encode import Track, blobs, code
from tlens_callback.reading import Reading
from tlens_callback.store.triangle import is_pattern

pytestmark = needs_browser()

# What the page does with each run: takes step after step in, decodes all, and tells the numbers'
# bits. Both scripts in a scope of their own, as on the page.
READ = """async ([source, runs]) => {
  const bits = (values) => {
    const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  };
  const told = [];
  for (const steps of runs) {
    const { data, unpack } = new Function(source + "; return { data, unpack };")();
    for (const [step, [small, ...large]] of steps.entries()) {
      data.take(step, await unpack(small), large);
    }
    const ofRun = [];
    // From the last step on: what is a difference is decoded from the one before that is whole.
    for (let step = steps.length - 1; step >= 0; step--) {
      const readings = [];
      for (const key of data.keys()) {
        if (!data.has(key, step)) continue;
        if (!await data.ready(key, step)) throw new Error(`${key} at ${step} is not there`);
        const { axes, unit, shape, limits, labels, texts, select } = data.entry(key, step);
        const values = data.values(key, step);
        const single = Array.from(values, (_, i) => data.number(key, step, i));
        readings.push({ key, axes, unit, shape, limits, labels, texts, select,
          bits: bits(values), single: bits(Float32Array.from(single)) });
      }
      ofRun.unshift(readings);
    }
    told.push(ofRun);
  }
  return told;
}"""


@st.composite
def encoded(draw: st.DrawFn) -> tuple[list[list[Reading]], list[list[str]]]:
    """What each step reads, and how the page gets it: some in blobs of their own, some patterns of
    a few heads only."""
    steps, track = draw(runs()), Track(deltas=draw(st.booleans()))
    blob = {r.key: draw(st.booleans()) for readings in steps for r in readings}
    made = []
    # Halves and whole frames among differences come with many numbers and steps; here with few.
    with mock.patch.multiple(encode, _HALF_FROM=5, _KEY_FRAME_EVERY=2):
        for readings in steps:
            parts = []
            for reading in readings:
                leads = int(np.prod(reading.values.shape[:-2]))
                select = None
                if is_pattern(reading.axes) and reading.values.size:
                    some = st.lists(st.integers(0, leads - 1), unique=True).map(sorted)
                    select = draw(st.none() | some)
                parts.append(track.part(code(reading, select), blob=blob[reading.key]))
            made.append(blobs(parts))
    return steps, made


def test_the_pages_script_reads_what_was_written(tab):
    page, faults, _ = tab
    examples = []

    # They cost the page no time of their own.
    @settings(max_examples=max(150, settings().max_examples))
    @given(encoded())
    def collect(example):
        examples.append(example)

    collect()
    assets = files("tlens_callback.page") / "assets"
    source = "\n".join((assets / f"{name}.js").read_text("utf-8") for name in ("codes", "data"))
    page.goto("about:blank")
    told = page.evaluate(READ, [source, [made for _, made in examples]])
    assert faults == [] and len(told) == len(examples)
    kinds = set()
    for (steps, made), of_run in zip(examples, told, strict=True):
        decoder = Decoder()
        for readings, of_step, here in zip(steps, made, of_run, strict=True):
            entries = decoder.step(of_step)
            assert sorted(one["key"] for one in here) == sorted(r.key for r in readings)
            by_key = {one["key"]: one for one in here}
            for reading in readings:
                entry, one = entries[reading.key], by_key[reading.key]
                expected = entry["values"].astype(np.float32).ravel()
                for bits in (one["bits"], one["single"]):
                    got = np.frombuffer(base64.b64decode(bits), np.float32)
                    np.testing.assert_array_equal(got, expected)
                    assert (np.signbit(got) == np.signbit(expected))[~np.isnan(expected)].all()
                assert one["axes"] == list(reading.axes) and one["unit"] == reading.unit
                assert one["shape"] == list(reading.values.shape)
                # Whole numbers arrive as such, in the digits that a float of theirs needs.
                ends = one["limits"] and tuple(map(float, one["limits"]))
                assert ends == reading.limits and one["select"] == entry.get("select")
                assert one["labels"] == {axis: list(of) for axis, of in reading.labels.items()}
                texts = None if reading.texts is None else reading.texts.ravel().tolist()
                assert one.get("texts") == texts
                if "select" not in entry:
                    assert near(entry, reading)
                kinds |= {(entry["type"], entry["tril"], entry["delta"], "blob" in entry)}
    # All that there is was among them.
    assert {kind[0] for kind in kinds} == {"u8", "f16", "f32"}
    for i in (1, 2, 3):
        assert {kind[i] for kind in kinds} == {False, True}
