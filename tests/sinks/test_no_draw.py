"""No sink draws from the random numbers that a trainer draws from, on whatever thread."""

import random

import numpy as np
import pytest
import torch
import wandb

from tests.sinks import trackio_run
from tests.sinks.samples import everything
from tlens_callback import LocalSink, MemorySink, TensorBoardSink, TrackioSink, WandbSink


def state():
    name, *numpy = np.random.get_state()
    return (
        random.getstate(),
        (name, numpy[0].tobytes(), *numpy[1:]),
        torch.get_rng_state().numpy().tobytes(),
    )


@pytest.mark.parametrize(
    "sink",
    [LocalSink, MemorySink, TensorBoardSink, TrackioSink, WandbSink],
    ids=lambda s: s.__name__,
)
def test_it_draws_nothing(offline, monkeypatch, sink):
    assert trackio_run.DIR
    monkeypatch.setenv("TRACKIO_PROJECT", "test_it_draws_nothing")
    store = LocalSink(offline / "store")
    made = {
        LocalSink: lambda: LocalSink(offline / "own"),
        MemorySink: MemorySink,
        TensorBoardSink: lambda: TensorBoardSink(offline / "tb", store=store),
        TrackioSink: lambda: TrackioSink(store=store),
        WandbSink: lambda: WandbSink(store=store, everything=True),
    }[sink]
    store.write(everything(0), step=0)
    before = state()
    one = made()
    for step in (0, 3):
        one.write(everything(step), step=step)
    one.close()
    assert state() == before
    random.random()
    assert state() != before, "and a draw is seen"
    wandb.teardown()
