"""What the trainer logs, among the readings: every number once, at the observation of its step."""

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.training import CAPITAL, Constant, Interrupts, trainer
from tlens_callback import MemorySink, TLensCallback, read_store
from tlens_callback.run.trainer_logs import TrainerLogs


def taken(rows, step=9):
    logs = TrainerLogs()
    logs.start(rows, step=0)
    return {r.key: r for r in logs.take(step)}


def test_values_steps_and_unit():
    found = taken([{"loss": 2.5, "step": 1}, {"loss": 2.0, "eval_loss": 3, "step": 2}])
    loss = found["trainer/loss"]
    assert loss.axes == ("update",) and loss.unit == "as logged"
    assert loss.values.tolist() == [2.5, 2.0] and loss.labels["update"] == ("1", "2")
    assert found["trainer/eval_loss"].labels["update"] == ("2",)
    assert set(found) == {"trainer/loss", "trainer/eval_loss"}, "the step is a label"


def test_numbers_of_every_kind_and_nothing_else():
    row = {
        "float": 1.5,
        "int": 2,
        "numpy": np.float32(3),
        "tensor": torch.tensor(4.0),
        "nan": float("nan"),
        "inf": float("-inf"),
        "beyond float32": 1e300,
        "text": "5",
        "flag": True,
        "none": None,
        "list": [6.0],
        "array": np.array([7.0]),
        "endless": 10**400,
        "no number": np.array("none"),
        "nothing alone": np.array(None),
        "complex": torch.tensor(9j),
        "complex alone": np.array(9j),
        "time": np.timedelta64(3, "s"),
        "nowhere": torch.tensor(1.0, device="meta"),
        "step": 1,
    }
    found = {key.removeprefix("trainer/"): r.values.tolist() for key, r in taken([row]).items()}
    assert np.isnan(found.pop("nan")).all()
    assert found == {
        "float": [1.5],
        "int": [2.0],
        "numpy": [3.0],
        "tensor": [4.0],
        "inf": [-np.inf],
        "beyond float32": [np.inf],
    }


def test_names_are_kept_where_they_make_a_key_and_none_collide():
    names = ["rewards/f/mean", "", "_", "a//b", "a/_/b", "/x", "x/", "\ud800", "\\ud800", " "]
    found = taken([{name: float(i) for i, name in enumerate(names)}])
    assert len(found) == len(names) and "trainer/rewards/f/mean" in found
    assert [r.values.item() for r in found.values()] == list(range(len(names)))
    assert [r.key for r in found.values()] == list(found)


def test_nothing_is_taken_twice_and_a_step_s_last_value_counts():
    rows = [{"loss": 1.0, "step": 1}, {"loss": 2.0, "step": 1}]
    logs = TrainerLogs()
    logs.start(rows, step=0)
    assert logs.take(1)[0].values.tolist() == [2.0]
    assert logs.take(2) == []
    rows.append({"loss": 3.0, "step": 2})
    assert logs.take(3)[0].values.tolist() == [3.0]


def test_a_log_that_holds_no_number_ends_no_training(tmp_path):
    class Notes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.log_history.append({"note": np.array("warm"), "step": state.global_step})

    sink = MemorySink()
    callback = TLensCallback([CAPITAL], instruments=[Constant()], sinks=[sink], every_n_steps=1)
    run = trainer(tmp_path, callback, logging_steps=1)
    run.add_callback(Notes())
    run.train()
    assert curve(sink)[0] == [1, 2, 3, 4, 5, 6] and "trainer/note" not in sink.readings


@pytest.mark.slow
def test_a_try_that_ran_out_of_memory_keeps_what_it_logged(tmp_path):
    class OutOfMemoryOnce(TrainerCallback):
        tries = 0

        def on_log(self, args, state, control, **kwargs):
            self.tries += 1
            if self.tries == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    class Notes(MemorySink):
        def write(self, readings, *, step):
            found = [r for r in readings if r.key == "trainer/loss"]
            wrote.append((step, [r.labels["update"] for r in found]))

    wrote = []
    callback = TLensCallback([CAPITAL], instruments=[Constant()], sinks=[Notes()], every_n_steps=2)
    run = trainer(tmp_path, callback, auto_find_batch_size=True, logging_steps=1, max_steps=2)
    run.add_callback(OutOfMemoryOnce())
    run.train()
    one_try = [(0, []), (1, []), (2, [("1", "2")])]
    assert wrote == one_try + one_try


def curve(sink, key="trainer/loss"):
    """Steps and values of all observations together, and the observations they are in."""
    at = sorted(sink.readings[key].items())
    steps = [int(step) for _, reading in at for step in reading.labels["update"]]
    return steps, [v for _, r in at for v in r.values.tolist()], [step for step, _ in at]


def logged(run, name="loss"):
    rows = [row for row in run.state.log_history if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


@pytest.mark.parametrize("by", ["steps", "epoch"])
@pytest.mark.parametrize("evaluates", [True, False])
def test_every_loss_is_in_a_reading_the_last_included(tmp_path, by, evaluates):
    sink = MemorySink()
    callback = TLensCallback(
        [CAPITAL], instruments=[Constant()], sinks=[sink], every_n_steps=2, on_error="raise"
    )
    args = dict(logging_strategy=by, logging_steps=1, max_steps=-1, num_train_epochs=2)
    if evaluates:
        args |= dict(eval_strategy=by, eval_steps=5)
    run = trainer(tmp_path, callback, per_device_train_batch_size=8, **args)
    run.train()
    assert run.state.global_step == 6
    steps, values, seen = curve(sink)
    assert (steps, values) == (logged(run)[0], pytest.approx(logged(run)[1]))
    if by == "steps":
        assert steps == [1, 2, 3, 4, 5, 6] and seen == [2, 4, 6]
        assert sink.readings["trainer/loss"][4].labels["update"] == ("3", "4")
    else:
        assert steps == [3, 6] and seen == [4, 6]
    if evaluates:
        assert curve(sink, "trainer/eval_loss")[:2] == (
            logged(run, "eval_loss")[0],
            pytest.approx(logged(run, "eval_loss")[1]),
        )
    assert "trainer/train_runtime" not in sink.readings
    assert "trainer/step" not in sink.readings


def test_an_evaluation_that_stops_training_is_in_the_last_reading(tmp_path):
    sink = MemorySink()
    callback = TLensCallback([CAPITAL], instruments=[Constant()], sinks=[sink], every_n_steps=2)
    settings = dict(
        max_steps=50,
        learning_rate=1.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    run = trainer(tmp_path, callback, **settings)
    run.add_callback(EarlyStoppingCallback(1, early_stopping_threshold=100.0))
    run.train()
    steps, values, seen = curve(sink, "trainer/eval_loss")
    assert steps == seen == [2, 4] and run.state.global_step == 4
    assert values == pytest.approx(logged(run, "eval_loss")[1])


def test_several_evaluation_sets_are_all_there(tmp_path):
    sink = MemorySink()
    callback = TLensCallback([CAPITAL], instruments=[Constant()], sinks=[sink])
    run = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=3)
    run.eval_dataset = {"one": run.eval_dataset, "two": run.eval_dataset}
    run.train()
    for name in ("eval_one_loss", "eval_two_loss"):
        assert curve(sink, f"trainer/{name}")[0] == [3, 6]


def test_the_store_has_them_where_nothing_else_is_measured(tmp_path):
    callback = TLensCallback(
        [CAPITAL], instruments=[], watch=False, every_n_steps=2, on_error="raise"
    )
    run = trainer(tmp_path, callback, logging_steps=1)
    run.train()
    store = read_store(tmp_path / "tlens")
    values = [v for s in (2, 4, 6) for v in store.reading("trainer/loss", s).values.tolist()]
    assert values == pytest.approx(logged(run)[1]) and len(values) == 6


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [3, 4])
def test_a_resumed_run_has_every_value_once(tmp_path, checkpoint):
    """At step 3 nothing had observed; step 4 was observed, and is again."""

    def run(resume=None, until=6):
        callback = TLensCallback(
            [CAPITAL], instruments=[Constant()], every_n_steps=2, on_error="raise"
        )
        args = dict(logging_steps=1, save_strategy="steps", save_steps=1)
        run = trainer(tmp_path, callback, max_steps=8, **args)
        if until < 8:
            run.add_callback(Interrupts(at=until))
            with pytest.raises(KeyboardInterrupt):
                run.train()
            callback.observer.close()
        else:
            run.train(resume_from_checkpoint=resume)
        return run

    run(until=6)
    again = run(str(tmp_path / f"checkpoint-{checkpoint}"), until=8)
    store = read_store(tmp_path / "tlens")
    found = [store.reading("trainer/loss", s) for s in store.steps if has(store, s)]
    steps = [int(step) for reading in found for step in reading.labels["update"]]
    values = [value for reading in found for value in reading.values.tolist()]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert values == pytest.approx(logged(again)[1])


def has(store, step):
    try:
        return store.reading("trainer/loss", step) is not None
    except ValueError:
        return False


def test_what_the_trainer_logs_while_training_fails_is_not_lost(tmp_path):
    """The observation waits for the evaluation, which raises: it is written all the same."""

    class Breaks(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            raise RuntimeError("out of memory")

    callback = TLensCallback([CAPITAL], instruments=[Constant()], every_n_steps=2)
    run = trainer(tmp_path, callback, logging_steps=1, eval_strategy="steps", eval_steps=4)
    run.add_callback(Breaks())
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    callback.observer.writer.drain()
    store = read_store(tmp_path / "tlens")
    assert list(store.steps)[-1] == 4
    assert store.reading("trainer/loss", 4).labels["update"] == ("3", "4")
    assert store.reading("trainer/eval_loss", 4).labels["update"] == ("4",)
    callback.observer.close()
