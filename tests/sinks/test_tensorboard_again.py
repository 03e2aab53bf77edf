"""Event files of a run that begins again or is resumed, read back with TensorBoard's reader."""

import numpy as np
import pytest

from tests.sinks.test_tensorboard import scalar, steps
from tlens_callback.reading import Reading
from tlens_callback.sinks import TensorBoardSink


@pytest.mark.parametrize("again", [20, 30])
def test_a_step_again_begins_anew_from_there(tmp_path, again):
    sink = TensorBoardSink(tmp_path)
    for step in (0, 10, 20, 30):
        sink.write([scalar(step)], step=step)
    changed = Reading(key="head_scores/max", values=np.array(-1.0), unit="probability")
    sink.write([changed], step=again)
    before = [(step, step) for step in (0, 10, 20) if step < again]
    assert steps(tmp_path) == [*before, (again, -1)]
    sink.close()


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    for first, last in ((0, 30), (20, 40)):
        sink = TensorBoardSink(tmp_path / "tb")
        for step in range(first, last + 1, 10):
            sink.write([scalar(step + first)], step=step)
        sink.close()
    assert steps(tmp_path / "tb") == [(0, 0), (10, 10), (20, 40), (30, 50), (40, 60)]
    again = TensorBoardSink(tmp_path / "tb")
    again.write([scalar(0)], step=0)
    again.close()
    assert again.path == tmp_path / "tb-2"
    assert len(steps(tmp_path / "tb")) == 5
    resumed = TensorBoardSink(tmp_path / "tb")
    resumed.write([scalar(1)], step=1)
    resumed.close()
    assert steps(tmp_path / "tb-2") == [(0, 0), (1, 1)]


def test_without_the_mark_of_a_new_beginning_both_would_be_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBoardSink, "_choose_folder", lambda self, step: False)
    for first in (0, 20):
        sink = TensorBoardSink(tmp_path)
        for step in (first, first + 10, first + 20):
            sink.write([scalar(step)], step=step)
        sink.close()
    assert [step for step, _ in steps(tmp_path)] == [0, 10, 20, 20, 30, 40]
