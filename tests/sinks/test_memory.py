"""Readings in a dict."""

import numpy as np
import pytest

from tests.sinks.samples import everything, same, small
from tlens_callback import Reading
from tlens_callback.sinks import MemorySink


def test_keeps_every_reading_by_key_and_step():
    sink = MemorySink()
    for step in (0, 20, 10):
        sink.write(everything(step), step=step)
    assert sink.steps == (0, 10, 20)
    first = everything(20)
    assert set(sink.readings) == {reading.key for reading in first}
    for reading in first:
        assert same(sink.readings[reading.key][20], reading)
    steps, values = sink.curve("cost/seconds")
    assert steps.tolist() == [0, 10, 20] and values.tolist() == [0.25, 10.25, 20.25]
    assert sink.curve("head_scores/induction")[1].shape == (3, 2, 3)


def test_a_step_written_again_replaces_its_readings():
    sink = MemorySink()
    sink.write(everything(0), step=0)
    sink.write(everything(5), step=5)
    sink.close()
    sink.write([Reading(key="cost/seconds", values=9.0, unit="seconds")], step=5)
    assert sink.curve("cost/seconds")[1].tolist() == [0.25, 9.0]
    assert sink.curve("head_scores/induction")[0].tolist() == [0]


def test_says_what_is_there():
    sink = MemorySink()
    with pytest.raises(ValueError, match="no reading 'a/b'"):
        sink.curve("a/b")
    sink.write(small(0), step=0)
    with pytest.raises(ValueError, match="head_scores/induction"):
        sink.curve("a/b")
    sink.write([Reading(key="cost/seconds", values=np.zeros(2), axes=("x",), unit="s")], step=1)
    with pytest.raises(ValueError, match="changes shape"):
        sink.curve("cost/seconds")
