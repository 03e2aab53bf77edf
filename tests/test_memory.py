"""What instruments remember: with a run's checkpoints, and of that run only."""

import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests import tiny
from tests.training import CAPITAL, trainer
from tlens_callback import MemorySink, Probe, Reading, TLensCallback


class Distance:
    """How far the last token's residual stream is from where it was at first."""

    name = "distance"

    def __init__(self):
        self.memory = {}

    def taps(self, shadow, batch):
        def last(hidden):
            now = hidden[0, batch.last[0]]
            if "first" not in self.memory:
                self.memory["first"] = now.clone()
            return (now - self.memory["first"]).norm()

        return {"blocks.1.hook_resid_post": last}

    def read(self, taken, shadow, batch):
        yield Reading(key="distance/norm", values=next(iter(taken.values())), unit="1")


class Rare:
    """Counts the observations it is asked at."""

    def __init__(self, every):
        self.name, self.every = f"every{every}", every

    def taps(self, shadow, batch):
        return {}

    def read(self, taken, shadow, batch):
        yield Reading(key=f"{self.name}/here", values=1.0, unit="1")


def watched(tmp_path, resume=None, probes=(CAPITAL,), **args) -> MemorySink:
    sink = MemorySink()
    callback = TLensCallback(
        list(probes), instruments=[Distance()], sinks=[sink], every_n_steps=1, on_error="raise"
    )
    settings = dict(save_strategy="steps", save_steps=3, max_steps=6)
    trainer(tmp_path, callback, **{**settings, **args}).train(resume_from_checkpoint=resume)
    return sink


def norms(sink) -> dict[int, float]:
    steps, values = sink.curve("distance/norm")
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def test_a_resumed_run_keeps_its_first_observation(tmp_path):
    whole = norms(watched(tmp_path))
    assert whole[0] == 0 and whole[3] > 0
    resumed = norms(watched(tmp_path, resume=str(tmp_path / "checkpoint-3")))
    assert resumed == {step: whole[step] for step in (3, 4, 5, 6)}


def test_without_the_file_it_says_so_and_begins_anew(tmp_path, caplog):
    """The control of the test above."""
    watched(tmp_path)
    (tmp_path / "checkpoint-3" / "tlens.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = norms(watched(tmp_path, resume=str(tmp_path / "checkpoint-3")))
    assert resumed[3] == 0
    assert "measured from here on" in caplog.text


def test_other_probes_have_another_first_observation(tmp_path, caplog):
    watched(tmp_path)
    other = Probe("capital", "the capital of Italy is", target=" Rome", foil=" London")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = norms(watched(tmp_path, str(tmp_path / "checkpoint-3"), probes=[other]))
    assert resumed[3] == 0
    assert "not those of the run" in caplog.text


def test_a_torn_file_ends_nothing(tmp_path, caplog):
    watched(tmp_path)
    (tmp_path / "checkpoint-3" / "tlens.safetensors").write_bytes(b"torn")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = norms(watched(tmp_path, resume=str(tmp_path / "checkpoint-3")))
    assert resumed[3] == 0 and resumed[6] > 0
    assert "tlens.safetensors" in caplog.text


def test_a_second_run_forgets_the_first(tmp_path):
    """Training twice with one callback: what it compares with is the second run's start."""
    instrument, sink = Distance(), MemorySink()
    callback = TLensCallback([CAPITAL], instruments=[instrument], sinks=[sink], every_n_steps=3)
    run = trainer(tmp_path, callback)
    run.train()
    run.train()
    assert norms(sink)[0] == 0


def test_what_is_kept_is_a_copy_on_the_cpu(tmp_path):
    watched(tmp_path)
    kept = load_file(tmp_path / "checkpoint-3" / "tlens.safetensors")
    assert kept["distance|first"].shape == (32,)
    assert any(key.startswith("watch|") for key in kept)


def test_without_a_memory_there_is_no_file(tmp_path):
    callback = TLensCallback([CAPITAL], instruments=[Rare(1)], sinks=[], watch=False)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=3).train()
    assert (tmp_path / "checkpoint-3").is_dir()
    assert not (tmp_path / "checkpoint-3" / "tlens.safetensors").exists()


def test_a_full_disk_ends_nothing(tmp_path, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("tlens_callback.observer.keep", full)
    callback = TLensCallback([CAPITAL], instruments=[Distance()], sinks=[], every_n_steps=1)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        trainer(tmp_path, callback, save_strategy="steps", save_steps=3).train()
    assert "No space left" in caplog.text
    assert (tmp_path / "checkpoint-6").is_dir()


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 2, 4, 6]), (4, [0, 4, 6])]
)
def test_a_schedule_counts_observations(tmp_path, every, expected):
    sink = MemorySink()
    callback = TLensCallback(
        [CAPITAL], instruments=[Rare(every)], sinks=[sink], every_n_steps=1, on_error="raise"
    )
    trainer(tmp_path, callback).train()
    assert sink.curve(f"every{every}/here")[0].tolist() == expected


def test_a_memory_lives_where_the_shadow_does(tmp_path):
    watched(tmp_path)
    instrument = Distance()
    callback = TLensCallback([CAPITAL], instruments=[instrument], sinks=[], every_n_steps=1)
    run = trainer(tmp_path, callback)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert instrument.memory["first"].device == torch.device("cpu")


def adapted():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny.model("llama"), LoraConfig(r=4, target_modules="all-linear"))


def test_every_fast_instrument_goes_on_where_it_stopped(tmp_path):
    """What a resumed run reads is what the whole run read, changes since step 0 included."""

    def run(resume=None) -> MemorySink:
        sink = MemorySink()
        callback = TLensCallback(
            [CAPITAL], sinks=[sink], watch=False, every_n_steps=1, on_error="raise"
        )
        settings = dict(save_strategy="steps", save_steps=3)
        run = trainer(tmp_path, callback, model=adapted(), **settings)
        run.train(resume_from_checkpoint=resume)
        return sink

    whole, resumed = run(), run(str(tmp_path / "checkpoint-3"))
    changes = {
        "adapter_spectrum/rotation",
        "activation_drift/relative",
        "attention_drift/js",
        "difference_lens/norm",
        "logit_attribution/head_change/capital",
        "residual_norms/ratio",
        "token_loss/change/capital",
        "update_sparsity/all",
    }
    assert changes <= whole.readings.keys()
    for key in whole.readings:
        if key.startswith(("cost/", "fidelity/", "frozen_weights/")):
            continue
        for step in (4, 5, 6):
            one, other = (sink.readings[key][step].values for sink in (whole, resumed))
            np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5, err_msg=key)
    for key in changes - {"adapter_spectrum/rotation"}:
        assert not np.array_equal(whole.readings[key][6].values, whole.readings[key][0].values)
