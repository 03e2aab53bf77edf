"""A run watched at every save, and looked at again from its checkpoints: the same readings."""

import pytest
from peft import LoraConfig

from tests.marks import exhaustive
from tests.offline.replaying import replayed, surplus, train, unlike
from tests.test_no_trace_instruments import every_instrument
from tlens_callback.instruments import AdapterSpectrum, TokenChange, TrainedFeatures

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = {
    "SFT with LoRA": dict(
        trl=True, adapter=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    ),
    "full": dict(),
    "DoRA, and modules to save": dict(
        adapter=LoraConfig(
            r=4, use_dora=True, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
        )
    ),
    "gpt2, LoRA": dict(
        family="gpt2", adapter=LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    ),
    "gemma2, full": dict(family="gemma2"),
}


def instruments(run):
    """All that have something to read, but those that read rows of training data, which a replay
    has not."""
    without: tuple[type, ...] = (TrainedFeatures,)
    without += () if "LoRA" in run else (AdapterSpectrum,)
    without += () if "adapter" in RUNS[run] else (TokenChange,)
    return [
        one
        for one in every_instrument()
        if not (isinstance(one, without) or (isinstance(one, TokenChange) and one.rows))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("run", exhaustive(RUNS, {"gpt2, LoRA", "gemma2, full"}))
def test_live_equals_replay(tmp_path, run):
    live = train(tmp_path, instruments(run), **RUNS[run])
    base = None if "adapter" in RUNS[run] else tmp_path / "base"
    again = replayed(tmp_path, instruments(run), base=base)
    assert again.store.steps == (0, 2, 4, 6) and not again.left_out
    assert unlike(live, again.store) == surplus(live)
    keys = {reading.key for step in live.steps for reading in live.readings(step)}
    assert {"watch/events", "trainer/loss", "trainer/grad_norm"} <= keys
    assert len({key.partition("/")[0] for key in keys}) > 20
    assert len(live.reading("trainer/loss", 4).values) == 2
