"""What instruments remember: with a run's checkpoints, and of that run only."""

import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests import tiny
from tests.training import CAPITAL, trainer
from tlens_callback import MemorySink, Probe, Reading, TLensCallback, read_store
from tlens_callback.run import baselines

KEY = "distance/norm"


class Distance:
    """How far the last token's residual stream is from where it was at first."""

    name = "distance"

    def __init__(self):
        self.baseline = {}

    def taps(self, shadow, batch):
        def last(hidden):
            now = hidden[0, batch.last[0]]
            if "first" not in self.baseline:
                self.baseline["first"] = now.clone()
            return (now - self.baseline["first"]).norm()

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


def watched(tmp_path, resume=None, probes=(CAPITAL,), dtype=None, **args) -> MemorySink:
    sink = MemorySink()
    callback = TLensCallback(
        list(probes),
        instruments=[Distance()],
        sinks=[sink],
        every_n_steps=1,
        dtype=dtype,
        on_error="raise",
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


@pytest.mark.parametrize("args", [{"save_total_limit": 1}, {"save_only_model": True}])
def test_however_checkpoints_are_kept(tmp_path, args):
    whole = norms(watched(tmp_path, max_steps=5, save_steps=4, **args))
    resumed = watched(tmp_path, resume=str(tmp_path / "checkpoint-5"), **args)
    assert norms(resumed)[5] == whole[5] > 0


def test_a_checkpoint_in_another_directory(tmp_path, caplog):
    """`train` does not tell callbacks where it is; the arguments may."""
    whole, old = norms(watched(tmp_path / "a")), str(tmp_path / "a" / "checkpoint-3")
    told = norms(watched(tmp_path / "b", resume=old, resume_from_checkpoint=old))
    assert told[3] == whole[3]
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        assert norms(watched(tmp_path / "c", resume=old))[3] == 0
    assert "name it in TrainingArguments(resume_from_checkpoint=...)" in caplog.text


def test_the_checkpoint_of_another_run_is_not_taken_for_this_ones(tmp_path, caplog):
    """Its step has the same number and its directory the same name."""
    watched(tmp_path / "a", logging_steps=1)
    watched(tmp_path / "b", logging_steps=1, learning_rate=1e-3)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = norms(watched(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3")))
    assert resumed[3] == 0
    assert "is from another training run, so" in caplog.text


def test_another_precision_has_another_first_observation(tmp_path, caplog):
    watched(tmp_path)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = watched(tmp_path, resume=str(tmp_path / "checkpoint-3"), dtype=torch.bfloat16)
    assert norms(resumed)[3] == 0
    assert "is from another precision, so" in caplog.text


def test_what_another_version_kept_is_not_compared_with(tmp_path, caplog, monkeypatch):
    """Its instruments may keep something else under the same key."""
    with monkeypatch.context() as earlier:
        earlier.setattr(baselines, "KEPT", "1")
        watched(tmp_path)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = watched(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert norms(resumed)[3] == 0
    assert "is from another version of tlens_callback, so" in caplog.text


@pytest.mark.slow
def test_two_callbacks_of_one_trainer(tmp_path):
    """Each has a file, a store and a first observation of its own; of one name they are refused."""
    rome = Probe("rome", "the capital of Italy is", target=" Rome")

    def train(names, resume=None):
        callbacks = [
            TLensCallback(
                [probe], instruments=[Distance()], every_n_steps=1, on_error="raise", **name
            )
            for probe, name in zip((CAPITAL, rome), names, strict=True)
        ]
        run = trainer(tmp_path, callbacks[0], save_strategy="steps", save_steps=3)
        run.add_callback(callbacks[1])
        run.train(resume_from_checkpoint=resume)
        return [read_store(tmp_path / n.get("name", "tlens")).curve(KEY) for n in names]

    names = [{}, {"name": "rome"}]
    first = train(names)
    again = train(names, str(tmp_path / "checkpoint-3"))
    for (steps, whole), (resumed_steps, resumed) in zip(first, again, strict=True):
        assert steps.tolist() == resumed_steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert whole.tolist() == resumed.tolist() and whole[3] > 0
    assert first[0][1].tolist() != first[1][1].tolist()
    with pytest.raises(ValueError, match="Two callbacks of one trainer are named 'tlens'"):
        train([{}, {}])


def test_an_instrument_that_is_new_says_so(tmp_path, caplog):
    callback = TLensCallback([CAPITAL], instruments=[Rare(1)], sinks=[], every_n_steps=1)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=3).train()
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = norms(watched(tmp_path, resume=str(tmp_path / "checkpoint-3")))
    assert resumed[3] == 0
    assert "holds nothing for 'distance'" in caplog.text and "'watch'" not in caplog.text


@pytest.mark.slow
def test_a_search_for_the_batch_size_forgets_the_first_try(tmp_path):
    class OutOfMemoryOnce(TrainerCallback):
        tries = 0

        def on_step_begin(self, args, state, control, **kwargs):
            self.tries += 1
            if self.tries == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    instrument, sink = Distance(), MemorySink()
    callback = TLensCallback([CAPITAL], instruments=[instrument], sinks=[sink], every_n_steps=1)
    run = trainer(tmp_path, callback, auto_find_batch_size=True)
    run.add_callback(OutOfMemoryOnce())
    run.train()
    assert norms(sink)[0] == 0 and norms(sink)[6] > 0


def test_without_the_file_it_says_so_and_begins_anew(tmp_path, caplog):
    """The control of the test above."""
    watched(tmp_path)
    (tmp_path / "checkpoint-3" / "tlens.memory").unlink()
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = norms(watched(tmp_path, resume=str(tmp_path / "checkpoint-3")))
    assert resumed[3] == 0
    assert "measured from this step on" in caplog.text


def test_other_probes_have_another_first_observation(tmp_path, caplog):
    watched(tmp_path)
    other = Probe("capital", "the capital of Italy is", target=" Rome", foil=" London")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = norms(watched(tmp_path, str(tmp_path / "checkpoint-3"), probes=[other]))
    assert resumed[3] == 0
    assert "is from other probes, so" in caplog.text


def test_a_torn_file_ends_nothing(tmp_path, caplog):
    watched(tmp_path)
    (tmp_path / "checkpoint-3" / "tlens.memory").write_bytes(b"torn")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        resumed = norms(watched(tmp_path, resume=str(tmp_path / "checkpoint-3")))
    assert resumed[3] == 0 and resumed[6] > 0
    assert "tlens.memory" in caplog.text


def test_a_file_of_somebody_else_ends_nothing(tmp_path, caplog):
    watched(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "checkpoint-3" / "tlens.memory")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        assert norms(watched(tmp_path, resume=str(tmp_path / "checkpoint-3")))[3] == 0
    assert "measured from this step on" in caplog.text


def test_weights_are_what_a_checkpoint_s_safetensors_hold(tmp_path):
    """vLLM loads every *.safetensors of a directory."""
    watched(tmp_path)
    found = sorted(path.name for path in (tmp_path / "checkpoint-3").glob("*.safetensors"))
    assert found == ["model.safetensors"]


class Odd(Rare):
    """Remembers something that is no tensor."""

    def __init__(self):
        super().__init__(1)
        self.baseline = {}

    def read(self, taken, shadow, batch):
        self.baseline["first"] = [1, 2]
        return super().read(taken, shadow, batch)


def test_a_baseline_of_other_things_raises_when_training_begins(tmp_path):
    callback = TLensCallback([CAPITAL], instruments=[Odd()], sinks=[], every_n_steps=1)
    with pytest.raises(ValueError, match="'every1' has a list in its baseline, as 'first'"):
        trainer(tmp_path, callback, save_strategy="steps", save_steps=3).train()


def test_a_baseline_that_goes_wrong_later_ends_nothing(tmp_path, caplog):
    class Late(Rare):
        def __init__(self):
            super().__init__(1)
            self.baseline, self.looks = {}, 0

        def read(self, taken, shadow, batch):
            self.looks += 1
            if self.looks > 1:
                self.baseline["first"] = [1, 2]
            return super().read(taken, shadow, batch)

    callback = TLensCallback([CAPITAL], instruments=[Late()], sinks=[], every_n_steps=1)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        trainer(tmp_path, callback, save_strategy="steps", save_steps=3).train()
    assert "'every1' has a list in its baseline, as 'first'" in caplog.text


def test_ctrl_c_while_it_is_written_leaves_no_half(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tlens_callback.store.atomic.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watched(tmp_path)
    assert not list((tmp_path / "checkpoint-3").glob("*tlens*"))


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
    kept = load_file(tmp_path / "checkpoint-3" / "tlens.memory")
    assert kept["distance/first"].shape == (32,)
    assert any(key.startswith("watch/") for key in kept)


def test_without_a_baseline_the_file_says_which_run_it_is(tmp_path):
    callback = TLensCallback([CAPITAL], instruments=[Rare(1)], sinks=[], watch=False)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=3).train()
    assert (tmp_path / "checkpoint-3").is_dir()
    with safe_open(tmp_path / "checkpoint-3" / "tlens.memory", "pt") as file:
        assert not [key for key in file.keys() if not key.startswith(("trainer/", "checkpoint/"))]
        assert len(file.metadata()["run"]) == 16


def test_a_full_disk_ends_nothing(tmp_path, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("tlens_callback.run.baselines.write", full)
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


def test_a_baseline_lives_where_the_shadow_does(tmp_path):
    watched(tmp_path)
    instrument = Distance()
    callback = TLensCallback([CAPITAL], instruments=[instrument], sinks=[], every_n_steps=1)
    run = trainer(tmp_path, callback)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert instrument.baseline["first"].device == torch.device("cpu")


def adapted():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny.model("llama"), LoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.slow
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


def test_the_older_name_of_the_attribute_is_known():
    """An instrument of a user's own may still call it `memory`."""
    now, before = type("Now", (), {}), type("Before", (), {})
    now.name, now.baseline = "now", {"first": torch.ones(1)}
    before.name, before.memory = "before", {"first": torch.zeros(1)}
    found = baselines.of([now, before, object()])
    assert found == {"now": now.baseline, "before": before.memory}
    assert found["before"] is before.memory
