"""The local store: what goes in comes out, also after a kill, on a full disk and on resuming."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from tests.sinks.samples import ODD, everything, named, pattern, same, small
from tlens_callback.reading import Reading
from tlens_callback.render import long_frame
from tlens_callback.sinks import LocalSink, read_store


def fill(path, steps, **settings):
    sink = LocalSink(path, **settings)
    for step in steps:
        sink.write(everything(step), step=step)
    return sink


def names(path):
    return sorted(p.relative_to(path).as_posix() for p in Path(path).rglob("*") if p.is_file())


def names_of(kind, *steps):
    return [f"step-{step:08d}.{kind}" for step in steps]


@pytest.mark.parametrize("exact", [True, False])
def test_every_reading_comes_back(tmp_path, exact):
    fill(tmp_path / "run", (0, 100), exact=exact)
    store = read_store(tmp_path / "run")
    assert store.steps == (0, 100)
    assert list(store.keys) == [r.key for r in everything()]
    for step in store.steps:
        back = store.readings(step)
        assert [r.key for r in back] == [r.key for r in everything(step)]
        for got, put in zip(back, everything(step), strict=True):
            packed = "pattern" in put.key and not exact
            assert same(got, put, atol=2**-12 if packed else 0)
            assert not packed or not same(got, put)
            assert same(store.reading(put.key, step), got)
            assert not same(got, put.__class__(**{**vars(put), "unit": "other"}))


def test_packing_is_half_a_triangle_and_only_for_attention(tmp_path):
    normal = pattern()
    ahead = normal.values.copy()
    ahead[0, 0, 2, 3] = 1e-30
    lists = {
        "normal": normal,
        "ahead": Reading(key="a/ahead", values=ahead, axes=normal.axes, unit="probability"),
        "large": Reading(key="a/large", values=normal.values * 1e5, axes=normal.axes, unit="x"),
        "nan": Reading(key="a/nan", values=normal.values * np.nan, axes=normal.axes, unit="x"),
        "other": Reading(key="a/other", values=normal.values, axes=("a", "b", "c", "d"), unit="x"),
        "tall": Reading(
            key="a/tall", values=normal.values[..., :4], axes=normal.axes, unit="probability"
        ),
    }
    sink = LocalSink(tmp_path / "run")
    sink.write(list(lists.values()), step=1)
    arrays = load_file(tmp_path / "run/arrays/step-00000001.safetensors")
    n = normal.values.shape[-1]
    assert arrays[normal.key].dtype == np.float16
    assert arrays[normal.key].shape == (2, 3, n * (n + 1) // 2)
    rows, columns = np.tril_indices(n)
    halves = normal.values[..., rows, columns].astype(np.float16)
    assert (arrays[normal.key] == halves).all()
    assert arrays["a/large"].shape == arrays[normal.key].shape
    for name in ("ahead", "large", "nan", "other", "tall"):
        assert arrays[f"a/{name}"].dtype == np.float32
        assert same(read_store(sink.path).reading(f"a/{name}", 1), lists[name])
    assert arrays["a/ahead"].shape == ahead.shape


def test_pandas_reads_the_scores_of_all_steps(tmp_path):
    sink = fill(tmp_path / "run", (0, 50, 100))
    frame = pd.read_parquet(tmp_path / "run" / "scores")
    expected = pd.concat([long_frame(small(step)).assign(step=step) for step in (0, 50, 100)])
    assert len(frame) == len(expected) and set(frame) == set(expected)
    for column in expected:
        a, b = frame[column].to_numpy(object), expected[column].to_numpy(object)
        assert (pd.isna(a) == pd.isna(b)).all() and (a[~pd.isna(a)] == b[~pd.isna(b)]).all()
    assert frame["layer"].dtype == "Int32" and frame["value"].dtype == np.float32
    mean = frame[frame.key == "head_scores/induction"].groupby("step").value.mean()
    assert mean[50] == pytest.approx(small(50)[3].values.mean())
    assert read_store(sink.path).frame().equals(frame)
    # Whole patterns are in the arrays only.
    assert not frame.key.str.startswith("attention_patterns").any()


def test_pandas_sees_axes_that_a_later_step_brings(tmp_path):
    sink = LocalSink(tmp_path / "run")
    sink.write([], step=0)
    sink.write(small(1)[:1], step=1)
    sink.write(small(2), step=2)
    late = Reading(key="a/b", values=np.ones(3), axes=("neuron",), unit="x")
    sink.write([late], step=3)
    frame = pd.read_parquet(sink.path / "scores")
    assert set(frame.step) == {1, 2, 3}
    assert frame[frame.step == 3].neuron.tolist() == [0, 1, 2]
    assert frame[frame.step == 2].block.max() == 24
    assert frame[frame.step == 1].neuron.isna().all()
    assert read_store(sink.path).steps == (0, 1, 2, 3)
    assert same(read_store(sink.path).reading("cost/seconds", 1), small(1)[0])


def test_texts_are_kept_letter_by_letter(tmp_path):
    (put, *_) = named(4)
    sink = LocalSink(tmp_path / "run")
    sink.write(everything(4), step=4)
    got = read_store(sink.path).reading(put.key, 4)
    assert got.texts.tolist() == put.texts.tolist() and got.texts.shape == (2, 5)
    assert set(ODD) >= set(put.texts.ravel()) and not got.texts.flags.writeable
    swapped = Reading(**{**vars(put), "texts": put.texts[::-1]})
    assert same(got, put) and not same(got, swapped)
    assert not same(got, Reading(**{**vars(put), "texts": None}))
    every = Reading(key="a/b", values=np.zeros(len(ODD)), axes=("rank",), unit="x", texts=ODD)
    sink.write([every], step=5)
    assert read_store(sink.path).reading("a/b", 5).texts.tolist() == ODD
    frame = pd.read_parquet(sink.path / "scores")
    assert frame[frame.step == 5].text.tolist() == ODD
    of_lens = frame[(frame.step == 4) & (frame.key == put.key)]
    assert of_lens.text.tolist() == put.texts.ravel().tolist()
    assert of_lens.value.tolist() == put.values.ravel().tolist()
    assert frame[frame.key == "head_scores/induction"].text.isna().all()


def test_a_store_from_before_there_were_texts_reads_and_goes_on(tmp_path):
    """Old files have neither the column nor the entries."""
    sink = LocalSink(tmp_path / "run")
    for step in (0, 1):
        sink.write([r for r in small(step) if r.texts is None], step=step)
    for step in (0, 1):
        file = sink.path / f"scores/step-{step:08d}.parquet"
        pd.read_parquet(file).drop(columns="text").to_parquet(file, index=False)
    store = read_store(sink.path)
    assert "text" not in store.frame() and store.reading("cost/seconds", 1).texts is None
    resumed = LocalSink(tmp_path / "run")
    resumed.write(small(2), step=2)
    resumed.write(small(3)[:1], step=3)
    for frame in (pd.read_parquet(store.path / "scores"), store.frame()):
        assert frame.groupby("step").text.count().to_dict() == {0: 0, 1: 0, 2: 12, 3: 0}
        lens = frame[(frame.step == 2) & (frame.key == "logit_lens/token/capital")]
        assert lens.text.tolist() == named(2)[0].texts.ravel().tolist()
        assert frame[frame.key == "cost/seconds"].value.tolist() == [0.25, 1.25, 2.25, 3.25]
        assert frame.layer.dtype == "Int32"
    assert store.steps == (0, 1, 2, 3)


def test_large_and_deep_readings_stay_out_of_the_table(tmp_path):
    sink = LocalSink(tmp_path / "run")
    wide = Reading(key="a/wide", values=np.zeros(100_001), axes=("neuron",), unit="x")
    fits = Reading(key="a/fits", values=np.zeros(100_000), axes=("neuron",), unit="x")
    sink.write([wide, fits, pattern()], step=0)
    assert set(read_store(sink.path).frame().key) == {"a/fits"}
    assert same(read_store(sink.path).reading("a/wide", 0), wide)


def test_curves(tmp_path):
    store = read_store(fill(tmp_path / "run", (0, 10, 20)).path)
    steps, values = store.curve("cost/seconds")
    assert steps.tolist() == [0, 10, 20] and values.tolist() == [0.25, 10.25, 20.25]
    assert (store.curve("head_scores/induction")[1][1] == small(10)[3].values).all()


# --- interruptions ---


def test_a_restarted_run_rewrites_what_follows(tmp_path):
    sink = fill(tmp_path / "run", (0, 10, 20, 30))
    sink.write(small(99), step=20)
    assert read_store(sink.path).steps == (0, 10, 20)
    assert read_store(sink.path).reading("cost/seconds", 20).values == 99.25
    sink.write(small(0), step=0)
    assert read_store(sink.path).steps == (0,)
    assert names(sink.path / "arrays") == names_of("safetensors", 0)
    sink.write(small(10), step=10)
    assert read_store(sink.path).steps == (0, 10)
    assert sink.path == tmp_path / "run" and not (tmp_path / "run-2").exists()


@pytest.mark.parametrize("again", ["closed", "new"])
def test_a_new_run_gets_a_directory_beside_the_old_one(tmp_path, again):
    sink = fill(tmp_path / "run", (0, 10))
    for number in (2, 3):
        sink.close()
        sink = sink if again == "closed" else LocalSink(tmp_path / "run")
        sink.write(small(number), step=0)
        sink.write(small(number), step=5)
        assert sink.path == tmp_path / f"run-{number}"
    assert read_store(tmp_path / "run").steps == (0, 10)
    assert read_store(tmp_path / "run-2").steps == (0, 5)
    assert read_store(tmp_path / "run-3").reading("cost/seconds", 5).values == 3.25


def test_a_resumed_run_goes_on_in_the_last_directory(tmp_path):
    fill(tmp_path / "run", (0, 10))
    fill(tmp_path / "run", (0, 10, 20, 30))
    (tmp_path / "run-3").mkdir()
    sink = LocalSink(tmp_path / "run")
    sink.write(small(77), step=20)
    assert sink.path == tmp_path / "run-2"
    assert read_store(tmp_path / "run-2").steps == (0, 10, 20)
    assert read_store(tmp_path / "run-2").reading("cost/seconds", 20).values == 77.25
    assert read_store(tmp_path / "run").steps == (0, 10)
    # A directory of somebody else is passed over.
    assert fill(tmp_path / "run", (0,)).path == tmp_path / "run-4"
    assert fill(tmp_path / "run", (5,)).path == tmp_path / "run-4"


def test_a_run_that_died_before_its_first_step_leaves_its_place(tmp_path):
    sink = fill(tmp_path / "run", (0,))
    (sink.path / "scores/step-00000000.parquet").unlink()
    assert fill(tmp_path / "run", (0, 10)).path == tmp_path / "run"
    assert read_store(tmp_path / "run").steps == (0, 10)


def test_a_resumed_run_without_a_store_makes_one(tmp_path):
    assert fill(tmp_path / "deep" / "run", (40, 50)).path == tmp_path / "deep" / "run"
    assert read_store(tmp_path / "deep" / "run").steps == (40, 50)


# --- what a user can get wrong ---


def test_says_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        LocalSink(tmp_path / "file")
    (tmp_path / "manifest.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="something else"):
        LocalSink(tmp_path)
    sink = LocalSink(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="two readings with the key 'cost/seconds'"):
        sink.write([small()[0], small()[0]], step=0)
    with pytest.raises(ValueError, match="0 or more"):
        sink.write([], step=-1)


def test_says_what_cannot_be_read(tmp_path):
    sink = fill(tmp_path / "run", (0, 10))
    store = read_store(sink.path)
    with pytest.raises(ValueError, match=r"no directory .*stores beside it: \['run'\]"):
        read_store(tmp_path / "missing")
    with pytest.raises(
        ValueError, match=r"not a tlens_callback store.*It holds the stores '.*/run'"
    ):
        read_store(tmp_path)
    with pytest.raises(ValueError, match=r"no complete step 5; its steps are \(0, 10\)"):
        store.reading("cost/seconds", 5)
    with pytest.raises(ValueError, match=r"no 'cost/second'; .*nearest are \['cost/seconds'"):
        store.reading("cost/second", 10)
    with pytest.raises(ValueError, match=r"no 'cost/second'; .*nearest are \['cost/seconds'"):
        store.curve("cost/second")
    with pytest.raises(ValueError, match=r"no '1'; it has \d+ keys"):
        store.curve("1")
    manifest = sink.path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tlens_callback": 99}))
    with pytest.raises(ValueError, match="format 99"):
        read_store(sink.path)


def test_the_manifest_says_what_made_it(tmp_path):
    sink = fill(tmp_path / "run", (0,))
    manifest = json.loads((sink.path / "manifest.json").read_text())
    assert manifest["tlens_callback"] == 1
    assert manifest["packages"]["numpy"] == np.__version__
    assert pd.Timestamp(manifest["created"]) <= pd.Timestamp.now("UTC")
    assert str(sink.path) in str(sink)
