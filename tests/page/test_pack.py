"""A store as one file: everything in it comes back, or the page says what does not."""

import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from tests.page.decode import Page, near
from tests.sinks.samples import TOKENS, everything, pattern, small
from tlens_callback.page import pack, page, template
from tlens_callback.page.thin import evenly_spaced
from tlens_callback.reading import Reading
from tlens_callback.sinks import LocalSink, read_store

LAYERS, HEADS, TOKENS_LONG = 4, 5, 20
MAIN, RARE = "attention_patterns/pattern/a", "pattern_change/pattern/a"


def store_of(path, readings_of, steps):
    sink = LocalSink(path, page=False)
    for step in steps:
        sink.write(readings_of(step), step=step)
    return read_store(path)


def drifting(step):
    """Patterns that move, heads of layer 2 the most; scores; a long line; events at step 130."""
    n = TOKENS_LONG
    rng = np.random.default_rng(5)
    speed = np.where(np.arange(LAYERS) == 2, 0.01, 0.0005)[:, None, None, None]
    logits = rng.normal(0, 2, (2, LAYERS, HEADS, n, n))
    p = np.tril(np.exp(logits[0] + speed * step * logits[1]))
    p /= p.sum(-1, keepdims=True)
    scores = np.full((LAYERS, HEADS), 0.1)
    scores[3, 4] = 0.2 + step / 1000
    scores[0, 1] = 0.3 - step / 1000
    axes, tokens = ("layer", "head", "query", "key"), [f" {i}" for i in range(n)]
    labels = {"query": tokens, "key": tokens}
    more = {"axes": axes, "labels": labels, "unit": "probability"}
    out = [
        Reading(key="cost/seconds", values=np.array(step / 7), unit="seconds"),
        Reading(key=MAIN, values=p, limits=(0, 1), **more),
        Reading(key="s/score", values=scores, axes=axes[:2], unit="probability", limits=(0, 1)),
        Reading(key="s/long", values=np.full(4001, step), axes=("neuron",), unit="x"),
    ]
    if step % 50 == 0:
        out.append(Reading(key=RARE, values=p - p[0], limits=(-1, 1), **more))
    if step == 130:
        out.append(
            Reading(
                key="watch/events", values=[1], axes=("event",), unit="event", texts=["</script>"]
            )
        )
    return out


STEPS = range(0, 400, 10)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("runs") / "medium", drifting, STEPS)


@pytest.fixture(scope="module")
def bare():
    """How many bytes a page without data and notes takes."""
    return len(template.html({"title": "medium", "live": False, "notes": []}).encode())


def check(made, readings_of, steps):
    """Every number that is there is right; returns what is not, as (step, key)."""
    missing = set()
    for step in steps:
        got = made.readings.get(step, {})
        here = [reading.key for reading in readings_of(step) if reading.key in got]
        assert list(got) == here
        for reading in readings_of(step):
            entry = got.get(reading.key)
            if entry is None or "select" in entry:
                missing.add((step, reading.key))
            if entry is not None:
                part = np.where(np.isnan(entry["values"]), np.nan, reading.values)
                if "select" in entry:
                    reading = Reading(**{**vars(reading), "values": part})
                # The store keeps attention in float16.
                assert near(entry, reading, more=2**-12), (step, reading.key)
    return missing


def test_everything_is_there_and_nothing_is_said(store):
    made = Page(page(store))
    assert list(made.steps) == list(STEPS)
    assert not check(made, drifting, STEPS)
    assert made.notes == [] and made.about["live"] is False
    # The folder of a store is "tlens" in every run; the one around it tells the runs apart.
    assert made.about["title"] == f"{store.path.parent.name}/medium"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", made.about["made"])
    entries = [entry for step in made.readings.values() for entry in step.values()]
    assert any(entry["delta"] for entry in entries)


def test_odd_readings_come_back_and_nothing_of_them_is_markup(tmp_path):
    name = "</script><script>alert(1)"
    path = tmp_path / name.replace("/", "\u2215")
    store = store_of(path, everything, (0, 10, 20))
    made = Page(text := page(store))
    assert not check(made, everything, (0, 10, 20)) and made.notes == []
    assert made.about["title"] == f"{tmp_path.name}/{path.name}"
    plain = Page(page(store_of(tmp_path / "plain", lambda step: [], (0, 10, 20))))
    assert made.tags == plain.tags
    for piece in ("alert(1)", "\u2215"):
        assert text.count(piece) <= 2 and (piece == "\u2215") <= (piece not in text)
    assert "<script>alert" not in text and "\\u003cscript>alert(1)" in text


def test_patterns_go_at_some_steps_first(store, bare):
    full = len(page(store)) - bare
    made = Page(text := page(store, most_bytes=(most := bare + int(full * 0.8))))
    assert 0.85 * most < len(text.encode()) <= most
    missing = check(made, drifting, STEPS)
    assert {key for _, key in missing} == {MAIN, RARE, "s/long"}
    here = [step for step in STEPS if MAIN in made.readings[step]]
    assert 20 <= len(here) < len(STEPS) and {0, 390, 130} <= set(here)
    gaps = np.diff(here)
    assert gaps.max() <= 30
    rare = [step for step in range(0, 400, 50) if RARE in made.readings[step]]
    assert rare[0] == 0 and rare[-1] == 350 and 2 <= len(rare) < 8
    said = " ".join(made.notes)
    assert f"(attention_patterns/pattern) are in this page at {len(here)} of 40 steps" in said
    assert f"(pattern_change/pattern) are in this page at {len(rare)} of 8 steps" in said
    assert f"numbers (s/long) are in this page at {len(here)} of 40 steps" in said
    assert "heads" not in said and "The store has everything" in said


def test_then_of_some_heads_those_of_the_highest_scores_and_the_most_change(store, bare):
    full = len(page(store)) - bare
    made = Page(text := page(store, most_bytes=(most := bare + int(full * 0.5))))
    assert 0.8 * most < len(text.encode()) <= most
    missing = check(made, drifting, STEPS)
    assert {key for _, key in missing} == {MAIN, RARE, "s/long"}
    here = [step for step in STEPS if MAIN in made.readings[step]]
    assert len(here) == 20 and {0, 390} <= set(here)
    (selected,) = {tuple(made.readings[step][MAIN]["select"]) for step in here}
    n = len(selected)
    assert 8 <= n < LAYERS * HEADS
    assert {tuple(e["select"]) for s in made.readings.values() if (e := s.get(RARE))} == {selected}
    # By score, the largest it ever was; by change, layer 2.
    assert {3 * HEADS + 4, 0 * HEADS + 1} <= set(selected)
    assert len({2 * HEADS + head for head in range(HEADS)} & set(selected)) >= 4
    said = " ".join(made.notes)
    assert (
        f"in this page are of {n} of 20 heads" in said and "s/score" in said and "change of" in said
    )
    assert "are in this page at 20 of 40 steps" in said


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.4, 0.6, 0.9, 1.3])
@pytest.mark.slow
def test_nothing_goes_without_a_word(store, bare, share):
    """What lacks is what the notes name, and where nothing lacks there are none."""
    full = len(page(store)) - bare
    most = bare + 4100 + int(full * share)
    made = Page(text := page(store, most_bytes=most))
    assert len(text.encode()) <= most
    missing = check(made, drifting, STEPS)
    said = " ".join(made.notes)
    names = {MAIN: "attention_patterns/pattern", RARE: "pattern_change/pattern"}
    for key in {key for _, key in missing if key in {MAIN, RARE, "s/long"}}:
        assert names.get(key, key) in said or "heads" in said
    at_all = [step for step in STEPS if step in made.readings]
    assert {key for step, key in missing if step in at_all} <= {MAIN, RARE, "s/long"}
    assert (f"This page has {len(at_all)} of 40 steps" in said) == (len(at_all) < 40)
    for key, name in names.items():
        kept = [s for s in made.readings.values() if key in s]
        of = len([step for step in STEPS if key in {r.key for r in drifting(step)}])
        if not kept:
            assert f"({name}) are not in this page" in said or "Attention patterns (" in said
        elif len(at_all) == 40:
            assert (f"({name}) are in this page at {len(kept)} of {of} steps" in said) == (
                len(kept) < of
            )
    assert bool(made.notes) == bool(missing) == (share < 1)


def test_scores_go_only_where_they_alone_are_too_much(tmp_path, bare):
    def readings_of(step):
        rng = np.random.default_rng(step)
        matrix = Reading(
            key="s/noise", values=rng.random((30, 30)), axes=("layer", "head"), unit="probability"
        )
        return [matrix, pattern(step)]

    steps = range(100)
    store = store_of(tmp_path / "run", readings_of, steps)
    most = bare + 4000 + 60_000
    made = Page(text := page(store, most_bytes=most))
    assert 0.8 * most < len(text.encode()) <= most
    here = list(made.steps)
    assert 10 < len(here) < 60 and {0, 99} <= set(here)
    assert np.diff(here).max() - np.diff(here).min() <= 1
    check(made, readings_of, here)
    assert made.notes[0].startswith(f"This page has {len(here)} of 100 steps, because all of them")
    with pytest.raises(ValueError, match=r"most_bytes=\d+ is too few"):
        page(store, most_bytes=bare + 4100)
    with pytest.raises(ValueError, match="is too few"):
        page(store, most_bytes=1000)


LARGE_SHAPE = (65, 64)
"""Of the heads of a large model: more than 4,000."""


def of_a_large_model(step):
    """Matrices of all heads that drift, of several measures, beside patterns and long readings."""
    rng = np.random.default_rng(step)
    start = np.random.default_rng(0)
    out = [drifting(step)[1]]
    for i in range(3):
        values = start.random(LARGE_SHAPE) * (1 + 0.01 * rng.normal(0, 1, LARGE_SHAPE))
        out.append(Reading(key=f"s/score{i}", values=values, axes=("layer", "head"), unit="bits"))
    wide = rng.random((3, *LARGE_SHAPE))
    axes = ("block", "layer", "head")
    return [*out, Reading(key="s/by_block", values=wide, axes=axes, unit="bits")]


SCORES = {f"s/score{i}" for i in range(3)}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("runs") / "large", of_a_large_model, range(12))


@pytest.fixture(scope="module")
def unrounded(tmp_path_factory, bare):
    """How many bytes the matrices of this run take with all their digits."""

    def readings_of(step):
        return [reading for reading in of_a_large_model(step) if reading.key in SCORES]

    return len(page(store_of(tmp_path_factory.mktemp("runs") / "x", readings_of, range(12)))) - bare


def test_matrices_of_a_large_model_stay_at_every_step(large, bare, unrounded):
    """Patterns go before them, and so does what has more axes."""
    whole = Page(page(large))
    assert not check(whole, of_a_large_model, range(12)) and not whole.notes
    made = Page(page(large, most_bytes=bare + 4000 + int(0.8 * unrounded)))
    missing = check(made, of_a_large_model, range(12))
    assert {key for _, key in missing} == {MAIN, "s/by_block"}
    assert all(SCORES <= made.readings[step].keys() for step in range(12))
    assert {entry["type"] for step in made.readings.values() for k, entry in step.items()
            if k in SCORES} == {"bf16"}  # fmt: skip
    said = " ".join(made.notes)
    assert "scores of heads are rounded to 8 binary digits" in said and "0.4%" in said
    assert "s/by_block" in said and "s/score" not in said and "12 steps" not in said


def test_all_measures_of_a_step_stay_or_go_together(large, bare):
    made = Page(page(large, most_bytes=bare + 4000 + 60_000))
    here = list(made.steps)
    assert 2 <= len(here) < 12 and {0, 11} <= set(here)
    assert all(set(made.readings[step]) == SCORES for step in here)
    said = " ".join(made.notes)
    assert f"This page has {len(here)} of 12 steps" in said and "rounded to 8" in said


def test_a_page_grows_beyond_its_usual_size_for_its_matrices_only(
    large, bare, unrounded, monkeypatch
):
    """Its sizes are made so small that this run is a long one."""
    monkeypatch.setattr(pack, "MOST_BYTES", bare + 4000 + unrounded)
    monkeypatch.setattr(pack, "_FOR_PATTERNS", unrounded * 3 // 4)
    monkeypatch.setattr(pack, "MOST_WITH_MATRICES", bare + 4000 + 2 * unrounded)
    made = Page(text := page(large))
    check(made, of_a_large_model, range(12))
    assert pack.MOST_BYTES < len(text) < bare + 4000 + 2 * unrounded
    assert all(SCORES <= made.readings[step].keys() for step in range(12))
    # The patterns still have some room.
    assert any(MAIN in made.readings[step] for step in range(12))
    monkeypatch.setattr(pack, "MOST_WITH_MATRICES", bare + 4000 + unrounded)
    made = Page(text := page(large))
    assert 2 <= len(made.steps) < 12 and len(text) <= pack.MOST_WITH_MATRICES


def test_nothing_is_said_of_rounding_where_there_is_no_matrix(tmp_path, bare):
    def readings_of(step):
        values = np.random.default_rng(step).random(500)
        return [Reading(key="s/line", values=values, axes=("neuron",), unit="x")]

    store = store_of(tmp_path / "run", readings_of, range(20))
    made = Page(page(store, most_bytes=bare + 4000 + 20_000))
    assert len(made.steps) < 20 and len(made.notes) == 1


def test_heads_are_told_apart_by_their_labels(tmp_path, bare):
    """Patterns of some layers, with scores of all."""

    def readings_of(step):
        rng = np.random.default_rng(step)
        n = 60
        p = np.tril(rng.random((2, 8, n, n)))
        scores = np.zeros((6, 8))
        scores[4, 3], scores[1, 7] = 0.9, 0.8
        return [
            Reading(
                key=MAIN,
                values=p / p.sum(-1, keepdims=True),
                axes=("layer", "head", "query", "key"),
                unit="probability",
                limits=(0, 1),
                labels={"layer": ["1", "4"]},
            ),
            Reading(key="s/score", values=scores, axes=("layer", "head"), unit="probability"),
        ]

    store = store_of(tmp_path / "run", readings_of, range(3))
    made = Page(page(store, most_bytes=bare + 60_000))
    for step in range(3):
        selected = made.readings[step][MAIN]["select"]
        assert {1 * 8 + 3, 0 * 8 + 7} <= set(selected) and len(selected) < 16
    assert f"of {len(selected)} of 16 heads" in " ".join(made.notes)


@pytest.mark.parametrize("steps", [1, 2])
def test_runs_of_a_step_or_two_keep_what_fits(tmp_path, bare, steps):
    def readings_of(step):
        p = np.tril(np.random.default_rng(step).random((2, 8, 60, 60)))
        axes = ("layer", "head", "query", "key")
        return [Reading(key=MAIN, values=p, axes=axes, unit="probability", limits=(0, 1))]

    store = store_of(tmp_path / "run", readings_of, range(steps))
    made = Page(page(store, most_bytes=bare + 4000 + steps * 20_000))
    selected = made.readings[0][MAIN]["select"]
    assert 3 < len(selected) < 16 and list(made.steps) == list(range(steps))
    said = "no measured score ranks them" if steps == 1 else "highest change of the pattern"
    assert f"of {len(selected)} of 16 heads" in made.notes[0] and said in made.notes[0]
    check(made, readings_of, range(steps))
    made = Page(page(store, most_bytes=bare + 4500))
    assert made.readings[0] == {} and "are not in this page: there is no room" in made.notes[0]


def test_readings_that_come_and_go(tmp_path):
    """Keys that are missing at some steps, change shape, or turn up late."""

    def readings_of(step):
        out = small(step)[:4]
        if step % 3:
            out.append(pattern(step, layers=1 + (step > 4)))
        if step % 2:
            out += small(step)[4:]
        return out

    made = Page(page(store_of(tmp_path / "run", readings_of, range(9))))
    assert not check(made, readings_of, range(9)) and made.notes == []


def test_a_store_with_torn_and_missing_steps(tmp_path):
    store = store_of(tmp_path / "run", everything, (0, 10, 20, 30))
    torn = tmp_path / "run/arrays/step-00000010.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    (tmp_path / "run/scores/step-00000020.parquet").unlink()
    made = Page(page(store))
    assert list(made.steps) == [0, 30] and not check(made, everything, (0, 30))
    assert made.notes == ["1 of 3 steps are incomplete in the store, so they are not here: 10."]
    for left in (0, 30):
        (tmp_path / f"run/scores/step-{left:08d}.parquet").unlink()
    with pytest.raises(ValueError, match="no complete step"):
        page(store)


def test_the_store_reads_what_the_page_needs(tmp_path):
    store = store_of(tmp_path / "run", everything, (0,))
    about = store.about(0)
    assert list(about) == [reading.key for reading in everything()]
    wanted = {"cost/seconds", pattern().key}
    assert [r.key for r in store.readings(0, wanted)] == [
        r.key for r in everything() if r.key in wanted
    ]
    got = {key: lower for key, _, lower in store.stored(0, wanted)}
    assert got["cost/seconds"] is None and got[pattern().key].shape == (2, 3, 45)
    assert len(TOKENS) == 9


@pytest.mark.parametrize("most", [2, 3, 7, 20, 39, 40, 41])
@pytest.mark.parametrize("wanted", [(), (3,), (0, 1, 2, 3, 38, 39), tuple(range(40))])
def test_evenly(most, wanted):
    chosen = evenly_spaced(range(40), most, wanted)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(most, 40)
    assert {chosen[0], chosen[-1]} == {0, 39}
    if not wanted:
        assert np.ptp(np.diff(chosen)) <= 1
    assert np.diff(chosen).max() <= 2 * 39 / (min(most, 40) - 1) + 1
    if most == 20 and wanted == (3,):
        assert 3 in chosen


def test_the_template_has_every_script():
    """One that is forgotten in the list would be missed on the page only."""
    names = {p.name for p in (files("tlens_callback.page") / "assets").iterdir()}
    assert names == {*template._SCRIPTS, "index.html", "style.css"}
    text = template.html({"notes": ["</script><!--"]})
    assert text.count("</script>") == 2 and text.lower().startswith("<!doctype html>")
    assert not re.search(r"/\*CSS\*/|/\*JS\*/|<!--DATA-->", text)
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:""", text)
    for name in template._SCRIPTS:
        source = Path(str(files("tlens_callback.page") / "assets" / name)).read_text()
        assert source in text


def test_wanted_steps_replace_their_nearest_whatever_their_number():
    """Against a search through all chosen steps for each wanted one."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(2, 60))
        steps = sorted(rng.choice(1000, n, replace=False).tolist())
        most = int(rng.integers(1, n))
        wanted = {step for step in steps if rng.random() < rng.choice([0.05, 0.5, 1])}
        chosen = [round(i * (n - 1) / max(most - 1, 1)) for i in range(most)]
        for at in (i for i, step in enumerate(steps) if step in wanted):
            nearest = min(range(most), key=lambda i: abs(chosen[i] - at))
            if 0 < nearest < most - 1 and steps[chosen[nearest]] not in wanted:
                chosen[nearest] = at
        assert evenly_spaced(steps, most, wanted) == sorted(steps[i] for i in set(chosen))
