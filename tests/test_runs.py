"""Runs of every kind: twice, resumed, interrupted, stopped early, searching, in W&B."""

import pytest
import torch
import wandb
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.sinks.wandb.wandb_file import history, run_file
from tests.test_no_trace import sft, state_of, watcher
from tests.training import CAPITAL, Constant, Interrupts, trainer
from tlens_callback import (
    MemorySink,
    TargetScores,
    TLensCallback,
    read_store,
)


def test_an_interrupted_run_and_the_next_are_two(tmp_path):
    callback = TLensCallback([CAPITAL], instruments=[Constant()], every_n_steps=1)
    run = trainer(tmp_path, callback)
    run.add_callback(Interrupts(at=4))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    first = callback.observer
    run.train()
    assert list(read_store(tmp_path / "tlens").steps) == [0, 1, 2, 3, 4]
    assert list(read_store(tmp_path / "tlens-2").steps) == [0, 1, 2, 3, 4, 5, 6]
    assert first.shadow is None and first.model is None and callback.observer is None


@pytest.mark.slow
def test_an_interrupted_search_for_the_batch_size_is_no_retry(tmp_path):
    callback = TLensCallback([CAPITAL], instruments=[Constant()], every_n_steps=1)
    run = trainer(tmp_path, callback, auto_find_batch_size=True)
    run.add_callback(Interrupts(at=3))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    assert list(read_store(tmp_path / "tlens").steps) == [0, 1, 2, 3]
    assert list(read_store(tmp_path / "tlens-2").steps) == [0, 1, 2, 3, 4, 5, 6]


def steps(rows, key):
    """The trainer's steps of the rows of a W&B run that hold a key."""
    return [row["train/global_step"] for row in rows if key in row]


def test_the_active_wandb_run_is_joined_and_rows_land_on_their_steps(offline):
    """Default sinks, with evaluation in between: as a user writes it."""
    callback = TLensCallback([CAPITAL], every_n_steps=2, on_error="raise")
    args = dict(report_to="wandb", logging_steps=1, eval_strategy="steps", eval_steps=3)
    run = trainer(offline / "out", callback, **args)
    run.train()
    assert wandb.run is not None, "a run that the trainer started is the trainer's to finish"
    wandb.finish()
    wandb.teardown()
    rows = history(run_file(offline))
    assert steps(rows, "tlens/target_scores/probability/capital") == [0, 2, 4, 6]
    assert steps(rows, "tlens/fidelity/kl") == [0, 1, 6]
    assert steps(rows, "tlens/attention_patterns/pattern/capital") == [0, 2, 4, 6]
    assert steps(rows, "tlens/page") == [6]
    assert steps(rows, "train/loss") == [1, 2, 3, 4, 5, 6] and steps(rows, "eval/loss") == [3, 6]
    assert not [key for row in rows for key in row if key.startswith("tlens/trainer/")]
    kept = read_store(offline / "out" / "tlens")
    logged = [row for row in rows if "tlens/target_scores/probability/capital" in row]
    _, values = kept.curve("target_scores/probability/capital")
    assert [row["tlens/target_scores/probability/capital"] for row in logged] == pytest.approx(
        values
    )
    assert kept.reading("trainer/eval_loss", 6).labels["update"] == ("6",)


def test_costs_add_up_to_what_was_spent(tmp_path):
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=1)
    observers = []

    class Keeps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            observers.append(callback.observer)

    run = trainer(tmp_path, callback)
    run.add_callback(Keeps())
    run.train()
    logged = float(memory.curve("cost/seconds")[1].sum())
    spent = observers[0].cost.seconds
    assert 0.5 * spent < logged <= spent, "all but the end of the last observation"
    shares = memory.curve("cost/share")[1]
    assert (shares > 0).all() and (shares <= 1).all()


@pytest.mark.parametrize("when", [("steps", 2), ("epoch", None)], ids=["steps", "epoch"])
def test_early_stopping_observes_the_last_step(tmp_path, when):
    memory = MemorySink()
    callback = TLensCallback(
        [CAPITAL], instruments=[TargetScores()], sinks=[memory], every_n_steps=100
    )
    run = trainer(
        tmp_path,
        callback,
        max_steps=50,
        learning_rate=1.0,
        eval_strategy=when[0],
        eval_steps=when[1],
        save_strategy=when[0],
        save_steps=when[1] or 500,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    run.add_callback(EarlyStoppingCallback(1, early_stopping_threshold=100.0))
    run.train()
    assert run.state.global_step < 50
    assert sorted(memory.readings["target_scores/loss/capital"]) == [0, run.state.global_step]


def test_training_twice_builds_once_a_run_and_loses_no_step(tmp_path):
    callback = TLensCallback([CAPITAL], instruments=[TargetScores()], every_n_steps=3)
    run = trainer(tmp_path, callback)
    run.train()
    run.train()
    assert list(read_store(tmp_path / "tlens").steps) == [0, 1, 3, 6]
    assert list(read_store(tmp_path / "tlens-2").steps) == [0, 1, 3, 6]


def test_resuming_continues_the_store(tmp_path):
    callback = TLensCallback([CAPITAL], instruments=[TargetScores()], every_n_steps=2)
    saves = dict(save_strategy="steps", save_steps=3)
    trainer(tmp_path, callback, **saves, max_steps=5).train()
    assert list(read_store(tmp_path / "tlens").steps) == [0, 1, 2, 4, 5]
    again = trainer(tmp_path, callback, **saves, max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert list(read_store(tmp_path / "tlens").steps) == [0, 1, 2, 3, 4, 6, 8]


@pytest.mark.slow
def test_a_search_for_the_batch_size_builds_one_shadow(tmp_path):
    class OutOfMemoryOnce(TrainerCallback):
        tries = 0

        def on_step_begin(self, args, state, control, **kwargs):
            self.tries += 1
            if self.tries == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    builds = []

    class Counts(TargetScores):
        def taps(self, shadow, batch):
            builds.append((id(shadow), shadow.builds))
            return super().taps(shadow, batch)

    memory = MemorySink()
    callback = TLensCallback([CAPITAL], instruments=[Counts()], sinks=[memory], every_n_steps=2)
    run = trainer(tmp_path, callback, auto_find_batch_size=True)
    run.add_callback(OutOfMemoryOnce())
    run.train()
    assert len(set(builds)) == 1 and builds[0][1] == 1
    assert sorted(memory.readings["target_scores/loss/capital"]) == [0, 2, 4, 6]


def test_checkpointed_and_autocast_models_are_watched(tmp_path):
    memory = MemorySink()
    callback = watcher(sinks=[memory])
    sft(tmp_path, [callback], bf16=True, gradient_checkpointing=True, max_steps=2)
    assert max(memory.curve("fidelity/max_abs_diff")[1]) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch 2.13 warns of what its own tracing does
def test_torch_compile_is_watched_and_unchanged(tmp_path):
    args = dict(torch_compile=True, torch_compile_backend="eager", max_steps=2)
    memory = MemorySink()
    without = state_of(sft(tmp_path / "a", [], **args))
    watched = state_of(sft(tmp_path / "b", [watcher(sinks=[memory])], **args))
    assert without == watched and list(memory.steps) == [0, 1, 2]


def test_other_ranks_do_nothing(tmp_path):
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=1)
    run = trainer(tmp_path, callback)
    run.is_world_process_zero = lambda: False
    run.train()
    assert run.state.global_step == 6 and list(memory.steps) == []
