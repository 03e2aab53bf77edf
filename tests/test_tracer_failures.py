"""What goes wrong around a tracer: in the loop, in a look, in what it was given."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader

from tests import tiny
from tests.own_loop import Loop, tracer
from tests.training import Constant
from tlens_callback import FidelityError, MemorySink, TargetScores, read_store

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS = "target_scores/loss/capital"


def test_an_exception_goes_on_and_what_was_observed_is_written(tmp_path, capsys):
    instrument, loop = Constant(), Loop(tiny.model("llama"))
    watching = tracer(
        loop.model, sinks=None, output_dir=tmp_path, every_n_steps=2, instruments=[instrument]
    )
    with pytest.raises(KeyboardInterrupt), watching:
        loop.run(3, watching)
        shadow = watching.observer.shadow
        raise KeyboardInterrupt
    assert read_store(tmp_path / "tlens").steps == (0, 1, 2) and instrument.calls == 2
    assert (tmp_path / "tlens" / "page.html").exists()
    assert not list(shadow.bridge.parameters()) and watching.observer is None
    assert "tlens: 2 observations" in capsys.readouterr().out
    with pytest.raises(ValueError, match="inside the block"):
        watching.step()


def test_of_two_exceptions_the_loop_s_own_is_raised(caplog):
    class Broken(MemorySink):
        def close(self):
            raise OSError("No space left on device")

    model = tiny.model("llama")
    settings = dict(instruments=[TargetScores()], sinks=[Broken()])
    with caplog.at_level(logging.WARNING, "tlens_callback"), pytest.raises(ZeroDivisionError):
        with tracer(model, **settings):
            raise ZeroDivisionError
    assert "No space left" in caplog.text
    with pytest.raises(OSError, match="No space left"), tracer(model, **settings):
        pass


def test_a_look_that_fails_at_the_end_closes_everything(tmp_path):
    """What is last looked at raises; the steps before are whole."""
    loop = Loop(tiny.model("llama"))
    instruments = [Constant(fail_at=3)]
    watching = tracer(
        loop.model, instruments=instruments, sinks=None, output_dir=tmp_path, every_n_steps=2
    )
    with pytest.raises(RuntimeError, match="broken"), watching:
        loop.run(3, watching)
    assert read_store(tmp_path / "tlens").steps == (0, 1, 2)
    assert (tmp_path / "tlens" / "page.html").exists() and watching.observer is None


def test_failures_warn_and_the_loop_goes_on(caplog):
    loop, sink = Loop(tiny.model("llama")), MemorySink()
    instruments = [TargetScores(), Constant(fail_at=2)]
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        with tracer(loop.model, instruments=instruments, sinks=[sink], on_error="warn") as t:
            loop.run(3, t)
    assert "'constant' raised RuntimeError: broken" in caplog.text
    assert sorted(sink.readings[LOSS]) == [0, 1, 2, 3] and len(loop.losses) == 3


def test_it_begins_on_a_model_that_can_be_shadowed_or_not_at_all(tmp_path):
    for model in (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")):
        watching = tracer(model, output_dir=tmp_path, sinks=None)
        with pytest.raises(ValueError, match="is not a transformers model"), watching:
            raise AssertionError("the block was entered")
        with pytest.raises(ValueError, match="inside the block"):
            watching.step()
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_not_taken_for_the_batch_s(monkeypatch):
    """`accelerate.utils.find_executable_batch_size` begins anew where memory is short."""
    from accelerate.utils import find_executable_batch_size

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("tlens_callback.run.observer.Shadow", full)
    sizes = []

    @find_executable_batch_size(starting_batch_size=8)
    def train(size):
        sizes.append(size)
        with tracer(tiny.model("llama")):
            pass

    with pytest.raises(RuntimeError, match="no room for the shadow"):
        train()
    assert sizes == [8]


def test_a_shadow_that_does_not_follow_is_found():
    """The check after the first update, with a loop that trains another model than it names."""
    loop = Loop(tiny.model("llama"))
    with pytest.raises(FidelityError), tracer(loop.model, every_n_steps=100) as watching:
        watching.observer.shadow.sync = lambda: None
        watching.observer.shadow.mirror.fill()
        for parameter in watching.observer.shadow.bridge.parameters():
            parameter.data = parameter.data.clone()
        loop.run(1, watching)


@pytest.mark.parametrize("use", ["step", "save"])
def test_outside_of_the_block(use, tmp_path):
    watching = tracer(tiny.model("llama"), instruments=[TargetScores()])
    arguments = [tmp_path] if use == "save" else []
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"tracer\.{use}\(\) belongs inside the block"):
            getattr(watching, use)(*arguments)
        with watching:
            getattr(watching, use)(*arguments)


def test_probes_from_a_file(tmp_path):
    file = tmp_path / "probes.jsonl"
    file.write_text('{"name": "rome", "text": "the capital of Italy is", "target": " Rome"}')
    with tracer(tiny.model("llama"), probes=file, instruments=[TargetScores()]) as watching:
        pass
    assert list(watching.sinks[0].readings["target_scores/loss/rome"]) == [0]


def test_entered_twice_at_once():
    watching = tracer(tiny.model("llama"), instruments=[TargetScores()])
    with watching, pytest.raises(ValueError, match="inside its block already"), watching:
        pass


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a whole number"),
        ({"step": -1}, "step must be a whole number, 0 or more, got -1"),
        ({"step": 1.5}, "step must be a whole number, 0 or more, got 1.5"),
        ({"step": True}, "step must be a whole number"),
        ({"step": 3, "last_step": 3}, "last_step must be a whole number greater than 3, got 3"),
        ({"last_step": "4"}, "last_step must be a whole number greater than 0, got '4'"),
        ({"resume_from": "."}, r"give the step where it resumes, Tracer\(step=...\)"),
        ({"train_dataset": DataLoader([1])}, "give loader.dataset, not the loader"),
        ({"model": "gpt2"}, "model must be the torch module that is trained, got str"),
        ({"probes": [Constant()]}, "probes must be Probe objects"),
        ({"probes": "no file"}, "there is no file 'no file'"),
    ],
)
def test_what_cannot_work_is_said_at_once(settings, text):
    model = settings.get("model") or tiny.model("llama")
    with pytest.raises(ValueError, match=text):
        tracer(model, **{key: value for key, value in settings.items() if key != "model"})


@pytest.mark.parametrize("wrong", ["text", None, [1.0], torch.zeros(2)])
def test_what_is_no_number_is_not_logged(wrong):
    with tracer(tiny.model("llama"), instruments=[TargetScores()]) as watching:
        with pytest.raises(ValueError, match=r"step\(\) takes numbers, got loss="):
            watching.step(loss=wrong)
        with pytest.raises(ValueError, match="counts the steps itself"):
            watching.step(step=3)
