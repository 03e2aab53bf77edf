"""What is written goes to the run that it is of, whichever run wrote last."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

from tests import tiny
from tests.training import CAPITAL, SENTENCES, trainer
from tlens_callback import (
    HeadScores,
    LocalSink,
    MemorySink,
    TensorBoardSink,
    TLensCallback,
    Tracer,
    read_store,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def run(folder: Path, to: int, *, seed: int = 0, resume: int | None = None, **settings):
    """Trains to a step, watched at every second one, with a checkpoint at each of these."""
    settings = {"instruments": [HeadScores()], "every_n_steps": 2, **settings}
    callback = TLensCallback([CAPITAL], **settings)
    args = dict(save_strategy="steps", save_steps=2, max_steps=to, logging_steps=1)
    model = tiny.model("llama", seed=seed)
    training = trainer(folder, callback, model=model, **args)
    checkpoint = None if resume is None else str(folder / f"checkpoint-{resume}")
    training.train(resume_from_checkpoint=checkpoint)
    return callback


def steps(store: Path) -> tuple[int, ...]:
    """The steps that were observed; the shadow is compared with the model at others too."""
    return tuple(read_store(store).curve("head_scores/max_induction")[0])


def run_in(store: Path) -> str:
    return json.loads((store / "manifest.json").read_text())["run"]


def test_a_resume_goes_on_in_its_own_store_and_not_in_the_last(tmp_path, caplog):
    run(tmp_path, 6)
    (tmp_path / "checkpoint-2").rename(tmp_path / "of the first")
    first = read_store(tmp_path / "tlens")
    before = first.reading("head_scores/induction", 6).values
    run(tmp_path, 8, seed=1)
    second = read_store(tmp_path / "tlens-2")
    assert (steps(first.path), steps(second.path)) == ((0, 2, 4, 6), (0, 2, 4, 6, 8))
    assert run_in(first.path) != run_in(second.path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "of the first").rename(tmp_path / "checkpoint-2")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        run(tmp_path, 6, resume=2)
    assert steps(second.path) == (0, 2, 4, 6, 8), "another run's steps are left alone"
    assert steps(first.path) == (0, 2, 4, 6)
    again = read_store(first.path).reading("head_scores/induction", 6).values
    assert abs(again - before).max() < 1e-6, "the same training"
    assert not (tmp_path / "tlens-3").exists()
    (said,) = [text for text in caplog.messages if "taken back" in text]
    assert "goes on at step 2; what it had at 2 later steps, up to step 6, is taken back" in said


def test_a_run_that_no_store_holds_begins_a_new_one(tmp_path, caplog):
    run(tmp_path, 4)
    store = tmp_path / "tlens"
    about = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(about | {"run": "another"}))
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        callback = run(tmp_path, 6, resume=4)
    assert steps(store) == (0, 2, 4)
    assert steps(tmp_path / "tlens-2") == (4, 6)
    assert callback.sinks[0].path == tmp_path / "tlens-2"
    assert any("so a new one begins at" in text for text in caplog.messages)
    # It is that run's store from now on.
    run(tmp_path, 8, resume=6)
    assert steps(tmp_path / "tlens-2") == (4, 6, 8)
    assert steps(store) == (0, 2, 4)


def test_a_store_of_an_older_version_goes_on(tmp_path):
    run(tmp_path, 4)
    store = tmp_path / "tlens"
    about = json.loads((store / "manifest.json").read_text())
    del about["run"]
    (store / "manifest.json").write_text(json.dumps(about))
    run(tmp_path, 6, resume=4)
    assert steps(store) == (0, 2, 4, 6) and not (tmp_path / "tlens-2").exists()


def test_tensorboards_folder_is_of_the_run_too(tmp_path):
    def sinks():
        return {"sinks": [TensorBoardSink(tmp_path / "board")]}

    run(tmp_path / "a", 4, **sinks())
    run(tmp_path / "b", 4, **sinks())
    files = {path: len(list(path.glob("events*"))) for path in sorted(tmp_path.glob("board*"))}
    assert list(files.values()) == [1, 1]
    run(tmp_path / "a", 6, resume=4, **sinks())
    after = {path: len(list(path.glob("events*"))) for path in sorted(tmp_path.glob("board*"))}
    assert list(after.values()) == [2, 1] and after.keys() == files.keys()


def test_a_tracer_resumes_its_own_run(tmp_path):
    model = tiny.model("llama")

    def trace(step, resume_from=None):
        tracer = Tracer(
            model, tiny.tokenizer(), [CAPITAL], instruments=[HeadScores()], every_n_steps=1,
            output_dir=tmp_path, step=step, resume_from=resume_from,
        )  # fmt: skip
        with tracer:
            tracer.step()
            tracer.save(tmp_path / f"saved-{step}")
        return tracer.sinks[0].path

    assert trace(0).name == "tlens"
    (tmp_path / "saved-0").rename(tmp_path / "first")
    assert trace(0).name == "tlens-2"
    assert trace(1, tmp_path / "first").name == "tlens"


# --- a search for hyperparameters ---


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_each_trial_of_a_search_has_its_store_and_its_checkpoints(tmp_path, caplog):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    tokenizer = tiny.tokenizer()
    rows = [dict(tokenizer(s, padding="max_length", max_length=16)) for s in SENTENCES]
    rows = [{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in rows]
    callback = TLensCallback(
        [CAPITAL], instruments=[HeadScores()], every_n_steps=2, on_error="raise"
    )
    search = Trainer(
        args=TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2,
            use_cpu=True, report_to="none", disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        processing_class=tokenizer,
        model_init=lambda: tiny.model("llama"),
        callbacks=[callback],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        search.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
            n_trials=2,
            backend="optuna",
            hp_name=lambda trial: f"trial {trial.number}",
        )
    assert "tlens" not in caplog.text
    for number in (0, 1):
        for step in (2, 4):
            assert (tmp_path / f"trial {number}" / f"checkpoint-{step}" / "tlens.memory").exists()
    stores = [tmp_path / "tlens", tmp_path / "tlens-2"]
    trials = [json.loads((store / "manifest.json").read_text())["trial"] for store in stores]
    assert [trial["name"] for trial in trials] == ["trial 0", "trial 1"]
    rates = [trial["parameters"]["learning_rate"] for trial in trials]
    assert rates[0] != rates[1] and all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert [steps(store) for store in stores] == [(0, 2, 4)] * 2
    assert not list(tmp_path.glob("checkpoint-*"))


# --- the end of a run, and the sinks ---


class LogsFlops(Trainer):
    """As some trainers do: every row of the log has what only the last one has elsewhere."""

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "total_flos": 5.0}, *args, **kwargs)


def test_a_row_with_flops_is_not_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.training.Trainer", LogsFlops)
    memory = MemorySink()
    closed = []
    memory.close = lambda: closed.append(max(memory.steps))
    callback = TLensCallback([CAPITAL], instruments=[HeadScores()], sinks=[memory], every_n_steps=2)
    trainer(tmp_path, callback, logging_steps=1).train()
    assert closed[0] == 6 and list(memory.readings["head_scores/sink"]) == [0, 2, 4, 6]
    assert memory.readings["trainer/total_flos"][4].values.tolist() == [5.0, 5.0]
    assert memory.readings["trainer/loss"][6].labels["update"] == ("5", "6")
    assert not any("train_runtime" in key for key in memory.readings)


def test_three_dots_among_the_sinks_stand_for_the_default_ones(tmp_path):
    memory = MemorySink()
    callback = run(tmp_path, 2, sinks=[..., memory])
    assert [type(sink) for sink in callback.sinks] == [LocalSink, MemorySink]
    assert list(memory.readings["head_scores/sink"]) == [0, 2] and steps(tmp_path / "tlens") == (
        0,
        2,
    )
    first, last = run(tmp_path / "b", 2, sinks=[memory, ...]).sinks
    assert first is memory and isinstance(last, LocalSink)
    with pytest.raises(ValueError, match="is not a Sink"):
        TLensCallback(sinks=[..., 3])
