"""One instrument object is used by one observer at a time."""

import gc

import pytest

from tests import tiny
from tests.training import CAPITAL, trainer
from tlens_callback import HeadScores, MemorySink, ResidualNorms, TLensCallback, Tracer

pytestmark = pytest.mark.usefixtures("one_thread")


def tracer(instruments, model=None):
    return Tracer(
        model or tiny.model("llama"),
        tiny.tokenizer(),
        [CAPITAL],
        instruments=instruments,
        sinks=[MemorySink()],
    )


def test_a_second_one_is_refused_when_it_starts(tmp_path):
    shared = ResidualNorms()
    with tracer([shared]) as first:
        callback = TLensCallback([CAPITAL], instruments=[HeadScores(), shared], sinks=[])
        with pytest.raises(ValueError, match="'residual_norms' is in use by another callback"):
            trainer(tmp_path, callback).train()
        with pytest.raises(ValueError, match="in use by another"), tracer([shared]):
            pass
        with tracer([ResidualNorms()]):
            first.step()
    assert first.observer is None


def test_one_after_the_other_may_use_it(tmp_path):
    shared = ResidualNorms()
    for _ in range(2):
        with tracer([shared]):
            pass
    callback = TLensCallback([CAPITAL], instruments=[shared], sinks=[MemorySink()])
    for run in "ab":
        trainer(tmp_path / run, callback).train()


def test_a_run_that_was_interrupted_and_forgotten_does_not_keep_it():
    shared = ResidualNorms()
    abandoned = tracer([shared])
    abandoned.__enter__()
    gc.disable()
    try:
        del abandoned
        with tracer([shared]):
            pass
    finally:
        gc.enable()
