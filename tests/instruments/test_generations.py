"""Generations equals Hugging Face's `generate` of the merged live model, one probe at a time."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from transformers import GenerationConfig

from tests import tiny, tiny_vision
from tests.instruments.common import PROBES, TEXTS, encoded
from tests.instruments.test_change import lora
from tests.marks import exhaustive
from tlens_callback import Generations, Probe, ProbeBatch, Reading, Shadow, observe
from tlens_callback.shadow.generation import UNKNOWN, greedy

TOKENS = 12


def look(of: Shadow, probes=TEXTS, tokens: int = TOKENS, only: Any = None) -> dict[str, Reading]:
    return named(observe(of, encoded(probes), [Generations(tokens=tokens, probes=only)]))


def named(readings: list[Reading]) -> dict[str, Reading]:
    return {reading.key.partition("/")[2]: reading for reading in readings}


def texts(reading: Reading) -> list[str]:
    assert reading.texts is not None
    return reading.texts.tolist()


def answers(got: dict[str, Reading]) -> list[list[int]]:
    return [[int(i) for i in row if i == i] for row in got["token"].values]


@torch.no_grad()
def generated(model: Any, prompt: list[int], most: int, ends: list[int] | None) -> list[int]:
    """What Hugging Face generates after this prompt, alone and without padding."""
    tokens = torch.tensor([prompt])
    # The end is cut off here: a config without one would get that of the model.
    config = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=10**6,
                              pad_token_id=0)  # fmt: skip
    mask = torch.ones_like(tokens)
    got = model.generate(tokens, attention_mask=mask, generation_config=config)
    got = got[0, len(prompt) :].tolist()
    return got[: next((i for i, token in enumerate(got) if token in (ends or [])), most)]


def wanted(model: Any, batch: ProbeBatch, most: int = TOKENS, ends: Any = (2,)) -> list[list[int]]:
    rows = [i for i, probe in enumerate(batch.probes) if probe.block is None]
    prompts = [batch.tokens[row, : batch.lengths[row]].tolist() for row in rows]
    return [generated(model, prompt, most, ends) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights", exhaustive(["resident", "streamed"], ["streamed"]))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_generate_of_the_merged_live_model(family, weights):
    # A tiny Gemma 2 with a tied head repeats the last token, whatever the adapter does.
    peft = lora(
        family, std=0.3, config={"tie_word_embeddings": False} if family == "gemma2" else {}
    )
    got = look(Shadow.of(peft, weights=weights), PROBES)
    merged = copy.deepcopy(peft).merge_and_unload()
    expected = wanted(merged, encoded())
    assert answers(got) == expected
    assert got["length"].values.tolist() == [len(answer) for answer in expected]
    written = ["".join(encoded().token_text(i) for i in answer) for answer in expected]
    assert texts(got["answer"]) == written
    assert got["answer"].labels["prompt"] == tuple(probe.name for probe in TEXTS)
    # It can fail: the base answers otherwise.
    assert wanted(copy.deepcopy(peft).unload(), encoded()) != expected


def by_positions(of: Shadow, prompts: list[list[int]], most: int, ends: Any) -> list[list[int]]:
    """Without a cache or padding."""
    found = []
    for prompt in prompts:
        text = list(prompt)
        while len(text) < min(len(prompt) + most, tiny.CONTEXT):
            token = int(of.logits(torch.tensor([text]))[0, -1].argmax())
            if token in ends:
                break
            text.append(token)
        found.append(text[len(prompt) :])
    return found


PROMPTS = [[1, *range(20, 20 + n)] for n in (3, 40, 11, 3, 1, 25)]


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(), tuple(range(0, tiny.VOCAB, 2))])
@pytest.mark.parametrize("most", exhaustive([1, 5, TOKENS, 90], [1, 5]))
@pytest.mark.parametrize(
    "family", exhaustive(["llama", "mistral", "gpt2", "opt", "gemma2"], ["llama", "opt"])
)
def test_neither_padding_nor_the_cache_matters(family, most, ends):
    """Prompts of many lengths, to the end of the context, and answers of different lengths."""
    of = Shadow.of(tiny.model(family))
    got = greedy(of, PROMPTS, most, ends)
    assert got == by_positions(of, PROMPTS, most, ends)
    if most == 90 and not ends:
        assert [len(p) + len(a) for p, a in zip(PROMPTS, got, strict=True)] == [tiny.CONTEXT] * 6
    if ends and most > 5:
        assert len({len(answer) for answer in got}) > 1


def test_padding_that_a_model_is_not_told_of_would_matter(monkeypatch):
    """The control: the same left padding, and no mask."""
    of = Shadow.of(tiny.model("llama"))
    forward = of.bridge.original_model.forward

    def deaf(tokens, attention_mask=None, position_ids=None, **more):
        return forward(tokens, **more)

    right = greedy(of, PROMPTS, 10, ())
    monkeypatch.setattr(of.bridge.original_model, "forward", deaf)
    assert greedy(of, PROMPTS, 10, ()) != right


def test_few_forward_passes():
    of, passes = Shadow.of(tiny.model("llama")), []
    model = of.bridge.original_model
    model.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape)))
    look(of, tokens=10)
    width = max(encoded(TEXTS).lengths)
    assert passes == [(3, width)] + [(3, 1)] * (len(passes) - 1) and len(passes) <= 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_fine_tuning_in_half_precision(dtype):
    model = tiny.model("llama").to(dtype)
    model.set_attn_implementation("eager")
    got = look(Shadow.of(model), TEXTS)
    assert answers(got) == wanted(model, encoded(TEXTS))


def test_an_answer_ends_where_the_live_models_own_does():
    """At the end tokens of its generation config, of which the model's config may know one."""
    model = tiny.model("llama")
    (first, *_) = answers(look(Shadow.of(model), TEXTS[:1]))
    for at in (0, 3):
        end = first[at]
        model.generation_config.eos_token_id = [2, end]
        got = look(Shadow.of(model), TEXTS[:1])
        assert answers(got) == [first[: first.index(end)]]
        assert got["length"].values == first.index(end)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    batch = encoded(TEXTS[:1])
    assert answers(look(Shadow.of(model), TEXTS[:1])) == wanted(model, batch, ends=None)


def test_an_answer_ends_with_the_context():
    of = Shadow.of(tiny.model("gpt2"))
    long = Probe("long", [1, *range(20, 20 + tiny.CONTEXT - 4)])
    full = Probe("full", [1, *range(20, 20 + tiny.CONTEXT - 1)][: tiny.CONTEXT])
    got = look(of, [long, full, TEXTS[0]])
    assert got["length"].values[:2].tolist() == [3, 0]
    assert texts(got["answer"])[1] == ""
    assert answers(got)[2] == answers(look(of, TEXTS[:1]))[0]


def test_what_has_changed_since_the_observation_before():
    model = tiny.model("llama")
    of, instrument = Shadow.of(model), Generations(tokens=TOKENS)
    batch = encoded(TEXTS)
    first = named(observe(of, batch, [instrument]))
    np.testing.assert_array_equal(first["same"].values, first["length"].values)
    assert first["changed"].values == 0
    before = answers(first)
    for scale in (0.0, 0.02, 0.1):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        of.sync()
        resumed = Generations(tokens=TOKENS)
        resumed.baseline.update(load(save(instrument.baseline)))
        got = named(observe(of, batch, [instrument]))
        now, shares = answers(got), []
        for row, (a, b) in enumerate(zip(now, before, strict=True)):
            pairs = zip(a, b, strict=False)
            same = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
            assert got["same"].values[row] == same
            shares.append(1 - same / max(len(a), len(b)))
        assert float(got["changed"].values) == pytest.approx(np.mean(shares), abs=1e-6)
        assert (float(got["changed"].values) > 0) == (scale > 0)
        for key, reading in named(observe(of, batch, [resumed])).items():
            np.testing.assert_array_equal(reading.values, got[key].values)
        before = now


def test_empty_answers_are_equal():
    model = tiny.model("llama")
    model.generation_config.eos_token_id = list(range(tiny.VOCAB))
    of, instrument = Shadow.of(model), Generations()
    for _ in range(2):
        got = named(observe(of, encoded(TEXTS), [instrument]))
        assert not got["length"].values.any() and got["changed"].values == 0
        assert set(texts(got["answer"])) == {""}


def test_what_is_no_number_is_no_token():
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = np.nan
    of = Shadow.of(model)
    got = greedy(of, [[1, 20], [1, 40]], 8, ())
    assert UNKNOWN not in got[0][:1] and got[1] == [UNKNOWN]
    probes = [Probe("good", [1, 20]), Probe("bad", [1, 40])]
    seen = look(of, probes, tokens=len(got[0]) if UNKNOWN not in got[0] else 1)
    assert np.isnan(seen["answer"].values).tolist() == [False, True]
    assert np.isnan(seen["token"].values[1]).all() and texts(seen["answer"])[1] == ""
    assert np.isnan(seen["changed"].values)


def test_without_a_tokenizer():
    of = Shadow.of(tiny.model("llama"))
    batch = ProbeBatch.encode([Probe("ids", [1, 20, 21])], vocab_size=tiny.VOCAB)
    got = named(observe(of, batch, [Generations(tokens=3)]))
    assert texts(got["answer"]) == [" ".join(map(str, answers(got)[0]))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", exhaustive(tiny_vision.FAMILIES, {*tiny_vision.FAMILIES} - {*tiny_vision.MAIN})
)
def test_vision_models(family):
    """One length at a time: their positions are not told of padding. No image is written."""
    model = tiny_vision.model(family)
    of = Shadow.of(model)
    batch = dataclasses.replace(encoded(TEXTS), placeholders=of.placeholders)
    got = named(observe(of, batch, [Generations(tokens=TOKENS)]))
    model.set_attn_implementation("eager")
    config = model.generation_config.eos_token_id
    ends = {*([config] if isinstance(config, int) else config or []), *of.placeholders}
    assert answers(got) == wanted(model, batch, ends=ends)


def random_states() -> list[Any]:
    # Python's is not among them: the checker of shapes draws from it.
    return [torch.random.get_rng_state().tolist(), repr(np.random.get_state())]


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_leaves_no_trace(weights):
    peft = lora("llama").train()
    of = Shadow.of(peft, weights=weights)
    before, logits = copy.deepcopy(peft.state_dict()), of.logits(encoded().tokens)
    states = random_states()
    look(of, PROBES)
    assert random_states() == states
    assert torch.equal(of.logits(encoded().tokens), logits)
    assert all(torch.equal(value, before[name]) for name, value in peft.state_dict().items())
    assert all(module.training for module in peft.modules())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tokens": 0}, "tokens >= 1"),
        ({"every": 0}, "every >= 1"),
        ({"probes": "story"}, "give a list"),
        ({"probes": ["story", "story"]}, "twice"),
    ],
)
def test_settings_that_cannot_work(settings, match):
    with pytest.raises(ValueError, match=match):
        Generations(**settings)


def test_probes_that_are_chosen_or_unknown():
    of = Shadow.of(tiny.model("llama"))
    assert look(of, PROBES, only=["story"])["answer"].labels["prompt"] == ("story",)
    with pytest.raises(ValueError, match="no probe 'other'"):
        look(of, only=["other"])
    assert look(of, PROBES[1:3]) == {}
