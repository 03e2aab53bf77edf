"""A real trainer with the callback: when it looks, what it says, what it refuses."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from tests import tiny
from tests.test_no_trace import sft, watcher
from tests.training import CAPITAL, Constant, trainer
from tlens_callback import (
    AttentionPatterns,
    HeadScores,
    MemorySink,
    Probe,
    TargetScores,
    TLensCallback,
    Watch,
    fast,
)


@pytest.mark.parametrize(
    "every, steps", [(1, [0, 1, 2, 3, 4, 5, 6]), (4, [0, 4, 6]), (100, [0, 6]), (3, [0, 3, 6])]
)
def test_observes_at_the_start_every_n_steps_and_at_the_end(tmp_path, every, steps):
    memory = MemorySink()
    instruments = [TargetScores()]
    callback = TLensCallback(
        [CAPITAL], instruments=instruments, sinks=[memory], every_n_steps=every, on_error="raise"
    )
    trainer(tmp_path, callback).train()
    assert sorted(memory.readings["target_scores/loss/capital"]) == steps
    checked = sorted(memory.readings["fidelity/kl"])
    assert checked == [0, 1, 6], "at the start, after the first update, and at the end"


def test_readings_are_those_of_the_weights_at_that_step(tmp_path):
    """What is logged for a step is what a Hugging Face forward of that step's weights gives."""
    seen = {}

    class Asks(TrainerCallback):
        def look(self, args, state, control, model=None, processing_class=None, **kwargs):
            tokenizer = tiny.tokenizer()
            ids = torch.tensor([tokenizer("the capital of France is")["input_ids"]])
            was, _ = model.training, model.eval()
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1]
            model.train(was)
            paris = tokenizer(" Paris", add_special_tokens=False)["input_ids"][0]
            seen[state.global_step] = float(-logits.log_softmax(-1)[paris])

        on_train_begin = on_step_end = look

    memory = MemorySink()
    sft(tmp_path, [Asks(), watcher(sinks=[memory])], eval_strategy="no")
    steps, losses = memory.curve("target_scores/loss/capital")
    assert list(steps) == sorted(seen) and len(set(seen.values())) == len(seen)
    for step, loss in zip(steps, losses, strict=True):
        assert loss == pytest.approx(seen[step], abs=2e-5)


def test_repeated_blocks_come_only_for_head_scores(tmp_path):
    for instruments, want in (([TargetScores()], 1), ([TargetScores(), HeadScores()], 13)):
        batches = []

        class Sees(Constant):
            def taps(self, shadow, batch, batches=batches):
                batches.append(len(batch.probes))
                return {}

            def read(self, taken, shadow, batch):
                return []

        callback = TLensCallback([CAPITAL], instruments=[*instruments, Sees()], sinks=[])
        trainer(tmp_path, callback).train()
        assert set(batches) == {want}


def test_the_end_says_where_to_look_and_what_it_cost(tmp_path, capsys):
    callback = TLensCallback([CAPITAL], instruments=[TargetScores()], every_n_steps=3)
    trainer(tmp_path, callback).train()
    said = capsys.readouterr().out
    assert re.search(
        r"watching 2 layers x 4 heads with 1 probe and 0 repeated blocks; the shadow "
        r"shares all weights of the model and copies none\n"
        r".*the shadow agrees with the model: max logit difference",
        said,
    )
    assert said.count(f"local store {tmp_path / 'tlens'}") == 2, "at the start and at the end"
    assert said.splitlines()[-1].endswith(f"page {tmp_path / 'tlens' / 'page.html'}")
    told = re.search(
        r"3 observations of 1 probe and 0 repeated blocks in ([\d.]+) s, ([\d.]+) of them before "
        r"the first step, [\d.]+% of the run",
        said,
    )
    assert told and float(told[2]) <= float(told[1])
    assert "MiB" in said


class Costs(TrainerCallback):
    """(beforehand, seconds) at the beginning of every step."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_step_begin(self, args, state, control, **kwargs):
        cost = self.callback.observer.cost
        self.seen.append((cost.beforehand, cost.seconds))


def test_what_was_spent_beforehand_is_that_of_the_start(tmp_path):
    callback = TLensCallback([CAPITAL], instruments=[TargetScores()], sinks=[], every_n_steps=1)
    run = trainer(tmp_path, callback)
    costs = Costs(callback)
    run.callback_handler.callbacks.insert(0, costs)
    run.train()
    (first, total), *later = costs.seen
    assert 0 < first == total
    assert all(beforehand == first < seconds for beforehand, seconds in later)


def test_adapters_and_copies_are_said(tmp_path, capsys):
    adapted = get_peft_model(tiny.model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    trainer(tmp_path, TLensCallback([CAPITAL], sinks=[]), model=adapted, max_steps=1).train()
    assert re.search(
        r"; 2 weights have adapters, the shadow takes [\d.]+ MiB more", capsys.readouterr().out
    )
    split = tiny.model("gpt_neox")
    trainer(tmp_path, TLensCallback([CAPITAL], sinks=[]), model=split, max_steps=1).train()
    assert re.search(r"repeated blocks; the shadow takes [\d.]+ MiB more", capsys.readouterr().out)


def with_(**attributes) -> Constant:
    instrument = Constant()
    vars(instrument).update(attributes)
    return instrument


BAD_SETTINGS = [
    (dict(every_n_steps=0), "every_n_steps must be a whole number, 1 or more"),
    (dict(every_n_steps=2.5), "every_n_steps must be a whole number"),
    (dict(every_n_steps=True), "every_n_steps must be a whole number"),
    (dict(on_error="ignore"), "'warn' or 'raise'"),
    (dict(probes="text"), "probes must be a list"),
    (dict(probes=["text"]), "Probe objects"),
    (
        dict(instruments=[AttentionPatterns]),
        "AttentionPatterns is a class; write AttentionPatterns",
    ),
    (dict(instruments=[HeadScores(), HeadScores()]), "The name 'head_scores' is used twice"),
    (
        dict(instruments=[Constant("watch")]),
        "name 'watch' is used twice.*may have the watch's name",
    ),
    (dict(instruments=[Constant("cost")]), "name 'cost' is used twice"),
    (
        dict(instruments=[Constant("trainer")]),
        "name 'trainer' is used twice.*cost, fidelity, trainer",
    ),
    (dict(writing="later"), "writing must be 'wait', 'drop_old' or 'inline', got 'later'"),
    (
        dict(instruments=[with_(every=0)]),
        "every of 'constant' must be a whole number, 1 or more, got 0",
    ),
    (dict(instruments=[with_(every=2.5)]), "every of 'constant' must be a whole number"),
    (dict(instruments=[with_(every="3")]), "every of 'constant' must be a whole number"),
    (dict(instruments=[with_(baseline=None)]), "baseline of 'constant' is a dict of tensors"),
    (dict(instruments=[with_(memory=None)]), "memory of 'constant' is a dict of tensors, got None"),
    (dict(name="a/b"), "name may only have letters"),
    (dict(sinks=[object()]), "is not a Sink"),
    (dict(instruments=[object()]), "is not an Instrument"),
    (dict(instruments=[fast]), r"write \[\*fast"),
    (dict(instruments=[fast()]), r"write \[\*fast"),
    (dict(sinks=MemorySink()), "sinks must be a list"),
    (dict(instruments=HeadScores()), "instruments must be a list"),
    (dict(device="nonsense"), "torch does not know this device"),
    (dict(dtype="float32"), "torch.dtype"),
]


@pytest.mark.parametrize("settings, text", BAD_SETTINGS)
def test_bad_settings_raise_at_construction(settings, text):
    with pytest.raises(ValueError, match=text):
        TLensCallback(**{"sinks": [], **settings})


class UnknownHook(Constant):
    def taps(self, shadow, batch):
        return {"blocks.0.hook_resid_pots": lambda t: t}


BAD_RUNS = [
    (dict(probes=[Probe("p", "the cat", target="")]), "is 0 tokens"),
    (dict(probes=[Probe("p", " ".join(["cat"] * 80))]), "the model's context is 64"),
    (dict(probes=[Probe("p", [5, 4000])]), "outside the model's vocabulary"),
    (dict(probes=[CAPITAL, CAPITAL]), "Two probes are named 'capital'"),
    (dict(instruments=[UnknownHook()]), "no hook point 'blocks.0.hook_resid_pots'"),
    (dict(instruments=[AttentionPatterns(layers=[7])]), "7"),
    (
        dict(watch=Watch(scores="mine")),
        r"scores heads in a role.*Asked for: mine; there are: head_scores",
    ),
    (dict(repeats=False, instruments=[HeadScores()]), "Probe.repeated"),
]


@pytest.mark.parametrize("settings, text", BAD_RUNS)
def test_bad_input_raises_when_training_begins(tmp_path, settings, text):
    callback = TLensCallback(**{"probes": [CAPITAL], "sinks": [], **settings})
    run = trainer(tmp_path, callback)
    with pytest.raises(ValueError, match=text):
        run.train()
    assert run.state.global_step == 0


def test_a_missing_tokenizer_raises(tmp_path):
    with pytest.raises(ValueError, match=r"processing_class="):
        trainer(tmp_path, TLensCallback([CAPITAL], sinks=[]), processing_class=None).train()
    ids = TLensCallback([Probe("ids", [1, 8, 9], target=11)], sinks=[], on_error="raise")
    trainer(tmp_path, ids, processing_class=None).train()
