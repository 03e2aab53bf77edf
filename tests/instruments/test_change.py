"""TokenChange equals scipy's arithmetic on the live model with and without its adapter."""

import copy
import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load, save
from scipy.spatial.distance import jensenshannon

from tests import tiny
from tests.instruments.common import BLOCKS, PROBES, TEXTS, encoded, ids
from tests.training import CAPITAL, trainer
from tlens_callback import (
    Generations,
    MemorySink,
    Probe,
    Reading,
    Shadow,
    TLensCallback,
    TokenChange,
    observe,
)
from tlens_callback.instruments.parts import predictions

K = 4


def lora(family: str, *, std: float = 0.1, dtype: Any = torch.float32, **settings: Any) -> Any:
    """A live model with an adapter that has moved by `std`; 0 is a new one."""
    model = tiny.model(family, **settings.pop("config", {}))
    model.set_attn_implementation("eager")
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft = get_peft_model(model, LoraConfig(**config))
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and std:
                parameter += std * torch.randn_like(parameter)
    return peft.to(dtype).eval()


def scaled(peft: Any, by: float) -> None:
    """Changes the scaling of the adapter, behind everybody's back."""
    for module in peft.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= by


@torch.no_grad()
def both(peft: Any, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[pos, vocab], the live model's ln p of one probe with its adapter, and without."""
    now = peft(input_ids=tokens, use_cache=False).logits[0].double().numpy()
    with peft.disable_adapter():
        base = peft(input_ids=tokens, use_cache=False).logits[0].double().numpy()
    return scipy.special.log_softmax(now, -1), scipy.special.log_softmax(base, -1)


def by_hand(now: np.ndarray, base: np.ndarray, following: list[int]) -> dict[str, np.ndarray]:
    """The measures by token, and the means, from ln p of now and of the base."""
    at = range(len(following))
    pairs = list(zip(np.exp(now), np.exp(base), strict=True))[: len(following)]
    own, before = now[at, following], base[at, following]
    got = {
        "log_ratio": own - before,
        "js": np.array([jensenshannon(p, q) ** 2 for p, q in pairs]),
        "entropy": np.array([scipy.stats.entropy(p) for p, _ in pairs]),
        "base_entropy": np.array([scipy.stats.entropy(q) for _, q in pairs]),
        "rank": (now[at] > own[:, None]).sum(1),
        "base_rank": (base[at] > before[:, None]).sum(1),
        "kl": np.mean([scipy.stats.entropy(p, q) for p, q in pairs]),
    }
    return got | {
        "mean_js": got["js"].mean(),
        "mean_abs_log_ratio": np.abs(got["log_ratio"]).mean(),
    }


def wanted(peft: Any, probes=TEXTS) -> dict[str, np.ndarray]:
    found = {}
    for probe in probes:
        tokens = ids(probe)
        for measure, value in by_hand(*both(peft, tokens), tokens[0, 1:].tolist()).items():
            found[f"{measure}/{probe.name}"] = value
    return found


def look(of: Shadow, probes=PROBES, **settings: Any) -> dict[str, Reading]:
    batch = encoded(probes)
    return named(observe(of, batch, [TokenChange(k=K, **settings)]))


def named(readings: list[Reading]) -> dict[str, Reading]:
    return {reading.key.partition("/")[2]: reading for reading in readings}


def texts(reading: Reading) -> list[Any]:
    assert reading.texts is not None
    return reading.texts.tolist()


def hooks_of(of: Shadow) -> dict[str, int]:
    points: dict[str, Any] = dict(of.hooks)
    return {name: len(point.fwd_hooks) for name, point in points.items()}


def distance(got: dict[str, Reading], expected: dict[str, np.ndarray]) -> float:
    """The largest difference, in nats; ranks are left out."""
    assert expected.keys() == {key for key in got if "/" in key}
    return max(
        float(np.abs(got[key].values - value).max())
        for key, value in expected.items()
        if "rank" not in key
    )


MODELS = {
    "llama": {},
    "llama tied": {"config": {"tie_word_embeddings": True}},
    "llama head": {"modules_to_save": ["lm_head"]},
    "llama embeddings": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "gemma2": {},
    "gemma2 untied": {"config": {"tie_word_embeddings": False, "final_logit_softcapping": 2.0}},
    "gpt2": {},
    "qwen3_moe": {},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("model", MODELS)
def test_equals_the_live_model_with_and_without_its_adapter(model, weights):
    peft = lora(model.split()[0], **copy.deepcopy(MODELS[model]))
    got, expected = look(Shadow.of(peft, weights=weights)), wanted(peft)
    assert distance(got, expected) < 2e-5
    for key, value in expected.items():
        if "rank" in key:
            np.testing.assert_array_equal(got[key].values, value)
    # It can fail: the adapter has moved something, and as much as it moves is measured.
    assert min(expected[f"mean_js/{probe.name}"] for probe in TEXTS) > 1e-3
    scaled(peft, 1.01)
    assert distance(got, wanted(peft)) > 1e-3


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16(family, weights):
    """The live model rounds at other places than merged weights do."""
    peft = lora(family, dtype=torch.bfloat16)
    got = look(Shadow.of(peft, weights=weights))
    rounding = distance(got, wanted(peft))
    assert rounding < 0.2
    merged, base = copy.deepcopy(peft).merge_and_unload(), copy.deepcopy(peft).unload()
    for probe in TEXTS:
        tokens = ids(probe)
        with torch.no_grad():
            now, before = (
                scipy.special.log_softmax(m(tokens, use_cache=False).logits[0].double().numpy(), -1)
                for m in (merged, base)
            )
        for measure, value in by_hand(now, before, tokens[0, 1:].tolist()).items():
            if "rank" not in measure:
                np.testing.assert_allclose(got[f"{measure}/{probe.name}"].values, value, atol=0.1)
    scaled(peft, 1.5)
    assert distance(got, wanted(peft)) > 2 * rounding


# Each way to hold weights, and each precision, with some families; all of them now and then.
@pytest.mark.parametrize(
    ("family", "weights", "dtype"),
    [
        pytest.param(
            family, weights, dtype, marks=[pytest.mark.exhaustive] * ((i + a + b) % 4 != 0)
        )
        for i, family in enumerate(tiny.FAMILIES)
        for a, weights in enumerate(["resident", "streamed"])
        for b, dtype in enumerate([torch.float32, torch.bfloat16])
    ],
)
def test_a_new_adapter_has_changed_nothing(family, weights, dtype):
    peft = lora(family, std=0, dtype=dtype)
    of = Shadow.of(peft, weights=weights)
    instrument = TokenChange(k=K, rows=2)
    got = named(observe(of, with_rows(), [instrument]))
    for key, reading in got.items():
        measure = key.partition("/")[0].removeprefix("rows_")
        if measure in ("log_ratio", "js", "mean_js", "mean_abs_log_ratio", "kl", "gained", "lost"):
            assert not np.nan_to_num(reading.values).any(), key
    for key in ("gained", "lost", "rows_gained"):
        assert set(texts(got[key])) == {""}
    for probe in TEXTS:
        for measure in ("entropy", "rank"):
            one, other = (got[f"{kind}{measure}/{probe.name}"].values for kind in ("", "base_"))
            np.testing.assert_array_equal(one, other)


def test_tokens_that_are_gained_and_lost():
    peft = lora("llama")
    got = look(Shadow.of(peft))
    gained, lost, n = Counter(), Counter(), 0
    for probe in TEXTS:
        now, base = both(peft, ids(probe))
        for difference in now - base:
            order = np.argsort(difference)
            gained.update(i for i in order[-K:].tolist() if difference[i] > 0)
            lost.update(i for i in order[:K].tolist() if difference[i] < 0)
            n += 1
    names = encoded(TEXTS)
    for measure, counts in (("gained", gained), ("lost", lost)):
        reading = got[measure]
        expected = sorted(counts.values(), reverse=True)[:K]
        np.testing.assert_allclose(reading.values, np.array(expected) / n, rtol=1e-6)
        count_of = {names.token_text(i): count for i, count in counts.items()}
        shown = texts(reading)
        assert [count_of[text] for text in shown] == expected and len(set(shown)) == K


def test_a_token_that_training_adds_everywhere_is_gained():
    """And nothing else is, with the k of one; the head alone is trained."""
    peft = lora("gptj", modules_to_save=["lm_head"], std=0)
    token = 40
    with torch.no_grad():
        peft.base_model.model.lm_head.modules_to_save["default"].bias[token] += 1
    of = Shadow.of(peft)
    got = named(observe(of, encoded(), [TokenChange(k=1)]))
    assert texts(got["gained"]) == [encoded().token_text(token)]
    assert got["gained"].values == 1
    got = named(observe(of, encoded(), [TokenChange(k=3)]))
    assert got["gained"].values[1:].max() == 0 and texts(got["gained"])[1:] == ["", ""]
    assert got["lost"].values[0] > 0


@pytest.mark.parametrize(
    "tokens, sizes, wanted",
    [
        ([[5, 6], [6, 7]], [[1, 1], [1, 1]], ([6, 5, 7], [1, 0.5, 0.5])),
        ([[5, 6], [6, 7]], [[1, 1], [0, 2]], ([7, 5, 6], [0.5, 0.5, 0.5])),
        ([[5, 6], [6, 7]], [[0, 0], [0, 0]], ([None] * 3, [0, 0, 0])),
        ([[5, 6], [6, 7]], [[1, math.nan], [0, 2]], ([None] * 3, [None] * 3)),
    ],
)
def test_the_most_frequent(tokens, sizes, wanted):
    got = predictions.most_frequent(np.array(tokens), np.array(sizes, dtype=float), 3)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, np.array(other, dtype=float))


def with_rows(first: int = 20, n: int = 3, taken: list[int] | None = None) -> Any:
    """A batch with a source of training rows of several lengths, each new."""
    count = iter(range(first, 90))

    def take(rows: int) -> list[list[int]]:
        if taken is not None:
            taken.append(rows)
        return [[1, *(next(count) for _ in range(4 + 2 * i))] for i in range(min(rows, n))]

    return dataclasses.replace(encoded(), training=take)


def test_rows_of_the_training_data():
    peft, taken = lora("gemma2"), []
    batch = with_rows(taken=taken)
    rows = [[1, *range(20, 24)], [1, *range(24, 30)], [1, *range(30, 38)]]
    rows = [row[:8] for row in rows]
    instrument = TokenChange(k=K, rows=3, length=8)
    of = Shadow.of(peft)
    got = named(observe(of, batch, [instrument]))
    each = [by_hand(*both(peft, torch.tensor([row])), row[1:]) for row in rows]
    for i, (row, one) in enumerate(zip(rows, each, strict=True)):
        for measure in ("log_ratio", "js"):
            reading = got[f"rows_{measure}"]
            n = len(row) - 1
            np.testing.assert_allclose(reading.values[i, :n], one[measure], atol=2e-5)
            assert np.isnan(reading.values[i, n:]).all() and set(texts(reading)[i][n:]) <= {""}
            assert texts(reading)[i][:n] == [batch.token_text(t) for t in row[1:]]
    sizes = [len(row) - 1 for row in rows]
    for measure, of_row in (("rows_mean_js", "mean_js"), ("rows_kl", "kl")):
        mean = np.average([one[of_row] for one in each], weights=sizes)
        assert float(got[measure].values) == pytest.approx(mean, abs=1e-5)
    assert got["rows_gained"].values[0] > 0
    # The same rows at the next observation, and after resuming.
    again = named(observe(of, batch, [instrument]))
    resumed = TokenChange(k=K, rows=3, length=8)
    resumed.baseline.update(load(save(instrument.baseline)))
    later = named(observe(of, with_rows(first=40), [resumed]))
    for key, reading in got.items():
        np.testing.assert_array_equal(reading.values, again[key].values)
        np.testing.assert_array_equal(reading.values, later[key].values)
    assert taken == [3]


def test_without_rows_of_training_data_there_is_nothing_of_them():
    of = Shadow.of(lora("llama"))
    settings = [({"rows": 3}, encoded()), ({"rows": 3}, with_rows(n=0)), ({}, with_rows())]
    for given, batch in settings:
        got = named(observe(of, batch, [TokenChange(**given)]))
        assert got and not [key for key in got if key.startswith("rows_")]


def test_padding_and_blocks_do_not_count():
    of = Shadow.of(lora("llama"))
    alone, together = look(of, TEXTS), look(of)
    assert alone.keys() == together.keys()
    for key, reading in alone.items():
        np.testing.assert_allclose(reading.values, together[key].values, atol=2e-5, err_msg=key)
        assert reading.texts is None or (reading.texts == together[key].texts).all()


def test_chosen_probes():
    of = Shadow.of(lora("llama"))
    batch = encoded()
    got = named(observe(of, batch, [TokenChange(probes=["story", BLOCKS[0].name])]))
    assert {key.partition("/")[2] for key in got} == {"story", BLOCKS[0].name, ""}
    labels = got["log_ratio/story"].labels["token"]
    assert labels == batch.labels[PROBES.index(TEXTS[1])][1:]


def test_pieces_do_not_matter(monkeypatch):
    of = Shadow.of(lora("gemma2"))
    whole = look(of)
    monkeypatch.setattr(predictions, "CHUNK", 3 * tiny.VOCAB)
    monkeypatch.setattr(predictions, "IN_CACHE", 2 * tiny.VOCAB)
    for key, reading in look(of).items():
        np.testing.assert_allclose(reading.values, whole[key].values, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_leaves_no_trace(weights, dtype):
    """Neither in the live model nor in the shadow, of whose weights some are overwritten."""
    peft = lora("llama", modules_to_save=["lm_head"]).train()
    of = Shadow.of(peft, weights=weights, dtype=dtype)
    before = copy.deepcopy(peft.state_dict())
    logits, random = of.logits(encoded().tokens), torch.random.get_rng_state()
    hooks = hooks_of(of)
    look(of)
    assert torch.equal(of.logits(encoded().tokens), logits)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in peft.state_dict().items())
    assert all(module.training for module in peft.modules())
    assert hooks_of(of) == hooks


def test_a_model_without_an_adapter():
    of = Shadow.of(tiny.model("llama"))
    with pytest.raises(ValueError, match="has no adapter that could be left out"):
        look(of)
    optional = TokenChange()
    object.__setattr__(optional, "optional", True)
    assert observe(of, encoded(), [optional]) == []


def test_probes_of_one_token_have_nothing():
    of = Shadow.of(lora("llama"))
    assert look(of, [Probe("one", [5])]) == {}
    assert look(of, [Probe("one", [5]), TEXTS[0]]).keys() == look(of, TEXTS[:1]).keys()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"k": 0}, "k >= 1"),
        ({"rows": -1}, "rows >= 0"),
        ({"length": 0}, "length >= 1"),
        ({"probes": "story"}, "give a list"),
    ],
)
def test_settings_that_cannot_work(settings, match):
    with pytest.raises(ValueError, match=match):
        TokenChange(**settings)


def test_more_tokens_than_there_are():
    with pytest.raises(ValueError, match=f"has {tiny.VOCAB} tokens"):
        observe(Shadow.of(lora("llama")), encoded(), [TokenChange(k=tiny.VOCAB + 1)])


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """The rows of training data, and the last answers, come back with the checkpoint."""

    def run(sink: MemorySink, **more: Any) -> None:
        made = [TokenChange(rows=2), Generations(tokens=6)]
        probes = [CAPITAL, Probe("ids", [1, 20, 21])]
        watched = TLensCallback(probes, instruments=made, sinks=[sink], every_n_steps=1)
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer(tmp_path, watched, lora("llama"), **saving).train(**more)

    whole, resumed = MemorySink(), MemorySink()
    run(whole)
    run(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.steps == (2, 3, 4)
    of_both = [key for key in whole.readings if key.startswith(("token_change", "generations"))]
    assert {"token_change/rows_js", "generations/changed"} <= {*of_both}
    for key in of_both:
        # The checkpoint is observed again, and its answers are compared with themselves.
        for step in (3, 4):
            one, other = (dict(sink.readings[key])[step].values for sink in (whole, resumed))
            np.testing.assert_array_equal(one, other, err_msg=key)
