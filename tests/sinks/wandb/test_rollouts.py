"""Rollouts of a real training in W&B: the run's own file and its tables are read back."""

import gc
import json

import numpy as np
import pytest
import wandb

from tests.rollouts.trained import distinct, short, watched
from tests.sinks.wandb.wandb_file import history, run_file
from tlens_callback import LocalSink, MemorySink, WandbSink, read_store

# An artifact of wandb 0.31, which a table makes, leaves its directory to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

STEP, TABLE = "train/global_step", "tlens/rollouts/rollout_table"


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


def logged(offline, sink=None, **settings):
    """The rows of the history, and the memory and the store of the same training."""
    memory, store = MemorySink(), LocalSink(offline / "store", page=False)
    sinks = [memory, store, sink or WandbSink()]
    watched(offline / "out", rewards=(distinct, short), sinks=sinks, **settings)
    wandb.teardown()
    return history(run_file(offline)), memory, read_store(offline / "store")


def rows_of(offline, entry):
    """The rows of a table's file, as dicts."""
    path = run_file(offline).parent / "files" / entry["path"]
    table = json.loads(path.read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


@pytest.mark.parametrize("texts", [True, False])
def test_each_observation_adds_its_rollouts_to_one_table(offline, texts):
    rows, _, store = logged(offline, rollouts={"texts": texts})
    found, with_table = [{}], [row for row in rows if TABLE in row]
    assert [row[STEP] for row in with_table] == [0, 1, 2]
    assert [row[TABLE]["increment_num"] for row in with_table] == [0, 1, 2]
    earlier = [row[TABLE]["previous_increments_paths"] for row in with_table]
    paths = [row[TABLE]["artifact_path"] for row in with_table]
    assert earlier == [[], paths[:1], paths[:2]], "W&B finds what was logged before"
    for row in with_table:
        assert row[TABLE]["_type"] == "incremental-table-file"
        found, wanted = rows_of(offline, row[TABLE]), store.rollouts(row[STEP])[0]
        assert list(found[0]) == list(wanted.columns) and len(found) == 8
        assert {one["step"] for one in found} == {row[STEP]}
        assert ("prompt" in found[0]) == ("completion" in found[0]) == texts
        for one, of in zip(found, wanted.to_dict("records"), strict=True):
            for name, value in one.items():
                if isinstance(value, float | int):
                    assert np.float32(value) == np.float32(of[name])
                else:
                    assert value == of[name] or (value is None and np.isnan(of[name]))
    needed = "group advantage weighted_reward length truncated mean_entropy mean_log_ratio"
    assert {*needed.split(), "reward_distinct", "reward_short"} <= set(found[0])


def test_what_lands_of_all_readings(offline):
    rows, memory, _ = logged(offline)
    (row,) = [row for row in rows if row.get(STEP) == 1 and TABLE in row]
    read = [key for key in memory.readings if key.startswith("rollouts/")]
    ours = {k.removeprefix("tlens/rollouts/"): v for k, v in row.items() if "rollouts/" in k}
    files = {name: one["_type"] for name, one in ours.items() if isinstance(one, dict)}
    assert files == {"rollout_table": "incremental-table-file", "heads": "plotly-file"}
    curves = set(ours) - set(files)
    assert curves == {
        *("reward_mean", "entropy_mean", "kl_mean", "kl_k3", "js_mean", "dead_groups"),
        *("truncated_share", "age", "discoveries", "run_discoveries"),
    }
    assert len(read) > 70, "the store has the rest"
    for name in curves:
        assert ours[name] == memory.readings[f"rollouts/{name}"][1].values.item()
    figure = json.loads((run_file(offline).parent / "files" / ours["heads"]["path"]).read_text())
    said = {one["text"] for one in figure["layout"]["annotations"]}
    contrasts = ("direct", "attention_first", "attention_prompt", "attention_answer", "repetition")
    assert {f"contrast_{name}" for name in contrasts} <= said
    assert {f"contrast_{name}_q" for name in contrasts} <= said
    assert not any(text.endswith(("_p", "_length", "_sign", "_run")) for text in said)


def test_everything_has_all_matrices(offline):
    rows, _, _ = logged(offline, WandbSink(everything=True), max_steps=1)
    (entry,) = [row["tlens/rollouts/heads"] for row in rows if "tlens/rollouts/heads" in row]
    figure = json.loads((run_file(offline).parent / "files" / entry["path"]).read_text())
    said = {one["text"] for one in figure["layout"]["annotations"]}
    assert {"contrast_direct_p", "contrast_direct_length", "contrast_direct_sign"} <= said


def test_rows_that_wait_keep_their_own_rollouts(offline):
    """Somebody logs with `step=`, so that the rows of tlens are logged late, several together."""
    run = wandb.init(project="test")

    def counted(completion_ids, **_):
        run.log({"own": 1.0}, step=run.step + 1)
        return distinct(completion_ids)

    memory = MemorySink()
    sinks = [memory, WandbSink()]
    watched(offline / "out", rewards=(counted,), sinks=sinks)
    run.finish()
    wandb.teardown()
    found = {row[STEP]: row[TABLE] for row in history(run_file(offline)) if TABLE in row}
    assert set(found) == {0, 1, 2}
    for step, entry in found.items():
        rewards = [one["reward_counted"] for one in rows_of(offline, entry)]
        assert rewards == memory.readings["rollouts/rewards"][step].values[:, 0].tolist()


def test_the_table_is_one_of_the_files_that_are_bounded(offline):
    rows, _, _ = logged(offline, WandbSink(most_files=4), max_steps=6)
    files = [key for row in rows for key, value in row.items() if isinstance(value, dict)]
    ours = [key for key in files if key.startswith("tlens/")]
    assert TABLE in ours and len(ours) <= 4


def test_another_run_has_a_table_of_its_own(offline):
    sink = WandbSink()
    for name in ("a", "b"):
        with wandb.init(project="test", dir=offline, id=name):
            watched(offline / name, max_steps=1, sinks=[sink])
    wandb.teardown()
    for name in ("a", "b"):
        (path,) = offline.glob(f"wandb/offline-run-*-{name}/*.wandb")
        (entry,) = [row[TABLE] for row in history(path) if TABLE in row]
        assert entry["increment_num"] == 0 and entry["previous_increments_paths"] == []
