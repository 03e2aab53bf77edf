"""The page of a run in progress: whole files, an index that names what is there, steps that go."""

import errno
import json
import os
import re

import numpy as np
import pytest

from tests.page.decode import Decoder, near
from tests.sinks.samples import everything, pattern, small
from tlens_callback.page import PageFolder, folder
from tlens_callback.page.heads import interleave
from tlens_callback.reading import Reading, descriptions


def index_of(path):
    text = (path / "data/index.js").read_text("ascii")
    assert text.startswith("tlens.index(") and text.endswith(")\n")
    return json.loads(text[12:-2])


def shown(path):
    """Step -> readings, as the page's script gets them; every file that is there is named."""
    out, named = {}, {"index.js"}
    for step, stamp, large in index_of(path)["steps"]:
        blobs = []
        for name, call in [
            (f"{step:08d}.js", rf'tlens\.chunk\({step},{stamp},"([\w+/=]+)"\)\n'),
            *(
                (f"{step:08d}-{i}.js", rf'tlens\.blob\({step},{stamp},{i},"([\w+/=]+)"\)\n')
                for i in range(large)
            ),
        ]:
            named.add(name)
            blobs.append(re.fullmatch(call, (path / "data" / name).read_text("ascii"))[1])
        out[step] = Decoder().step(blobs)  # each step by itself
    assert {p.name for p in (path / "data").iterdir()} == named
    return out


def stamps(path):
    return {step: stamp for step, stamp, _ in index_of(path)["steps"]}


def long(step, *, scores=True, tokens=150):
    """Patterns above the limit for large blobs; head 5 of layer 1 and 0 of layer 3 score high."""
    rng = np.random.default_rng(step)
    p = np.tril(rng.random((4, 16, tokens, tokens), np.float32))
    axes = ("layer", "head", "query", "key")
    out = [
        Reading(
            key=f"attention_patterns/pattern/{name}",
            values=p / p.sum(-1, keepdims=True),
            axes=axes,
            unit="probability",
            limits=(0, 1),
        )
        for name in "ab"
    ]
    out.append(Reading(key="a/long", values=rng.random(30_000), axes=("neuron",), unit="x"))
    if scores:
        values = rng.random((4, 16)) / 2
        values[1, 5], values[3, 0] = 0.9, 0.8
        out.append(Reading(key="s/score", values=values, axes=axes[:2], unit="probability"))
    return out


def test_every_step_comes_back_by_itself(tmp_path):
    page = PageFolder(tmp_path / "run" / "page")
    assert page.steps == () and not page.path.exists()
    for step in (0, 10, 20):
        page.write(everything(step), step)
        assert set(shown(page.path)) == set(page.steps) == set(range(0, step + 1, 10))
    for step, got in shown(page.path).items():
        assert list(got) == [reading.key for reading in everything(step)]
        assert all(near(got[reading.key], reading) for reading in everything(step))
    assert index_of(page.path) == {
        "title": f"{tmp_path.name}/run",
        "notes": [],
        "done": False,
        "steps": [[step, stamps(page.path)[step], 0] for step in (0, 10, 20)],
        "instruments": {
            name: json.loads(json.dumps(one.as_json()))
            for name, one in descriptions(everything(0)).items()
        },
    }
    text = (page.path / "index.html").read_text("utf-8")
    about = re.search(r'<script type="application/json" id="about">(.*)</script>', text)[1]
    title = f"{tmp_path.name}/run"
    assert json.loads(about) == {
        "title": title,
        "live": True,
        "notes": [],
    }
    page.finish()
    assert index_of(page.path)["done"] and page.steps == (0, 10, 20)
    page.write(everything(30), 30)
    assert not index_of(page.path)["done"]


def test_large_readings_have_files_of_their_own(tmp_path):
    page = PageFolder(tmp_path / "page")
    page.write(long(0, tokens=60), 0)
    assert [n for _, _, n in index_of(page.path)["steps"]] == [3]
    got = shown(page.path)[0]
    assert all(near(got[reading.key], reading) for reading in long(0, tokens=60))
    assert not index_of(page.path)["notes"]
    # A step that has fewer leaves none behind.
    page.write(small(1), 0)
    assert set(shown(page.path)[0]) == {reading.key for reading in small(1)}


@pytest.mark.slow
def test_too_many_patterns_are_cut_to_the_heads_of_the_highest_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MOST_LARGE", 800_000)
    page = PageFolder(tmp_path / "page")
    for step in (0, 10):
        page.write(long(step), step)
        size = sum(p.stat().st_size for p in page.path.glob(f"data/{step:08d}-*.js"))
        assert 600_000 < size < 801_000
        got = shown(page.path)[step]
        selected = got["attention_patterns/pattern/a"]["select"]
        assert selected == got["attention_patterns/pattern/b"]["select"] == sorted(selected)
        scores = long(step)[-1].values.ravel()
        assert set(selected) == set(np.argsort(-scores)[: len(selected)])
        assert {1 * 16 + 5, 3 * 16} <= set(selected) and 5 < len(selected) < 60
        for reading in long(step):
            entry = got[reading.key]
            hidden = np.isnan(entry["values"])
            part = Reading(**{**vars(reading), "values": np.where(hidden, np.nan, reading.values)})
            assert near(entry, part)
        (note,) = index_of(page.path)["notes"]
        assert (
            f"at step {step} of {len(selected)} of 64 heads" in note
            and "highest head scores" in note
        )
    # What was left out stays said, also when the next step fits and the run is resumed.
    page = PageFolder(tmp_path / "page")
    page.write(small(20), 20)
    assert index_of(page.path)["notes"] == [note]
    monkeypatch.setattr(folder, "MOST_LARGE", 4_000_000)
    whole = PageFolder(tmp_path / "whole")
    whole.write(long(0), 0)
    assert not index_of(whole.path)["notes"] and not any(
        "select" in e for e in shown(whole.path)[0]
    )


def test_without_scores_the_first_heads_are_kept_and_nothing_else_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MOST_LARGE", 300_000)
    page = PageFolder(tmp_path / "page")
    page.write(long(0, scores=False), 0)
    selected = shown(page.path)[0]["attention_patterns/pattern/a"]["select"]
    assert selected == list(range(len(selected))) and selected
    assert "no head scores" in index_of(page.path)["notes"][0]
    monkeypatch.setattr(folder, "MOST_LARGE", 1000)
    page.write(long(10), 10)
    got = shown(page.path)[10]
    assert got["attention_patterns/pattern/b"]["select"] == []
    assert near(got["a/long"], long(10)[2]) and near(got["s/score"], long(10)[3])
    assert "at step 10 of 0 of 64 heads" in index_of(page.path)["notes"][0]


def test_steps_are_dropped_and_written_again_under_another_stamp(tmp_path):
    page = PageFolder(tmp_path / "page")
    for step in (0, 10, 20, 30):
        page.write(small(step), step)
    before = stamps(page.path)
    assert len(set(before.values())) == 4
    page.drop(20)
    assert page.steps == (0, 10) and set(shown(page.path)) == {0, 10}
    page.write(small(99), 20)
    page.write(small(98), 10)
    after = stamps(page.path)
    assert after[0] == before[0] and not {after[10], after[20]} & set(before.values())
    assert near(shown(page.path)[20]["cost/seconds"], small(99)[0])
    assert near(shown(page.path)[10]["cost/seconds"], small(98)[0])
    page.keep([10, 77])
    assert set(shown(page.path)) == {10}
    page.drop(0)
    assert shown(page.path) == {} and PageFolder(page.path).steps == ()


def test_a_resumed_page_goes_on(tmp_path):
    page = PageFolder(tmp_path / "page")
    for step in (0, 10):
        page.write(small(step), step)
    before = stamps(page.path)
    again = PageFolder(tmp_path / "page")
    assert again.steps == (0, 10)
    again.write(small(20), 20)
    assert {**before, 20: stamps(page.path)[20]} == stamps(page.path)
    assert set(shown(page.path)) == {0, 10, 20}


def test_the_template_is_replaced_by_that_of_an_upgrade(tmp_path):
    page = PageFolder(tmp_path / "page")
    page.write(small(0), 0)
    html = page.path / "index.html"
    made, text = html.stat().st_mtime_ns, html.read_bytes()
    PageFolder(tmp_path / "page").write(small(1), 1)
    page.write(small(2), 2)
    assert html.stat().st_mtime_ns == made
    html.write_bytes(b"an older version's")
    PageFolder(tmp_path / "page").write(small(3), 3)
    assert html.read_bytes() == text


@pytest.mark.parametrize("text", ["", "tlens.index({)", "tlens.index([])", 'tlens.index({"a":1})'])
def test_an_index_that_cannot_be_read_begins_anew(tmp_path, text):
    page = PageFolder(tmp_path / "page")
    page.write(small(0), 0)
    (page.path / "data/index.js").write_text(text)
    again = PageFolder(tmp_path / "page")
    assert again.steps == ()
    again.write(small(0), 0)
    assert set(shown(page.path)) == {0}


def test_a_step_whose_file_is_gone_does_not_count(tmp_path):
    page = PageFolder(tmp_path / "page")
    for step in (0, 10):
        page.write(small(step), step)
    (page.path / "data/00000000.js").unlink()
    assert PageFolder(tmp_path / "page").steps == (10,)


@pytest.mark.parametrize("last", range(4))
@pytest.mark.slow
def test_a_write_that_fails_leaves_a_page_that_is_right(tmp_path, monkeypatch, last):
    """The index never names what is not there, whichever file is the last that fits."""
    page = PageFolder(tmp_path / "page")
    page.write(long(0, tokens=40), 0)
    replace, count = os.replace, iter(range(100))

    def full(old, new):
        if next(count) >= last:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        page.write(long(10, tokens=40), 10)
    monkeypatch.undo()
    steps = index_of(page.path)["steps"]
    assert [step for step, _, _ in steps] == [0]
    assert not list(page.path.rglob("*.tmp"))
    again = PageFolder(tmp_path / "page")
    again.write(long(10, tokens=40), 10)
    assert set(shown(page.path)) == {0, 10}
    assert near(shown(page.path)[10]["a/long"], long(10, tokens=40)[2])


def test_heads_come_in_turn():
    a, b = {("0", "0"): 0.1, ("0", "1"): 0.9}, {("0", "0"): 5.0, ("1", "0"): 7.0, ("0", "1"): 6.0}
    assert interleave([a, b]) == [("0", "1"), ("1", "0"), ("0", "0")]
    assert interleave([]) == [] and pattern().axes[:2] == ("layer", "head")
