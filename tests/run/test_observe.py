"""One forward pass serves every instrument; one that fails stands alone."""

import pytest
import torch

from tests import tiny
from tests.shadow.test_shadow import PROBES, batch_for
from tlens_callback import Probe, ProbeBatch, Reading, RepeatLoss, Shadow, observe
from tlens_callback.instruments import fast


class Mean:
    def __init__(self, name, hook="blocks.0.hook_resid_post", act=None):
        self.name, self.hook, self.act = name, hook, act

    def taps(self, shadow, batch):
        return {self.hook: lambda t: t.mean() if self.act is None else self.act(t)}

    def read(self, taken, shadow, batch):
        assert list(taken) == [self.hook]
        yield Reading(key=f"{self.name}/mean", values=taken[self.hook], unit="1")


@pytest.fixture(scope="module")
def shadow():
    return Shadow.of(tiny.model("llama"))


def test_adding_instruments_adds_no_forward_pass(shadow):
    calls = []
    handle = shadow.bridge.original_model.model.register_forward_hook(lambda *_: calls.append(1))
    batch = ProbeBatch.encode(
        [*PROBES, Probe("t", "the cat", target="sat", foil="mat")],
        tiny.tokenizer(),
        vocab_size=shadow.vocab_size,
    )
    readings = observe(shadow, batch, [*fast(), Mean("a"), Mean("b")])
    handle.remove()
    assert len(calls) == 1
    instruments = {reading.instrument for reading in readings}
    # There is no adapter to look at.
    assert instruments == {i.name for i in fast()} - {"adapter_spectrum"} | {"a", "b"}


def test_weights_alone_need_no_forward_pass(shadow):
    class Weights:
        name = "weights"

        def taps(self, shadow, batch):
            return {}

        def read(self, taken, shadow, batch):
            norm = shadow.bridge.blocks[0].attn.W_O.norm()
            yield Reading(key="weights/norm", values=norm.detach(), unit="1")

    calls = []
    handle = shadow.bridge.original_model.model.register_forward_hook(lambda *_: calls.append(1))
    readings = observe(shadow, batch_for(shadow), [Weights()])
    handle.remove()
    assert calls == [] and float(readings[0].values) > 0


def test_low_precision_arrives_as_float32_and_tuples_as_tuples(shadow):
    got = {}

    class Pair(Mean):
        def read(self, taken, shadow, batch):
            got.update(taken)
            return []

    act = lambda t: (t.bfloat16().mean(), t.argmax(-1))  # noqa: E731
    observe(shadow, batch_for(shadow), [Pair("pair", act=act)])
    mean, index = got["blocks.0.hook_resid_post"]
    assert mean.dtype == torch.float32 and index.dtype == torch.long


@pytest.mark.parametrize("first", [True, False])
def test_an_instrument_that_raises_stands_alone(shadow, first):
    def broken(tensor):
        raise RuntimeError("broken")

    bad, good = Mean("bad", act=broken), Mean("good")
    failures = []
    readings = observe(
        shadow,
        batch_for(shadow),
        [bad, good] if first else [good, bad],
        on_error=lambda instrument, error: failures.append((instrument.name, str(error))),
    )
    assert [r.key for r in readings] == ["good/mean"] and failures == [("bad", "broken")]
    with pytest.raises(RuntimeError, match="broken"):
        observe(shadow, batch_for(shadow), [bad, good])


def test_one_key_twice_is_refused(shadow):
    with pytest.raises(ValueError, match="'same/mean'"):
        observe(shadow, batch_for(shadow), [Mean("same"), Mean("same")])


def test_an_optional_instrument_that_fits_nothing_is_left_out_and_another_raises(shadow):
    batch = ProbeBatch.encode(PROBES[:1], tiny.tokenizer(), vocab_size=shadow.vocab_size)
    assert "repeat_loss" not in {r.instrument for r in observe(shadow, batch, fast())}
    with pytest.raises(ValueError, match="needs repeated random blocks"):
        observe(shadow, batch, [RepeatLoss()])


def test_a_key_that_is_another_instruments_is_refused(shadow):
    class Other(Mean):
        def read(self, taken, shadow, batch):
            yield Reading(key="other/mean", values=taken[self.hook], unit="1")

    batch = batch_for(shadow)
    with pytest.raises(ValueError, match="'other/mean' is not named after its instrument"):
        observe(shadow, batch, [Other("mine")])
