"""Preferences of the training data: chosen beside rejected, held against TRL's own rewards."""

import functools
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from tests import tiny
from tests.rollouts.test_look import logged, shown
from tests.rollouts.trained import look
from tests.test_no_trace import differences, peft_config, state_of
from tests.training import SENTENCES
from tests.training import trainer as plain_trainer
from tlens_callback import MemorySink
from tlens_callback.rollouts.pairs import preferences

pytestmark = pytest.mark.slow

PAIRS = {
    "prompt": [s.rsplit(" ", 2)[0] for s in SENTENCES[:4]],
    "chosen": [" " + s.rsplit(" ", 2)[1] + " Rome yes" for s in SENTENCES[:4]],
    "rejected": [" no cat", " the dog sat on London", " one two", " seven eight nine"],
}
JUDGED = {
    "prompt": PAIRS["prompt"] * 2,
    "completion": PAIRS["chosen"] + PAIRS["rejected"],
    "label": [True] * 4 + [False] * 4,
}


def trained(folder: Any, kind: str, callback: Any, dropout: float = 0.0) -> Any:
    set_seed(7)
    made, config, rows = {
        "dpo": (DPOTrainer, DPOConfig, PAIRS),
        "kto": (KTOTrainer, KTOConfig, JUDGED),
    }[kind]
    settings = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=len(rows["prompt"]),
        learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
        disable_tqdm=True, logging_steps=1, seed=7, beta=0.3,
    )  # fmt: skip
    trainer = made(
        tiny.model("llama"),
        args=config(**settings),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config(lora_dropout=dropout),
        callbacks=[callback] if callback else [],
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A function of the kind: a training whose pairs were looked at, the same for all tests."""

    @functools.cache
    def run(kind: str) -> tuple[Any, MemorySink]:
        callback, sink = look()
        return trained(tmp_path_factory.mktemp(kind), kind, callback), sink

    return run


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_rewards_are_the_trainers(watched, kind):
    """beta times the change of a completion's log probability is what TRL logs as its reward."""
    of, sink = watched(kind)
    assert sink.readings["rollouts/token"].keys() == {0, 1, 2, 3}, "the last step, too"
    for step in (0, 1, 2):
        rows = shown(sink, step)
        for sign, name in ((1, "rewards/chosen"), (-1, "rewards/rejected")):
            mine = [row["sum_log_ratio"] for row in rows if row["advantage"] == sign]
            assert len(mine) == 4
            wanted = logged(of, name)[step + 1]
            assert 0.3 * np.mean(mine) == pytest.approx(wanted, abs=2e-4)
        if step == 0:
            assert not any(row["log_ratio"].any() for row in rows)
    assert abs(logged(of, "rewards/chosen")[3]) > 1e-2


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_tokens_are_those_of_the_training_data(watched, kind):
    of, sink = watched(kind)
    rows, data = shown(sink, 1), of.train_dataset
    if kind == "dpo":
        wanted = [(r["prompt_ids"], r[f"{k}_ids"]) for r in data for k in ("chosen", "rejected")]
        assert [row["group"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    else:
        ranked = sorted(data, key=lambda r: not r["label"])
        wanted = [(r["prompt_ids"], r["completion_ids"]) for r in ranked]
        assert [row["group"] for row in rows] == [*range(8)]
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        (list(a), list(b)) for a, b in wanted
    ]
    assert not {
        "rollouts/rewards",
        "rollouts/reward_mean",
        "rollouts/truncated",
        "rollouts/age",
    } & {*sink.readings}


def test_judgements_are_compared_with_all_others(watched):
    """Each has a prompt of its own, so that a group would have nothing to compare."""
    _, sink = watched("kto")
    direct, gain = (sink.readings[f"rollouts/{n}"][3].values for n in ("direct", "advantage"))
    wanted = np.tensordot(gain, direct, 1) / np.abs(gain).sum()
    found = sink.readings["rollouts/contrast_direct"][3].values
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (sink.readings["rollouts/contrast_direct_p"][3].values < 1).any()


@pytest.mark.parametrize("kind", ["dpo", pytest.param("kto", marks=pytest.mark.exhaustive)])
def test_preference_training_leaves_no_trace(tmp_path, kind):
    plain = trained(tmp_path / "plain", kind, None, dropout=0.3)
    callback, sink = look()
    of = trained(tmp_path / "watched", kind, callback, dropout=0.3)
    assert differences(state_of(plain), state_of(of)) == [] and "rollouts/token" in sink.readings


def test_few_of_many_and_long_prompts():
    rows = {
        "prompt_ids": [[1] * 9, [2], [3], [4], []],
        "chosen_ids": [[5], [], [6], [7], [8]],
        "rejected_ids": [[5], [6], [6, 7], [7], [8]],
    }
    data = Dataset.from_dict(rows)
    assert [one.prompt for one in preferences(data, 99, 9)] == [(3,), (3,), (4,), (4,)]
    assert [one.completion for one in preferences(data, 3, 9)] == [(6,), (6, 7)]
    judged = Dataset.from_dict(
        {"prompt_ids": [[1]] * 5, "completion_ids": [[2], [3], [4], [5], [6]],
         "label": [True, True, True, False, False]}
    )  # fmt: skip
    found = preferences(judged, 5, 9)
    assert [(one.completion[0], one.advantage) for one in found] == [
        (2, 1),
        (3, 1),
        (5, -1),
        (6, -1),
    ]
    alone = Dataset.from_dict({"prompt_ids": [[1]], "completion_ids": [[2]], "label": [True]})
    assert preferences(alone, 8, 9) == preferences(None, 8, 9) == []


def test_nothing_to_look_at_is_said(tmp_path, caplog):
    callback, sink = look()
    plain_trainer(tmp_path, callback, max_steps=1).train()
    assert caplog.text.count("rollouts=Rollouts(...) has nothing to look at") == 1
    assert not [key for key in sink.readings if key.startswith("rollouts/")]
