"""A real trainer and the thread that writes: what is written when, and when training ends badly."""

import gc
import logging
import subprocess
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from transformers import TrainerCallback

from tests import tiny
from tests.processes import python
from tests.sinks.wandb.wandb_file import history
from tests.training import CAPITAL, Constant, Pace, trainer
from tlens_callback import MemorySink, TLensCallback, read_store
from tlens_callback.run import cost

ENDS = ["sigint", "raises", "raises, no exit", "wandb", "sigint, wandb", "wandb, no seam"]


class Slow(MemorySink):
    """Is that much slower than training, and notes who asks.

    Args:
        behind: writing a step ends when training is so many steps further, or in its last step.
    """

    def __init__(self, pace=None, behind=0):
        super().__init__()
        self.pace, self.behind, self.closed, self.threads = pace, behind, 0, set()

    def write(self, readings, *, step):
        if self.behind and step > 0:  # the first is written before training goes on
            self.pace.reaches(min(step + self.behind, 6))
        self.threads.add(threading.current_thread().name)
        super().write(readings, step=step)

    def close(self):
        self.closed += 1


class Sees(TrainerCallback):
    """What had been written by the end of the last `on_step_end`, and by `on_train_end`."""

    def __init__(self, sink):
        self.sink, self.seen = sink, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.seen[state.global_step] = self.sink.steps, self.sink.closed

    def on_train_end(self, args, state, control, **kwargs):
        self.seen["end"] = self.sink.steps, self.sink.closed


def running() -> set[threading.Thread]:
    """Threads, without the one that tqdm starts with its first progress bar."""
    return {thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"}


@pytest.mark.parametrize("writing", ["wait", "drop_old", "inline"])
def test_the_last_observation_is_written_and_the_sinks_closed_in_the_last_step(
    tmp_path, capsys, writing
):
    before, pace = running(), Pace()
    sink = Slow(pace, {"wait": 2, "drop_old": 6, "inline": 0}[writing])
    sees = Sees(sink)
    callback = TLensCallback(
        [CAPITAL], instruments=[Constant()], sinks=[sink], every_n_steps=1, on_error="raise",
        writing=writing,
    )  # fmt: skip
    run = trainer(tmp_path, callback)
    run.add_callback(sees)
    run.add_callback(pace)
    run.train()
    written, closed = sees.seen[6]
    assert written[-1] == 6 and closed == 1 and sees.seen["end"] == (written, 1)
    assert running() <= before, "nothing is left running"  # others' threads may end meanwhile
    said = capsys.readouterr().out
    if writing == "drop_old":
        dropped = sink.curve("cost/dropped")[1]
        assert len(written) < 7 and dropped[0] == 0 and list(dropped) == sorted(dropped)
        assert f"tlens: dropped {7 - len(written)} observation" in said
    else:
        assert written == (0, 1, 2, 3, 4, 5, 6)
        assert "cost/dropped" not in sink.readings and "dropped" not in said
    assert sink.threads == {"MainThread" if writing == "inline" else "tlens-writer"}


@pytest.mark.slow
def test_training_is_ahead_of_a_slow_sink(tmp_path):
    """The control of the test above: without the thread each step is written when it is over."""
    ahead = {}
    for writing in ("wait", "inline"):
        pace = Pace()
        sink = Slow(pace, 2 if writing == "wait" else 0)
        sees = Sees(sink)
        callback = TLensCallback(
            [CAPITAL], instruments=[Constant()], sinks=[sink], every_n_steps=1, writing=writing
        )
        run = trainer(tmp_path / writing, callback)
        run.add_callback(sees)
        run.add_callback(pace)
        run.train()
        ahead[writing] = [step - max(sees.seen[step][0]) for step in range(1, 6)]
    assert ahead["inline"] == [0, 0, 0, 0, 0]
    assert max(ahead["wait"]) in (2, 3) and min(ahead["wait"]) >= 1


@pytest.mark.slow
def test_cost_is_that_of_the_training_thread(tmp_path, monkeypatch):
    """By a clock of each thread's own: a sink lets hours pass, on the thread that it runs on."""
    spent, passed, real = {}, threading.local(), time.perf_counter
    clock = SimpleNamespace(perf_counter=lambda: real() + getattr(passed, "hours", 0) * 3600)
    monkeypatch.setattr(cost, "time", clock)

    class Hours(MemorySink):
        def write(self, readings, *, step):
            passed.hours = getattr(passed, "hours", 0) + 1
            super().write(readings, step=step)

    for writing in ("wait", "inline"):
        sink = Hours()
        callback = TLensCallback(
            [CAPITAL], instruments=[Constant()], sinks=[sink], every_n_steps=1, writing=writing
        )
        trainer(tmp_path / writing, callback).train()
        # The first is written before training goes on; the last is not in its own reading.
        spent[writing] = sum(sink.curve("cost/seconds")[1]) - float(
            sink.readings["cost/seconds"][0].values
        )
    assert spent["inline"] >= 5 * 3600 > 3600 > spent["wait"]


@pytest.mark.slow
def test_a_sink_that_hangs_does_not_end_the_training(tmp_path, caplog):
    before, comes_back = running(), threading.Event()

    class Hangs(Slow):
        def write(self, readings, *, step):
            assert step != 2 or comes_back.wait(120)
            super().write(readings, step=step)

    memory, hangs = MemorySink(), Hangs()
    callback = TLensCallback(
        [CAPITAL], instruments=[Constant()], sinks=[hangs, memory], every_n_steps=1
    )

    class Impatient(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            callback.observer.writer.patience = 1.0

    run = trainer(tmp_path, callback)
    run.add_callback(Impatient())
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run.train()
    assert memory.steps == (0, 1, 2, 3, 4, 5, 6) and 3 not in hangs.steps
    assert caplog.text.count("sink Hangs is given up: writing step 2") == 1
    comes_back.set()
    for thread in running() - before:
        thread.join(60)
    assert running() <= before and 3 not in hangs.steps


def test_a_wandb_run_that_is_finished_right_after_a_failure_has_the_last_observation(offline):
    """In one process, as in a notebook: nothing ends, so nobody but the finishing can wait."""

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise RuntimeError("training failed")

    wandb.init(project="test")
    callback = TLensCallback([CAPITAL], instruments=[Constant()], every_n_steps=1)
    run = trainer(offline / "out", callback)
    run.add_callback(Breaks())
    with pytest.raises(RuntimeError, match="training failed"):
        try:
            run.train()
        finally:
            wandb.finish()
    wandb.teardown()
    (file,) = offline.glob("wandb/offline-run-*/*.wandb")
    rows = [row["train/global_step"] for row in history(file) if "tlens/constant/mean" in row]
    assert rows == [0, 1, 2, 3, 4]
    callback.observer.close()


def test_an_observation_that_waits_when_training_fails_keeps_no_model(tmp_path):
    """As in a notebook: what was given up lives on until the end of the interpreter."""

    class Breaks(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            raise RuntimeError("out of memory")

    model = tiny.model("llama")
    callback = TLensCallback([CAPITAL], instruments=[Constant()], sinks=[MemorySink()])
    run = trainer(tmp_path, callback, model=model, eval_strategy="steps", eval_steps=6)
    run.add_callback(Breaks())
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    writer, model = callback.observer.writer, weakref.ref(model)
    del run, callback
    gc.collect()
    assert model() is None
    writer.close()


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """Trainings with slow sinks, each ended badly in a process of its own."""
    folder = tmp_path_factory.mktemp("ended")
    command = [*python(), "-m", "tests.stopped_script", str(folder), *ENDS]
    root = Path(__file__).parent.parent
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=400)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("how", "error"), [("sigint", "KeyboardInterrupt"), ("raises", "failed")])
def test_the_end_of_the_interpreter_writes_what_waits(ended, how, error):
    assert list(read_store(ended / how / "tlens").steps) == [0, 1, 2, 3, 4]
    assert (ended / how / "tlens" / "page.html").exists(), "the sinks are closed"
    said = (ended / how / "stderr.txt").read_text()
    assert f"page {ended / how / 'tlens' / 'page.html'}" in (ended / how / "stdout.txt").read_text()
    assert error in said.splitlines()[-1] and (ended / how / "status").read_text() != "0"


@pytest.mark.slow
def test_without_a_word_at_the_end_it_would_be_lost(ended):
    """The control of the test above, with the same slow sink."""
    assert max(read_store(ended / "raises, no exit" / "tlens").steps) < 4


def rows(folder) -> list[int]:
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return [row["train/global_step"] for row in history(file) if "tlens/constant/mean" in row]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wandb", "sigint, wandb"])
def test_a_script_that_finishes_its_wandb_run_in_finally_loses_nothing(ended, how):
    assert rows(ended / how) == [0, 1, 2, 3, 4]
    assert list(read_store(ended / how / "out" / "tlens").steps) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_without_the_sink_s_waiting_it_would_lose_it(ended):
    """The control of the test above."""
    assert max(rows(ended / "wandb, no seam")) < 4
    said = (ended / "wandb, no seam" / "stderr.txt").read_text()
    assert "has been finished, so" in said
