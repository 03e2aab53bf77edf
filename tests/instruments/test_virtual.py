"""VirtualHeads equals loops over composed patterns, and finds the two hops of made-up models."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean as mean
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.instruments.common import (
    BLOCKS,
    MIXED_MOE,
    PROBES,
    TEXTS,
    attentions,
    encoded,
    hugging_face,
    of_layers,
    played,
    readings,
    shadow,
)
from tests.instruments.two_hops import two_hops
from tlens_callback import (
    HeadScores,
    Probe,
    ProbeBatch,
    RepeatLoss,
    Shadow,
    VirtualHeads,
    observe,
)

HEADS = 4
FIVE_AND_NINE = {5: (BLOCKS[0], BLOCKS[2]), 9: (BLOCKS[1], BLOCKS[3])}

Head = tuple[int, int]


def by_lag(patterns: Mapping[int, Sequence[np.ndarray]]) -> dict[int, float]:
    """Lag -> mass, of one pattern on the sequences of each block length."""
    each = [
        [
            {
                d: mean(a[q, q - d] for q in range(d + 1, len(a)))
                for d in range((len(a) - 1) // 2 + 1)
            }
            for a in sequences
        ]
        for sequences in patterns.values()
    ]
    lags = range(max(len(lags) for block in each for lags in block))
    return {
        d: mean(
            mean(lags[d] for lags in block if d in lags)
            for block in each
            if any(d in lags for lags in block)
        )
        for d in lags
    }


def induction(patterns: Mapping[int, Sequence[np.ndarray]]) -> list[float]:
    """Per block length."""
    return [
        mean(mean(a[q, q - s + 1] for q in range(s + 1, 2 * s + 1)) for a in sequences)
        for s, sequences in patterns.items()
    ]


def composed(later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    out = np.zeros_like(later)
    for q, k in itertools.product(range(len(out)), repeat=2):
        for m in range(k, q + 1):
            out[q, k] += later[q, m] * earlier[m, k]
    return out


def naive(patterns: Mapping[int, Sequence[np.ndarray]], heads: Sequence[Head]) -> dict[str, dict]:
    """Name of a pair -> its scores, from [layer, head, query, key] per block length, sequence."""
    of = {
        head: {s: [a[head] for a in sequences] for s, sequences in patterns.items()}
        for head in heads
    }
    out = {}
    for a, b in itertools.product(heads, repeat=2):
        if a[0] <= b[0]:
            continue
        both = {
            s: [composed(x, y) for x, y in zip(of[a][s], of[b][s], strict=True)] for s in patterns
        }
        mass = by_lag(both)
        lag = max(mass, key=lambda d: mass[d])
        score, *own = (induction(x) for x in (both, of[a], of[b]))
        out[f"L{a[0]}H{a[1]}*L{b[0]}H{b[1]}"] = {
            "lag": lag,
            "lag_mass": mass[lag],
            "lag_gain": mass[lag] - max(by_lag(of[a])[lag], by_lag(of[b])[lag]),
            "induction": min(score),
            "induction_gain": min(c - max(x, y) for c, x, y in zip(score, *own, strict=True)),
        }
    return out


def listed(got: Mapping[str, Any], kind: str) -> dict[str, dict[str, float]]:
    """Name of a pair -> its scores, in the order of one list; ranks without a pair left out."""
    measures = ("lag", "lag_mass", "lag_gain") if kind == "lag" else ("induction", "induction_gain")
    names = got[f"virtual_heads/{kind}_pair"].texts.tolist()
    return {
        name: {m: float(got[f"virtual_heads/{m}"].values[i]) for m in measures}
        for i, name in enumerate(names)
        if name
    }


def check(got: Mapping[str, Any], expected: Mapping[str, Mapping[str, float]], k: int) -> None:
    for kind in ("lag", "induction"):
        order = sorted(expected, key=lambda name: -expected[name][f"{kind}_gain"])[:k]
        rows = listed(got, kind)
        assert list(rows) == order
        for name, scores in rows.items():
            for measure, value in scores.items():
                assert value == pytest.approx(expected[name][measure], abs=2e-6), (name, measure)
    for measure in ("lag_gain", "induction", "induction_gain"):
        most = max(scores[measure] for scores in expected.values())
        assert got[f"virtual_heads/max_{measure}"].values == pytest.approx(most, abs=2e-6)


def real(model: Any) -> dict[int, list[np.ndarray]]:
    return {s: [attentions(model, probe) for probe in of] for s, of in FIVE_AND_NINE.items()}


def strength(patterns: Mapping[int, Sequence[np.ndarray]], head: Head) -> float:
    return mean(
        mean(mean(a[head][q, 1:q].max() for q in range(s + 1, a.shape[2])) for a in sequences)
        for s, sequences in patterns.items()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_equals_naive_loops_on_hugging_face(family):
    """Sequences of 21 and 19 tokens in one batch: two paddings, and a lag that not all have."""
    expected = naive(real(hugging_face(family)), list(itertools.product(range(2), range(HEADS))))
    assert len(expected) == 16
    check(readings(VirtualHeads(k=16), shadow(family)), expected, 16)
    check(readings(VirtualHeads(k=3), shadow(family)), expected, 3)


@pytest.mark.parametrize("strongest", [5, 7, 12, 20])
def test_the_strongest_of_several_layers(strongest):
    patterns = real(hugging_face("qwen3_moe", mixed=True))
    heads = list(itertools.product(range(MIXED_MOE["num_hidden_layers"]), range(HEADS)))
    heads.sort(key=lambda head: -strength(patterns, head))
    expected = naive(patterns, heads[:strongest])
    of = shadow("qwen3_moe", mixed=True)
    check(readings(VirtualHeads(k=99, strongest=strongest), of), expected, 99)
    if strongest < 12:
        # The check can fail: other heads make other pairs.
        assert expected.keys() != naive(patterns, heads[-strongest:]).keys()


def test_ids_are_those_of_the_names():
    got: Any = readings(VirtualHeads(), shadow("qwen3_moe", mixed=True))["virtual_heads/lag_pair"]
    for value, text in zip(got.values, got.texts.tolist(), strict=True):
        later, earlier = divmod(int(value), 3 * HEADS)
        (a, b), (c, d) = divmod(later, HEADS), divmod(earlier, HEADS)
        assert text == f"L{a}H{b}*L{c}H{d}"


# Heads made by hand: query, block length -> the weights of its keys. The others sink.
Rule = Callable[[int, int], dict[int, float]]


def at(place: Callable[[int, int], int]) -> Rule:
    """All attention on one place, on BOS where there is none."""
    return lambda q, s: {place(q, s) if 0 < place(q, s) <= q else 0: 1.0}


def back(d: int) -> Rule:
    return at(lambda q, s: q - d)


def after_match(offset: int) -> Rule:
    """So many places after the last occurrence of the query's token."""
    return at(lambda q, s: q - s + offset if q > s else 0)


def half(one: Rule, other: Rule) -> Rule:
    def both(q: int, s: int) -> dict[int, float]:
        weights: dict[int, float] = {}
        for rule in (one, other):
            for k, weight in rule(q, s).items():
                weights[k] = weights.get(k, 0) + weight / 2
        return weights

    return both


def made_by_hand(heads: Mapping[Head, Rule], probes=BLOCKS, **settings) -> dict[str, Any]:
    batch = encoded(probes)
    width = batch.tokens.shape[1]
    patterns = torch.rand(2, len(probes), HEADS, width, width).tril()  # other rows: anything
    for row, probe in enumerate(batch.probes):
        if probe.block is None:
            continue
        patterns[:, row, :, : batch.lengths[row]] = 0
        for layer, head, q in itertools.product(range(2), range(HEADS), range(batch.lengths[row])):
            weights = heads.get((layer, head), back(1000))(q, probe.block)
            for k, weight in weights.items():
                patterns[layer, row, head, q, k] = weight
    return played(VirtualHeads(**settings), batch, of_layers("attn.hook_pattern", patterns))


def test_two_hops_make_an_induction_head():
    """One head brings what stood three before; the other looks three past the last occurrence."""
    got = made_by_hand({(0, 2): back(3), (1, 1): after_match(4)}, [TEXTS[1], *BLOCKS])
    rows = listed(got, "induction")
    assert next(iter(rows)) == "L1H1*L0H2"
    assert rows["L1H1*L0H2"] == pytest.approx({"induction": 1, "induction_gain": 1})
    assert got["virtual_heads/max_induction_gain"].values == pytest.approx(1)
    assert max(s["induction_gain"] for n, s in rows.items() if n != "L1H1*L0H2") <= 0


def test_an_induction_head_behind_one_that_stays_is_no_virtual_head():
    for heads in (
        {(0, 0): back(0), (1, 3): after_match(1)},
        {(0, 0): after_match(1), (1, 3): back(0)},
    ):
        got = made_by_hand(heads)
        assert got["virtual_heads/max_induction"].values == pytest.approx(1)
        assert got["virtual_heads/max_induction_gain"].values == pytest.approx(0, abs=1e-6)
        assert got["virtual_heads/max_lag_gain"].values == pytest.approx(0, abs=1e-6)
    # Half of it stays, half of it does not.
    got = made_by_hand({(0, 0): half(back(0), back(2)), (1, 3): after_match(1)})
    assert got["virtual_heads/max_induction"].values == pytest.approx(0.5)
    assert got["virtual_heads/max_induction_gain"].values == pytest.approx(0, abs=1e-6)


def test_two_positional_heads_are_a_virtual_positional_head_only():
    """4 and 4 back: induction on blocks of nine, and on no others."""
    got = made_by_hand({(0, 1): back(4), (1, 2): back(4)})
    rows = listed(got, "lag")
    assert next(iter(rows)) == "L1H2*L0H1"
    assert rows["L1H2*L0H1"] == pytest.approx({"lag": 8, "lag_mass": 1, "lag_gain": 1})
    assert got["virtual_heads/max_induction"].values == pytest.approx(0, abs=1e-6)
    # Seen at one length only, it passes: that is why there are several.
    one = made_by_hand({(0, 1): back(4), (1, 2): back(4)}, [BLOCKS[1], BLOCKS[3]])
    assert one["virtual_heads/max_induction_gain"].values == pytest.approx(1)


def test_half_of_each_hop_is_a_quarter():
    sinking = back(1000)
    heads = {(0, 2): half(back(3), sinking), (1, 1): half(after_match(4), sinking)}
    rows = listed(made_by_hand(heads), "induction")
    assert rows["L1H1*L0H2"] == pytest.approx({"induction": 0.25, "induction_gain": 0.25})


def test_heads_of_one_layer_make_no_pairs():
    """The two strongest are in layer 1: there is nothing to compose, and that is what is said."""
    got = made_by_hand({(1, 0): back(1), (1, 1): back(2)}, k=3, strongest=2)
    for kind in ("lag", "induction"):
        assert got[f"virtual_heads/{kind}_pair"].texts.tolist() == ["", "", ""]
    assert all(not reading.values.any() for reading in got.values())
    assert listed(made_by_hand({(1, 0): back(1), (0, 1): back(2)}, strongest=2), "lag").keys() == {
        "L1H0*L0H1"
    }


def test_what_is_no_number_comes_through():
    def broken(q: int, s: int) -> dict[int, float]:
        return {q: float("nan")}

    got = made_by_hand({(1, 0): broken, (0, 1): back(2)}, strongest=3)
    assert np.isnan(got["virtual_heads/max_lag_gain"].values)


def test_half_precision_patterns_are_widened_first():
    batch = encoded()
    width = batch.tokens.shape[1]
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(2, len(PROBES), HEADS, width, width, generator=generator).tril()
    pattern = (pattern / pattern.sum(-1, keepdim=True)).bfloat16()
    half, full = (
        played(VirtualHeads(), batch, of_layers("attn.hook_pattern", given))
        for given in (pattern, pattern.float())
    )
    for key, reading in full.items():
        np.testing.assert_array_equal(half[key].values, reading.values)


def test_padding_company_and_order_do_not_matter():
    alone = readings(VirtualHeads(k=16), shadow("llama"), BLOCKS)
    longer = Probe("long", list(range(10, 70)))
    company = readings(
        VirtualHeads(k=16), shadow("llama"), [longer, *reversed(BLOCKS[:2]), *BLOCKS[2:], *TEXTS]
    )
    for kind in ("lag", "induction"):
        one, other = listed(alone, kind), listed(company, kind)
        assert list(one) == list(other)
        for name in one:
            assert one[name] == pytest.approx(other[name], abs=1e-6)


@pytest.fixture(scope="module")
def hand_built() -> Mapping[str, Any]:
    probes = [
        Probe.repeated(f"repeat-{s}-{seed}", block=s, times=times, seed=seed)
        for s, times in ((6, 3), (9, 2), (12, 2))
        for seed in range(2)
    ]
    batch = ProbeBatch.encode(probes, vocab_size=30, context=40)
    looks = [HeadScores(), RepeatLoss(), VirtualHeads()]
    return {r.key: r for r in observe(Shadow.of(two_hops()), batch, looks)}


def test_the_hand_built_model_repeats(hand_built):
    assert hand_built["repeat_loss/max_difference"].values < -2
    assert hand_built["repeat_loss/second"].values.max() < 0.5


def test_head_scores_see_nothing_of_it(hand_built):
    assert hand_built["head_scores/max_induction"].values < 0.1


def test_virtual_heads_do(hand_built):
    rows = listed(hand_built, "induction")
    assert next(iter(rows)) == "L1H0*L0H1"
    assert rows["L1H0*L0H1"]["induction"] > 0.9
    assert rows["L1H0*L0H1"]["induction_gain"] > 0.8
    assert hand_built["virtual_heads/max_induction_gain"].values > 0.8


def test_settings():
    with pytest.raises(ValueError, match=r"k=0.*k >= 1"):
        VirtualHeads(k=0)
    with pytest.raises(ValueError, match=r"strongest=1.*at least 2"):
        VirtualHeads(strongest=1)
    with pytest.raises(ValueError, match=r"needs repeated random blocks.*Probe\.repeated"):
        VirtualHeads().taps(shadow("llama"), encoded(TEXTS))


def test_one_layer_has_no_pairs():
    with pytest.raises(ValueError, match="only one layer"):
        readings(VirtualHeads(), Shadow.of(tiny.model("llama", num_hidden_layers=1)))
