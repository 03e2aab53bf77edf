"""Unembedded residual streams give Hugging Face's own logits, in pieces of any size."""

import weakref
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch

from tests import tiny
from tests.instruments.common import PROBES, TEXTS, Played, encoded, hugging_face, ids, of_layers
from tests.instruments.naive_lens import residuals, unembedded
from tests.instruments.test_lens import SCALED, scaled
from tlens_callback import LogitLens, ProbeBatch, Shadow, TokenLoss, observe
from tlens_callback.shadow import LAST_LOGITS, Stack, Unembedded, stacks, taps
from tlens_callback.shadow import unembed as module
from tlens_callback.shadow.unembed import demand_equal, gap, pieces, unembed

BATCH = encoded()
ROWS, WIDTH = BATCH.tokens.shape
LAST = "hook_resid_post"
FAMILIES = (*tiny.FAMILIES, *SCALED)
EVERY_TOKEN = tuple(row * WIDTH + pos for row in range(ROWS) for pos in range(BATCH.lengths[row]))
SOME = (5, 2 * WIDTH + 1, WIDTH, 5, 0)
SIZES = [(1, 1), (96, 96), (3 * 96, 96), (7 * 96, 3 * 96), (5 * 96, 2**20), (2**23, 4 * 96)]
"""CHUNK and IN_CACHE: of less than a row, of one, of some, of all; the one divides the other or
does not."""


@cache
def shadow(family: str) -> Shadow:
    return Shadow.of(live(family))


def live(family: str) -> Any:
    return scaled(family) if family in SCALED else tiny.model(family)


@cache
def logits_of(family: str) -> np.ndarray:
    """[place, vocab], Hugging Face's, of each probe alone; NaN where there is padding."""
    model = scaled(family) if family in SCALED else hugging_face(family)
    found = np.full((ROWS, WIDTH, tiny.VOCAB), np.nan)
    with torch.no_grad():
        for row, probe in enumerate(PROBES):
            found[row, : BATCH.lengths[row]] = model(ids(probe)).logits[0]
    return found.reshape(ROWS * WIDTH, -1)


def request(tokens: tuple[int, ...], layers: tuple[int, ...] = (1,)) -> Stack:
    return Stack(LAST, layers, tokens=tokens)


def keep(logits: torch.Tensor, lse: torch.Tensor, part: slice) -> tuple[torch.Tensor, ...]:
    assert len(logits) == len(lse) == part.stop - part.start > 0
    assert logits.dtype == lse.dtype == torch.float32
    return torch.arange(part.start, part.stop), logits.clone(), lse.clone()


def whole(logits: torch.Tensor, lse: torch.Tensor, part: slice) -> torch.Tensor:
    return lse.clone()


@pytest.mark.parametrize("chunk", SIZES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "Cohere"])
def test_all_requests_of_a_pass_in_pieces_of_any_size(family, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk[0])
    monkeypatch.setattr(module, "IN_CACHE", chunk[1])
    wanted, requests = logits_of(family), (EVERY_TOKEN, SOME, SOME[:1])
    got = shadow(family).run(BATCH, [{request(at): Unembedded(keep)} for at in requests])
    for at, taken in zip(requests, got, strict=True):
        rows, logits, lse, off = taken[request(at)]
        assert rows.tolist() == list(range(len(at)))
        np.testing.assert_allclose(logits, wanted[list(at)], atol=3e-5, rtol=3e-5)
        np.testing.assert_allclose(
            lse, scipy.special.logsumexp(wanted[list(at)], axis=1), atol=3e-5
        )
        assert off < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hugging_face(family):
    """With its soft cap, its logit scale, its biases and its final norm."""
    (taken,) = shadow(family).run(BATCH, [{request(EVERY_TOKEN): Unembedded(keep)}])
    _, logits, lse, off = taken[request(EVERY_TOKEN)]
    wanted = logits_of(family)[list(EVERY_TOKEN)]
    np.testing.assert_allclose(logits, wanted, atol=3e-5, rtol=3e-5)
    np.testing.assert_allclose(lse, scipy.special.logsumexp(wanted, axis=1), atol=3e-5)
    assert off < 1e-5
    # The check can fail: at the next token there are other logits.
    assert np.abs(logits[:-1].numpy() - wanted[1:]).max(1).min() > 1e-2


def test_a_soft_cap_and_a_scale_matter():
    for family in ("gemma2", *SCALED):
        of = shadow(family)
        (taken,) = of.run(BATCH, [{f"blocks.1.{LAST}": lambda value: value.flatten(0, 1)}])
        head = of.bridge.unembed.original_component
        bare = head(module._before_head(of)[0](taken[f"blocks.1.{LAST}"])).detach()
        wanted = logits_of(family)[list(EVERY_TOKEN)]
        assert np.abs(bare[list(EVERY_TOKEN)].numpy() - wanted).max() > 1e-2


@pytest.mark.parametrize("limit", [0, 2**40])
@pytest.mark.parametrize("chunk", SIZES)
def test_rows_come_by_token_and_for_each_token_by_layer(chunk, limit, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk[0])
    monkeypatch.setattr(module, "IN_CACHE", chunk[1])
    monkeypatch.setattr(stacks, "_ON_CPU", limit)
    model = hugging_face("gpt2")
    places = [(row, BATCH.lengths[row] - 1) for row in (3, 0, 6)] + [(0, 1)]
    key = request(tuple(row * WIDTH + pos for row, pos in places), (0, 1))
    (taken,) = shadow("gpt2").run(BATCH, [{key: Unembedded(keep)}])
    rows, logits, lse, _ = taken[key]
    assert rows.tolist() == list(range(8))
    at = iter(zip(logits, lse, strict=True))
    for row, pos in places:
        for stream in residuals(model, "gpt2", PROBES[row])[:, pos]:
            one, its = next(at)
            wanted = unembedded(model, "gpt2", stream)
            np.testing.assert_allclose(one, wanted, atol=3e-5, rtol=3e-5)
            assert float(its) == pytest.approx(scipy.special.logsumexp(wanted), abs=3e-5)


@pytest.mark.parametrize("chunk", SIZES)
@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (4, 1, 9), (13,)])
def test_no_row_is_left_out_or_comes_twice(sizes, chunk, monkeypatch):
    """A piece is of one request and of at most so many logits; so is what is computed at once."""
    monkeypatch.setattr(module, "CHUNK", chunk[0])
    monkeypatch.setattr(module, "IN_CACHE", chunk[1])
    of, computed, whole = shadow("llama"), [], module.unembed

    def recorded(*args):
        computed.append(len(args[1]))
        return whole(*args)

    monkeypatch.setattr(module, "unembed", recorded)
    resid = torch.randn(sum(sizes), 32, generator=torch.Generator().manual_seed(0))
    requests = resid.split(list(sizes))
    seen = []
    for at, part, logits, lse in pieces(of, requests):
        assert len(logits) == len(lse) == part.stop - part.start
        assert 1 <= len(logits) <= max(1, chunk[1] // tiny.VOCAB)
        seen += [(at, row) for row in range(part.start, part.stop)]
        torch.testing.assert_close(logits, whole(of, requests[at][part]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, logits.logsumexp(1))
    assert seen == [(at, row) for at, size in enumerate(sizes) for row in range(size)]
    assert sum(computed) == sum(sizes) and max(computed) <= max(1, chunk[0] // tiny.VOCAB)


def test_all_instruments_share_one_unembedding(monkeypatch):
    rows, own = [], module.unembed
    monkeypatch.setattr(module, "unembed", lambda *args: rows.append(len(args[1])) or own(*args))
    keys = [request(SOME), request(SOME[:2], (0, 1)), request(SOME[1:2])]
    shadow("llama").run(BATCH, [{key: Unembedded(whole)} for key in keys])
    assert rows == [1 + 5 + 4 + 1], "and one row that is compared"
    rows.clear()
    shadow("llama").run(BATCH, [{LAST_LOGITS: lambda logits: logits}, {}])
    assert rows == []


def test_they_are_read_when_the_models_own_logits_have_been():
    order: list[str] = []

    def at(name: str) -> Any:
        return lambda value, *_: order.append(name) or value.new_zeros(1)

    names = ["logits", LAST_LOGITS]
    asked = {request((1,)): Unembedded(at("unembedded"))}
    shadow("llama").run(BATCH, [asked | {name: at(name) for name in names}])
    assert sorted(order[:2]) == sorted(names) and order[2:] == ["unembedded"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_in_half_precision_the_gap_is_rounding_too(family):
    of = Shadow.of(tiny.model(family).bfloat16())
    (taken,) = of.run(BATCH, [{request(SOME): Unembedded(keep)}])
    *_, logits, _, off = taken[request(SOME)]
    assert off < 2e-2
    demand_equal(off, of, "it")
    np.testing.assert_allclose(logits, logits_of(family)[list(SOME)], atol=0.3)


def gaps(of: Shadow, batch: ProbeBatch = BATCH) -> list[torch.Tensor]:
    """Of several instruments, one of which has none of the last layer's rows."""
    keys = [request(SOME), request(SOME[:2], (0,))]
    return [
        got[key][-1]
        for got, key in zip(
            of.run(batch, [{key: Unembedded(whole)} for key in keys]), keys, strict=True
        )
    ]


def test_every_instrument_has_the_gap():
    for family in ("llama", "gemma2", "Cohere"):
        for off in gaps(shadow(family)):
            assert off < 1e-5
            demand_equal(off, shadow(family), "it")
    of = shadow("llama")
    (row,) = of.run(BATCH, [{f"blocks.1.{LAST}": lambda x: x[:1, BATCH.lengths[0] - 1]}])
    ends = torch.tensor(logits_of("llama")[BATCH.lengths[0] - 1 : BATCH.lengths[0]])
    made = unembed(of, row[f"blocks.1.{LAST}"])
    assert float(gap(made, 1.5 * ends)) == pytest.approx(1 / 3, abs=1e-4)


def _a_bias_outside_the_head(model: Any) -> None:
    own = model.forward

    def forward(*args, **kwargs):
        found = own(*args, **kwargs)
        found.logits = found.logits + torch.linspace(-1, 1, tiny.VOCAB)
        return found

    model.forward = forward


def _a_scale_outside_the_head(model: Any) -> None:
    own = model.forward

    def forward(*args, **kwargs):
        found = own(*args, **kwargs)
        found.logits = found.logits * 1.01
        return found

    model.forward = forward


@pytest.mark.parametrize("spoil", [_a_bias_outside_the_head, _a_scale_outside_the_head])
def test_logits_that_are_made_otherwise_are_refused(spoil):
    """The control of taking logits from the residual stream."""
    of = Shadow.of(tiny.model("llama"))
    spoil(of.bridge.original_model)
    for off in gaps(of):
        assert off > 5e-3
        with pytest.raises(ValueError, match=r"it: norm and unembedding .* leave the instrument"):
            demand_equal(off, of, "it")
    for instrument in (LogitLens(), TokenLoss()):
        with pytest.raises(ValueError, match="away from this LlamaForCausalLM's output"):
            observe(of, BATCH, [instrument])


def test_a_head_that_is_not_the_models_is_refused(monkeypatch):
    of = Shadow.of(tiny.model("llama"))
    assert all(off < 1e-5 for off in gaps(of))
    head, other = of.bridge.unembed.original_component, tiny.model("llama", seed=1).lm_head
    own = module.unembed

    def with_another(shadow: Any, resid: torch.Tensor) -> torch.Tensor:
        kept, head.weight = head.weight, other.weight
        try:
            return own(shadow, resid)
        finally:
            head.weight = kept

    monkeypatch.setattr(module, "unembed", with_another)
    for off in gaps(of):
        with pytest.raises(ValueError, match="rounding allows 1e-03"):
            demand_equal(off, of, "it")


def test_a_gap_that_is_no_number_is_no_refusal():
    """The model's own output is none then."""
    of = shadow("llama")
    demand_equal(torch.tensor(float("nan")), of, "it")
    streams = of_layers(LAST, [torch.full((ROWS, WIDTH, tiny.VOCAB), float("nan"))] * 2)
    made: Any = Played(streams, streams[f"blocks.1.{LAST}"])
    (taken,) = made.run(BATCH, [{request(SOME): Unembedded(keep)}])
    assert taken[request(SOME)][-1].isnan()


def failures(of: Any, *asked: Any) -> tuple[list[Any], dict[int, Exception]]:
    failed: dict[int, Exception] = {}

    def fail(i: int, error: Exception) -> None:
        assert i not in failed
        failed[i] = error

    return of.run(BATCH, asked, on_error=fail), failed


def _raises(logits, lse, part):
    raise ZeroDivisionError


def _raises_at_the_end(logits, lse, part):
    return lse / (1 if part.stop < len(SOME) else 1 // 0)


FAILING = {
    "always": (_raises, ZeroDivisionError),
    "in the last piece": (_raises_at_the_end, ZeroDivisionError),
    "no tensor": (lambda logits, lse, part: 1.0, ValueError),
    "numbers without an axis": (lambda logits, lse, part: lse.sum(), RuntimeError),
    "other shapes": (lambda logits, lse, part: logits[:, : 1 + part.start], RuntimeError),
}


@pytest.mark.parametrize("how", FAILING)
def test_a_reduction_that_fails_fails_its_own_instrument(how, monkeypatch):
    monkeypatch.setattr(module, "IN_CACHE", 2 * tiny.VOCAB)
    reduce, error = FAILING[how]
    key, of = request(SOME), shadow("llama")
    taken, failed = failures(
        of,
        {key: Unembedded(keep)},
        {LAST_LOGITS: lambda logits: logits, key: Unembedded(reduce)},
        {key: Unembedded(keep), request((1,)): Unembedded(keep)},
        {key: lambda value, part: value},
    )
    assert list(failed) == [1] and isinstance(failed[1], error) and taken[1] == {}
    for i in (0, 2):
        np.testing.assert_allclose(taken[i][key][1], logits_of("llama")[list(SOME)], atol=3e-5)
    assert taken[3][key].shape == (1, len(SOME), 32)
    with pytest.raises(error):
        of.run(BATCH, [{key: Unembedded(reduce)}])
    assert all(not point.has_hooks() for point in of.hooks.values())


def test_an_instrument_that_failed_before_has_nothing_unembedded(monkeypatch):
    rows, own = [], module.unembed
    monkeypatch.setattr(module, "unembed", lambda *args: rows.append(len(args[1])) or own(*args))
    gone = {"blocks.9.hook_resid_post": lambda value: value}
    taken, failed = failures(
        shadow("llama"),
        {**gone, request(SOME): Unembedded(whole)},
        {request((1,)): Unembedded(whole)},
        {request(SOME): Unembedded(whole), LAST_LOGITS: lambda logits: 1 / 0},
    )
    assert list(failed) == [0, 2] and list(taken[1]) == [request((1,))]
    assert rows == [1 + 1]


def test_streams_of_another_width_are_an_error_of_their_readers():
    """Their rows do not fit the others'; what is not unembedded goes on."""
    wrong = Stack("mlp.hook_post", (1,), tokens=(1,))
    taken, failed = failures(
        shadow("llama"),
        {wrong: Unembedded(whole)},
        {request((1,)): lambda value, part: value, LAST_LOGITS: lambda logits: logits},
    )
    assert list(failed) == [0] and len(taken[1]) == 2


def test_a_model_whose_last_stream_has_no_hook_point():
    """Without it nothing says whether logits are the model's: who asks for them is told so."""
    of = Shadow.of(tiny.model("llama"))
    of.hooks = {name: point for name, point in of.hooks.items() if name != f"blocks.1.{LAST}"}
    early = Stack(LAST, (0,), tokens=(1,))
    taken, failed = failures(
        of, {early: Unembedded(whole)}, {LAST_LOGITS: lambda logits: logits.clone()}
    )
    assert list(failed) == [0] and isinstance(failed[0], ValueError)
    assert f"blocks.1.{LAST}" in str(failed[0])
    assert taken[1][LAST_LOGITS].shape == (ROWS, tiny.VOCAB)


def test_a_large_batch_of_streams_is_let_go(monkeypatch):
    """What was asked for is held until it is unembedded, and no longer."""
    held = []

    def reduce(logits, lse, part):
        held.append(weakref.ref(logits))
        return lse

    monkeypatch.setattr(module, "IN_CACHE", tiny.VOCAB)
    shadow("llama").run(BATCH, [{request(SOME): Unembedded(reduce)}])
    assert len(held) == len(SOME) and all(value() is None for value in held)


def test_the_first_probe_is_compared_at_its_last_token(monkeypatch):
    """Also where it is shorter than others, and the rows that are asked for are others."""
    seen = []
    own = taps.gap
    monkeypatch.setattr(taps, "gap", lambda *both: seen.append(both) or own(*both))
    batch = encoded([TEXTS[0], PROBES[1]])
    assert batch.lengths[0] < batch.tokens.shape[1]
    shadow("llama").run(batch, [{Stack(LAST, (0,), tokens=(2,)): Unembedded(whole)}])
    ((made, own_logits),) = seen
    wanted = logits_of("llama")[BATCH.lengths[0] - 1]
    np.testing.assert_allclose(made[0], wanted, atol=3e-5)
    np.testing.assert_allclose(own_logits[0], wanted, atol=3e-5)
