"""Two watched runs against each other, from their stores alone."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from tests import tiny
from tests.offline.two_models import DOG, asked, fine_tune, save, watched
from tests.sinks.samples import everything, pattern
from tests.training import CAPITAL
from tlens_callback import Description, LocalSink, PatternChange, Probe, Reading, fast, read_store
from tlens_callback.checkpoints import Checkpoint, Loader
from tlens_callback.offline.compare import compare_models
from tlens_callback.offline.compare_stores import compare_stores
from tlens_callback.offline.stages import name_reading

INSTRUMENTS = [*fast(), PatternChange()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two runs over two bases, that ended at the models a and b, and their stores."""
    folder = tmp_path_factory.mktemp("runs")
    base = save(tiny.model("llama"), folder / "base")
    a, b, middle = (fine_tune(folder / name, i) for i, name in enumerate(("a", "b", "c"), 1))
    made = {"base": base, "a": a, "b": b}
    made["run a"] = watched(folder / "run-a", {0: base, 4: a}, instruments=INSTRUMENTS)
    steps = {0: middle, 4: a, 9: b}
    made["run b"] = watched(folder / "run-b", steps, instruments=INSTRUMENTS)
    return made


def by_key(readings):
    return {reading.key: reading for reading in readings}


def stores(saved):
    return read_store(saved["run a"]), read_store(saved["run b"])


def written(path, *steps):
    sink = LocalSink(path, page=False)
    for step, readings in enumerate(steps):
        sink.write(readings, step=step)
    sink.close()
    return read_store(path)


def test_stores_give_what_the_checkpoints_give(saved):
    pair = compare_stores(*stores(saved))
    assert pair.left_out == ()
    models = compare_models(
        Checkpoint.of(saved["a"]),
        Checkpoint.of(saved["b"]),
        Loader(),
        asked(instruments=INSTRUMENTS),
    )
    for mine, theirs in zip((pair.first, pair.last), (models.first, models.last), strict=True):
        mine, theirs = by_key(mine), by_key(theirs)
        lacking = {key.split("/")[0] for key in set(theirs) - set(mine)}
        assert lacking == {"activation_drift", "difference_lens", "update_sparsity", "cost"}
        assert set(mine) <= set(theirs)
        for key in set(mine) - {"checkpoint/name"}:
            # Patterns are float16 in a store; all else is what it was.
            rough = "pattern" in key or "attention_drift" in key
            assert np.allclose(
                mine[key].values, theirs[key].values, atol=5e-4 if rough else 2e-5, equal_nan=True
            ), key
            assert (mine[key].axes, mine[key].unit) == (theirs[key].axes, theirs[key].unit)
            assert mine[key].labels == theirs[key].labels
    off = by_key(pair.last)["attention_drift/js"].values
    off = np.abs(off - by_key(models.last)["attention_drift/js"].values)
    assert off.max() < 1e-4


def test_what_is_relative_is_not_that_of_the_runs(saved):
    """The negative control: a run's own drift, against its own first step, is another number."""
    a, b = stores(saved)
    pair = compare_stores(a, b)
    first, last = by_key(pair.first), by_key(pair.last)
    for key in (
        "attention_drift/js",
        "token_loss/change/capital",
        "logit_attribution/head_change/capital",
        "residual_norms/ratio",
        "pattern_change/pattern/capital",
    ):
        own = b.reading(key, 9).values
        assert np.abs(own - last[key].values).max() > 0.01
        nothing = 1 if key.endswith("ratio") else 0
        assert (first[key].values == nothing).all() and (last[key].values != nothing).any()


def test_one_step_of_both(saved):
    a, b = stores(saved)
    pair = compare_stores(a, b, step=4)  # both were at the same model then
    assert by_key(pair.last)["attention_drift/max"].values == 0
    assert pair.names == (f"{a.path}, step 4", f"{b.path}, step 4")
    with pytest.raises(ValueError, match=r"Step 9 is not in both: .*they have \[0, 4\] in common"):
        compare_stores(a, b, step=9)


def test_other_tokens_under_one_name(saved, tmp_path):
    a, _ = stores(saved)
    other = [replace(CAPITAL, content="the capital of Italy is"), DOG]
    b = read_store(watched(tmp_path / "other", {0: saved["b"]}, other, instruments=INSTRUMENTS))
    pair = compare_stores(a, b)
    assert pair.left_out == ("The probe 'capital' has different tokens in A and B.",)
    last = by_key(pair.last)
    assert not any(key.endswith("/capital") for key in last)
    assert np.array_equal(last["attention_drift/js"].values, last["attention_drift/js/dog"].values)


def test_what_only_one_has_is_named(saved, tmp_path):
    a, _ = stores(saved)
    some = [one for one in INSTRUMENTS if one.name not in ("repeat_loss", "update_sparsity")]
    probes = [CAPITAL, Probe("new", "the cat sat", target=" on")]
    b = read_store(watched(tmp_path / "some", {0: saved["b"]}, probes, instruments=some))
    pair = compare_stores(a, b)
    assert pair.left_out == (
        "Only A has the probe 'dog', repeat_loss.",
        "Only B has the probe 'new'.",
    )
    assert not any(
        "dog" in key or "new" in key or "repeat_loss" in key for key in by_key(pair.last)
    )


def test_models_of_another_shape(saved, tmp_path):
    deeper = save(tiny.model("llama", num_hidden_layers=3), tmp_path / "deeper")
    b = read_store(watched(tmp_path / "b", {0: deeper}))
    with pytest.raises(ValueError, match=r"different shapes .*: A has 2 layers, B has 3"):
        compare_stores(stores(saved)[0], b)


def test_nothing_in_common_and_nothing_at_all(tmp_path):
    one, other = (Reading(key=f"mine/{n}", values=np.array(1.0), unit="x") for n in "ab")
    a, b = written(tmp_path / "a", [one]), written(tmp_path / "b", [other])
    with pytest.raises(ValueError, match="have nothing in common: Only A has mine/a"):
        compare_stores(a, b)
    empty = written(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="empty has no complete observation"):
        compare_stores(a, empty)
    check = Reading(key="fidelity/kl", values=np.array(1e-9), unit="nats")
    late = written(tmp_path / "late", [one], [check])
    assert compare_stores(late, a).names[0].endswith("step 0")  # a comparison is no observation
    with pytest.raises(ValueError, match=r"late has \[0\]"):
        compare_stores(late, a, step=1)


def test_a_probe_with_a_slash_and_layers_that_were_chosen(tmp_path):
    def readings(seed):
        loss = np.random.default_rng(seed).random(3)
        labels = {"token": ["a", "b", "c"]}
        for what, values in (("loss", loss), ("change", loss * 0 + 7)):
            key = f"token_loss/{what}/my/probe"
            yield Reading(key=key, values=values, axes=("token",), unit="nats", labels=labels)
        yield pattern(seed)

    a, b = (written(tmp_path / name, [*readings(i)]) for i, name in enumerate("ab"))
    pair = compare_stores(a, b)
    first, last = by_key(pair.first), by_key(pair.last)
    loss = "token_loss/loss/my/probe"
    assert np.array_equal(
        last["token_loss/change/my/probe"].values, last[loss].values - first[loss].values
    )
    assert last["attention_drift/js"].labels == {"layer": ("1", "3")}


def test_rows_of_a_model_with_sinks_of_its_own(tmp_path):
    """What a row lacks to one is one more key, as `AttentionDrift` has it."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(2):
        row = np.concatenate([np.tril(rng.random((3, 3))), rng.random((3, 1))], 1)
        rows.append(row / row.sum(-1, keepdims=True))  # [query, key or sink]
    stores = [
        written(
            tmp_path / name,
            [
                Reading(
                    key="attention_patterns/pattern/p",
                    values=row[None, None, :, :3],
                    axes=("layer", "head", "query", "key"),
                    unit="probability",
                )
            ],
        )
        for name, row in zip("ab", rows, strict=True)
    ]
    js = jensenshannon(rows[0][1:], rows[1][1:], axis=-1, base=2) ** 2
    found = by_key(compare_stores(*stores).last)["attention_drift/js"].values
    assert found.shape == (1, 1) and abs(found[0, 0] - js.mean()) < 1e-4 < js.mean() / 100


def test_what_is_of_other_blocks_is_left_out_in_one_sentence(saved, tmp_path):
    a, _ = stores(saved)
    own = (CAPITAL, DOG, Probe.repeated("own", block=5), Probe.repeated("other", block=7))
    b = read_store(watched(tmp_path / "b", {0: saved["a"]}, own))
    pair = compare_stores(a, b)
    (said,) = [one for one in pair.left_out if "blocks" in one]
    assert "have 8, 12, 24 tokens in A and 5, 7 in B" in said
    assert "head_scores, repeat_loss, virtual_heads" in said
    seen = {reading.instrument for reading in (*pair.first, *pair.last)}
    assert not seen & {"head_scores", "repeat_loss", "virtual_heads"}
    assert {"attention_drift", "target_scores"} <= seen
    assert not any("different shape" in one for one in pair.left_out)


def test_stores_from_before_instruments_described_themselves_are_compared_alike(tmp_path):
    """What is of one run is known by the names that the package's own have."""

    def bare(folder, step):
        readings = [reading.described(Description()) for reading in everything(step)]
        sink = LocalSink(tmp_path / folder, page=False)
        sink.write([*readings, name_reading(folder).described(Description())], step=0)
        sink.close()
        return read_store(sink.path)

    a, b = bare("a", 0), bare("b", 1)
    pair = compare_stores(a, b)
    keys = [reading.key for reading in pair.last]
    assert len(set(keys)) == len(keys), "each key once"
    assert not [key for key in keys if key.startswith(("cost/", "trainer/"))]
    pair.write(LocalSink(tmp_path / "pair", page=False))
