"""TargetScores equals what log_softmax of Hugging Face's logits gives."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.instruments.common import (
    LONG_ANSWER,
    PROBES,
    TEXTS,
    encoded,
    hugging_face,
    ids,
    readings,
    shadow,
)
from tlens_callback import Probe, Shadow, TargetScores


def last_logits(family: str, probe: Probe) -> list[float]:
    with torch.no_grad():
        return hugging_face(family)(ids(probe)).logits[0, -1].double().tolist()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_hugging_face(family):
    got = readings(TargetScores(), shadow(family))
    answers = {"capital": (" Paris", " London"), "story": (" Mary", None)}
    token: Any = tiny.tokenizer().convert_tokens_to_ids
    for probe in TEXTS[:2]:
        logits = last_logits(family, probe)
        target, foil = answers[probe.name]
        at = logits[token(target.replace(" ", "\u0120"))]
        loss = math.log(sum(math.exp(x - at) for x in logits))
        assert got[f"target_scores/loss/{probe.name}"].values == pytest.approx(loss, abs=2e-5)
        assert got[f"target_scores/probability/{probe.name}"].values == pytest.approx(
            math.exp(-loss), abs=1e-5
        )
        rank = sorted(logits, reverse=True).index(at)
        assert got[f"target_scores/rank/{probe.name}"].values == rank
        if foil:
            ahead = at - logits[token(foil.replace(" ", "\u0120"))]
            assert got[f"target_scores/logit_diff/{probe.name}"].values == pytest.approx(
                ahead, abs=2e-5
            )
    assert len(got) == 4 + 3


def test_the_position_matters():
    """The comparison above can fail: one token earlier the loss is another."""
    whole = readings(TargetScores(), shadow("llama"))["target_scores/loss/capital"].values
    cut = Probe("capital", "The capital of France", target=" Paris")
    earlier = readings(TargetScores(), shadow("llama"), [cut])["target_scores/loss/capital"].values
    assert abs(whole - earlier) > 1e-2


def test_made_up_logits():
    probes = [
        Probe("top", [5, 6], target=4, foil=2),
        Probe("none", [5]),
        Probe("tied", [5, 6, 7], target=1),
        Probe("sure", [8], target=0),
    ]
    batch = encoded(probes)
    logits = torch.zeros(4, tiny.VOCAB)
    logits[0, 4], logits[0, 2] = 3.0, 1.0
    logits[2, :3] = 2.0
    logits[3, 0] = 200.0
    taps = TargetScores().taps(shadow("llama"), batch)
    taken = {"last_logits": taps["last_logits"](logits)}
    got = {r.key: float(r.values) for r in TargetScores().read(taken, shadow("llama"), batch)}
    assert "target_scores/loss/none" not in got
    assert got["target_scores/logit_diff/top"] == 2.0
    assert got["target_scores/rank/top"] == 0
    # Nothing is above a tied top: its rank is 0.
    assert got["target_scores/rank/tied"] == 0
    expected = math.exp(2) / (3 * math.exp(2) + tiny.VOCAB - 3)
    assert got["target_scores/probability/tied"] == pytest.approx(expected, rel=1e-5)
    assert got["target_scores/probability/sure"] == 1.0
    assert got["target_scores/loss/sure"] == 0.0


def test_half_precision_logits_are_widened_first():
    probe = Probe("top", [5, 6], target=4, foil=2)
    logits = torch.linspace(-3, 3, tiny.VOCAB)[None].bfloat16()
    score: Any = TargetScores().taps(shadow("llama"), encoded([probe]))["last_logits"]
    wide = score(logits.float())
    assert torch.equal(score(logits), wide)
    narrow = logits.logsumexp(1) - logits[:, 4]
    assert abs(float(narrow) - float(wide[0, 2])) > 1e-3


def told(family: str, *content: str) -> list[float]:
    """ln p of each token of the second text behind the first, in Hugging Face's model."""
    prompt, whole = ids(Probe("p", content[0])), ids(Probe("p", "".join(content)))
    n = prompt.shape[1]
    assert torch.equal(whole[:, :n], prompt)
    with torch.no_grad():
        logits = hugging_face(family)(whole[:, :-1]).logits[0, n - 1 :].double()
    return logits.log_softmax(1).gather(1, whole[0, n:, None])[:, 0].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_target_of_several_tokens_is_the_sum_of_their_log_probabilities(family):
    probe, question = LONG_ANSWER, str(LONG_ANSWER.content)
    one = Probe("one", question, target=" Rome", foil=" Berlin and Paris")
    got = readings(TargetScores(), shadow(family), [*TEXTS, probe, one])
    target, foil = (told(family, question, answer) for answer in (probe.target, probe.foil))
    near = {"abs": 1e-4}
    assert got["target_scores/loss/long"].values == pytest.approx(-sum(target), **near)
    assert got["target_scores/probability/long"].values == pytest.approx(
        math.exp(sum(target)), rel=1e-3
    )
    lead = sum(target) - sum(foil)
    assert got["target_scores/logit_diff/long"].values == pytest.approx(lead, **near)
    each = got["target_scores/loss_by_token/long"]
    assert each.values == pytest.approx([-ln for ln in target], **near)
    assert each.labels["answer"] == (" Rome", " and", " Madrid")
    assert got["target_scores/rank/long"].values == got["target_scores/rank/one"].values
    # One token against three, and a probe of one token beside those of several.
    assert "target_scores/loss_by_token/one" not in got
    lead = target[0] - sum(foil)
    assert got["target_scores/logit_diff/one"].values == pytest.approx(lead, **near)
    alone = readings(TargetScores(), shadow(family), TEXTS)
    for key, one in alone.items():
        np.testing.assert_allclose(got[key].values, one.values, atol=1e-5, rtol=1e-5)


def test_without_any_target_it_says_so():
    with pytest.raises(ValueError, match="none of the probes has a target"):
        readings(TargetScores(), shadow("llama"), PROBES[1:3])


def test_padding_and_company_do_not_matter():
    alone = readings(TargetScores(), shadow("llama"), TEXTS[:1])
    together = readings(TargetScores(), shadow("llama"))
    for key, reading in alone.items():
        np.testing.assert_allclose(reading.values, together[key].values, atol=1e-6, rtol=1e-6)


def test_logits_that_are_no_numbers_have_no_rank():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    got = readings(TargetScores(), Shadow(model))
    assert np.isnan(got["target_scores/rank/capital"].values)
