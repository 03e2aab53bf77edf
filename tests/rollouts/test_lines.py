"""What a run says on the terminal of its rollouts, against its readings and the memory it takes."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.rollouts.test_tokens import batch_of
from tests.rollouts.trained import distinct, short, watched
from tests.shadow.test_layers import Living
from tests.shadow.test_shadow import lora
from tests.training import CAPITAL, trainer
from tlens_callback import LocalSink, MemorySink, Reading, Shadow, TLensCallback
from tlens_callback.events.contrasts import Told, discoveries
from tlens_callback.rollouts import Look, Recorder, Rollouts
from tlens_callback.rollouts.bounds import most_tokens, peaks
from tlens_callback.sinks.default import outgoing_lines


def said(capsys: Any) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("tlens: ") for line in lines if line.startswith("tlens: rollouts: ")]


def test_what_is_looked_at_is_said_when_training_begins(tmp_path, capsys):
    few = {"per_observation": 6, "groups": 2, "max_tokens": 20}
    sinks = [MemorySink(), LocalSink(tmp_path / "store", page=False)]
    _, _ = watched(tmp_path / "out", rollouts=few, sinks=sinks, max_steps=1)
    first, second, third, _ = said(capsys)
    assert first == (
        "rollouts: at most 6 of 2 groups at each observation, 20 tokens each, run with and without "
        "the adapters"
    )
    assert re.fullmatch(
        r"rollouts: at most 240 tokens go through the shadow at an observation, and take up to "
        r"about \d+ MiB of memory",
        second,
    )
    assert third == (
        "rollouts: their prompts and completions go to the local store and its page and to "
        "MemorySink; to write numbers only, pass rollouts=Rollouts(texts=False)"
    )


def test_without_texts_and_without_adapters(tmp_path, capsys):
    some = {"texts": False, "after_update": True}
    watched(tmp_path, rollouts=some, peft=None, max_steps=1)
    first, second, third, _ = said(capsys)
    assert first.endswith("weights of now; without adapters there is no base to compare with")
    assert "64 tokens each" in first and "at most 4096 tokens" in second, "before and after"
    assert third == "rollouts: only numbers are written, no prompts and completions"


def test_a_run_without_rollouts_says_nothing_of_them(tmp_path, capsys):
    trainer(tmp_path, TLensCallback([CAPITAL], instruments=[], sinks=[]), max_steps=1).train()
    assert said(capsys) == []


def test_a_run_of_wandb_that_begins_later_is_named():
    args: Any = SimpleNamespace(output_dir=".", report_to=["wandb"], push_to_hub=False)
    (line,) = outgoing_lines([], rows=0, args=args, rollouts=True)
    assert "go to W&B;" in line


@pytest.mark.parametrize("fdr", [0.9999, 1e-6])
def test_what_tells_winners_from_losers_is_said_at_the_end(tmp_path, capsys, fdr):
    _, memory = watched(tmp_path, rewards=(distinct, short), rollouts={"fdr": fdr})
    line = said(capsys)[-1]
    at = {k.removeprefix("rollouts/"): r[2] for k, r in memory.readings.items() if 2 in r}
    found, compared = (int(at[name].values) for name in ("discoveries", "looked_at"))
    if fdr < 0.1:
        assert found == 0 and line == (
            f"rollouts: at step 2, none of {compared} numbers compared tells winners from losers "
            f"(false discovery rate 1e-06)"
        )
        return
    assert found > 5
    start = f"rollouts: at step 2, {found} of {compared} numbers compared tell winners from losers"
    assert line.startswith(f"{start} (false discovery rate 1): ")
    named = line.split("): ", 1)[1].split("; ")
    assert len(named) == 6 and named[-1] == f"and {found - 5} more"
    for one in named[:5]:
        what, more, measure, value = re.fullmatch(
            r"(\S+(?: MLP)?) \w+ (more|less) [a-z ]+ \((\w+) (\S+) \w+\)(?:, may be length)?", one
        ).groups()  # type: ignore[union-attr]
        contrast = at[f"contrast_{measure}"]
        if contrast.texts is not None:
            place = contrast.texts.tolist().index(what)
        else:
            layer, head = re.fullmatch(r"L(\d+)(?:H(\d+)| MLP)", what).groups()  # type: ignore
            place = (int(layer),) if head is None else (int(layer), int(head))
        wanted = contrast.values[place]
        assert (wanted > 0) == (more == "more") and float(value) == pytest.approx(wanted, rel=0.06)
        long = abs(at[f"contrast_{measure}_length"].values[place]) > 0.7
        assert long == one.endswith("may be length")
        assert at[f"contrast_{measure}_q"].values[place] <= fdr


def compared(**numbers):
    """Readings of two layers of two heads, and what else is given by name."""
    heads, rank = ("layer", "head"), ("rank",)
    neurons = np.array(["L0N7", "L1N3"])
    axes = {4: heads, 2: ("layer",)}
    for name, values in numbers.items():
        of = rank if "neuron" in name else axes.get(np.size(values), ())
        shape = (2, 2) if of == heads else np.shape(values)
        yield Reading(
            key=f"rollouts/{name}",
            values=np.reshape(values, shape),
            axes=of,
            unit="logit",
            labels={"layer": ["3", "9"]} if of[:1] == ("layer",) else {},
            texts=neurons if of == rank else None,
        ).described(Look.description)


def test_the_surest_are_named_first():
    told = discoveries(
        compared(
            contrast_direct=[0.1, -0.2, 0.3, 0.4],
            contrast_direct_q=[0.5, 0.02, 0.01, 1],
            contrast_direct_p=[0.4, 0.01, 0.01, 1],
            contrast_direct_length=[0, 0.8, 0.1, 0],
            contrast_direct_sign=[0, -0.5, 1, 1],
            contrast_mlp_direct=[0.5, np.nan],
            contrast_mlp_direct_q=[0.04, 0.0],
            contrast_neuron=[-2.0, 3.0],
            contrast_neuron_q=[0.02, 0.9],
            discoveries=4.0,
            looked_at=99.0,
        ),
        most=3,
    )
    assert told is not None and (told.found, told.compared) == (4, 99)
    assert [str(one) for one in told.surest] == [
        "L9H0 adds more to the sampled tokens (direct +0.3 logit)",
        "L3H1 adds less to the sampled tokens (direct -0.2 logit)",
        "L0N7 is less active (neuron -2 logit)",
    ]
    assert [one.q for one in told.surest] == pytest.approx([0.01, 0.02, 0.02])
    assert [one.length for one in told.surest] == pytest.approx([0.1, 0.8, np.nan], nan_ok=True)
    assert [one.sign for one in told.surest] == pytest.approx([1, -0.5, np.nan], nan_ok=True)
    assert discoveries(compared(discoveries=1.0)) is None


def test_a_contrast_that_may_be_length():
    def one(length):
        return Told("L0H0", "direct", 1.0, "logit", 0.01, length=length)

    assert [one(x).may_be_length for x in (0.71, -0.71, 0.69, np.nan)] == [True, True, False, False]


SIZES = [
    {"tokens": 256},
    {"tokens": 1024, "n": 8},
    {"tokens": 1024, "n": 8, "dtype": torch.bfloat16},
    {"vocab_size": 4000, "hidden_size": 128},
    {"hidden_size": 512, "intermediate_size": 64, "tokens": 128},
    {"intermediate_size": 4096, "num_hidden_layers": 6, "tokens": 32},
    {"hidden_size": 256, "peft": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_memory_that_is_announced_is_what_it_takes(size):
    """With rollouts of the longest length, each phase takes no more and not much less."""
    size = dict(size)
    n, length = size.pop("n", 32), size.pop("tokens", 128)
    dtype, peft = size.pop("dtype", torch.float32), size.pop("peft", True)
    model = tiny.model("llama", max_position_embeddings=2048, **size).to(dtype)
    shadow = Shadow.of(lora(model) if peft else model)
    settings = Rollouts(per_observation=n, max_tokens=length, permutations=100)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(7, 60, (2,), generator=draw).tolist() for _ in range(4)]
    each = [prompt for prompt in prompts for _ in range(n // 4)]
    ids = torch.randint(7, 60, (n, length), generator=draw).tolist()
    recorder = Recorder()
    reward = recorder.reward(lambda completion_ids, **_: [float(one[0]) for one in completion_ids])
    reward(prompts=each, completions=ids, completion_ids=ids)
    args = SimpleNamespace(num_generations=n // 4, scale_rewards="none", temperature=1.0)
    batch = batch_of(shadow)
    with Living() as living:
        Look(settings, recorder).before_update(shadow, batch, model, args, 0)
    announced = max(peaks(settings, shadow, has_base=peft).values())
    assert most_tokens(settings, shadow) == n * length
    assert living.most <= announced <= 2.5 * living.most
