"""What goes out of the training data and of the store is said once, and where it goes."""

from types import SimpleNamespace

import pytest

from tests.training import CAPITAL, trainer
from tlens_callback import LocalSink, MemorySink, TLensCallback, TokenLoss, read_store
from tlens_callback.sinks.default import outgoing_lines

OUT = "Their tokens become labels in the local store and its page"


@pytest.mark.parametrize("given", [True, False])
def test_what_of_the_training_data_goes_out_is_said_once_and_where(tmp_path, capsys, given):
    callback = TLensCallback([CAPITAL] if given else None, instruments=[TokenLoss()])
    trainer(tmp_path, callback, max_steps=2).train()
    said = capsys.readouterr().out
    assert said.count(OUT) == (not given) and said.count("2 rows of the training data") == (
        not given
    )
    tokens = read_store(tmp_path / "tlens").readings(0)
    assert any("train-0" in reading.key for reading in tokens) is not given


def test_every_place_is_named(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=["wandb"], push_to_hub=True)
    sinks = [LocalSink(tmp_path / "tlens"), MemorySink()]
    labels, hub = outgoing_lines(sinks, rows=2, args=args)
    assert "in the local store and its page and in W&B;" in labels
    assert f"{tmp_path.name}/tlens" in hub and "push_to_hub" in hub
    # The controls: probes of one's own, a store elsewhere, nothing that goes out.
    elsewhere = [LocalSink(tmp_path.parent / "elsewhere")]
    assert outgoing_lines(elsewhere, rows=0, args=args) == []
    assert outgoing_lines([MemorySink()], rows=2) == []
