"""A loop of one's own, watched: what is seen, when, and what is refused."""

import inspect
import logging
import random
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests import tiny
from tests.own_loop import Loop, adapted, compared, rows, tracer
from tests.training import CAPITAL, Constant, trainer
from tlens_callback import (
    ActivationDrift,
    HeadScores,
    MemorySink,
    TargetScores,
    TLensCallback,
    Tracer,
    read_store,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS = "target_scores/loss/capital"


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [lambda: tiny.model("llama"), lambda: adapted(lora_dropout=0.0)], ids=["full", "lora"]
)
def test_a_trainer_and_a_loop_with_the_same_batches_read_the_same(tmp_path, model):
    """Fast instruments, watch, logs, steps of observation and of checks; weights equal by bits."""
    by_trainer, by_loop, other = MemorySink(), MemorySink(), MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[by_trainer], every_n_steps=2, on_error="raise")
    run = trainer(
        tmp_path, callback, model(), max_steps=7, logging_steps=1, max_grad_norm=0,
        optim="adamw_torch", lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    run.train()
    for sink, lr in ((by_loop, 1e-2), (other, 1.1e-2)):
        loop = Loop(model(), lr=lr)
        with tracer(loop.model, sinks=[sink], every_n_steps=2) as watching:
            loop.run(7, watching)
        both = zip(run.model.parameters(), loop.model.parameters(), strict=True)
        equal = [torch.equal(a, b) for a, b in both]
        assert all(equal) == (sink is by_loop)
    assert list(by_trainer.steps) == list(by_loop.steps) == [0, 1, 2, 4, 6, 7]
    assert by_loop.readings["trainer/loss"][4].labels["update"] == ("3", "4")
    of_the_trainer = {f"trainer/{name}" for name in ("grad_norm", "learning_rate", "epoch")}
    assert compared(by_trainer, by_loop) == (of_the_trainer, 0.0)
    assert compared(by_trainer, other)[1] > 1e-2


@pytest.mark.parametrize("known", [True, False])
def test_a_last_step_that_is_known_is_observed_as_the_trainer_s(tmp_path, known):
    """One that would be observed anyway: with the shadow's check and the rare instruments. The
    control is a tracer that learns too late that it was the last."""
    sinks = MemorySink(), MemorySink()
    rare = Constant()
    rare.every = 10
    settings = dict(every_n_steps=2, on_error="raise", instruments=[TargetScores(), rare])
    callback = TLensCallback([CAPITAL], sinks=[sinks[0]], **settings)
    trainer(
        tmp_path, callback, max_grad_norm=0, optim="adamw_torch",
        lr_scheduler_type="constant", train_sampling_strategy="sequential",
    ).train()  # fmt: skip
    loop = Loop(tiny.model("llama"))
    last_step = 6 if known else None
    with tracer(loop.model, sinks=[sinks[1]], last_step=last_step, **settings) as watching:
        loop.run(6, watching)
    theirs, ours = (
        {(key, step): reading.values.tolist() for key, by_step in sink.readings.items()
         for step, reading in by_step.items() if not key.startswith(("trainer/", "cost/"))}
        for sink in sinks
    )  # fmt: skip
    late = {("constant/mean", 6)} | {
        (f"fidelity/{measure}", 6) for measure in ("max_abs_diff", "kl", "top1_agreement")
    }
    assert {at for at in theirs if theirs[at] != ours.get(at)} == (set() if known else late)


def test_what_a_step_logs_belongs_to_the_observation_at_that_step():
    sink, model = MemorySink(), tiny.model("llama")
    with tracer(model, instruments=[TargetScores()], sinks=[sink], every_n_steps=2) as watching:
        watching.step(loss=1.5, **{"eval/accuracy": np.float32(0.5)})
        watching.step(loss=torch.tensor(2.5, requires_grad=True))
        watching.step()
        watching.step(lr=3, loss=float("nan"))
        watching.step(loss=7)
    found = {
        step: dict(zip(reading.labels["update"], reading.values.tolist(), strict=True))
        for step, reading in sink.readings["trainer/loss"].items()
    }
    assert found[2] == {"1": 1.5, "2": 2.5} and found[5] == {"5": 7.0}
    assert found[4].keys() == {"4"} and np.isnan(found[4]["4"])
    assert sink.readings["trainer/eval/accuracy"].keys() == {2}
    assert sink.readings["trainer/lr"][4].values.tolist() == [3.0]


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(1, 2, [0, 1, 2]), (2, 4, [0, 2, 4]), (3, 4, [0, 3, 4])]
)
def test_the_last_step_is_observed_once(every, steps, expected):
    instrument, sink = Constant(), MemorySink()
    loop = Loop(tiny.model("llama"))
    with tracer(loop.model, instruments=[instrument], sinks=[sink], every_n_steps=every) as t:
        loop.run(steps, t)
    assert sorted(sink.readings["constant/mean"]) == expected
    assert instrument.calls == len(expected)
    assert sorted(sink.readings["fidelity/kl"])[:2] == [0, 1]


def test_a_block_without_a_step_is_observed_once(capsys):
    sink = MemorySink()
    with tracer(tiny.model("llama"), sinks=[sink], instruments=[TargetScores()]):
        pass
    assert list(sink.steps) == [0]
    said = capsys.readouterr().out
    assert "tlens: watching 2 layers x 4 heads with 1 probe and " in said
    assert "tlens: 1 observation of 1 probe and " in said


def test_the_default_store_has_a_page_and_a_second_run_another_folder(tmp_path, capsys):
    loop = Loop(tiny.model("llama"))
    watching = tracer(loop.model, sinks=None, output_dir=tmp_path / "out", name="eyes")
    for folder in ("eyes", "eyes-2"):
        with watching:
            loop.run(1, watching)
        path = tmp_path / "out" / folder
        assert read_store(path).steps == (0, 1) and (path / "page.html").stat().st_size > 10**5
        assert f"page {path / 'page.html'}" in capsys.readouterr().out
        assert watching.sinks[0].path == path and watching.observer is None
    moved = [read_store(tmp_path / "out" / name).reading("activation_drift/cka", 1).values
             for name in ("eyes", "eyes-2")]  # fmt: skip
    assert not np.array_equal(*moved), "the second run is compared with its own first step"
    first = read_store(tmp_path / "out" / "eyes-2").reading("activation_drift/relative", 0)
    assert (first.values == 0).all()


def test_the_training_data_give_probes_and_rows_and_keep_their_order(caplog):
    """An instrument that learns from them, and a data set that draws when it is read."""

    class Draws:
        def __init__(self):
            self.read = []

        def __len__(self):
            return 24

        def __getitem__(self, i):
            self.read.append(i)
            torch.rand(1), random.random(), np.random.rand()
            return rows()[i]

    class Learns(Constant):
        def taps(self, shadow, batch):
            self.rows = batch.training(3)
            return super().taps(shadow, batch)

    data, learns = Draws(), Learns()
    found = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with tracer(tiny.model("llama"), probes=None, train_dataset=data, instruments=[learns]) as t:
        assert [probe.name for probe in t.observer.batch.probes] == ["train-0", "train-1"]
        given = t.observer.batch.tokens[0, : t.observer.batch.lengths[0]].tolist()
    assert given == [i for i in rows()[0]["input_ids"].tolist() if i != 3]
    assert len(learns.rows) == 3 and data.read[:2] == [0, 1]
    assert torch.equal(found[0], torch.get_rng_state())
    assert found[1:] == (random.getstate(), str(np.random.get_state()))
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        with tracer(tiny.model("llama"), probes=None, instruments=[HeadScores()]) as t:
            assert all(probe.block for probe in t.observer.batch.probes)
    assert "repeated blocks are run; pass probes=[...] or train_dataset=" in caplog.text


def test_other_processes_do_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    loop = Loop(tiny.model("llama"))
    with tracer(loop.model, sinks=None, output_dir=tmp_path / "out") as watching:
        loop.run(2, watching)
        watching.save(tmp_path / "checkpoint")
        assert watching.observer is None and watching.sinks == []
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="inside the block"):
        watching.step()


def test_drift_is_of_the_loop_s_own_model():
    """By independent arithmetic: how far the last layer's output at the last token has moved."""
    loop, sink = Loop(tiny.model("llama")), MemorySink()
    ids = torch.tensor(tiny.tokenizer()(CAPITAL.content)["input_ids"])[None]

    def hidden():
        with torch.no_grad():
            return loop.model.model(ids, output_hidden_states=True).hidden_states[1][0].double()

    before = hidden()
    settings = dict(instruments=[ActivationDrift()], every_n_steps=10, repeats=False)
    with tracer(loop.model, sinks=[sink], **settings) as watching:
        loop.run(3, watching)
    reading = sink.readings["activation_drift/relative"][3]
    at = reading.labels["part"].index("resid")
    moved = ((hidden() - before).norm(dim=-1) / before.norm(dim=-1))[1:].mean()
    assert reading.values[0, at] == pytest.approx(float(moved), rel=1e-4)
    assert reading.values[0, at] > 0.01


def test_the_docstring_s_loop_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = re.search(r"( {4}with Tracer.*?)\n\n\S", inspect.getdoc(Tracer), flags=re.DOTALL)[1]
    lines = [line.removeprefix("    ") for line in block.splitlines()]
    model = tiny.model("llama").train()
    names = dict(
        Tracer=Tracer, model=model, tokenizer=tiny.tokenizer(), probes=[CAPITAL],
        loader=DataLoader(rows(), batch_size=4),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip
    exec("\n".join(lines), names)
    assert read_store(tmp_path / "tlens").steps == (0, 1, 6)
