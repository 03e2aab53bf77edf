"""Rows that others log to the same run, with `step=` too, are all there and as they were."""

import subprocess
from tempfile import TemporaryDirectory

import pytest
import wandb
from transformers import TrainerCallback

from tests.processes import python
from tests.sinks.wandb.test_sink import STEP, StandIn, as_the_trainer_does, misplaced, scalar
from tests.sinks.wandb.wandb_file import history, run_file
from tests.test_no_trace import sft
from tests.training import CAPITAL
from tlens_callback import TLensCallback, WandbSink
from tlens_callback.sinks.wandb.row_log import RowLog

pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
OURS = "tlens/head_scores/max_induction"
NUMBERED = "somebody logs to this W&B run with step="
DROPPED = "W&B drops a row that was logged with step="


class Numbers(TrainerCallback):
    """A user's callback that logs with `step=`."""

    def on_log(self, args, state, control, **_):
        wandb.log({"mine/logged": state.global_step}, step=state.global_step)


def started(folder):
    folder.mkdir()
    run = wandb.init(project="test", dir=folder)
    as_the_trainer_does(run)
    return run


def rows_in(folder):
    wandb.finish()
    wandb.teardown()
    return history(run_file(folder))


def of_others(rows):
    """What others logged, with W&B's number of its row; ours is left out."""
    keep = ("mine/", "train/loss", "eval/loss")
    found = [
        (row["_step"], {key: value for key, value in row.items() if key.startswith(keep)})
        for row in rows
    ]
    return [(step, row) for step, row in found if row]


@pytest.mark.slow
def test_a_users_callback_that_numbers_its_rows_keeps_them(offline, caplog):
    def train(name, *more):
        started(offline / name)
        settings = {"report_to": "wandb", "max_steps": 4, "eval_strategy": "no"}
        sft(offline / name / "out", [Numbers(), *more], **settings)
        # As people do after training.
        wandb.log({"mine/final": 1}, step=4)
        return rows_in(offline / name)

    alone = of_others(train("alone"))
    look = TLensCallback([CAPITAL], sinks=[WandbSink()], every_n_steps=1, on_error="raise")
    rows = train("both", look)
    assert [row["mine/logged"] for _, row in alone if "mine/logged" in row] == [1, 2, 3, 4]
    assert [set(row) for _, row in of_others(rows)] == [set(row) for _, row in alone]
    assert [step for step, _ in of_others(rows)] == [step for step, _ in alone]
    ours = [row[STEP] for row in rows if "tlens/target_scores/rank/capital" in row]
    assert ours == [0, 1, 2, 3, 4]
    assert [NUMBERED in record.message for record in caplog.records].count(True) == 1


def logged(folder, sink, *, every, logging, steps=24, numbers=True, after_training=True):
    """Rows of a run to which a trainer logs, as transformers' does, and a user with `step=`."""
    run = started(folder)
    if sink is not None:
        sink.before_finish(lambda: None)
        sink.write([scalar(0)], step=0)
    for step in range(1, steps + 1):
        if sink is not None and step % every == 0:
            sink.write([scalar(step)], step=step)
        if step % logging == 0:
            run.log({"train/loss": -step, STEP: step})
            if numbers:
                wandb.log({"mine/logged": step}, step=step)
        if step % 6 == 0:
            run.log({"eval/loss": -step, STEP: step})
            if numbers:
                wandb.log({"mine/evaluated": step}, step=step)
    if sink is not None:
        sink.close()
    if numbers and after_training:
        wandb.log({"mine/final": 1}, step=steps)
    return rows_in(folder)


@pytest.mark.parametrize(("every", "logging"), [(2, 1), (1, 3), (12, 5)])
@pytest.mark.slow
def test_rows_with_a_step_stay_as_they_were(offline, every, logging):
    """The trainer's own evaluation rows push out a few of the user's, without us too."""
    alone = logged(offline / "alone", None, every=every, logging=logging)
    rows = logged(offline / "both", WandbSink(), every=every, logging=logging)

    def by_key(rows, key):
        return [row[key] for _, row in of_others(rows) if key in row]

    for key in ("train/loss", "eval/loss", "mine/logged", "mine/evaluated", "mine/final"):
        assert by_key(rows, key) == by_key(alone, key)
    assert len(by_key(alone, "mine/logged")) >= 4
    assert misplaced(rows) == []
    assert [row[OURS] for row in rows if OURS in row] == list(range(0, 25, every))


def test_without_the_wait_rows_with_a_step_are_lost(offline, monkeypatch):
    """The negative control: as if every row were logged at once."""
    plain = RowLog.__init__
    monkeypatch.setattr(RowLog, "_make_room", lambda *_: None)
    monkeypatch.setattr(RowLog, "__init__", lambda self, *run, **_: plain(self, *run, at_once=True))
    rows = logged(offline / "both", WandbSink(), every=2, logging=1)
    assert sum("mine/logged" in row for row in rows) == 0


def test_a_late_row_with_a_step_that_is_lost_is_said_once(offline, caplog):
    run = started(offline / "run")
    sink = WandbSink()
    for step in range(6):
        sink.write([scalar(step)], step=step)
        run.log({"train/loss": -step, STEP: step})
    for _ in range(2):
        run.log({"mine/logged": 6}, step=6)
    assert [DROPPED in record.message for record in caplog.records].count(True) == 1
    run.log({"mine/logged": 99}, step=99)
    sink.close()
    rows = rows_in(offline / "run")
    assert [row["mine/logged"] for row in rows if "mine/logged" in row] == [99]
    assert len([row for row in rows if OURS in row]) == 6


def test_rows_are_logged_at_once_when_the_trainer_has_logged_twice(offline):
    """Nobody logs with `step=`, so nothing waits until the end."""
    run = started(offline / "run")
    sink = WandbSink()
    sink.write([scalar(0)], step=0)
    assert run.step == 0
    run.log({"train/loss": 1.0, STEP: 1})
    run.log({"completions": 1.0, STEP: 1})  # GRPO's second row of a step: no sign yet.
    assert run.step == 2
    run.log({"train/loss": 1.0, STEP: 2})
    assert run.step == 4
    sink.write([scalar(2)], step=2)
    assert run.step == 5
    sink.close()
    assert misplaced(rows_in(offline / "run")) == []


def test_rows_are_logged_where_nobody_else_logs(offline):
    sink = WandbSink()
    sink.write([scalar(0)], step=0)
    assert wandb.run.step == 1, "the sink has started the run itself"
    sink.close()
    run = wandb.init(project="test")
    before = list(run._teardown_hooks)
    sink = WandbSink()
    for step in range(10):
        assert run.step == 0
        sink.write([scalar(step)], step=step)
    assert run.step == 10
    sink.write([scalar(10)], step=10)
    assert run.step == 11
    sink.close()
    assert "_log" not in vars(run) and run._teardown_hooks == before


@pytest.mark.slow
@pytest.mark.parametrize("finish", ["", "run.finish()", "wandb.finish()"])
def test_rows_that_wait_are_logged_when_the_script_ends(offline, finish):
    script = f"""
import wandb
from tests.sinks.wandb.test_sink import scalar
from tlens_callback import WandbSink
if __name__ == "__main__":
    run = wandb.init(project="test")
    sink = WandbSink()
    for step in range(3):
        run.log({{"mine/logged": step}}, step=step)
        sink.write([scalar(step)], step=step)
    sink.close()
    assert run.step == 2
    run.log({{"mine/logged": 3}}, step=3)
    {finish}
"""
    path = offline / "script.py"
    path.write_text(script)
    subprocess.run([*python(), str(path)], check=True, timeout=300)
    rows = history(run_file(offline))
    assert [row["mine/logged"] for row in rows if "mine/logged" in row] == [0, 1, 2, 3]
    assert [row[OURS] for row in rows if OURS in row] == [0, 1, 2]


@pytest.mark.slow
def test_rows_that_wait_are_logged_when_the_script_fails(offline):
    """Nobody closes the sink then but the writer, at the end of the interpreter."""
    path = offline / "script.py"
    path.write_text("""
import wandb
from tests.sinks.wandb.test_sink import scalar
from tlens_callback import WandbSink
from tlens_callback.run.writer import Writer
if __name__ == "__main__":
    run = wandb.init(project="test")
    writer = Writer([WandbSink()])
    for step in range(3):
        run.log({"mine/logged": step}, step=step)
        writer.put([scalar(step)], step=step)
    raise RuntimeError("of the script")
""")
    done = subprocess.run([*python(), str(path)], timeout=300, capture_output=True)
    assert done.returncode == 1 and b"of the script" in done.stderr
    rows = history(run_file(offline))
    assert [row["mine/logged"] for row in rows if "mine/logged" in row] == [0, 1, 2]
    assert [row[OURS] for row in rows if OURS in row] == [0, 1, 2]


def test_a_second_training_in_the_same_run_goes_on_with_the_rows_that_wait(offline):
    run = started(offline / "run")
    sink = WandbSink()
    for training in range(2):
        for step in range(3 * training, 3 * training + 3):
            run.log({"mine/logged": step}, step=step)
            sink.write([scalar(step)], step=step)
        sink.close()
    rows = rows_in(offline / "run")
    assert [row["mine/logged"] for row in rows if "mine/logged" in row] == list(range(6))
    assert misplaced(rows) == [] and [row[OURS] for row in rows if OURS in row] == list(range(6))


class Counted(StandIn):
    """A run with a count that never gives way: each step follows the one before."""

    step = 0

    def log(self, row, step=None, commit=None):
        self._log(data=row, step=step, commit=commit)

    def _log(self, data, step, commit):
        self.rows.append(data)


def test_the_files_that_wait_are_bounded():
    run = Counted()
    rows = RowLog(run)
    run.log({}, step=0)
    folders = [TemporaryDirectory() for _ in range(5)]
    for step, folder in enumerate(folders):
        rows.log({"step": step}, {f"{step}-{i}": i for i in range(90)}, folder)
    rows.leave(now=False)
    assert len(run.rows) == 1
    rows.leave(now=True)
    assert [row["step"] for row in run.rows[1:]] == [0, 1, 2, 3, 4]
    assert [len(row) for row in run.rows[1:]] == [1, 1, 1, 91, 91]
    assert run.log.__self__ is run and "_log" not in vars(run)


def test_two_sinks_leave_the_run_as_it_was_in_any_order():
    run = Counted()
    first, second = RowLog(run), RowLog(run)
    second.leave(now=True)
    run.log({"mine": 1})
    first.leave(now=True)
    assert "_log" not in vars(run) and run.rows == [{"mine": 1}]
    first, second = RowLog(run), RowLog(run)
    first.leave(now=True)
    run.log({"mine": 2}, step=9)
    second.leave(now=True)
    assert run.rows[1:] == [{"mine": 2}] and "_log" not in vars(run)


def test_a_fault_of_ours_does_not_reach_who_logs(monkeypatch, caplog):
    run = Counted()
    rows = RowLog(run)
    monkeypatch.setattr(rows, "_make_room", lambda *_: 1 / 0)
    run.log({"mine": 1}, step=1)
    assert run.rows == [{"mine": 1}] and "not everything was logged to W&B" in caplog.text
