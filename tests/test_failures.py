"""What goes wrong: training goes on, or stops as the user asked, and what is stored stays."""

import errno
import logging

import pytest
import torch
import wandb
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from tests import tiny
from tests.training import CAPITAL, Constant, Interrupts, trainer
from tlens_callback import (
    AttentionPatterns,
    FidelityError,
    LocalSink,
    MemorySink,
    TargetScores,
    TLensCallback,
    read_store,
)


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
    with pytest.raises(RuntimeError, match="broken") as raised:
        trainer(tmp_path, callback).train()
    assert raised.value.__notes__ == ["(raised by the instrument 'constant')"]


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
    callback = TLensCallback([CAPITAL], instruments=[Constant()], every_n_steps=1)
    run = trainer(tmp_path, callback)
    run.add_callback(Interrupts(at=4))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    callback.observer.writer.drain()
    assert list(read_store(tmp_path / "tlens").steps) == [0, 1, 2, 3, 4]
    callback.observer.close()


def test_ctrl_c_inside_an_observation_leaves_the_model_as_it_was(tmp_path):
    bad = Constant(fail_at=3, error=KeyboardInterrupt(), where="reduce")
    callback = TLensCallback([CAPITAL], instruments=[bad], every_n_steps=1, sinks=[])
    run = trainer(tmp_path, callback)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.model.training and torch.is_grad_enabled()
    assert all(not point.has_hooks() for point in callback.observer.shadow.hooks.values())


def test_a_breach_of_fidelity_at_the_start_raises(tmp_path, monkeypatch):
    from tlens_callback.shadow import shadow as module

    monkeypatch.setattr(module.Shadow, "_fill", lambda self: None)
    model = tiny.model("gpt_neox")
    callback = TLensCallback([CAPITAL], sinks=[])

    def skewed(skeleton, device, build=module.bridge.build):
        bridge = build(skeleton, device)
        next(iter(bridge.original_model.parameters())).data = torch.randn(tiny.VOCAB, 32)
        return bridge

    monkeypatch.setattr(module.bridge, "build", skewed)
    with pytest.raises(FidelityError, match="is not the live model"):
        trainer(tmp_path, callback, model=model).train()


def test_a_stale_shadow_is_found_after_the_first_update_and_ends_the_watching(
    tmp_path, monkeypatch, caplog
):
    """GPT-NeoX: the split copies of the fused QKV are right at the start and stale ever after."""
    from tlens_callback.shadow import bridge

    monkeypatch.setattr(bridge, "refresh", lambda copies: None)
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=1)
    run = trainer(tmp_path, callback, model=tiny.model("gpt_neox"), learning_rate=1e-4)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run.train()
    assert run.state.global_step == 6 and list(memory.steps) == [0, 1]
    said = [r.getMessage() for r in caplog.records if "Watching ends" in r.getMessage()]
    assert len(said) == 1 and ("did not follow" in said[0] or "is not the live" in said[0])
    # The last that is recorded is the event; nothing is read from a shadow that is not the model.
    assert [key for key, at in memory.readings.items() if 1 in at] == [
        "watch/count",
        "watch/events",
    ]
    (event,) = memory.readings["watch/events"][1].texts
    assert event in said[0]


def test_a_stale_shadow_is_found_when_a_long_warm_up_lets_the_weights_move(
    tmp_path, monkeypatch, caplog
):
    """A step too small to tell is no proof: fidelity is asked for until one is."""
    from tlens_callback.shadow import bridge

    monkeypatch.setattr(bridge, "refresh", lambda copies: None)
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=100)
    model = tiny.model("gpt_neox")
    args = dict(max_steps=40, learning_rate=1e-5, warmup_steps=39, lr_scheduler_type="linear")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        trainer(tmp_path, callback, model=model, **args).train()
    assert "Watching ends" in caplog.text
    assert {key for key, at in memory.readings.items() if 40 in at} == {
        "watch/count",
        "watch/events",
    }


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


def test_trained_copies_in_float32_beside_a_bfloat16_base_are_watched(tmp_path):
    memory = MemorySink()
    model = tiny.model("llama").to(torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config)
    model.get_base_model().lm_head.modules_to_save["default"].float()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=2, on_error="raise")
    trainer(tmp_path, callback, model=model, bf16=True, max_steps=4).train()
    assert {0, 2, 4} <= set(memory.steps)


def test_a_wandb_run_that_is_finished_early_is_set_aside(offline, caplog):
    class Finishes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                wandb.finish()

    mine = wandb.init(project="test")
    callback = TLensCallback([CAPITAL], instruments=[TargetScores()], every_n_steps=2)
    run = trainer(offline / "out", callback)
    run.add_callback(Finishes())
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run.train()
    wandb.teardown()
    assert mine is not None and run.state.global_step == 6
    assert list(read_store(offline / "out" / "tlens").steps) == [0, 1, 2, 4, 6]
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


def test_no_room_for_the_shadow_is_not_taken_for_too_large_a_batch(tmp_path, monkeypatch):
    from tlens_callback.shadow import shadow as module

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
