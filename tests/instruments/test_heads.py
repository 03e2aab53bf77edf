"""HeadScores equals loops written from the formulas, and names made-up heads for what they are."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from tests.instruments.common import (
    BLOCKS,
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
from tlens_callback import HeadScores, Probe, Reading

LAYERS, HEADS = 2, 4


def mean(numbers) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def visible(a: np.ndarray, q: int, k: int) -> list[float]:
    """[A[q, k]], or nothing where there is no such place."""
    return [a[q, k]] if 0 <= k <= q else []


def naive(a: np.ndarray, s: int) -> dict[str, Any]:
    """The scores of one head on one sequence, from the formulas in the docstring."""
    tokens = len(a)
    prefix = []
    for q in range(s + 1, tokens):
        total = 0.0
        for k in range(1, q):
            if (q - k) % s == 0:  # key k holds the token of query q
                total += a[q, k + 1]
        prefix.append(total)
    entropy = []
    for q in range(1, tokens):
        bits = -sum(p * math.log(p) for p in a[q] if p > 0)
        entropy.append(bits / math.log(q + 1))
    lags = {
        d: mean(a[q, q - d] for q in range(d + 1, tokens)) for d in range((tokens - 1) // 2 + 1)
    }
    lag = max(lags, key=lambda d: lags[d])
    return {
        "previous": mean(a[q, q - 1] for q in range(1, tokens)),
        "current": mean(a[q, q] for q in range(tokens)),
        "duplicate": mean(a[q, q - s] for q in range(s + 1, tokens)),
        "induction": mean(a[q, q - s + 1] for q in range(s + 1, 2 * s + 1)),
        "induction_diagonal": mean(x for q in range(tokens) for x in visible(a, q, q - s + 1)),
        "prefix_matching": mean(prefix),
        "sink": mean(a[q, 0] for q in range(tokens)),
        "entropy": mean(entropy),
        "lag": lag,
        "lag_mass": lags[lag],
        "lags": lags,
    }


def naive_scores(patterns: dict[int, list[np.ndarray]], measure: str) -> dict[str, np.ndarray]:
    """A measure's three readings, from block length -> sequences of [layer, head, query, key]."""
    shape = next(iter(patterns.values()))[0].shape[:2]
    overall, spread = np.zeros(shape), np.zeros(shape)
    by_block = np.zeros((len(patterns), *shape))
    for layer in range(shape[0]):
        for head in range(shape[1]):
            each = {
                s: [naive(a[layer, head], s) for a in sequences]
                for s, sequences in patterns.items()
            }
            if measure in ("lag", "lag_mass"):
                profiles = {
                    s: {d: mean(x["lags"][d] for x in scores) for d in scores[0]["lags"]}
                    for s, scores in each.items()
                }
                everywhere = {
                    d: mean(profile[d] for profile in profiles.values() if d in profile)
                    for d in range(max(map(len, profiles.values())))
                }
                pick = (
                    (lambda profile: max(profile, key=profile.get))
                    if measure == "lag"
                    else (lambda profile: max(profile.values()))
                )
                blocks = [pick(profile) for profile in profiles.values()]
                overall[layer, head] = pick(everywhere)
            else:
                blocks = [mean(x[measure] for x in scores) for scores in each.values()]
                overall[layer, head] = mean(blocks)
            by_block[:, layer, head] = blocks
            of = blocks
            if len(blocks) == 1:
                of = [x[measure] for scores in each.values() for x in scores]
            spread[layer, head] = math.sqrt(mean((x - mean(of)) ** 2 for x in of))
    return {"": overall, "_by_block": by_block, "_spread": spread}


MEASURES = "previous current duplicate induction prefix_matching sink entropy lag lag_mass".split()


def check(got: dict[str, Reading], patterns: dict[int, list[np.ndarray]], measures) -> None:
    for measure in measures:
        for suffix, expected in naive_scores(patterns, measure).items():
            values = got[f"head_scores/{measure}{suffix}"].values
            np.testing.assert_allclose(values, expected, atol=2e-6, err_msg=measure + suffix)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_equals_naive_loops_on_hugging_face(family):
    got = readings(HeadScores(), shadow(family))
    patterns = {
        5: [attentions(hugging_face(family), BLOCKS[i]) for i in (0, 2)],
        9: [attentions(hugging_face(family), BLOCKS[i]) for i in (1, 3)],
    }
    check(got, patterns, MEASURES)
    assert got["head_scores/induction_by_block"].labels == {"block": ("5", "9")}
    for measure in ("previous", "duplicate", "induction", "prefix_matching"):
        least = naive_scores(patterns, measure)["_by_block"].min(0)
        assert got[f"head_scores/max_{measure}"].values == pytest.approx(least.max(), abs=2e-6)
    entropy = naive_scores(patterns, "entropy")[""]
    assert got["head_scores/min_entropy"].values == pytest.approx(entropy.min(), abs=2e-6)
    assert got["head_scores/mean_entropy"].values == pytest.approx(entropy.mean(), abs=2e-6)
    share = (naive_scores(patterns, "sink")[""] > 0.3).mean()
    assert got["head_scores/sink_share"].values == pytest.approx(share)


def test_the_common_version_by_its_own_name():
    got = readings(HeadScores(strict=False), shadow("llama"))
    patterns = {
        5: [attentions(hugging_face("llama"), BLOCKS[i]) for i in (0, 2)],
        9: [attentions(hugging_face("llama"), BLOCKS[i]) for i in (1, 3)],
    }
    check(got, patterns, ["induction_diagonal"])
    assert "head_scores/max_induction_diagonal" in got
    assert not any(key.startswith("head_scores/induction_by") for key in got)
    assert "head_scores/max_induction" not in got
    for s, a in ((5, patterns[5][0]), (9, patterns[9][0])):
        common = torch.tensor(a).diagonal(1 - s, dim1=2, dim2=3).mean(-1)
        np.testing.assert_allclose(common[1, 2], naive(a[1, 2], s)["induction_diagonal"])


def test_strict_and_common_differ_by_two_queries():
    """With two repeats: the common one has S+2 queries, S-1 and S on top of the strict S."""
    s, a = 9, attentions(hugging_face("llama"), BLOCKS[1])
    probes = [BLOCKS[1]]
    strict = readings(HeadScores(), shadow("llama"), probes)["head_scores/induction"].values
    common = readings(HeadScores(strict=False), shadow("llama"), probes)
    common = common["head_scores/induction_diagonal"].values
    expected = (s * strict + a[:, :, s - 1, 0] + a[:, :, s, 1]) / (s + 2)
    np.testing.assert_allclose(common, expected, atol=1e-6)
    assert np.abs(common - strict).max() > 1e-3


def test_prefix_matching_is_induction_with_two_repeats_only():
    got = readings(HeadScores(), shadow("llama"))
    prefix = got["head_scores/prefix_matching_by_block"].values
    induction = got["head_scores/induction_by_block"].values
    np.testing.assert_allclose(prefix[1], induction[1], atol=1e-6)  # 9 tokens, twice
    assert np.abs(prefix[0] - induction[0]).max() > 1e-2  # 5 tokens, four times


def test_entropy_equals_scipy():
    a = attentions(hugging_face("gpt2"), BLOCKS[0])
    q = np.arange(1, a.shape[2])
    expected = (scipy.stats.entropy(a[:, :, 1:], axis=-1) / np.log(q + 1)).mean(-1)
    got = readings(HeadScores(), shadow("gpt2"), [BLOCKS[0]])
    np.testing.assert_allclose(got["head_scores/entropy"].values, expected, atol=2e-6)


# Heads made by hand. Each is a rule: query, block length -> the weights of its keys.
Rule = Callable[[int, int], dict[int, float]]
RULES: dict[str, Rule] = {
    "sink": lambda q, s: {0: 1.0},
    "previous": lambda q, s: {max(q - 1, 0): 1.0},
    "current": lambda q, s: {q: 1.0},
    "duplicate": lambda q, s: {q - s if q > s else 0: 1.0},
    "induction": lambda q, s: {q - s + 1 if q > s else 0: 1.0},
    "copy from 8 back": lambda q, s: {q - 8 if q > 8 else 0: 1.0},
    "uniform": lambda q, s: {k: 1 / (q + 1) for k in range(q + 1)},
    "all earlier": lambda q, s: (
        {k + 1: 1 / ((q - 1) // s) for k in range(1, q) if (q - k) % s == 0} if q > s else {0: 1.0}
    ),
}


def only(rule: Rule) -> dict[str, Rule]:
    """One head that is looked at, and sinks."""
    return {"it": rule} | {f"sink {i}": RULES["sink"] for i in range(1, LAYERS * HEADS)}


def made_by_hand(heads: dict[str, Rule], probes: list[Probe], instrument: HeadScores):
    """Readings of heads that follow the rules, as if they were layer 0's and layer 1's heads."""
    assert len(heads) == LAYERS * HEADS
    names = list(heads)
    batch = encoded(probes)
    width = batch.tokens.shape[1]
    patterns = torch.rand(LAYERS, len(probes), HEADS, width, width)  # other rows: anything
    for row, probe in enumerate(batch.probes):
        if probe.block is None:
            continue
        for i, name in enumerate(names):
            patterns[i // HEADS, row, i % HEADS, : batch.lengths[row]] = 0
            for q in range(batch.lengths[row]):
                for k, weight in heads[name](q, probe.block).items():
                    patterns[i // HEADS, row, i % HEADS, q, k] = weight
    read = played(instrument, batch, of_layers("attn.hook_pattern", patterns))
    got = {key.split("/")[1]: reading for key, reading in read.items()}
    return lambda measure, head: got[measure].values[..., *divmod(names.index(head), HEADS)], got


def test_made_up_heads_have_the_known_scores():
    value, got = made_by_hand(RULES, [TEXTS[1], *BLOCKS], HeadScores())
    assert value("previous", "previous") == pytest.approx(1)
    assert value("current", "current") == pytest.approx(1)
    assert value("duplicate", "duplicate") == pytest.approx(1)
    assert value("induction", "induction") == pytest.approx(1)
    assert value("prefix_matching", "induction") == pytest.approx(1)
    assert value("sink", "sink") == pytest.approx(1)
    assert value("prefix_matching", "all earlier") == pytest.approx(1)
    assert value("induction", "all earlier") == pytest.approx(1)
    assert value("induction", "duplicate") == pytest.approx(0)
    assert value("duplicate", "induction") == pytest.approx(0)
    assert value("previous", "current") == pytest.approx(0)
    for one_hot in ("sink", "previous", "induction"):
        assert value("entropy", one_hot) == pytest.approx(0, abs=1e-6)
    assert value("entropy", "uniform") == pytest.approx(1, abs=1e-6)
    assert got["min_entropy"].values == pytest.approx(0, abs=1e-6)
    assert got["max_induction"].values == pytest.approx(1)
    # The sink head, and the four that look at BOS until there is something to look back to.
    assert got["sink_share"].values == pytest.approx(5 / 8)


def test_a_head_is_a_sink_from_three_tenths_on():
    """Gu et al. 2024. Query 0 has no other key, so a head's mean is above the share of the rest."""

    def on_bos(share: float) -> Rule:
        return lambda q, s: {0: share, q: 1 - share} if q else {0: 1.0}

    heads = {str(share): on_bos(share) for share in (0.05, 0.1, 0.2, 0.25, 0.27, 0.3, 0.6, 0.9)}
    value, got = made_by_hand(heads, list(BLOCKS), HeadScores())
    assert 0.28 < value("sink", "0.25") < 0.3 < value("sink", "0.27") < 0.32
    assert got["sink_share"].values == pytest.approx(4 / 8)


@pytest.mark.slow
def test_a_positional_copy_is_no_induction_head():
    """Eight tokens back is induction on blocks of nine, and on no others."""
    no_induction = only(RULES["copy from 8 back"])
    value, got = made_by_hand(no_induction, list(BLOCKS), HeadScores())
    np.testing.assert_allclose(value("induction_by_block", "it"), [0, 1], atol=1e-6)
    assert value("induction", "it") == pytest.approx(0.5)
    assert value("induction_spread", "it") == pytest.approx(0.5)
    assert got["max_induction"].values == pytest.approx(0)
    assert value("lag", "it") == 8
    assert value("lag_spread", "it") == 0
    # Seen at one length only, it passes: that is why there are several.
    _, one = made_by_hand(no_induction, [BLOCKS[1], BLOCKS[3]], HeadScores())
    assert one["max_induction"].values == pytest.approx(1)


def test_lag_scan():
    value, got = made_by_hand(RULES, list(BLOCKS), HeadScores())
    np.testing.assert_array_equal(value("lag_by_block", "induction"), [4, 8])
    assert value("lag_spread", "induction") == 2
    np.testing.assert_array_equal(value("lag_by_block", "duplicate"), [5, 9])
    assert value("lag", "previous") == 1
    assert value("lag", "current") == 0
    # Key 0 is left out: a pure sink has no mass at any lag, and previous looks there once.
    assert value("lag_mass", "sink") == 0
    assert value("lag_mass", "previous") == pytest.approx(1)
    assert got["lag"].limits == (0.0, 10.0)


def test_lags_that_few_queries_have_are_left_out():
    """Sequences of 1 + 5 * 2 and 1 + 5 * 6 tokens: lags up to 5, and up to 15."""
    probes = [Probe.repeated("short", block=5), Probe.repeated("long", block=5, times=6, seed=1)]
    far = only(lambda q, s: {q - 12 if q > 12 else 0: 1.0})
    value, got = made_by_hand(far, probes, HeadScores())
    assert value("lag", "it") == 12
    assert value("lag_mass", "it") == pytest.approx(1)
    assert got["lag"].limits == (0.0, 15.0)


def test_spread_over_the_sequences_where_there_is_one_length():
    probes = [BLOCKS[0], BLOCKS[2]]
    got = readings(HeadScores(), shadow("llama"), probes)
    patterns = {5: [attentions(hugging_face("llama"), probe) for probe in probes]}
    check(got, patterns, MEASURES)
    assert got["head_scores/previous_spread"].values.max() > 1e-4


def test_half_precision_patterns_are_widened_first():
    batch = encoded()
    width = batch.tokens.shape[1]
    pattern = torch.rand(len(PROBES), HEADS, width, width).tril()
    pattern = (pattern / pattern.sum(-1, keepdim=True)).bfloat16()
    half, full = (
        played(HeadScores(), batch, of_layers("attn.hook_pattern", [given] * LAYERS))
        for given in (pattern, pattern.float())
    )
    for key, reading in full.items():
        np.testing.assert_array_equal(half[key].values, reading.values)


def test_padding_company_and_order_do_not_matter():
    alone = readings(HeadScores(), shadow("llama"), BLOCKS)
    longer = Probe("long", list(range(10, 70)))
    with_longer = readings(HeadScores(), shadow("llama"), [longer, *reversed(BLOCKS), *TEXTS])
    assert alone.keys() == with_longer.keys()
    for key, reading in alone.items():
        np.testing.assert_allclose(with_longer[key].values, reading.values, atol=1e-6)


def test_a_score_that_counts_padding_is_told_apart():
    """The check above can fail: a mean over the whole rectangle moves with the padding."""

    def unmasked(probes) -> float:
        hook = "blocks.0.attn.hook_pattern"
        row = [p.name for p in probes].index(BLOCKS[0].name)
        reduce = {hook: lambda pattern: pattern[row, :, :, 0].mean(-1)}
        sinks: Any = shadow("llama").run(encoded(probes), [reduce])[0][hook]
        return sinks.max().item()

    longer = Probe("long", list(range(10, 70)))
    assert abs(unmasked(BLOCKS[:1]) - unmasked([*BLOCKS[:1], longer])) > 1e-2


def test_no_repeated_blocks():
    with pytest.raises(ValueError, match=r"needs repeated random blocks.*Probe\.repeated"):
        HeadScores().taps(shadow("llama"), encoded(TEXTS))
