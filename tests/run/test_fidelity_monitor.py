"""A shadow that stops following its model is found at any time; one that is only rounded is not."""

import logging
import math

import pytest
import torch

from tests import tiny
from tests.own_loop import Loop, adapted
from tests.training import CAPITAL
from tlens_callback import FidelityError, Probe, Shadow
from tlens_callback.probes import ProbeBatch
from tlens_callback.run.fidelity_monitor import FidelityMonitor

pytestmark = pytest.mark.usefixtures("one_thread")


class Watched:
    """A loop and its shadow, compared after each step."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.loop = Loop(adapted(lora_dropout=0.0).to(dtype))
        # A shadow that misses an update: a streamed one reads the live weights in each pass.
        self.shadow = Shadow(self.loop.model, weights="resident")
        self.batch = ProbeBatch.encode([CAPITAL], tiny.tokenizer(), vocab_size=tiny.VOCAB)
        self.monitor, self.step = FidelityMonitor(), 0
        self.monitor.start(self.loop.model, self.shadow, self.batch, step=0)

    def go(self, lr: float, sync=lambda shadow: shadow.sync()):
        self.loop.optimizer.param_groups[0]["lr"] = lr
        self.loop.run(1)
        sync(self.shadow)
        self.step += 1
        return self.monitor.check(self.loop.model, self.shadow, self.batch, step=self.step)


def test_a_small_update_that_is_missed_late_is_found():
    """Beside all that the model has moved since the start it is nothing."""
    watched = Watched()
    start = watched.monitor._reference
    for _ in range(5):
        assert watched.go(1e-2).followed == pytest.approx(1, abs=1e-3)
    since_start = float((watched.monitor._reference - start)[0].abs().max())
    with pytest.raises(FidelityError, match=r"made 0% of this change"):
        watched.go(1e-6, sync=lambda shadow: None)
    missed = watched.monitor.checks[6]
    assert missed.close and missed.gap < 0.01 * since_start


@pytest.mark.parametrize("missed", [False, True])
def test_rounding_larger_than_an_update_is_not_taken_for_a_missed_one(missed):
    """In bfloat16 it grows with training: here the shadow's last matrix is off by the same at each
    step. The control is a shadow that then stays behind."""
    watched = Watched(torch.bfloat16)
    head = watched.shadow.bridge.original_model.get_output_embeddings().weight
    off = head.data + 0.03 * torch.randn(head.shape, generator=torch.manual_seed(0)).to(head.dtype)

    def skewed(shadow):
        shadow.sync()
        head.data = off

    watched.go(1e-2, skewed)
    for _ in range(2):
        found = watched.go(2e-3, skewed)
    assert found.telling(watched.monitor._first) and found.gap > 0.5 * found.moved
    if missed:
        with pytest.raises(FidelityError, match="did not follow"):
            for _ in range(6):
                watched.go(2e-3, lambda shadow: None)


def test_logits_that_are_not_finite_are_asked_for_ever_more_rarely(caplog):
    watched = Watched()
    for parameter in watched.loop.model.parameters():
        parameter.data.fill_(math.nan)
    asked = []
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        for step in range(1, 17):
            if watched.monitor.due(step):
                model, shadow = watched.loop.model, watched.shadow
                asked.append(step)
                assert watched.monitor.check(model, shadow, watched.batch, step=step) is None
    assert asked == [1, 2, 4, 8, 16] and len(caplog.messages) == 5


@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_that_nothing_is_trained_is_said_once(lr, caplog):
    watched = Watched()
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        for _ in range(9):
            watched.go(lr)
    said = [message for message in caplog.messages if "Is anything trained?" in message]
    assert len(said) == (lr == 0)
    if said:
        assert "at step 4 the model's answers" in said[0] and "of step 0" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_tokens_see_those_behind_them_is_refused(dtype):
    """Live model and shadow see the same padding, so the comparison of both finds nothing."""

    def start(**config):
        model = tiny.model("gemma3_text", **config).to(dtype)
        shadow = Shadow(model)
        probes = [CAPITAL, Probe("longer", "the capital of Italy is Rome and")]
        batch = ProbeBatch.encode(probes, tiny.tokenizer(), vocab_size=tiny.VOCAB)
        return FidelityMonitor().start(model, shadow, batch, step=0)

    assert start().close
    with pytest.raises(ValueError, match=r"Gemma3ForCausalLM sees the tokens behind it"):
        start(use_bidirectional_attention=True)
