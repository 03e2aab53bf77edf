"""A small training to watch, what fails in it when told to, and a Ctrl-C."""

import threading

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests import tiny
from tlens_callback import Probe, Reading

SENTENCES = [
    "the capital of France is Paris",
    "the capital of Italy is Rome",
    "John gave Mary a book and went to the store",
    "the cat sat on the mat and the dog sat on the cat",
] * 6

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


class Pace(TrainerCallback):
    """Where the training is: a sink that waits for it is slower, however fast the machine is."""

    def __init__(self):
        self.step, self.changed = 0, threading.Condition()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.next()

    def next(self):
        with self.changed:
            self.step += 1
            self.changed.notify_all()

    def reaches(self, step):
        """Waits until this step is being trained, its update still to come."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.step >= step, 120), f"no step {step}"


class Interrupts(TrainerCallback):
    """Ctrl-C at a step, once."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.at = None
            raise KeyboardInterrupt


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
