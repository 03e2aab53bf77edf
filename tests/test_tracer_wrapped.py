"""Loops with more around them: accelerate, compilation, accumulation, autocast, W&B."""

import contextlib

import pytest
import torch
import wandb
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from tests import tiny
from tests.own_loop import Loop, adapted, compared, rows, tracer
from tests.sinks.wandb.wandb_file import history, run_file
from tlens_callback import MemorySink, TargetScores, TrainedFeatures, fast

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS = "target_scores/loss/capital"


@pytest.fixture(autouse=True)
def accelerator_state():
    """One for all accelerators of a process, which keeps the settings of the first."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["compile", "prepared", "accumulate"])
def test_wrapped_models_and_loops_read_what_plain_ones_do(wrap):
    plain, sink = MemorySink(), MemorySink()
    batches = 2 if wrap == "accumulate" else 1
    with tracer(
        (loop := Loop(adapted(lora_dropout=0.0), batches=batches)).model, sinks=[plain]
    ) as t:
        loop.run(3, t)
    model = adapted(lora_dropout=0.0)
    if wrap == "compile":
        loop = Loop(torch.compile(model, backend="eager"))
        with tracer(loop.model, sinks=[sink]) as watching:
            loop.run(3, watching)
    else:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=batches)
        loop = Loop(model, batches=batches)
        loader = DataLoader(rows(), batch_size=4)
        model, optimizer, loader = accelerator.prepare(model, loop.optimizer, loader)
        data = (batch for _ in range(2) for batch in loader)
        with tracer(model, sinks=[sink]) as watching:
            for _ in range(3 * batches):
                with accelerator.accumulate(model):
                    accelerator.backward(model(**next(data)).loss)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    watching.step(loss=0.0)
    sink.readings.pop("trainer/loss"), plain.readings.pop("trainer/loss")
    only, worst = compared(plain, sink)
    assert not only and worst < 1e-5
    assert len({float(r.values) for r in sink.readings[LOSS].values()}) == 4


@pytest.mark.parametrize("lifted", [True, False])
def test_a_step_inside_autocast_reads_in_full_precision(lifted, monkeypatch):
    """The whole body of a loop may stand in an autocast; the control is one that is not lifted."""
    if not lifted:
        monkeypatch.setattr("tlens_callback.tracer._full_precision", contextlib.nullcontext)
    sinks = MemorySink(), MemorySink()
    for sink, on in zip(sinks, (False, True), strict=True):
        with contextlib.ExitStack() as stack:
            if on:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            instruments = [*fast(), TrainedFeatures("blocks.1.hook_resid_post")]
            settings = dict(sinks=[sink], instruments=instruments, train_dataset=rows())
            with tracer(tiny.model("llama"), **settings) as watching:
                watching.step()
    assert (compared(*sinks) == (set(), 0.0)) == lifted


def test_training_in_autocast_is_followed():
    sink, loop = MemorySink(), Loop(adapted())
    with tracer(loop.model, sinks=[sink], instruments=[TargetScores()]) as watching:
        loop.run(3, watching, autocast=True)
    assert max(r.values for r in sink.readings["fidelity/max_abs_diff"].values()) < 1e-4
    assert len({float(r.values) for r in sink.readings[LOSS].values()}) == 4


def test_the_active_wandb_run_is_joined_when_it_begins_later_too(offline):
    loop = Loop(tiny.model("llama"))
    with tracer(loop.model, sinks=None, output_dir=offline / "out", every_n_steps=2) as watching:
        loop.run(1, watching)
        wandb.init(project="own")
        loop.run(3, watching)
    wandb.finish()
    wandb.teardown()
    rows = history(run_file(offline))
    key = "tlens/target_scores/probability/capital"
    assert [row["train/global_step"] for row in rows if key in row] == [2, 4]
    assert [type(sink).__name__ for sink in watching.sinks] == ["LocalSink", "WandbSink"]
