"""TokenLoss and RepeatLoss equal what log-probabilities of Hugging Face's logits give."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch

from tests import tiny
from tests.instruments.common import (
    BLOCKS,
    PROBES,
    TEXTS,
    encoded,
    hugging_face,
    ids,
    of_layers,
    played,
    readings,
    shadow,
)
from tlens_callback import Probe, RepeatLoss, TokenLoss
from tlens_callback.shadow import taps
from tlens_callback.shadow import unembed as unembed_module


def losses(model: Any, probe: Probe) -> list[float]:
    """-ln p of the probe's tokens from the second on, of a forward pass of this probe alone."""
    tokens = ids(probe)
    with torch.no_grad():
        logits = model(tokens).logits[0].double().numpy()
    out = []
    for t in range(1, tokens.shape[1]):
        log_p = logits[t - 1] - scipy.special.logsumexp(logits[t - 1])
        out.append(-log_p[tokens[0, t]])
    return out


def made_up(instrument: Any, batch: Any, logits: torch.Tensor) -> dict[str, np.ndarray]:
    """Readings of logits that no model made: those of the residual stream after the last layer."""
    streams = of_layers("hook_resid_post", [torch.zeros_like(logits), logits])
    return {key: r.values for key, r in played(instrument, batch, streams, logits).items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_token_loss_equals_hugging_face(family):
    got = readings(TokenLoss(), shadow(family))
    assert len(got) == 3 * len(TEXTS)
    for probe in TEXTS:
        expected = losses(hugging_face(family), probe)
        loss = got[f"token_loss/loss/{probe.name}"]
        np.testing.assert_allclose(loss.values, expected, atol=3e-5)
        assert loss.labels["token"] == encoded([probe]).labels[0][1:]
        mean = got[f"token_loss/mean/{probe.name}"].values
        assert mean == pytest.approx(sum(expected) / len(expected), abs=3e-5)
        # The check can fail: the loss of the token one further on is another.
        assert np.abs(loss.values[1:] - expected[:-1]).max() > 1e-2


def test_change_since_the_first_observation():
    before, after = shadow("llama"), shadow("llama", seed=1)
    instrument = TokenLoss()
    first, second = readings(instrument, before), readings(instrument, after)
    third = readings(instrument, before)
    assert first.keys() == second.keys() == third.keys()
    for probe in TEXTS:
        key = f"token_loss/change/{probe.name}"
        expected = np.subtract(
            losses(hugging_face("llama", seed=1), probe), losses(hugging_face("llama"), probe)
        )
        assert not first[key].values.any() and not third[key].values.any()
        np.testing.assert_allclose(second[key].values, expected, atol=3e-5)
        assert np.abs(expected).max() > 0.5


def test_what_it_remembers_is_its_own():
    """Of losses alone, one tensor a probe: not the logits behind them, and no views of one."""
    instrument = TokenLoss()
    readings(instrument, shadow("llama"))
    assert set(instrument.baseline) == {probe.name for probe in TEXTS}
    for probe in TEXTS:
        kept = instrument.baseline[probe.name]
        assert kept.untyped_storage().nbytes() == 4 * kept.numel()
    instrument.baseline["capital"] += 1.0
    again = readings(instrument, shadow("llama"))
    np.testing.assert_allclose(again["token_loss/change/capital"].values, -1.0, atol=1e-5)
    assert not again["token_loss/change/story"].values.any()


def test_chosen_probes_in_their_order():
    got = readings(TokenLoss(probes=["repeat-5-0", "bare"]), shadow("gpt2"))
    names = ["repeat-5-0", "bare"]
    assert [key for key in got if "/loss/" in key] == [f"token_loss/loss/{name}" for name in names]
    expected = losses(hugging_face("gpt2"), BLOCKS[0])
    np.testing.assert_allclose(got["token_loss/loss/repeat-5-0"].values, expected, atol=3e-5)
    with pytest.raises(ValueError, match="no probe 'nobody'"):
        readings(TokenLoss(probes=["nobody"]), shadow("gpt2"))
    with pytest.raises(ValueError, match="selects nothing"):
        TokenLoss(probes=[])


def test_one_token_has_no_loss():
    one = Probe("one", [5])
    got = readings(TokenLoss(), shadow("llama"), [one, TEXTS[2]])
    assert {key.split("/")[2] for key in got} == {"bare"}
    assert TokenLoss().taps(shadow("llama"), encoded([one, BLOCKS[0]])) == {}
    assert readings(TokenLoss(), shadow("llama"), [one, BLOCKS[0]]) == {}


def test_only_the_positions_that_count_are_read():
    """Logits of padding, of the last token and of other rows may be anything."""
    batch = encoded()
    logits = torch.full((*batch.tokens.shape, tiny.VOCAB), float("nan"))
    for row, probe in enumerate(batch.probes):
        if probe.block is None:
            logits[row, : batch.lengths[row] - 1] = 0.0
    got = made_up(TokenLoss(), batch, logits)
    for probe in TEXTS:
        uniform = got[f"token_loss/loss/{probe.name}"]
        np.testing.assert_allclose(uniform, math.log(tiny.VOCAB), rtol=1e-6)


def test_a_large_vocabulary_bit_by_bit(monkeypatch):
    """The pieces are small, of any number of positions, and nothing overflows or is left out."""
    monkeypatch.setattr(unembed_module, "CHUNK", 5 * tiny.VOCAB)
    monkeypatch.setattr(unembed_module, "IN_CACHE", 2 * tiny.VOCAB)
    batch = encoded([Probe("long", list(range(1, 24))), Probe("short", [3, 4])])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 23, tiny.VOCAB, generator=generator).mul(9).add(300)
    sizes, whole = [], unembed_module.unembed

    def recorded(of, resid):
        sizes.append(len(resid))
        return whole(of, resid)

    monkeypatch.setattr(unembed_module, "unembed", recorded)
    got = made_up(TokenLoss(), batch, logits)
    # One row more than there are losses: the one that is compared with the model's output.
    assert max(sizes) == 5 and sum(sizes) == 24
    for row, name in enumerate(["long", "short"]):
        expected = [
            scipy.special.logsumexp(at) - at[token]
            for at, token in zip(
                logits[row].double().numpy(),
                batch.tokens[row, 1 : batch.lengths[row]],
                strict=False,
            )
        ]
        np.testing.assert_allclose(got[f"token_loss/loss/{name}"], expected, atol=5e-5)


def test_an_output_made_in_another_way_is_refused(monkeypatch):
    """The control of taking the losses from the residual stream."""
    whole = taps.gap
    monkeypatch.setattr(taps, "gap", lambda made, output: whole(made, 2 * output))
    for instrument in (TokenLoss(), RepeatLoss()):
        with pytest.raises(ValueError, match="does not know; leave the instrument out"):
            readings(instrument, shadow("llama"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_repeat_loss_equals_hugging_face(family):
    got = readings(RepeatLoss(), shadow(family))
    first, second, spread = [], [], []
    for s, probes in ((5, (BLOCKS[0], BLOCKS[2])), (9, (BLOCKS[1], BLOCKS[3]))):
        # losses(...)[t - 1] is that of token t.
        each = [losses(hugging_face(family), probe) for probe in probes]
        once = [np.mean([loss[t - 1] for t in range(2, s + 1)]) for loss in each]
        again = [np.mean([loss[t - 1] for t in range(s + 2, 2 * s + 1)]) for loss in each]
        first.append(np.mean(once))
        second.append(np.mean(again))
        spread.append(np.std(np.subtract(again, once)))
    difference = np.subtract(second, first)
    for measure, expected in (
        ("first", first),
        ("second", second),
        ("difference", difference),
        ("spread", spread),
        ("mean", difference.mean()),
        ("max_difference", difference.max()),
    ):
        values = got[f"repeat_loss/{measure}"].values
        np.testing.assert_allclose(values, expected, atol=3e-5, err_msg=measure)
    assert got["repeat_loss/difference"].labels == {"block": ("5", "9")}
    assert len(got) == 6


def copied(batch: Any, source: Any) -> torch.Tensor:
    """Logits that foresee the token at position `source(t, S)` as token t; no idea if None."""
    logits = torch.zeros(*batch.tokens.shape, tiny.VOCAB)
    for row, probe in enumerate(batch.probes):
        for t in range(1, batch.lengths[row]):
            at = source(t, probe.block)
            if at is not None:
                logits[row, t - 1, batch.tokens[row, at]] = 50.0
    return logits


def test_perfect_induction_learns_at_every_length():
    """Also where it is wrong about the second block's first token: nothing could foresee it."""
    batch = encoded(BLOCKS)
    logits = copied(batch, lambda t, s: t - s if t > s + 1 else 1 if t == s + 1 else None)
    wrong = copied(batch, lambda t, s: t - s if t > s + 1 else s if t == s + 1 else None)
    uniform = math.log(tiny.VOCAB)
    for of in (logits, wrong):
        got = made_up(RepeatLoss(), batch, of)
        np.testing.assert_allclose(got["repeat_loss/first"], uniform, atol=1e-4)
        np.testing.assert_allclose(got["repeat_loss/second"], 0, atol=1e-5)
        assert got["repeat_loss/max_difference"] == pytest.approx(-uniform, abs=1e-4)


def test_a_positional_copy_does_not():
    """From nine back: right in blocks of nine, and in those of five wrong with confidence."""
    batch = encoded(BLOCKS)
    got = made_up(RepeatLoss(), batch, copied(batch, lambda t, s: t - 9 if t > 9 else None))
    by_block = got["repeat_loss/difference"]
    assert by_block[1] == pytest.approx(-math.log(tiny.VOCAB), abs=1e-4)
    assert by_block[0] > 1 and got["repeat_loss/max_difference"] == by_block[0]
    # One length alone would have called it in-context learning.
    batch = encoded([BLOCKS[1]])
    got = made_up(RepeatLoss(), batch, copied(batch, lambda t, s: t - 9 if t > 9 else None))
    assert got["repeat_loss/max_difference"] < -4


def test_repeat_loss_reads_two_blocks_without_their_first_tokens():
    batch = encoded()
    logits = torch.full((*batch.tokens.shape, tiny.VOCAB), float("nan"))
    for row, probe in enumerate(batch.probes):
        if (s := probe.block) is not None:
            logits[row, 1:s] = logits[row, s + 1 : 2 * s] = 0.0
    got = made_up(RepeatLoss(), batch, logits)
    np.testing.assert_allclose(got["repeat_loss/first"], math.log(tiny.VOCAB), rtol=1e-6)
    np.testing.assert_allclose(got["repeat_loss/difference"], 0, atol=1e-6)


def test_padding_company_and_order_do_not_matter():
    long = Probe("long", list(range(10, 70)))
    for instrument in (TokenLoss(probes=["capital"]), RepeatLoss()):
        alone = readings(instrument, shadow("gpt2"), [TEXTS[0], *BLOCKS])
        together = readings(instrument, shadow("gpt2"), [long, *reversed(PROBES)])
        for key, reading in alone.items():
            np.testing.assert_allclose(together[key].values, reading.values, atol=1e-5)


def test_no_repeated_blocks():
    with pytest.raises(ValueError, match=r"needs repeated random blocks.*Probe\.repeated"):
        RepeatLoss().taps(shadow("llama"), encoded(TEXTS))
