"""LogitAttribution equals Hugging Face modules taken apart in float64, and its parts sum up."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import tiny
from tests.instruments.common import PROBES, TEXTS, encoded, readings, shadow
from tests.instruments.naive_parts import Account, in_float64, out_of
from tests.instruments.test_neurons import DENSE
from tests.instruments.test_neurons import Account as Neurons
from tests.shadow.test_other_families import OTHERS, SMALL
from tests.shadow.test_other_families import model as other_model
from tlens_callback import LogitAttribution, Probe, Shadow
from tlens_callback.instruments import attribution
from tlens_callback.instruments.parts.direct import dots

CAPITAL, STORY, BARE = TEXTS
OPEN = Probe("open", "The capital of Italy is", target=" Rome")
"""Without a foil: against the mean over the vocabulary."""
ASKED = (CAPITAL, STORY, OPEN)


def values(got: dict, measure: str, probe: Probe) -> np.ndarray:
    return got[f"logit_attribution/{measure}/{probe.name}"].values


def check(got: dict, account: Account, probe: Probe) -> None:
    """Every part against the account, and the sum against the model's own answer."""
    layers, heads = range(len(account.layers)), range(4)
    expected = {
        "head": [[account.head(i, h) for h in heads] for i in layers],
        "attention": [account.attention(i) for i in layers],
        "mlp": [account.worth(account.seen["mlp", i]) for i in layers],
        "embed": account.worth(account.seen["embed"]),
        "bias": account.bias(),
        "total": account.answer(),
    }
    parts = [expected[part] for part in ("head", "mlp", "embed", "bias")]
    size = sum(np.abs(part).sum() for part in parts)
    assert sum(np.sum(part) for part in parts) == pytest.approx(account.answer(), abs=1e-5 * size)
    for measure, value in expected.items():
        np.testing.assert_allclose(
            values(got, measure, probe), value, atol=1e-6 * size, err_msg=measure
        )
    assert abs(values(got, "remainder", probe)) < 1e-6 * size
    for measure in ("head", "mlp"):
        assert np.abs(expected[measure]).min() > 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_are_hugging_faces_and_sum_to_its_answer(family):
    """With a foil and without; among probes of other lengths, so padding is in every row."""
    got = readings(LogitAttribution(), shadow(family), [*PROBES, OPEN])
    for probe in ASKED:
        check(got, Account(in_float64(family), family, probe), probe)
    assert not any("bare" in key or "repeat" in key for key in got)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"head_dim": 16}),
        ("gemma2", {"final_logit_softcapping": 9.0}),
        ("gemma2", {"attention_bias": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}),
    ],
)
def test_variants_of_a_family(family, overrides):
    of = Shadow.of(tiny.model(family, **overrides))
    account = Account(in_float64(family, **overrides), family, CAPITAL)
    check(readings(LogitAttribution(), of, [CAPITAL]), account, CAPITAL)


def test_a_soft_cap_matters():
    """The sum is that of the logits before the cap; behind it the lead is another."""
    account = Account(in_float64("gemma2"), "gemma2", CAPITAL)
    assert abs(account.lead(account.logits) - account.answer()) > 0.1


def _no_gain(monkeypatch):
    monkeypatch.setattr(attribution, "before_norm", lambda norm, direction: direction)


def _no_post_norm(monkeypatch):
    monkeypatch.setattr(attribution, "ATTN_NORM", "nowhere")


def _no_output_bias(monkeypatch):
    heads = attribution.head_writes
    monkeypatch.setattr(
        attribution,
        "head_writes",
        lambda layers, w_o, b_o, direction: heads(layers, w_o, lambda layer: None, direction),
    )


def _no_constant(monkeypatch):
    minus_foil = attribution.minus_foil
    monkeypatch.setattr(attribution, "minus_foil", lambda x, t, f: 0 * minus_foil(x, t, f))


def _every_head_the_first(monkeypatch):
    heads = attribution.head_writes
    monkeypatch.setattr(
        attribution,
        "head_writes",
        lambda layers, w_o, *rest: heads(
            layers, lambda layer: w_o(layer)[:1].expand(4, -1, -1), *rest
        ),
    )


def _capped(monkeypatch):
    monkeypatch.setattr(attribution, "uncapped", lambda of, logits: logits)


@pytest.mark.parametrize(
    ("spoil", "family"),
    [
        (_no_gain, "llama"),
        (_no_gain, "gemma2"),
        (_no_gain, "gpt2"),
        (_no_post_norm, "gemma2"),
        (_no_post_norm, "gemma3_text"),
        (_no_post_norm, "olmo2"),
        (_no_output_bias, "gpt2"),
        (_no_output_bias, "gpt_neox"),
        (_no_output_bias, "opt"),
        (_no_constant, "gptj"),
        (_every_head_the_first, "llama"),
        (_capped, "gemma2"),
    ],
)
def test_the_remainder_tells_of_a_missing_part(monkeypatch, spoil, family):
    """What is logged as a control can fail, and does for each thing easily left out."""
    spoil(monkeypatch)
    monkeypatch.setattr(attribution, "_check_sum", lambda off, shadow: None)
    got = readings(LogitAttribution(), shadow(family), [CAPITAL])
    assert abs(values(got, "remainder", CAPITAL)) > 1e-2


def test_hook_result_would_not_sum_behind_a_post_norm():
    """TransformerLens's own per-head results are what the post-norm reads, not what it adds."""
    account = Account(in_float64("gemma2"), "gemma2", CAPITAL)
    raw = out_of(account.layers[0], "gemma2")(account.seen["z", 0])
    assert abs(account.worth(raw) - account.attention(0)) > 1e-2


@pytest.mark.parametrize("family", DENSE)
def test_neurons(family):
    got = readings(LogitAttribution(neurons=3), shadow(family), [CAPITAL, STORY])
    target, foil = encoded([CAPITAL]).targets[0], encoded([CAPITAL]).foils[0]
    account = Neurons(family, CAPITAL)
    assert target is not None
    for i in range(2):
        width = account.fired[i].shape[1]
        writes = [account.write(i, n, target, foil) for n in range(width)]
        top = sorted(range(width), key=lambda n: -abs(writes[n]))[:3]
        assert values(got, "neuron", CAPITAL)[i].tolist() == top
        np.testing.assert_allclose(
            values(got, "neuron_write", CAPITAL)[i], [writes[n] for n in top], atol=5e-6, rtol=1e-5
        )


def test_all_neurons_are_the_mlp():
    for family, mixed, layers in (("gemma2", False, (0, 1)), ("qwen3_moe", True, (1,))):
        got = readings(LogitAttribution(neurons=48), shadow(family, mixed=mixed), [CAPITAL])
        write, mlp = values(got, "neuron_write", CAPITAL), values(got, "mlp", CAPITAL)
        assert write.shape == (len(layers), 48)
        np.testing.assert_allclose(write.sum(1), mlp[list(layers)], atol=1e-5)
    assert got["logit_attribution/neuron/capital"].labels == {"layer": ("1",)}
    none = readings(LogitAttribution(neurons=48), shadow("mixtral"), [CAPITAL])
    assert "logit_attribution/neuron/capital" not in none


def test_changes_are_against_the_first_observation():
    live = tiny.model("llama")
    of, instrument = Shadow.of(live), LogitAttribution()
    first = readings(instrument, of, ASKED)
    for probe in ASKED:
        for measure in ("head", "mlp"):
            assert not values(first, f"{measure}_change", probe).any()
    for seed in (1, 2):
        with torch.no_grad():
            other = tiny.model("llama", seed=seed)
            for mine, theirs in zip(live.parameters(), other.parameters(), strict=True):
                mine.lerp_(theirs, 0.2)
        of.sync()
        later, fresh = readings(instrument, of, ASKED), readings(LogitAttribution(), of, ASKED)
        for probe in ASKED:
            for measure in ("head", "mlp"):
                now = values(fresh, measure, probe)
                np.testing.assert_array_equal(values(later, measure, probe), now)
                change = values(later, f"{measure}_change", probe)
                np.testing.assert_array_equal(change, now - values(first, measure, probe))
                assert np.abs(change).max() > 1e-2
    resumed = LogitAttribution()
    resumed.baseline.update({key: kept.clone() for key, kept in instrument.baseline.items()})
    again = readings(resumed, of, ASKED)
    for key, reading in later.items():
        np.testing.assert_array_equal(again[key].values, reading.values)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral"])
def test_padding_and_company_do_not_matter(family):
    alone = readings(LogitAttribution(neurons=2), shadow(family), [CAPITAL])
    longer = Probe("long", list(range(10, 70)), target=5)
    together = readings(LogitAttribution(neurons=2), shadow(family), [longer, *PROBES])
    for key, reading in alone.items():
        np.testing.assert_allclose(together[key].values, reading.values, atol=5e-6)


def test_attributing_at_the_batchs_last_position_is_told_apart():
    """The check above can fail: a shorter probe's last column is padding."""

    def at_the_end(probes: list[Probe]) -> float:
        hook = "blocks.1.hook_mlp_out"
        taken: Any = shadow("llama").run(encoded(probes), [{hook: lambda x: x[0, -1].norm()}])
        return float(taken[0][hook])

    assert abs(at_the_end([CAPITAL]) - at_the_end([CAPITAL, STORY])) > 1e-3


def test_half_precision_leaves_its_own_rounding():
    of = Shadow.of(tiny.model("llama").bfloat16())
    got = readings(LogitAttribution(), of, [CAPITAL])
    wide = readings(LogitAttribution(), shadow("llama"), [CAPITAL])
    assert 1e-5 < abs(values(got, "remainder", CAPITAL)) < 0.05
    np.testing.assert_allclose(
        values(got, "head", CAPITAL), values(wide, "head", CAPITAL), atol=0.05
    )


def test_a_wide_weight_is_taken_in_pieces():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 700, 2100, generator=generator).bfloat16()
    direction = torch.randn(2, 2100, generator=generator)
    got = dots(weight, direction)
    expected = np.einsum("hnd,rd->rhn", weight.double().numpy(), direction.double().numpy())
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_selection():
    got = readings(LogitAttribution(probes=["story"]), shadow("llama"), PROBES)
    assert {reading.probe for reading in got.values()} == {"story"}
    with pytest.raises(ValueError, match="none of the probes has a target"):
        readings(LogitAttribution(), shadow("llama"), [BARE])
    with pytest.raises(ValueError, match="probe 'bare' has no target"):
        readings(LogitAttribution(probes=["capital", "bare"]), shadow("llama"), PROBES)
    with pytest.raises(ValueError, match="no probe 'nobody'"):
        readings(LogitAttribution(probes=["nobody"]), shadow("llama"))
    with pytest.raises(ValueError, match="neurons=-1"):
        LogitAttribution(neurons=-1)
    with pytest.raises(ValueError, match=r"neurons=49\): layer 0 has 48 neurons"):
        readings(LogitAttribution(neurons=49), shadow("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        # The residual stream goes on from behind the layers' norms.
        ("Bloom", {**OTHERS["bloom"][1], "apply_residual_connection_post_layernorm": True}),
        ("ModernBertDecoder", SMALL),  # its head is more than a matrix
    ],
)
def test_refuses_a_family_that_makes_its_logits_in_another_way(family, settings, dtype):
    of = Shadow.of(other_model(family, settings).eval().to(dtype))
    with pytest.raises(ValueError, match=rf"answer of this {family}ForCausalLM by .*e-01 of"):
        readings(LogitAttribution(), of, [CAPITAL])


@pytest.mark.parametrize("family", sorted(OTHERS.keys() - {"granite", "cohere"}))
def test_families_on_no_list_sum_up(family):
    got = readings(LogitAttribution(), Shadow.of(other_model(*OTHERS[family]).eval()), [CAPITAL])
    assert abs(values(got, "remainder", CAPITAL)) < 1e-6
    assert np.abs(values(got, "head", CAPITAL)).max() > 1e-3


def test_refuses_where_the_parts_would_not_sum():
    config = transformers.GraniteConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        logits_scaling=8.0,
    )
    granite = Shadow.of(transformers.GraniteForCausalLM(config).eval())
    with pytest.raises(ValueError, match="more than the unembedding"):
        readings(LogitAttribution(), granite, [CAPITAL])
    hybrid = Shadow.of(tiny.model("llama"))
    hybrid.hooks = {k: v for k, v in hybrid.hooks.items() if k != "blocks.1.attn.hook_z"}
    with pytest.raises(ValueError, match=r"layer 1 of this model has no 'blocks.1.attn.hook_z'"):
        readings(LogitAttribution(), hybrid, [CAPITAL])
