"""HeadAblation equals Hugging Face's model with a slice of its output matrix zeroed, or its input
replaced; its first-order estimates are derivatives."""

import copy
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch

from tests import tiny
from tests.instruments.common import (
    BLOCKS,
    PROBES,
    TEXTS,
    encoded,
    hugging_face,
    ids,
    readings,
    shadow,
)
from tests.instruments.surgery import OUTPUT, kept, module, replaced
from tests.marks import in_turns
from tlens_callback import HeadAblation, Probe, Shadow
from tlens_callback.instruments.ablation import _errors

LAYERS, HEADS = 2, 4
TARGET, FOIL = (
    tiny.tokenizer().convert_tokens_to_ids(word) for word in ("\u0120Paris", "\u0120London")
)
CAPITAL = TEXTS[0]
MEASURES = ("loss", "logit_diff")


def measured(model, probe=CAPITAL) -> dict[str, float]:
    """Of the text alone, in double precision."""
    with torch.no_grad():
        logits = model(ids(probe), use_cache=False).logits[0].double()
    logp = logits.log_softmax(-1)
    tokens = ids(probe)[0]
    each = [-float(logp[pos, tokens[pos + 1]]) for pos in range(len(tokens) - 1)]
    return {
        "loss": -float(logp[-1, TARGET]),
        "logit_diff": float(logits[-1, TARGET] - logits[-1, FOIL]),
        "token_loss": sum(each) / len(each),
    }


def columns(model, head: int) -> slice:
    config = model.config
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return slice(head * d_head, (head + 1) * d_head)


def blended(family, model, put, share, layer, head, probe=CAPITAL) -> dict[str, float]:
    """With z moved a share of the way to `put`, [layer][width]."""
    at = columns(model, head)

    def edit(z):
        z = z.clone()
        z[:, at] += share * (put[layer][at].to(z.dtype) - z[:, at])
        return z

    with replaced(family, model, {("z", layer): edit}):
        return measured(model, probe)


def mean_z(family, model) -> list[torch.Tensor]:
    """Per layer, over all tokens of the plain probes, each text run by itself."""
    each = [kept(family, model, ids(probe), ["z"])[1] for probe in TEXTS]
    return [torch.cat([got["z", i] for got in each]).double().mean(0) for i in range(LAYERS)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_zero_is_a_head_without_an_output_matrix(family):
    got = readings(HeadAblation(mode="zero", tokens=True), shadow(family))
    model = copy.deepcopy(hugging_face(family))
    clean = measured(model)
    largest = 0.0
    for layer, head in np.ndindex(LAYERS, HEADS):
        output = module(model, layer, OUTPUT[family])
        rows = type(output).__name__ == "Conv1D"
        slab = output.weight.data.T if rows else output.weight.data
        before = slab.clone()
        slab[:, columns(model, head)] = 0
        for measure, value in measured(model).items():
            effect = value - clean[measure]
            shown = got[f"head_ablation/{measure}/capital"].values[layer, head]
            assert shown == pytest.approx(effect, abs=1e-4), (measure, layer, head)
            largest = max(largest, abs(effect))
        slab.copy_(before)
    assert largest > 0.05
    assert "head_ablation/logit_diff/story" not in got  # it has no foil
    assert "head_ablation/loss/bare" not in got  # nor target


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_mean_is_that_of_the_plain_probes_tokens(family):
    got = readings(HeadAblation(), shadow(family))
    model = hugging_face(family)
    clean, put = measured(model), mean_z(family, model)
    far = 0.0
    for layer, head in np.ndindex(LAYERS, HEADS):
        effect = blended(family, model, put, 1.0, layer, head)
        for measure in ("loss", "logit_diff"):
            shown = got[f"head_ablation/{measure}/capital"].values[layer, head]
            assert shown == pytest.approx(effect[measure] - clean[measure], abs=1e-4)
        zeros = [torch.zeros_like(z) for z in put]
        nothing = blended(family, model, zeros, 1.0, layer, head)
        far = max(far, abs(nothing["loss"] - effect["loss"]))
    assert far > 1e-2  # zero and mean are told apart


@pytest.mark.parametrize(("family", "mode"), in_turns(tiny.FAMILIES, ["mean", "zero"]))
def test_first_order_is_the_derivative(family, mode):
    """Along the way from z to what takes its place: by central differences in float64."""
    got = readings(HeadAblation(mode=mode, method="first_order", tokens=True), shadow(family))
    exact = readings(HeadAblation(mode=mode, tokens=True), shadow(family))
    model = copy.deepcopy(hugging_face(family)).double()
    if family in ("qwen3_moe", "mixtral"):
        model.set_experts_implementation("eager")  # torch groups no matmuls in float64
    put = mean_z(family, model)
    put = [torch.zeros_like(z) for z in put] if mode == "zero" else put
    step = 2e-3  # Hugging Face's norms and softmaxes stay in float32
    for layer, head in np.ndindex(LAYERS, HEADS):
        ahead, behind = (blended(family, model, put, share, layer, head) for share in (step, -step))
        for measure in ahead:
            slope = (ahead[measure] - behind[measure]) / (2 * step)
            shown = got[f"head_ablation/{measure}/capital"].values[layer, head]
            assert shown == pytest.approx(slope, abs=1e-3, rel=1e-3), (measure, layer, head)
    key = "head_ablation/loss/capital"
    assert np.abs(got[key].values - exact[key].values).max() > 5e-3  # an estimate is no effect


@pytest.mark.parametrize("checked", [8, 20])
def test_the_doubt_over_all_heads(checked):
    of = shadow("llama")
    got = readings(HeadAblation(method="first_order", tokens=True, checked=checked), of)
    exact = readings(HeadAblation(tokens=True), of)
    for measure in ("loss", "logit_diff", "token_loss"):
        estimate, truth = (r[f"head_ablation/{measure}/capital"].values for r in (got, exact))
        error = np.abs(estimate - truth).max()
        assert error > 1e-3
        assert got[f"head_ablation/{measure}_error/capital"].values == pytest.approx(error)
        spearman = scipy.stats.spearmanr(estimate.ravel(), truth.ravel())[0]
        shown = got[f"head_ablation/{measure}_rank_correlation/capital"].values
        assert shown == pytest.approx(spearman, abs=1e-5)
    assert "head_ablation/loss_error/capital" not in exact


@pytest.mark.parametrize("checked", [3, 6])
def test_the_doubt_over_some_heads(checked):
    """A third the largest, a third of largest reach, the rest evenly spaced over the others."""
    beyond, different = 0.0, 0
    for family in ("gpt2", "llama", "opt"):
        of = shadow(family)
        got = readings(HeadAblation(mode="zero", method="first_order", checked=checked), of)
        exact = readings(HeadAblation(mode="zero"), of)
        size = [np.abs(got[f"head_ablation/{m}/capital"].values).ravel() for m in MEASURES]
        size = [max(one[i] / max(one) for one in size) for i in range(LAYERS * HEADS)]
        reach = reaches(family)
        chosen = sorted(range(LAYERS * HEADS), key=lambda i: -size[i])[: checked // 3]
        different += max(range(LAYERS * HEADS), key=lambda i: reach[i]) not in chosen
        others = sorted(set(range(LAYERS * HEADS)) - set(chosen), key=lambda i: -reach[i])
        chosen += others[: checked // 3]
        others = sorted(set(range(LAYERS * HEADS)) - set(chosen))
        chosen += others[:1] if checked == 3 else [others[0], others[-1]]
        for measure in MEASURES:
            key = f"head_ablation/{measure}/capital"
            miss = np.abs(got[key].values - exact[key].values).ravel()
            shown = got[f"head_ablation/{measure}_error/capital"].values
            assert shown == pytest.approx(miss[chosen].max(), abs=1e-5)
            beyond = max(beyond, miss.max() - miss[chosen].max())
    assert different or checked == 6
    assert beyond > 1e-3 or checked == 6  # all heads would say something else


def test_equal_effects_share_a_rank():
    """As scipy has it; no correlation where all are equal, there is one head, or no number."""
    rng = np.random.default_rng(0)
    for estimate, exact in rng.integers(0, 4, (20, 2, 7, 1)).astype(np.float32):
        expected = scipy.stats.spearmanr(estimate[:, 0], exact[:, 0])[0]
        largest, correlation = _errors(estimate, exact)[0]
        assert correlation == pytest.approx(expected, abs=1e-6)
        assert largest == np.abs(estimate - exact).max()
    some = np.arange(5, dtype=np.float32)[:, None]
    assert np.isnan(_errors(some, np.zeros_like(some))[0, 1])
    assert np.isnan(_errors(some, np.full_like(some, np.nan))).all()
    alone = Shadow.of(
        tiny.model("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    )
    got = readings(HeadAblation(method="first_order"), alone)
    assert np.isnan(got["head_ablation/loss_rank_correlation/capital"].values)
    assert np.isfinite(got["head_ablation/loss_error/capital"].values)


def reaches(family) -> list[float]:
    """sum over pos of |z| |d value / dz|, of Hugging Face's model by its own graph; relative."""
    model, found = hugging_face(family), {}

    def leaf(layer, value):
        found[layer] = value.detach().requires_grad_() if not found else value
        return found[layer]

    with replaced(family, model, {("z", i): partial(leaf, i) for i in range(LAYERS)}):
        logits = model(ids(CAPITAL), use_cache=False).logits[0, -1]
    relative = []
    for value in (-logits.log_softmax(-1)[TARGET], logits[TARGET] - logits[FOIL]):
        slopes = torch.autograd.grad(value, list(found.values()), retain_graph=True)
        reach = [
            float(sum(z.detach()[:, at].norm(dim=1) * slope[:, at].norm(dim=1)))
            for z, slope in zip(found.values(), slopes, strict=True)
            for at in (columns(model, head) for head in range(HEADS))
        ]
        relative.append([one / max(reach) for one in reach])
    return [max(each) for each in zip(*relative, strict=True)]


def test_the_mean_of_token_losses_is_over_tokens():
    """On a repeated block, which has no target, when it is named."""
    block = BLOCKS[0]
    got = readings(HeadAblation(mode="zero", tokens=True, probes=[block.name]), shadow("gpt_neox"))
    assert set(got) == {f"head_ablation/token_loss/{block.name}"}
    model = hugging_face("gpt_neox")
    clean = measured(model, block)["token_loss"]
    zeros = [torch.zeros(32)] * LAYERS
    without = blended("gpt_neox", model, zeros, 1.0, 1, 3, block)["token_loss"]
    (reading,) = got.values()
    assert reading.values[1, 3] == pytest.approx(without - clean, abs=1e-4)
    assert abs(without - clean) > 1e-3


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_how_many_side_by_side_does_not_matter(rows):
    for method in ("exact", "first_order"):
        wide = readings(HeadAblation(method=method), shadow("qwen3_moe"))
        narrow = readings(HeadAblation(method=method, rows=rows), shadow("qwen3_moe"))
        for key, reading in wide.items():
            np.testing.assert_allclose(reading.values, narrow[key].values, atol=2e-5)


def test_company_moves_the_mean_and_nothing_else():
    zero, mean = HeadAblation(mode="zero"), HeadAblation()
    key = "head_ablation/loss/capital"
    alone, together = (readings(zero, shadow("mistral"), p)[key] for p in (TEXTS[:1], PROBES))
    np.testing.assert_allclose(alone.values, together.values, atol=1e-5)
    alone, together = (readings(mean, shadow("mistral"), p)[key] for p in (TEXTS[:1], PROBES))
    assert np.abs(alone.values - together.values).max() > 1e-2


def test_no_trace():
    of, batch = shadow("llama"), encoded()
    weights = [p.clone() for p in of.bridge.parameters()]
    logits = of.logits(batch.tokens)
    readings(HeadAblation(method="first_order"), of)
    assert all(p.grad is None for p in of.bridge.parameters())
    assert all(torch.equal(p, w) for p, w in zip(of.bridge.parameters(), weights, strict=True))
    assert torch.equal(of.logits(batch.tokens), logits)
    assert not any(getattr(point, "fwd_hooks", []) for point in of.hooks.values())


def test_bfloat16():
    wide = readings(HeadAblation(), shadow("llama"))
    narrow = shadow("llama").__class__.of(tiny.model("llama").bfloat16())
    for method in ("exact", "first_order"):
        for key, reading in readings(HeadAblation(method=method), narrow).items():
            assert np.isfinite(reading.values).all()
            if method == "exact":
                assert np.abs(reading.values - wide[key].values).max() < 0.2


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "median"},
        {"method": "second_order"},
        {"checked": 2},
        {"rows": 0},
        {"every": 0},
        {"probes": "capital"},
        {"probes": []},
    ],
)
def test_a_wrong_argument_is_named(wrong):
    # Where types are checked, the checker is first.
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        HeadAblation(**wrong)


def test_probes_that_cannot_be_measured_are_named():
    with pytest.raises(ValueError, match="no probe 'other'"):
        HeadAblation(probes=["other"]).taps(shadow("llama"), encoded())
    for nothing in (TEXTS[2:], BLOCKS[:1]):
        with pytest.raises(ValueError, match="none has a target"):
            HeadAblation().taps(shadow("llama"), encoded(nothing))
    with pytest.raises(ValueError, match="mode='zero'"):
        HeadAblation(tokens=True, probes=[BLOCKS[0].name]).taps(shadow("llama"), encoded(BLOCKS))
    # One token has no token loss.
    with pytest.raises(ValueError, match="none has a target"):
        HeadAblation(tokens=True).taps(shadow("llama"), encoded([Probe("one", [5])]))
