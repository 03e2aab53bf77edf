"""W&B beside real trainers, on the writer's thread: rows of both, read back in order."""

import gc

import pytest
import wandb

from tests.sinks.wandb.test_files import Paged
from tests.sinks.wandb.wandb_file import history, records, run_file
from tests.test_no_trace import grpo, sft
from tests.training import CAPITAL, Interrupts
from tlens_callback import MemorySink, TLensCallback, WandbSink

STEP = "train/global_step"

NUMBERS = {
    "target_scores/probability/capital",
    "target_scores/rank/capital",
    "target_scores/logit_diff/capital",
    "head_scores/max_previous",
    "head_scores/max_induction",
    "head_scores/sink_share",
    "head_scores/mean_entropy",
    "virtual_heads/max_induction_gain",
    "logit_lens/first_layer/capital",
    "token_loss/mean/capital",
    "repeat_loss/mean",
    "repeat_loss/max_difference",
    "attention_drift/max",
    "attention_drift/mean",
    "update_sparsity/all",
    "cost/share",
    "watch/count",
}
SOMETIMES = {"fidelity/kl", "frozen_weights/changed", "frozen_weights/largest_change"}
FILES = {
    "attention_patterns/pattern/capital": "image-file",
    "attention_patterns/pattern/repeat-24-0": "image-file",
    "head_scores/heads": "plotly-file",
    "attention_drift/heads": "plotly-file",
    "logit_attribution/heads": "plotly-file",
    "logit_lens/by_layer": "plotly-file",
    "activation_drift/by_part": "plotly-file",
    "adapter_spectrum/by_module": "plotly-file",
    "logit_lens/table": "table-file",
    "top_neurons/table": "table-file",
    "difference_lens/table": "table-file",
    "token_loss/token_table": "table-file",
}


# An artifact of wandb 0.31, which a table makes, leaves its directory to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


def split(rows):
    """Rows of ours without their prefix, and those of the trainer; none is of both."""
    ours, theirs = [], []
    for row in rows:
        seen = {key: value for key, value in row.items() if key[0] != "_"}
        own = {k.removeprefix("tlens/"): v for k, v in seen.items() if k.startswith("tlens/")}
        assert len(own) in (0, len(seen) - 1), f"a row of both: {sorted(seen)}"
        (ours if own else theirs).append({**own, STEP: seen.get(STEP)} if own else seen)
    return ours, theirs


def watched(offline, train, **settings):
    """Our rows and the trainer's, after a training with both; and the memory of what was read."""
    memory = MemorySink()
    callback = TLensCallback(
        [CAPITAL],
        sinks=[memory, WandbSink(store=Paged(offline))],
        every_n_steps=2,
        on_error="raise",
    )
    train(offline / "out", [callback], report_to="wandb", **settings)
    wandb.finish()
    wandb.teardown()
    return *split(history(run_file(offline))), memory


def check(ours, memory, steps):
    assert [row[STEP] for row in ours] == [0, 1, *steps, steps[-1]]
    assert set(ours[1]) == {"fidelity/kl", STEP}, "the comparison after the first update"
    assert set(ours[-1]) == {"page", STEP} and ours[-1]["page"]["_type"] == "html-file"
    for row in (ours[0], *ours[2:-1]):
        numbers = {k: v for k, v in row.items() if not isinstance(v, dict) and k != STEP}
        pinned = {key for key in numbers if key.startswith("watch/") and key != "watch/count"}
        assert len(pinned) == 3 and set(numbers) - SOMETIMES == NUMBERS | pinned
        assert 10 <= len(numbers) <= 30
        for key, value in numbers.items():
            assert value == memory.readings[key][row[STEP]].values.item(), key
        files = {key: value["_type"] for key, value in row.items() if isinstance(value, dict)}
        assert {key: kind for key, kind in files.items() if key != "watch/event_table"} == FILES


@pytest.mark.slow
def test_beside_a_trainer_that_evaluates(offline):
    ours, theirs, memory = watched(offline, sft)
    check(ours, memory, [2, 4, 5])
    losses = [row[STEP] for row in theirs if "train/loss" in row]
    evaluations = [row[STEP] for row in theirs if "eval/loss" in row]
    assert losses == [1, 2, 3, 4, 5] and evaluations == [2, 4, 5]


@pytest.mark.slow
def test_beside_grpo_which_logs_rows_of_its_own(offline):
    ours, theirs, memory = watched(offline, grpo, log_completions=True)
    check(ours, memory, [2, 4])
    assert [row[STEP] for row in theirs if "train/reward" in row] == [1, 2, 3, 4]
    assert sum("completions" in row for row in theirs) >= 4


@pytest.mark.slow
def test_a_training_that_is_stopped_loses_nothing(offline):
    """`finally: wandb.finish()`, without an end of training."""
    sink = WandbSink(store=Paged(offline))
    callback = TLensCallback([CAPITAL], sinks=[sink], every_n_steps=1)
    run = wandb.init(project="test")
    try:
        with pytest.raises(KeyboardInterrupt):
            sft(offline / "out", [callback, Interrupts(4)])
    finally:
        wandb.finish()
    wandb.teardown()
    ours, _ = split(history(run_file(offline)))
    looked = [row[STEP] for row in ours if "target_scores/rank/capital" in row]
    assert looked in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert [row[STEP] for row in ours if "page" in row] == [looked[-1]]
    assert [r.WhichOneof("record_type") for r in records(run_file(offline))].count("exit") == 1
    assert run._teardown_hooks == []
