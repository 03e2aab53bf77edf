"""Reading a store: tidy tables of one reading, and each step once whatever the run went through."""

import threading

import numpy as np
import pandas as pd
import pytest

from tests.page.decode import Page, near
from tests.page.test_folder import shown
from tests.sinks.samples import ODD, TOKENS, everything, named, pattern, small
from tests.sinks.test_local import fill
from tests.training import CAPITAL, trainer
from tlens_callback import HeadScores, LocalSink, Reading, TLensCallback, read_store
from tlens_callback.instruments import AttentionPatterns
from tlens_callback.offline.changes import History, probe_of
from tlens_callback.render import long_frame
from tlens_callback.run.trainer_logs import TrainerLogs
from tlens_callback.store.find import find_store

PATTERN = pattern().key


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return read_store(fill(tmp_path_factory.mktemp("a") / "run", (0, 10, 20)).path)


def test_frame_of_a_pattern_names_every_cell(store):
    frame = store.frame(PATTERN)
    assert dict(frame.dtypes.astype(str)) == {
        "step": "int64",
        "key": "category",
        "layer": "int32",
        "head": "int32",
        "query": "int32",
        "query_name": "category",
        "key_index": "int32",
        "key_name": "category",
        "value": "float32",
    }
    steps, values = store.curve(PATTERN)
    assert len(frame) == values.size
    assert (frame.value.to_numpy().reshape(values.shape) == values).all()
    at = np.random.default_rng(0).integers(0, values.shape, (200, 5))
    for i, layer, head, query, key in at:
        row = frame.iloc[np.ravel_multi_index((i, layer, head, query, key), values.shape)]
        assert row.step == steps[i] and row.key == PATTERN
        # Layers 1 and 3 were selected: their labels are numbers, and stand for them.
        assert (row.layer, row["head"]) == ((1, 3)[layer], head)
        assert (row["query"], row.query_name) == (query, TOKENS[query])
        assert (row.key_index, row.key_name) == (key, TOKENS[key])
        assert row.value == store.reading(PATTERN, steps[i]).values[layer, head, query, key]
    assert frame.memory_usage(deep=False, index=False).sum() < 34 * len(frame) + 2000


def test_the_names_of_a_trainer_have_no_probe_in_the_frame(tmp_path):
    sink, logs = LocalSink(tmp_path / "run", page=False), TrainerLogs()
    names = "loss", "completions/mean_length", "rewards/f/mean", "rewards/a/b/std"
    logs.start([{**dict.fromkeys(names, 0.5), "step": 1}], step=0)
    sink.write([*logs.take(1), Reading(key="a/b/probe", values=1, unit="nats")], step=1)
    sink.close()
    store = read_store(tmp_path / "run")
    frame = store.frame()
    assert set(frame.probe.dropna()) == {"probe"}
    assert set(frame.measure[frame.instrument == "trainer"]) == set(names)
    assert store.curve("trainer/rewards/a/b/std")[0].tolist() == [1]
    history = History(store)
    assert [probe_of(key) for key in history.steps] == [None] * len(names) + ["probe"]


def test_frame_of_one_reading_has_the_rows_of_the_frame_of_all(store):
    """Against `long_frame`, which goes another way; numbers, lists, texts, events, nothing."""
    whole = store.frame()
    keys = [r.key for r in small()]
    assert PATTERN not in set(whole.key) and PATTERN in store.keys
    for key in keys:
        frame, other = store.frame(key), whole[whole.key == key]
        reading = store.reading(key, 0)
        assert len(frame) == len(other) == 3 * reading.values.size, key
        np.testing.assert_array_equal(frame.value, other.value)
        np.testing.assert_array_equal(frame.step, other.step)
        for axis in long_frame([reading]).columns.intersection([*reading.axes, "key_index"]):
            np.testing.assert_array_equal(frame[axis], other[axis].astype("int32"), axis)
        assert ("text" in frame) == (reading.texts is not None)
        if reading.texts is not None:
            assert frame.text.tolist() == other.text.tolist()
    token = store.frame(f"logit_lens/token/{CAPITAL.name}")
    assert token[token.step == 10].text.tolist() == named(10)[0].texts.ravel().tolist()
    assert set(token.text) <= set(ODD)
    events = store.frame("watch/events")
    assert events.event_name.tolist()[::2] == [
        f"L1H2 has become an induction head ({step})" for step in (0, 10, 20)
    ]
    blocks = store.frame("head_scores/induction_by_block")
    assert set(blocks.block) == {8, 12, 24} and "block_name" not in blocks


def test_frame_of_a_reading_that_changes(tmp_path):
    def of(step, labels, texts=None):
        return Reading(key="a/b", values=np.full(len(labels), step), axes=("event",), unit="event",
                       labels={"event": labels}, texts=texts)  # fmt: skip

    sink = LocalSink(tmp_path / "run", page=False)
    sink.write([of(1, ["x", "y"])], step=1)
    sink.write([], step=2)
    sink.write([of(3, ["y"], ["told"])], step=3)
    sink.write([of(4, ["7", "0"])], step=4)
    store = read_store(sink.path)
    frame = store.frame("a/b")
    assert frame.step.tolist() == [1, 1, 3, 4, 4] and frame.value.tolist() == [1, 1, 3, 4, 4]
    assert frame.event_name.tolist() == ["x", "y", "y", "7", "0"]
    assert frame.event.tolist() == [0, 1, 0, 7, 0]
    assert frame.text.tolist()[2] == "told" and frame.text.isna().sum() == 4
    with pytest.raises(ValueError, match="changes shape"):
        store.curve("a/b")
    sink.write([Reading(key="a/b", values=[1.0], axes=("rank",), unit="event")], step=5)
    with pytest.raises(ValueError, match="changes its axes between steps"):
        store.frame("a/b")
    with pytest.raises(ValueError, match=r"has no 'a/c'; it has \['a/b'\]"):
        store.frame("a/c")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Watched at every step to 5; resumed from the checkpoint at 2, to 6: 3, 4, 5 come twice."""
    folder = tmp_path_factory.mktemp("resumed")
    stores = []
    for resume in (None, str(folder / "checkpoint-2")):
        callback = TLensCallback(
            [CAPITAL],
            every_n_steps=1,
            instruments=[HeadScores(), AttentionPatterns()],
            sinks=[LocalSink(folder / "tlens")],
        )
        run = trainer(
            folder,
            callback,
            max_steps=6 if resume else 5,
            save_strategy="steps",
            save_steps=2,
            # One that learns otherwise has other numbers.
            learning_rate=1e-1 if resume else 1e-2,
        )
        run.train(resume_from_checkpoint=resume)
        store = read_store(folder / "tlens")
        stores.append({step: store.reading("head_scores/induction", step) for step in store.steps})
    assert not (folder / "tlens-2").exists()
    return store, *stores


def test_a_step_that_was_written_twice_is_there_once(resumed):
    store, first, last = resumed
    assert list(first) == [0, 1, 2, 3, 4, 5] and list(last) == [0, 1, 2, 3, 4, 5, 6]
    assert store.steps == (0, 1, 2, 3, 4, 5, 6)
    steps, values = store.curve("head_scores/induction")
    assert steps.tolist() == list(store.steps)
    for frame in (store.frame("head_scores/induction"), store.frame(),
                  pd.read_parquet(store.path / "scores")):  # fmt: skip
        rows = frame[frame.key == "head_scores/induction"]
        assert rows.groupby("step").size().tolist() == [values[0].size] * 7
        np.testing.assert_array_equal(rows.value.to_numpy().reshape(values.shape), values)
    numbers = store.frame().groupby(["step", "key"], observed=True).value
    assert numbers.size().equals(
        pd.read_parquet(store.path / "scores").groupby(["step", "key"], observed=True).value.size()
    )
    key = store.frame(next(key for key in store.keys if key.startswith("attention_patterns")))
    assert not key.duplicated(["step", "layer", "head", "query", "key_index"]).any()


def test_the_later_writing_is_what_is_there(resumed):
    _, first, last = resumed
    moved = {step: np.abs(first[step].values - last[step].values).max() for step in first}
    assert moved[1] == moved[2] == 0
    assert all(moved[step] > 0 for step in (4, 5)), moved


def test_the_page_has_each_step_once(resumed):
    store, _, last = resumed
    made = Page(store.page().text)
    assert list(made.steps) == sorted(set(made.steps)) == list(store.steps)
    live = shown(store.path / "page")
    assert sorted(live) == list(store.steps)
    for step, reading in last.items():
        for page in (made.readings, live):
            assert near(page[step][reading.key], reading)


def test_a_store_is_read_while_it_is_written(tmp_path):
    """What a reader sees at any moment is whole steps, and a step that was seen stays."""
    sink, enough = LocalSink(tmp_path / "run", page=False), threading.Event()
    sink.write(everything(0), step=0)
    written = [0]

    def write():
        # However slow the reader is, it looks ten times while steps come.
        while not enough.is_set():
            step = written[-1] + 1
            sink.write(everything(step), step=step)
            written.append(step)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    store, seen = read_store(sink.path), ()
    try:
        for _ in range(10):
            steps = store.steps
            assert steps[: len(seen)] == seen and store.torn == ()
            at, values = store.curve("head_scores/induction")
            assert (
                len(at) >= len(steps)
                and (values[len(steps) - 1] == small(steps[-1])[3].values).all()
            )
            assert len(store.readings(steps[-1])) == len(everything())
            seen = steps
        assert writer.is_alive()
    finally:
        enough.set()
        writer.join()
    assert store.steps == tuple(written)


def test_a_directory_of_a_run_means_the_last_of_its_stores(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"no store of a watched run in .*holds checkpoint-2.*repl"
    ):
        find_store(out)
    for _ in range(11):
        fill(out / "tlens", (0,), page=False)
    store, earlier = find_store(out)
    assert store.path == out / "tlens-11"
    assert earlier == ["tlens", *(f"tlens-{number}" for number in range(2, 11))]
    found, others = find_store(out / "tlens-3")
    assert (found.path, others) == (out / "tlens-3", [])
    # The run itself is meant, not what looked at its checkpoints again.
    fill(out / "tlens-replay", (0,), page=False)
    store, others = find_store(out)
    assert store.path == out / "tlens-11" and others == ["tlens-replay", *earlier]
    fill(out / "slow", (0,), page=False)
    with pytest.raises(
        ValueError, match=r"several stores: name one of them.*slow, .*tlens-11, .*repl"
    ):
        find_store(out)
    fill(tmp_path / "unseen" / "tlens-replay", (0,), page=False)
    assert find_store(tmp_path / "unseen")[0].path.name == "tlens-replay"
    with pytest.raises(ValueError, match=r"no directory .*stores beside it: .*'tlens'"):
        find_store(out / "tlenz")
