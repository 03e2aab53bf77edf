"""How often the header of a step is read: once for all that is asked of it, until it changes."""

import json
import os

import numpy as np
import pytest

from tests.sinks.samples import everything
from tlens_callback.offline.summary import summary
from tlens_callback.page import page
from tlens_callback.reading import Reading
from tlens_callback.sinks import LocalSink, read_store
from tlens_callback.store.format import arrays_file


@pytest.fixture
def parsed(monkeypatch):
    """The texts that were parsed so far; a header takes the same number of them, each time."""
    texts, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text, **more: texts.append(text) or loads(text))
    return texts


def written(path, keys, steps=6):
    sink = LocalSink(path, page=False)
    for step in range(steps):
        values = np.random.default_rng(step).random(keys)
        sink.write(
            [
                Reading(key=f"own/measure{i}", values=value, axes=(), unit="x")
                for i, value in enumerate(values)
            ],
            step=step,
        )
    return sink.path


def test_all_keys_of_a_step_take_one_look(tmp_path, parsed):
    store = read_store(written(tmp_path / "run", 50))
    parsed.clear()
    store.reading("own/measure0", 3)
    once = len(parsed)
    for i in range(50):
        assert store.reading(f"own/measure{i}", 3).key == f"own/measure{i}"
    store.about(3), store.readings(3), store.descriptions(3)
    assert list(store.stored(3, ["own/measure1"]))
    assert len(parsed) == once > 0
    # The measure sees other looks.
    store.curve("own/measure0")
    assert len(parsed) > once


def test_steps_are_looked_at_once(tmp_path, parsed):
    store = read_store(written(tmp_path / "run", 5))
    assert store.steps == tuple(range(6)) and parsed
    parsed.clear()
    assert store.steps == tuple(range(6)) and store.torn == ()
    assert not parsed


@pytest.mark.parametrize("act", [summary, page], ids=["summary", "page"])
def test_twice_as_many_keys_take_as_many_looks(tmp_path, parsed, act):
    looks = []
    for keys in (20, 40):
        path = written(tmp_path / str(keys), keys)
        parsed.clear()
        assert act(read_store(path))
        looks.append(len(parsed))
    assert looks[0] == looks[1] > 0


def test_a_step_that_is_written_again_is_looked_at_again(tmp_path):
    sink = LocalSink(tmp_path / "run", page=False)
    sink.write(everything(0), step=0)
    store = read_store(sink.path)
    assert store.steps == (0,)
    sink.write([Reading(key="own/other", values=np.array(1.0), axes=(), unit="x")], step=0)
    assert list(store.about(0)) == ["own/other"]
    assert store.reading("own/other", 0).values == 1
    file = arrays_file(sink.path, 0)
    os.truncate(file, file.stat().st_size - 1)
    assert store.steps == () and store.torn == (0,)
    with pytest.raises(ValueError, match="no complete step"):
        store.reading("own/other", 0)


def test_one_key_of_many_takes_apart_no_more_of_a_header(tmp_path, monkeypatch):
    """Counted in dicts that the parser makes, at steps that were looked at before."""
    store = read_store(written(tmp_path / "run", 300, steps=9))
    assert len(store.steps) == 9
    made, decode = [], json.JSONDecoder.raw_decode

    def count(decoder, text, idx=0):
        value, end = decode(decoder, text, idx)
        made.append(0 if isinstance(value, str) else json.dumps(value).count("{"))
        return value, end

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", count)
    # The last four steps are known, and not parsed again.
    steps, values = store.curve("own/measure7")
    assert len(steps) == len(values) == 9 and 0 < sum(made) < 9 * 5
    made.clear()
    store.about(0)
    assert sum(made) > 2 * 300


@pytest.mark.parametrize(
    "key", ['own/\u00fc "x": \\ <\u2028>', "texts/own/a", "own/a", "own/b", "own/none"]
)
def test_one_key_is_read_as_with_all_others(tmp_path, key):
    """Names that need escapes, names and labels that look like entries, and a key of few steps."""
    values = np.arange(3.0)
    texts = ['"own/a":', '"own/a": {"packing"', "}"]
    readings = [
        Reading(key="own/first", values=values, axes=("own/a",), unit="x", texts=texts,
                labels={"own/a": ['"own/a": {', '"texts/own/a":', '"readings":"']}),
        Reading(key="texts/own/a", values=values + 1, axes=("rank",), unit="x"),
        Reading(key="own/a", values=values + 2, axes=("rank",), unit="x", texts=texts),
        Reading(key='own/\u00fc "x": \\ <\u2028>', values=values + 3, axes=("rank",), unit="x"),
    ]  # fmt: skip
    sink = LocalSink(tmp_path / "run", page=False)
    for step in range(8):
        sink.write(readings[: 4 - step % 2], step=step)
    store = read_store(sink.path)
    wanted = {}
    for step in store.steps:
        for reading in store.readings(step):
            if reading.key == key:
                wanted[step] = reading
    if not wanted:
        with pytest.raises(ValueError, match="has no"):
            store.curve(key)
        return
    steps, got = store.curve(key)
    assert steps.tolist() == list(wanted)
    assert (got == np.stack([reading.values for reading in wanted.values()])).all()
    frame = store.frame(key)
    if key == "own/a":
        assert frame["text"].tolist() == texts * 8


def test_what_is_returned_is_the_callers_own(tmp_path):
    store = read_store(written(tmp_path / "run", 2))
    store.about(0).clear()
    store.descriptions(0)["own"] = None
    assert list(store.about(0)) == ["own/measure0", "own/measure1"]
    assert "own" not in store.descriptions(0)
