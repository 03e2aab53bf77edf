"""Nothing of ours ends a run: every event of the trainer, with every part of ours failing."""

import logging
from types import FunctionType, ModuleType
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

import tlens_callback.callback as callback_module
import tlens_callback.tracer as tracer_module
import tlens_callback.watcher as watcher_module
from tests import tiny
from tests.marks import exhaustive
from tests.own_loop import Loop, tracer
from tests.training import CAPITAL, Constant, trainer
from tlens_callback import MemorySink, TLensCallback, Tracer, Watch, read_store
from tlens_callback.run import baselines, observer
from tlens_callback.run.cost import Cost
from tlens_callback.run.fidelity_monitor import FidelityMonitor
from tlens_callback.run.observer import Observer
from tlens_callback.run.schedule import Schedule
from tlens_callback.run.trainer_logs import TrainerLogs
from tlens_callback.run.writer import Writer
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.mirror import Mirror
from tlens_callback.watcher import Watcher

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Some of the faults are on the thread that writes.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

# Two tests take turns with these.
OURS = (
    *(Observer, Writer, Shadow, Mirror, Watch, FidelityMonitor, TrainerLogs, Schedule, Cost),
    *(MemorySink, Constant, baselines, observer),
)
EVENTS = (
    *("epoch_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "substep_end"),
    *("step_end", "log", "evaluate", "save", "predict", "prediction_step", "epoch_end"),
)


class Injected(RuntimeError):
    pass


def functions(owner: Any) -> list[str]:
    """The functions of a class, or those that a module uses by a name of its own."""
    public = [name for name, value in vars(owner).items() if isinstance(value, FunctionType)]
    if isinstance(owner, ModuleType):
        return public
    return [name for name in public if not (name.startswith("__") and name.endswith("__"))]


def fail(monkeypatch, owner, name):
    def broken(*args, **kwargs):
        raise Injected(f"{name} is broken")

    monkeypatch.setattr(owner, name, broken)


class Driven:
    """A callback that gets a trainer's events, without a training between them."""

    def __init__(self, tmp_path, **settings):
        self.memory = MemorySink()
        self.callback = TLensCallback(
            [CAPITAL],
            instruments=[Constant()],
            **{"every_n_steps": 1, "sinks": [self.memory], **settings},
        )
        run = trainer(tmp_path, self.callback, model=tiny.model("llama", num_hidden_layers=1))
        self.handler, self.args = run.callback_handler, run.args
        self.state = TrainerState(max_steps=3, is_world_process_zero=True)
        self.control = TrainerControl()
        self.handler.on_train_begin(self.args, self.state, self.control)

    def go_on(self):
        for step in (1, 2, 3):
            self.state.global_step = step
            for event in EVENTS:
                self.control.should_training_stop = event == "epoch_end" and step == 3
                row = {"loss": 1.0 / step}
                if event == "log":
                    self.state.log_history.append({**row, "step": step})
                more = {"logs": row} if event == "log" else {}
                more = {"metrics": row} if event in ("evaluate", "predict") else more
                self.handler.call_event(f"on_{event}", self.args, self.state, self.control, **more)
        self.handler.on_train_end(self.args, self.state, self.control)


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner",
    exhaustive([TLensCallback, callback_module, Watcher, watcher_module, *OURS], OURS[1::2]),
)
def test_every_event_passes_with_every_part_of_ours_failing(tmp_path, monkeypatch, owner):
    names = [name for name in functions(owner) if not name.startswith("on_")]
    assert names
    for name in names:
        run = Driven(tmp_path)
        with monkeypatch.context() as patch:
            fail(patch, owner, name)
            run.go_on()
        assert 0 in run.memory.steps, name
        if run.callback.observer is not None:
            run.callback.observer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner",
    exhaustive(
        [Tracer, tracer_module, Watcher, watcher_module, *OURS],
        [Watcher, watcher_module, *OURS[0::2]],
    ),
)
def test_a_tracer_s_loop_passes_with_every_part_of_ours_failing(tmp_path, monkeypatch, owner):
    loop = Loop(tiny.model("llama", num_hidden_layers=1))
    # What checks the loop's own arguments is to raise, and replaced here it has lost its guard.
    own = {"step", "save", "_check_entered", "_number", "_is_first_process"}
    guarded = {"_observe", "_save", "_leave"}
    for name in sorted(set(functions(owner)) - own - guarded):
        memory = MemorySink()
        watched = tracer(loop.model, sinks=[memory], instruments=[Constant()], on_error="warn")
        with monkeypatch.context() as patch, watched:
            fail(patch, owner, name)
            loop.run(1, watched)
            watched.save(tmp_path / name)
        assert 0 in memory.steps, name
    assert loop.losses


@pytest.mark.parametrize("name", ["after_update", "hand_over", "remember", "close"])
def test_with_on_error_raise_the_same_faults_raise(tmp_path, monkeypatch, name):
    run = Driven(tmp_path, on_error="raise")
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with monkeypatch.context() as patch:
        fail(patch, Observer, name)
        with pytest.raises(Injected):
            run.go_on()
    run.callback.observer = None


def test_ctrl_c_in_a_part_of_ours_passes_the_guard(tmp_path, monkeypatch):
    run = Driven(tmp_path)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Observer, "hand_over", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.go_on()


def test_what_was_observed_is_written_and_the_end_of_watching_is_said_once(
    tmp_path, monkeypatch, caplog
):
    run = Driven(tmp_path, writing="wait")

    def fails_later(self, *args, last=False, **kwargs):
        if last:
            raise Injected("no reason")
        return after_update(self, *args, last=last, **kwargs)

    after_update = Observer.after_update
    monkeypatch.setattr(Observer, "after_update", fails_later)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run.go_on()
    assert [0, 1, 2] == list(run.memory.steps)
    said = [r.getMessage() for r in caplog.records if "Injected" in r.getMessage()]
    assert len(said) == 1 and "watching failed" in said[0] and "no reason" in said[0]


def test_a_wandb_run_that_cannot_be_joined_leaves_the_other_sinks(tmp_path, monkeypatch, caplog):
    run = Driven(tmp_path, sinks=None)
    fail(monkeypatch, watcher_module, "active_wandb")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run.go_on()
    assert read_store(tmp_path / "tlens").steps == (0, 1, 2, 3)
    assert sum("active W&B run" in r.getMessage() for r in caplog.records) == 1


STRANGE_ROWS = [
    {"mine": 1.0, "step": None},
    {"mine": 1.0},
    {"mine": 1.0, "step": "three"},
    {"mine": 1.0, "step": float("nan")},
    {("a", "tuple"): 1.0, 5: 2.0, None: 3.0},
    ["no", "dict"],
    "a text",
    None,
    7,
    {"mine": object()},
]


@pytest.mark.parametrize("row", STRANGE_ROWS, ids=range(len(STRANGE_ROWS)))
def test_rows_of_others_in_the_trainers_log_do_not_end_the_training(tmp_path, row):
    class Rows(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.log_history.append(row)

    memory = MemorySink()
    callback = TLensCallback(
        [CAPITAL], instruments=[Constant()], sinks=[memory], every_n_steps=1, on_error="raise"
    )
    run = trainer(tmp_path, callback, max_steps=3, logging_steps=1)
    run.add_callback(Rows())
    run.train()
    assert list(memory.steps) == [0, 1, 2, 3]
    assert memory.readings["trainer/loss"][2].labels["update"] == ("2",)
    if isinstance(row, dict) and row.get("mine") == 1.0:
        assert memory.readings["trainer/mine"][2].labels["update"] == ("2",)
