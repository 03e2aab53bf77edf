"""Every instrument there is, at every step and with checkpoints: training is the same bit for bit.

`test_no_trace` has the checks on culprits, which show that the comparison finds one.
"""

import dataclasses
import inspect

import pytest

from tests.instruments.settings import SETTINGS
from tests.marks import exhaustive
from tests.test_no_trace import CAPITAL, differences, grpo, sft, state_of
from tlens_callback import (
    Instrument,
    MemorySink,
    Probe,
    Rule,
    TLensCallback,
    Watch,
    instruments,
)


def every_instrument() -> list[Instrument]:
    """All exported classes in all their settings, at every observation."""
    made: list[Instrument] = []
    for name in instruments.__all__:
        exported = getattr(instruments, name)
        if not inspect.isclass(exported):
            continue
        slow = "every" in {field.name for field in dataclasses.fields(exported)}
        for settings in SETTINGS.get(name, [{}]):
            often = {"every": 1} if slow else {}
            made.append(exported(**{**settings, **often, "name": f"{name.lower()}{len(made)}"}))
    return made


def everything(sink: MemorySink) -> TLensCallback:
    made = every_instrument()
    scores = next(one.name for one in made if isinstance(one, instruments.TargetScores))
    return TLensCallback(
        [CAPITAL, Probe("story", "John gave Mary a book and went to the", target=" store")],
        instruments=made,
        sinks=[sink],
        watch=Watch([Rule(f"{scores}/loss/capital", jump=0.1)]),
        every_n_steps=1,
        on_error="raise",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", exhaustive(["llama", "gpt2", "gemma2", "mixtral"], {"gpt2", "gemma2"})
)
def test_sft_with_every_instrument(tmp_path, family):
    sink = MemorySink()
    saving = dict(save_strategy="steps", save_steps=2, save_total_limit=1)
    plain = state_of(sft(tmp_path / "plain", [], family, **saving))
    seen = state_of(sft(tmp_path / "watched", [everything(sink)], family, **saving))
    assert differences(plain, seen) == []
    assert sink.steps == (0, 1, 2, 3, 4, 5)
    measured = {key.partition("/")[0] for key in sink.readings}
    assert {i.name for i in every_instrument()} <= measured
    assert list((tmp_path / "watched").glob("checkpoint-*/tlens.memory"))


@pytest.mark.slow
def test_grpo_with_every_instrument(tmp_path):
    sink = MemorySink()
    plain = state_of(grpo(tmp_path / "plain", []))
    seen = state_of(grpo(tmp_path / "watched", [everything(sink)]))
    assert differences(plain, seen) == []
    assert {i.name for i in every_instrument()} <= {key.partition("/")[0] for key in sink.readings}
