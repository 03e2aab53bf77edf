"""Rollouts of a real training in trackio and TensorBoard: their own files are read back."""

import html
import re

import numpy as np
import pytest

from tests.rollouts.trained import distinct, short, watched
from tests.sinks.test_tensorboard import page_of, read, shown, text_of
from tests.sinks.trackio_run import rows, traces
from tlens_callback import LocalSink, MemorySink, Reading, TensorBoardSink, TrackioSink, read_store
from tlens_callback.meaning import Quantity
from tlens_callback.rollouts import Look

KEY = "tlens/rollouts/rollout_table"


@pytest.fixture
def project(request, monkeypatch):
    pytest.importorskip("trackio")
    name = re.sub(r"\W", "_", request.node.name)
    monkeypatch.setenv("TRACKIO_PROJECT", name)
    return name


def watch(folder, sink, **settings):
    """Trains, and returns the memory and the store of the same training."""
    memory, store = MemorySink(), LocalSink(folder / "store", page=False)
    watched(folder / "out", rewards=(distinct, short), sinks=[memory, store, sink()], **settings)
    return memory, read_store(folder / "store")


def same(value, wanted):
    if isinstance(wanted, str):
        return value == wanted
    return value is None if np.isnan(wanted) else np.float32(value) == np.float32(wanted)


def test_each_rollout_is_a_trace(project, tmp_path):
    memory, store = watch(tmp_path, TrackioSink)
    found = traces(project)
    assert [(step, key, i) for step, key, i, *_ in found] == [
        (step, KEY, i) for step in range(3) for i in range(8)
    ]
    for step in range(3):
        wanted = store.rollouts(step)[0].to_dict("records")
        for (*_, messages, metadata), of in zip(found[8 * step :], wanted, strict=False):
            assert messages == [
                {"role": "user", "content": of.pop("prompt")},
                {"role": "assistant", "content": of.pop("completion")},
            ]
            assert metadata.keys() == of.keys() and {"advantage", "reward_short"} <= of.keys()
            assert all(same(metadata[name], of[name]) for name in of)
    logged = {step: row for _, step, row in rows(project)}
    assert logged[1]["tlens/rollouts/reward_mean"] == pytest.approx(
        memory.readings["rollouts/reward_mean"][1].values.item()
    )
    histograms = {key for key, one in logged[1].items() if is_histogram(one)}
    assert len(histograms) == 10 and "tlens/rollouts/contrast_direct_q" in histograms


def is_histogram(entry):
    return isinstance(entry, dict) and entry.get("_type") == "trackio.histogram"


@pytest.mark.parametrize("why", ["no traces", "no texts"])
def test_else_they_are_a_table(project, tmp_path, monkeypatch, why):
    if why == "no traces":
        monkeypatch.delattr("trackio.Trace")
    _, store = watch(tmp_path, TrackioSink, rollouts={"texts": why == "no traces"}, max_steps=1)
    assert traces(project) == []
    ((_, _, row),) = [row for row in rows(project) if KEY in row[2]]
    wanted = store.rollouts(0)[0].to_dict("records")
    assert row[KEY]["_type"] == "trackio.table" and len(row[KEY]["_value"]) == 8
    for found, of in zip(row[KEY]["_value"], wanted, strict=True):
        assert found.keys() == of.keys() and ("prompt" in of) == (why == "no traces")
        assert all(same(found[name], of[name]) for name in of)


def test_tensorboard_shows_the_best_and_the_worst(tmp_path):
    pytest.importorskip("tensorboard")
    memory, store = watch(tmp_path, lambda: TensorBoardSink(tmp_path / "tb"))
    found = read(tmp_path / "tb")
    curves = [tag for tag in found.Tags()["scalars"] if "/rollouts/" in tag]
    assert len(curves) == 11
    for tag in curves:
        for event in found.Scalars(tag):
            reading = memory.readings[tag.removeprefix("tlens/")][event.step]
            assert event.value == reading.values.item()
    events = found.Tensors("tlens/rollouts/best_and_worst")
    assert [event.step for event in events] == [0, 1, 2]
    for event in events:
        page, frame = page_of(event), store.rollouts(event.step)[0]
        assert page.count("<h3>") == page.count("<strong>Best</strong>") == 2
        assert page.count("<strong>Worst</strong>") == 2
        for number, group in frame.groupby("group"):
            quoted = [" ".join(lines(text)) for text in re.findall(QUOTED, part(page, number))]
            best, worst = group["advantage"].argmax(), group["advantage"].argmin()
            texts = group["prompt"].iloc[0], *group["completion"].iloc[[best, worst]]
            # A space at either end of a line is shown as a dot.
            seen = [re.sub("^·+|·+$", lambda at: " " * len(at[0]), text) for text in quoted]
            assert seen == [text.replace("\n", " ") for text in texts]
            for place in (best, worst):
                row = group.iloc[place]
                said = html.unescape(part(page, number))
                assert f"rollout {row['rollout']}, advantage {row['advantage']:.4g}, " in said
    (table, *_) = found.Tensors("tlens/rollouts/rollout_table")
    assert "advantage" in shown(table).rows[0] and "completion" not in shown(table).rows[0]
    assert len(shown(table).rows) == 9
    pictures = [tag for tag in found.Tags()["images"] if "/rollouts/" in tag]
    assert pictures == ["tlens/rollouts/heads", "tlens/rollouts/by_layer"]


QUOTED = re.compile(r"<blockquote>\s*<p>(.*?)</p>\s*</blockquote>", re.DOTALL)


def lines(text):
    return [html.unescape(line).strip("\n") for line in re.split(r"<br\s*/?>", text)]


def part(page, number):
    (found,) = [one for one in page.split("<h3>") if one.startswith(f"Group {number}<")]
    return found


def some(prompt, completions, advantages):
    """Readings of one group with these texts, a letter for a token."""
    n, width = len(completions), max(map(len, completions))
    ids = np.full((n, width), np.nan)
    texts = np.full((n, width), "", dtype="<U8")
    for i, one in enumerate(completions):
        ids[i, : len(one)] = 1
        texts[i, : len(one)] = list(one)
    names = {"rollout": [f"1.{i + 1}" for i in range(n)]}
    rows = ("rollout", "pos")
    prompts = np.array([list(prompt)])
    made = [
        ("token", ids, rows, names, texts),
        ("prompt", np.ones(prompts.shape), ("group", "pos"), {"group": ["1"]}, prompts),
        ("group", np.zeros(n), ("rollout",), names, None),
        ("advantage", np.array(advantages), ("rollout",), names, None),
    ]
    return [
        Reading(
            key=f"rollouts/{key}", values=values, axes=axes, unit="x", labels=labels, texts=of
        ).described(Look.description)
        for key, values, axes, labels, of in made
    ]


HOSTILE = "# a\n\n    | b |\n> <script>x</script> **c** [d](http://e) `f`\n1. g\n\n---\n\x1b[2J"


def test_no_text_of_a_rollout_is_taken_for_markdown(tmp_path):
    pytest.importorskip("tensorboard")
    sink = TensorBoardSink(tmp_path / "tb")
    sink.write(some(HOSTILE, [HOSTILE, "\n", "b"], [1.0, -1.0, 0.0]), step=0)
    sink.close()
    (event,) = read(tmp_path / "tb").Tensors("tlens/rollouts/best_and_worst")
    page = page_of(event)
    tags = set(re.findall(r"<(\w+)", page))
    assert tags == {"h3", "blockquote", "p", "br", "strong"}, text_of(event)
    prompt, best, _ = re.findall(r"<blockquote>(.*?)</blockquote>", page, re.DOTALL)
    assert prompt == best
    seen = [
        line.strip() for of in re.findall(r"<p>(.*?)</p>", best, re.DOTALL) for line in lines(of)
    ]
    wanted = HOSTILE.replace("    |", "····|").replace("\x1b", "\\x1b").split("\n")
    assert [line for line in seen if line] == [line for line in wanted if line]


@pytest.mark.parametrize(
    ("advantages", "said"),
    [([0.0, 0.0], ["All have the same advantage; the first"]), ([np.nan, 1.0], None)],
)
def test_a_group_without_spread_or_without_advantages(tmp_path, advantages, said):
    pytest.importorskip("tensorboard")
    sink = TensorBoardSink(tmp_path / "tb")
    readings = some("a", ["b", "c"], advantages)
    assert {r.meaning.quantity for r in readings} >= {Quantity.ROLLOUT_ADVANTAGE}
    sink.write(readings, step=0)
    sink.close()
    found = read(tmp_path / "tb")
    if said is None:
        assert found.Tags()["tensors"] == ["tlens/rollouts/rollout_table"]
    else:
        (event,) = found.Tensors("tlens/rollouts/best_and_worst")
        assert re.findall("<strong>(.*?)</strong>", page_of(event)) == said
