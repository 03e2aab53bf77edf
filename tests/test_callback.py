"""A real trainer with the callback: when it looks, what it refuses, what failures do."""

import errno
import logging
import re

import pytest
import torch
import wandb
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from tests import tiny
from tests.sinks.wandb_file import history, run_file
from tests.test_no_trace import SENTENCES, sft, state_of, watcher
from tlens_callback import (
    AttentionPatterns,
    FidelityError,
    HeadScores,
    LocalSink,
    MemorySink,
    Probe,
    Reading,
    TargetScores,
    TLensCallback,
    read_store,
)

CAPITAL = Probe("capital", "the capital of France is", target=" Paris", foil=" London")


def trainer(tmp_path, callback, model=None, processing_class="default", **args) -> Trainer:
    tokenizer = tiny.tokenizer()
    rows = [dict(tokenizer(s, padding="max_length", max_length=16)) for s in SENTENCES]
    rows = [{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in rows]
    settings = dict(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(
        model or tiny.model("llama"),
        args=TrainingArguments(**{**settings, **args}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer if processing_class == "default" else processing_class,
        callbacks=[callback] if callback else [],
    )


class Constant:
    """An instrument that fails when told to."""

    def __init__(self, name="constant", fail_at=None, error=None, where="read"):
        self.name, self.fail_at, self.where = name, fail_at, where
        self.error = error or RuntimeError("broken")
        self.calls = 0

    def taps(self, shadow, batch):
        self.calls += 1

        def reduce(value):
            if self.where == "reduce" and self.calls == self.fail_at:
                raise self.error
            return value.mean()

        if self.where == "taps" and self.calls == self.fail_at:
            raise self.error
        return {"blocks.0.hook_resid_post": reduce}

    def read(self, taken, shadow, batch):
        if self.where == "read" and self.calls == self.fail_at:
            raise self.error
        yield Reading(key=f"{self.name}/mean", values=taken["blocks.0.hook_resid_post"], unit="1")


class Breaks:
    """A sink that fails at its n-th write."""

    def __init__(self, at, error):
        self.at, self.error, self.writes = at, error, 0

    def write(self, readings, *, step):
        self.writes += 1
        if self.writes >= self.at:
            raise self.error

    def close(self):
        pass


@pytest.mark.parametrize(
    "every, steps", [(1, [0, 1, 2, 3, 4, 5, 6]), (4, [0, 4, 6]), (100, [0, 6]), (3, [0, 3, 6])]
)
def test_observes_at_the_start_every_n_steps_and_at_the_end(tmp_path, every, steps):
    memory = MemorySink()
    instruments = [TargetScores()]
    callback = TLensCallback(
        [CAPITAL], instruments=instruments, sinks=[memory], every_n_steps=every, on_error="raise"
    )
    trainer(tmp_path, callback).train()
    assert sorted(memory.readings["target_scores/loss/capital"]) == steps
    checked = sorted(memory.readings["fidelity/kl"])
    assert checked == [0, 1, 6], "at the start, after the first update, and at the end"


def test_readings_are_those_of_the_weights_at_that_step(tmp_path):
    """What is logged for a step is what a Hugging Face forward of that step's weights gives."""
    seen = {}

    class Asks(TrainerCallback):
        def look(self, args, state, control, model=None, processing_class=None, **kwargs):
            tokenizer = tiny.tokenizer()
            ids = torch.tensor([tokenizer("the capital of France is")["input_ids"]])
            was, _ = model.training, model.eval()
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1]
            model.train(was)
            paris = tokenizer(" Paris", add_special_tokens=False)["input_ids"][0]
            seen[state.global_step] = float(-logits.log_softmax(-1)[paris])

        on_train_begin = on_step_end = look

    memory = MemorySink()
    sft(tmp_path, [Asks(), watcher(sinks=[memory])], eval_strategy="no")
    steps, losses = memory.curve("target_scores/loss/capital")
    assert list(steps) == sorted(seen) and len(set(seen.values())) == len(seen)
    for step, loss in zip(steps, losses, strict=True):
        assert loss == pytest.approx(seen[step], abs=2e-5)


@pytest.mark.parametrize("where", ["taps", "reduce", "read"])
@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_an_instrument_that_raises_is_set_aside_and_training_goes_on(
    tmp_path, caplog, where, error
):
    memory = MemorySink()
    bad = Constant("bad", fail_at=3, error=error, where=where)
    callback = TLensCallback(
        [CAPITAL], instruments=[Constant("good"), bad], sinks=[memory], every_n_steps=1
    )
    done = trainer(tmp_path, callback)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        done.train()
    assert done.state.global_step == 6
    assert sorted(memory.readings["good/mean"]) == [0, 1, 2, 3, 4, 5, 6]
    assert sorted(memory.readings["bad/mean"]) == [0, 1]
    said = [r.getMessage() for r in caplog.records if "bad" in r.getMessage()]
    assert len(said) == 1 and type(error).__name__ in said[0]


def test_on_error_raise_raises(tmp_path):
    callback = TLensCallback(
        [CAPITAL], instruments=[Constant(fail_at=3)], sinks=[], every_n_steps=1, on_error="raise"
    )
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, callback).train()


def test_a_full_disk_sets_the_sink_aside_and_what_was_stored_stays(tmp_path, caplog):
    memory, full = MemorySink(), OSError(errno.ENOSPC, "No space left on device")
    store = LocalSink(tmp_path / "store")
    writes = store.write

    def write(readings, *, step):
        if step >= 3:
            raise full
        writes(readings, step=step)

    store.write = write
    callback = TLensCallback(
        [CAPITAL], instruments=[Constant()], sinks=[store, memory], every_n_steps=1
    )
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        trainer(tmp_path, callback).train()
    assert list(read_store(tmp_path / "store").steps) == [0, 1, 2]
    assert sorted(memory.readings["constant/mean"]) == [0, 1, 2, 3, 4, 5, 6]
    assert sum("LocalSink" in r.getMessage() for r in caplog.records) == 1


def test_a_sink_that_fails_at_once_does_not_stop_the_others(tmp_path):
    memory = MemorySink()
    broken = Breaks(1, RuntimeError("no connection"))
    callback = TLensCallback(
        [CAPITAL], instruments=[Constant()], sinks=[broken, memory], every_n_steps=2
    )
    trainer(tmp_path, callback).train()
    assert broken.writes == 1 and sorted(memory.readings["constant/mean"]) == [0, 2, 4, 6]


def test_ctrl_c_stops_training_as_asked_and_the_store_is_readable(tmp_path):
    class Interrupts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    callback = TLensCallback([CAPITAL], instruments=[Constant()], every_n_steps=1)
    run = trainer(tmp_path, callback)
    run.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert list(read_store(tmp_path / "tlens").steps) == [0, 1, 2, 3, 4]


def test_ctrl_c_inside_an_observation_leaves_the_model_as_it_was(tmp_path):
    bad = Constant(fail_at=3, error=KeyboardInterrupt(), where="reduce")
    callback = TLensCallback([CAPITAL], instruments=[bad], every_n_steps=1, sinks=[])
    run = trainer(tmp_path, callback)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.model.training and torch.is_grad_enabled()
    assert all(not point.has_hooks() for point in callback.observer.shadow.hooks.values())


def test_a_breach_of_fidelity_at_the_start_raises(tmp_path, monkeypatch):
    from tlens_callback import shadow as module

    monkeypatch.setattr(module.Shadow, "_fill", lambda self: None)
    model = tiny.model("gpt_neox")
    callback = TLensCallback([CAPITAL], sinks=[])

    def skewed(skeleton, device, build=module._bridge.build):
        bridge = build(skeleton, device)
        next(iter(bridge.original_model.parameters())).data = torch.randn(tiny.VOCAB, 32)
        return bridge

    monkeypatch.setattr(module._bridge, "build", skewed)
    with pytest.raises(FidelityError, match="is not the live model"):
        trainer(tmp_path, callback, model=model).train()


def test_a_stale_shadow_is_found_after_the_first_update_and_ends_the_watching(
    tmp_path, monkeypatch, caplog
):
    """GPT-NeoX: the split copies of the fused QKV are right at the start and stale ever after."""
    from tlens_callback import _bridge

    monkeypatch.setattr(_bridge, "refresh", lambda copies: None)
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=1)
    run = trainer(tmp_path, callback, model=tiny.model("gpt_neox"), learning_rate=1e-4)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run.train()
    assert run.state.global_step == 6 and list(memory.steps) == [0]
    said = [r.getMessage() for r in caplog.records if "Watching ends" in r.getMessage()]
    assert len(said) == 1 and ("did not follow" in said[0] or "is not the live" in said[0])


def test_a_stale_shadow_is_found_when_a_long_warm_up_lets_the_weights_move(
    tmp_path, monkeypatch, caplog
):
    """A step too small to tell is no proof: fidelity is asked for until one is."""
    from tlens_callback import _bridge

    monkeypatch.setattr(_bridge, "refresh", lambda copies: None)
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=100)
    model = tiny.model("gpt_neox")
    args = dict(max_steps=40, learning_rate=1e-5, warmup_steps=39, lr_scheduler_type="linear")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        trainer(tmp_path, callback, model=model, **args).train()
    assert "Watching ends" in caplog.text and max(memory.steps) < 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_fresh_adapter_is_watched_to_the_end(tmp_path, dtype):
    memory = MemorySink()
    model = get_peft_model(
        tiny.model("llama").to(dtype), LoraConfig(r=4, target_modules="all-linear")
    )
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=2, on_error="raise")
    trainer(tmp_path, callback, model=model, learning_rate=1e-4).train()
    assert {0, 2, 4, 6} <= set(memory.steps)
    assert max(memory.curve("fidelity/kl")[1]) < 0.05


@pytest.mark.parametrize("autocast", [True, False])
def test_trained_copies_in_float32_beside_a_bfloat16_base_are_watched(tmp_path, autocast):
    memory = MemorySink()
    model = tiny.model("llama").to(torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config)
    model.get_base_model().lm_head.modules_to_save["default"].float()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=2, on_error="raise")
    run = trainer(tmp_path, callback, model=model, bf16=autocast, max_steps=4)
    if autocast:
        run.train()
        assert {0, 2, 4} <= set(memory.steps)


def test_an_interrupted_run_and_the_next_are_two(tmp_path):
    class InterruptsOnce(TrainerCallback):
        done = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    callback = TLensCallback([CAPITAL], instruments=[Constant()], every_n_steps=1)
    run = trainer(tmp_path, callback)
    run.add_callback(InterruptsOnce())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    first = callback.observer
    run.train()
    assert list(read_store(tmp_path / "tlens").steps) == [0, 1, 2, 3, 4]
    assert list(read_store(tmp_path / "tlens-2").steps) == [0, 1, 2, 3, 4, 5, 6]
    assert first.shadow is None and first.model is None and callback.observer is None


def test_an_interrupted_search_for_the_batch_size_is_no_retry(tmp_path):
    class InterruptsOnce(TrainerCallback):
        done = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    callback = TLensCallback([CAPITAL], instruments=[Constant()], every_n_steps=1)
    run = trainer(tmp_path, callback, auto_find_batch_size=True)
    run.add_callback(InterruptsOnce())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    assert list(read_store(tmp_path / "tlens").steps) == [0, 1, 2, 3]
    assert list(read_store(tmp_path / "tlens-2").steps) == [0, 1, 2, 3, 4, 5, 6]


class AllRows:
    """Sees that the rows of a W&B run are what was logged, each on its step."""

    def __init__(self, folder):
        self.rows = history(run_file(folder))

    def steps(self, key):
        return [row["train/global_step"] for row in self.rows if key in row]


def test_the_active_wandb_run_is_joined_and_rows_land_on_their_steps(tmp_path, monkeypatch):
    """Default sinks, with evaluation in between: as a user writes it."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    callback = TLensCallback([CAPITAL], every_n_steps=2, on_error="raise")
    args = dict(report_to="wandb", logging_steps=1, eval_strategy="steps", eval_steps=3)
    run = trainer(tmp_path / "out", callback, **args)
    run.train()
    assert wandb.run is not None, "a run that the trainer started is the trainer's to finish"
    wandb.finish()
    wandb.teardown()
    rows = AllRows(tmp_path)
    assert rows.steps("tlens/target_scores/loss/capital") == [0, 2, 4, 6]
    assert rows.steps("tlens/fidelity/kl") == [0, 1, 6]
    assert rows.steps("tlens/attention_patterns/pattern/capital") == [0, 2, 4, 6]
    assert rows.steps("train/loss") == [1, 2, 3, 4, 5, 6] and rows.steps("eval/loss") == [3, 6]
    kept = read_store(tmp_path / "out" / "tlens")
    logged = [row for row in rows.rows if "tlens/target_scores/loss/capital" in row]
    _, losses = kept.curve("target_scores/loss/capital")
    assert [row["tlens/target_scores/loss/capital"] for row in logged] == pytest.approx(losses)


def test_a_wandb_run_that_is_finished_early_is_set_aside(tmp_path, monkeypatch, caplog):
    class Finishes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                wandb.finish()

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    mine = wandb.init(project="test")
    callback = TLensCallback([CAPITAL], instruments=[TargetScores()], every_n_steps=2)
    run = trainer(tmp_path / "out", callback)
    run.add_callback(Finishes())
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run.train()
    wandb.teardown()
    assert mine is not None and run.state.global_step == 6
    assert list(read_store(tmp_path / "out" / "tlens").steps) == [0, 1, 2, 4, 6]
    said = [r.getMessage() for r in caplog.records if "WandbSink" in r.getMessage()]
    assert len(said) == 1 and "finished" in said[0]


@pytest.mark.parametrize("given", [True, False])
def test_a_default_instrument_that_does_not_fit_the_model_is_set_aside(
    tmp_path, monkeypatch, given
):
    """A family that the fidelity check admits may lack what an instrument reads."""

    def unfit(self, shadow, batch):
        raise AttributeError("this family has no such thing")

    monkeypatch.setattr(AttentionPatterns, "taps", unfit)
    memory = MemorySink()
    instruments = [AttentionPatterns(), TargetScores()] if given else None
    callback = TLensCallback([CAPITAL], instruments=instruments, sinks=[memory])
    run = trainer(tmp_path, callback)
    if given:
        with pytest.raises(AttributeError, match="no such thing"):
            run.train()
    else:
        run.train()
        assert sorted(memory.readings["target_scores/loss/capital"]) == [0, 6]
        assert "head_scores/induction" in memory.readings


def test_repeated_blocks_come_only_for_head_scores(tmp_path):
    for instruments, want in (([TargetScores()], 1), ([TargetScores(), HeadScores()], 13)):
        batches = []

        class Sees(Constant):
            def taps(self, shadow, batch, batches=batches):
                batches.append(len(batch.probes))
                return {}

            def read(self, taken, shadow, batch):
                return []

        callback = TLensCallback([CAPITAL], instruments=[*instruments, Sees()], sinks=[])
        trainer(tmp_path, callback).train()
        assert set(batches) == {want}


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
    spent = observers[0].seconds
    assert 0.5 * spent < logged <= spent, "all but the last observation's writing"
    shares = memory.curve("cost/share")[1]
    assert (shares > 0).all() and (shares <= 1).all()


def test_no_room_for_the_shadow_is_not_taken_for_too_large_a_batch(tmp_path, monkeypatch):
    from tlens_callback import shadow as module

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module.Shadow, "_fill", full)
    run = trainer(tmp_path, TLensCallback([CAPITAL], sinks=[]), auto_find_batch_size=True)
    with pytest.raises(RuntimeError, match="no room for the shadow"):
        run.train()
    assert run._train_batch_size == 4


def test_a_hook_that_is_gone_later_sets_one_instrument_aside(tmp_path):
    class Vanishes(Constant):
        def taps(self, shadow, batch):
            taps = super().taps(shadow, batch)
            return taps if self.calls < 3 else {"blocks.9.hook_resid_post": lambda t: t}

    memory = MemorySink()
    instruments = [Vanishes("bad"), Constant("good")]
    callback = TLensCallback([CAPITAL], instruments=instruments, sinks=[memory], every_n_steps=1)
    trainer(tmp_path, callback).train()
    assert sorted(memory.readings["bad/mean"]) == [0, 1]
    assert sorted(memory.readings["good/mean"]) == [0, 1, 2, 3, 4, 5, 6]


def test_a_training_that_diverges_is_watched_on_and_said_so(tmp_path, caplog):
    class Diverges(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.lm_head.weight.data.fill_(float("nan"))

    memory = MemorySink()
    callback = TLensCallback([CAPITAL], instruments=[Constant()], sinks=[memory], every_n_steps=1)
    run = trainer(tmp_path, callback)
    run.callback_handler.callbacks.insert(0, Diverges())
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run.train()
    assert sorted(memory.readings["constant/mean"]) == [0, 1, 2, 3, 4, 5, 6]
    assert "logits are not finite at step 6" in caplog.text


def test_a_first_step_that_moves_nothing_is_checked_again(tmp_path):
    """Under a warm-up the first step has learning rate 0; fidelity waits for a real update."""
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=100, on_error="raise")
    trainer(tmp_path, callback, warmup_steps=3, lr_scheduler_type="linear").train()
    assert sorted(memory.readings["fidelity/kl"]) == [0, 1, 2, 6]


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


def test_the_end_says_where_to_look_and_what_it_cost(tmp_path, capsys):
    callback = TLensCallback([CAPITAL], instruments=[TargetScores()], every_n_steps=3)
    trainer(tmp_path, callback).train()
    said = capsys.readouterr().out
    assert re.search(
        r"watching 2 layers x 4 heads with 1 probes and 0 repeated blocks; 0 weights have adapters",
        said,
    )
    assert said.count(str(tmp_path / "tlens")) == 2, "at the start and at the end"
    assert re.search(
        r"3 observations of 1 probes and 0 repeated blocks in [\d.]+ s, [\d.]+% of the run", said
    )
    assert "MiB" in said


BAD_SETTINGS = [
    (dict(every_n_steps=0), "every_n_steps is a whole number from 1"),
    (dict(every_n_steps=2.5), "every_n_steps is a whole number"),
    (dict(every_n_steps=True), "every_n_steps is a whole number"),
    (dict(on_error="ignore"), "'warn' or 'raise'"),
    (dict(probes="text"), "probes is a list"),
    (dict(probes=["text"]), "Probe objects"),
    (
        dict(instruments=[AttentionPatterns]),
        "AttentionPatterns is a class; write AttentionPatterns",
    ),
    (dict(instruments=[HeadScores(), HeadScores()]), "Two instruments are named 'head_scores'"),
    (dict(sinks=[object()]), "is no Sink"),
    (dict(sinks=MemorySink()), "sinks is a list"),
    (dict(instruments=HeadScores()), "instruments is a list"),
    (dict(device="nonsense"), "device is one that torch knows"),
    (dict(dtype="float32"), "torch.dtype"),
]


@pytest.mark.parametrize("settings, text", BAD_SETTINGS)
def test_bad_settings_raise_at_construction(settings, text):
    with pytest.raises(ValueError, match=text):
        TLensCallback(**{"sinks": [], **settings})


class UnknownHook(Constant):
    def taps(self, shadow, batch):
        return {"blocks.0.hook_resid_pots": lambda t: t}


BAD_RUNS = [
    (dict(probes=[Probe("p", "the cat", target="the cat")]), "is 2 tokens"),
    (dict(probes=[Probe("p", " ".join(["cat"] * 80))]), "the model's context is 64"),
    (dict(probes=[Probe("p", [5, 4000])]), "outside the model's vocabulary"),
    (dict(probes=[CAPITAL, CAPITAL]), "Two probes are named 'capital'"),
    (dict(instruments=[UnknownHook()]), "no hook point 'blocks.0.hook_resid_pots'"),
    (dict(instruments=[AttentionPatterns(layers=[7])]), "7"),
    (dict(repeats=False, instruments=[HeadScores()]), "Probe.repeated"),
]


@pytest.mark.parametrize("settings, text", BAD_RUNS)
def test_bad_input_raises_when_training_begins(tmp_path, settings, text):
    callback = TLensCallback(**{"probes": [CAPITAL], "sinks": [], **settings})
    run = trainer(tmp_path, callback)
    with pytest.raises(ValueError, match=text):
        run.train()
    assert run.state.global_step == 0


def test_a_missing_tokenizer_raises(tmp_path):
    with pytest.raises(ValueError, match=r"processing_class=tokenizer"):
        trainer(tmp_path, TLensCallback([CAPITAL], sinks=[]), processing_class=None).train()
    ids = TLensCallback([Probe("ids", [1, 8, 9], target=11)], sinks=[], on_error="raise")
    trainer(tmp_path, ids, processing_class=None).train()


def test_other_ranks_do_nothing(tmp_path):
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=1)
    run = trainer(tmp_path, callback)
    run.is_world_process_zero = lambda: False
    run.train()
    assert run.state.global_step == 6 and list(memory.steps) == []
