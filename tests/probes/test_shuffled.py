"""The order of training rows: that of a shuffle of all of them, in the memory of a few."""

import random
import tracemalloc

import numpy as np
import pytest
import torch

from tlens_callback.probes.builtin import training_rows


class Many:
    """A data set of so many rows that makes each when it is asked for."""

    def __init__(self, size):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        self.read.append(i)
        return {"input_ids": [5, 6, i % 7]}


class Tokenizer:
    """One without a BOS token, so that no row is read to look for it."""

    bos_token_id = None


def rows_of(data):
    return training_rows(type("Loader", (), {"dataset": data})(), Tokenizer())


def peak_of(act):
    """The most bytes that Python held for what `act` made."""
    tracemalloc.start()
    try:
        kept = act()
        return tracemalloc.get_traced_memory()[1], kept
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_rows_come_in_the_order_of_a_shuffle_and_then_again(size):
    data = Many(size)
    rows = rows_of(data)
    for n in (1, 3, size, size):
        rows(n)
    wanted = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    assert data.read == [wanted[i % size] for i in range(len(data.read))]
    assert len(data.read) == 1 + min(3, size) + 2 * size


def test_ten_million_rows_take_no_more_memory_than_a_hundred():
    def first(size):
        return lambda: rows_of(Many(size))(32)

    first(100)()  # what is made once, as imports
    (few, _), (many, got) = peak_of(first(100)), peak_of(first(10_000_000))
    assert len(got) == 32 and many < few + 20_000
    # A list of all of them is seen by this measure.
    assert peak_of(lambda: torch.randperm(100_000).tolist())[0] > 20 * few


def test_the_generators_of_training_are_not_drawn_from():
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    rows_of(Many(1000))(300)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
