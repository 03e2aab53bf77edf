"""Saved models one after another: one at a time in memory, and each compared with its shadow."""

import gc
import sys
import weakref

import pytest
import torch

from tests import tiny
from tests.offline.replaying import PROBES, arguments
from tlens_callback import FidelityError, MemorySink, Shadow, TargetScores
from tlens_callback.checkpoints import Checkpoint, Loader
from tlens_callback.offline.stages import Stage, observe_stages

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Four checkpoints of full weights, each a small update further than the one before."""
    folder = tmp_path_factory.mktemp("offline")
    model = tiny.model("llama")
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        model.save_pretrained(folder / str(i))
        with torch.no_grad():
            for parameter in model.parameters():
                # The first is a large one; the others are small beside it.
                size = 0.1 if i == 0 else 1e-5
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return [Checkpoint.of(folder / str(i)) for i in range(4)]


def stages(saved):
    return [Stage(10 * i, one, f"number {i}") for i, one in enumerate(saved)]


def looked(saved, loader=None, **kwargs):
    sink = MemorySink()
    observe_stages(
        stages(saved),
        loader or Loader(device="cpu"),
        arguments([TargetScores()], repeats=False),
        [sink],
        tokenizer=tiny.tokenizer(),
        **kwargs,
    )
    return sink


def test_numbers_are_those_of_each_model(saved):
    sink = looked(saved)
    tokenizer = tiny.tokenizer()
    ids = tokenizer(PROBES[0].content, return_tensors="pt")["input_ids"]
    (paris,) = tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    for i, one in enumerate(saved):
        model = Loader(device="cpu").load(one)
        loss = -model(ids).logits[0, -1].log_softmax(-1)[paris].item()
        got = sink.readings["target_scores/loss/capital"][10 * i]
        assert float(got.values) == pytest.approx(loss, abs=1e-5)
        assert str(sink.readings["checkpoint/name"][10 * i].texts) == f"number {i}"


class Counts(Loader):
    """How many of the models that it ever made are alive, when it is asked for the next."""

    def __init__(self):
        super().__init__(device="cpu")
        self.made, self.alive = [], []

    def _load_full(self, place):
        self.alive.append(sum(model() is not None for model in self.made))
        model = super()._load_full(place)
        self.made.append(weakref.ref(model))
        return model


def test_one_model_is_in_memory_at_a_time(saved):
    gc.disable()  # what only a collection would free is there too long
    try:
        loader = Counts()
        looked(saved, loader)
        assert loader.alive == [0, 0, 0, 0]
    finally:
        gc.enable()


def test_that_is_found_where_somebody_holds_one(saved):
    """The control."""
    loader, held = Counts(), []
    load = loader.load
    loader.load = lambda checkpoint: held.append(load(checkpoint)) or held[-1]
    looked(saved, loader)
    assert loader.alive == [0, 1, 2, 3]


def test_each_model_is_compared_with_its_shadow(saved):
    sink = looked(saved)
    assert sorted(sink.readings["fidelity/kl"]) == [0, 10, 20, 30]
    assert sink.curve("fidelity/max_abs_diff")[1].max() < 1e-4


@pytest.mark.parametrize("at", [1, 2])
def test_a_shadow_of_another_model_is_found(saved, monkeypatch, at):
    """By much, or by so little that it is rounding beside what the first update did."""
    build, built = Shadow.__init__, []

    def of_the_one_before(self, model, **kwargs):
        built.append(model)
        if len(built) == at + 1:
            model = Loader(device="cpu").load(saved[at - 1])
        build(self, model, **kwargs)

    monkeypatch.setattr(Shadow, "__init__", of_the_one_before)
    sink = MemorySink()
    with pytest.raises(FidelityError):
        observe_stages(
            stages(saved),
            Loader(device="cpu"),
            arguments([TargetScores()], repeats=False),
            [sink],
            tokenizer=tiny.tokenizer(),
        )
    assert sink.steps == tuple(10 * i for i in range(at))


def test_what_cannot_be_loaded_raises_or_is_left_out(saved, tmp_path):
    empty = Checkpoint(str(tmp_path / "nothing"))
    other = tiny.model("llama", num_hidden_layers=3)
    other.save_pretrained(tmp_path / "deeper")
    deeper = Checkpoint.of(tmp_path / "deeper")
    told = []

    def tell(stage, error):
        told.append((stage.step, str(error)))

    for wrong, why in ((empty, "nothing"), (deeper, "different shapes")):
        with pytest.raises(ValueError, match=why):
            looked([saved[0], wrong, saved[2]])
        assert looked([saved[0], wrong, saved[2]], leave_out=tell).steps == (0, 20)
        step, text = told.pop()
        assert step == 10 and why in text
    assert looked([empty, saved[0]], leave_out=tell).steps == (10,)
    assert [step for step, _ in told] == [0]


def test_nothing_is_written_while_a_step_is_told_of(saved):
    sink, told = MemorySink(), []
    observe_stages(
        stages(saved),
        Loader(device="cpu"),
        arguments([TargetScores()], repeats=False, writing="wait"),
        [sink],
        tokenizer=tiny.tokenizer(),
        written=lambda observer, stage: told.append((stage.step, sink.steps[-1])),
    )
    assert told == [(0, 0), (10, 10), (20, 20), (30, 30)]


def test_a_bar_on_a_terminal_alone(saved, capsys, monkeypatch):
    looked(saved, progress="replay")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    looked(saved, progress="replay")
    assert "replay: " in capsys.readouterr().err
