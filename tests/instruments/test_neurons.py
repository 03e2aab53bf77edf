"""TopNeurons equals activations, rankings and contributions worked out from HF modules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

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
from tlens_callback import Probe, Shadow, TopNeurons
from tlens_callback.instruments.parts.direct import has_direct_path
from tlens_callback.shadow import Stack

DENSE = [family for family in tiny.FAMILIES if family not in ("qwen3_moe", "mixtral")]
CAPITAL, STORY, BARE = TEXTS


@dataclass
class Mlp:
    """One layer's MLP in a Hugging Face model, by the names of its family."""

    reads: nn.Module
    fire: Callable[[Tensor], Tensor]
    w_out: Tensor
    b_out: Tensor | None
    post_norm: nn.Module | None = None


def mlp_of(model: Any, family: str, i: int) -> Mlp:
    if family == "gpt2":
        mlp = model.transformer.h[i].mlp
        out = mlp.c_proj
        return Mlp(mlp, lambda x: mlp.act(mlp.c_fc(x)), out.weight, out.bias)
    if family == "gptj":
        mlp = model.transformer.h[i].mlp
        return Mlp(mlp, lambda x: mlp.act(mlp.fc_in(x)), mlp.fc_out.weight.T, mlp.fc_out.bias)
    if family == "gpt_neox":
        mlp = model.gpt_neox.layers[i].mlp
        out = mlp.dense_4h_to_h
        return Mlp(mlp, lambda x: mlp.act(mlp.dense_h_to_4h(x)), out.weight.T, out.bias)
    if family == "opt":
        layer = model.model.decoder.layers[i]
        out = layer.fc2
        return Mlp(layer.fc1, lambda x: layer.activation_fn(layer.fc1(x)), out.weight.T, out.bias)
    layer = model.model.layers[i]
    mlp = layer.mlp
    if family == "phi3":

        def fire(x: Tensor) -> Tensor:
            gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
            return mlp.activation_fn(gate) * up

    else:

        def fire(x: Tensor) -> Tensor:
            return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)

    post = getattr(layer, "post_feedforward_layernorm", None)
    return Mlp(mlp, fire, mlp.down_proj.weight.T, mlp.down_proj.bias, post)


def final_norm_of(model: Any, family: str) -> nn.Module:
    if family in ("gpt2", "gptj"):
        return model.transformer.ln_f
    if family == "gpt_neox":
        return model.gpt_neox.final_layer_norm
    return model.model.decoder.final_layer_norm if family == "opt" else model.model.norm


class Account:
    """One forward pass of the untouched model on one probe, kept for working things out."""

    @torch.no_grad()
    def __init__(self, family: str, probe: Probe, *, mixed: bool = False) -> None:
        self.family = family
        self.model = model = hugging_face(family, mixed=mixed)
        self.norm: Any = final_norm_of(model, family)
        self.layers = [1] if mixed else list(range(model.config.num_hidden_layers))
        self.mlps = {i: mlp_of(model, family, i) for i in self.layers}
        seen: dict[Any, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, key=key: seen.__setitem__(key, args[0].reshape(-1, 32))
            )
            for key, module in [
                ("final", self.norm),
                *((i, mlp.reads) for i, mlp in self.mlps.items()),
                *((("post", i), mlp.post_norm) for i, mlp in self.mlps.items() if mlp.post_norm),
            ]
        ]
        try:
            self.logits = model(ids(probe), use_cache=False).logits[0, -1].double()
        finally:
            for handle in handles:
                handle.remove()
        self.seen = seen
        self.fired = {i: mlp.fire(seen[i]).double() for i, mlp in self.mlps.items()}

    def top(self, i: int, k: int, skip: int) -> list[int]:
        """The k neurons of layer i, by sorting."""
        peaks = self.fired[i][skip:].abs().max(0).values.tolist()
        return sorted(range(len(peaks)), key=lambda n: -peaks[n])[:k]

    @torch.no_grad()
    def through(self, norm: Any, at: Tensor, x: Tensor) -> Tensor:
        """norm(x) with the scale it has at `at`, without its bias."""
        gain = norm.weight.double()
        if self.family.startswith("gemma"):
            gain = 1 + gain
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        if isinstance(norm, nn.LayerNorm):
            at, x = at - at.mean(), x - x.mean()
        return x / (at.pow(2).mean() + eps).sqrt() * gain

    @torch.no_grad()
    def logits_of(self, x: Tensor) -> Tensor:
        """The logits before any soft cap, were x in the last token's final residual stream."""
        head = self.model.get_output_embeddings()
        normed = self.through(self.norm, self.seen["final"][-1].double(), x)
        if getattr(self.norm, "bias", None) is not None:
            normed = normed + self.norm.bias.double()
        logits = normed @ head.weight.double().T
        return logits if head.bias is None else logits + head.bias.double()

    def difference(self, i: int, written: Tensor, target: int, foil: int | None) -> float:
        """How the last logits change if the MLP of layer i does not write `written`."""
        if self.mlps[i].post_norm is not None:
            at = self.seen["post", i][-1].double()
            written = self.through(self.mlps[i].post_norm, at, written)
        final = self.seen["final"][-1].double()
        change = self.logits_of(final) - self.logits_of(final - written)
        return float(change[target] - (change.mean() if foil is None else change[foil]))

    def write(self, i: int, n: int, target: int, foil: int | None) -> float:
        neuron = self.fired[i][-1, n] * self.mlps[i].w_out[n].double()
        return self.difference(i, neuron, target, foil)


def answer(probe: Probe) -> tuple[int, int | None]:
    batch = encoded([probe])
    assert batch.targets[0] is not None
    return batch.targets[0], batch.foils[0]


@pytest.mark.parametrize("family", DENSE)
def test_the_reference_explains_the_logits(family):
    """What `write` is compared with is Hugging Face's own answer taken apart."""
    account = Account(family, CAPITAL)
    logits = account.logits_of(account.seen["final"][-1].double())
    if cap := getattr(account.model.config, "final_logit_softcapping", None):
        logits = cap * (logits / cap).tanh()
    np.testing.assert_allclose(logits, account.logits, atol=2e-5)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("skip_first", [True, False])
def test_equals_sorting_hugging_face(family, skip_first):
    k = 4
    got = readings(TopNeurons(k=k, skip_first=skip_first), shadow(family))
    for probe in TEXTS:
        account = Account(family, probe)
        names = got[f"top_neurons/neuron/{probe.name}"].values
        fired = got[f"top_neurons/activation/{probe.name}"]
        assert fired.labels == {"pos": encoded([probe]).labels[0]}
        assert names.shape == (2, k)
        for i in account.layers:
            expected = account.top(i, k, skip=int(skip_first))
            assert names[i].tolist() == expected
            np.testing.assert_allclose(
                fired.values[i], account.fired[i][:, expected].T, atol=5e-6, rtol=2e-6
            )


@pytest.mark.parametrize("family", DENSE)
def test_write_is_what_removing_the_neuron_changes(family):
    """With a foil, and without one; through the post-norm where there is one."""
    got = readings(TopNeurons(k=3), shadow(family))
    for probe in (CAPITAL, STORY):
        account = Account(family, probe)
        write = got[f"top_neurons/write/{probe.name}"].values
        expected = [
            [account.write(i, n, *answer(probe)) for n in account.top(i, 3, skip=1)]
            for i in account.layers
        ]
        np.testing.assert_allclose(write, expected, atol=5e-6, rtol=1e-5)
        assert np.abs(write).max() > 1e-3
    assert "top_neurons/write/bare" not in got


@pytest.mark.parametrize("family", DENSE)
def test_all_writes_and_the_bias_are_the_layers_contribution(family):
    account = Account(family, CAPITAL)
    k = account.fired[0].shape[1]
    got = readings(TopNeurons(k=k), shadow(family), [CAPITAL])["top_neurons/write/capital"]
    for i, mlp in account.mlps.items():
        bias = torch.zeros(32).double() if mlp.b_out is None else mlp.b_out.double()
        whole = account.fired[i][-1] @ mlp.w_out.double() + bias
        expected = account.difference(i, whole, *answer(CAPITAL))
        left = account.difference(i, bias, *answer(CAPITAL))
        assert got.values[i].sum() + left == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_formula_without_the_gain_is_told_apart(family):
    """The comparison above can fail: these models' norms have gains that matter."""
    account = Account(family, CAPITAL)
    right = account.write(0, 0, *answer(CAPITAL))
    gain, norm = account.norm.weight.clone(), account.norm
    with torch.no_grad():
        norm.weight.fill_(0.0 if family == "gemma2" else 1.0)
        wrong = account.write(0, 0, *answer(CAPITAL))
        norm.weight.copy_(gain)
    assert abs(right - wrong) > 1e-3 * abs(right)


def test_the_first_token_would_fill_the_list():
    """A neuron that fires hard on <bos> only, as they do on sinks: shown only if asked for."""
    live: Any = tiny.model("gpt2")
    with torch.no_grad():
        start = live.transformer.wte.weight[1] + live.transformer.wpe.weight[0]
        live.transformer.h[0].mlp.c_fc.weight[:, 7] = 30 * start / start.norm()
        live.transformer.h[0].attn.c_proj.weight.zero_()
        live.transformer.h[0].mlp.c_fc.bias[7] = -100
    of = Shadow.of(live)
    kept = readings(TopNeurons(skip_first=False), of, [CAPITAL])
    assert kept["top_neurons/neuron/capital"].values[0, 0] == 7
    assert kept["top_neurons/activation/capital"].values[0, 0].argmax() == 0
    skipped = readings(TopNeurons(), of, [CAPITAL])
    assert 7 not in skipped["top_neurons/neuron/capital"].values[0]


def test_a_probe_of_one_token_has_only_that_one():
    got = readings(TopNeurons(k=2), shadow("llama"), [Probe("one", [9], target=4), CAPITAL])
    account = Account("llama", Probe("one", [9]))
    assert got["top_neurons/neuron/one"].values.tolist() == [account.top(i, 2, 0) for i in (0, 1)]
    assert got["top_neurons/activation/one"].values.shape == (2, 2, 1)


def test_selection():
    got = readings(TopNeurons(probes=["repeat-5-0", "capital"]), shadow("llama"))
    assert list(got) == [
        "top_neurons/neuron/repeat-5-0",
        "top_neurons/activation/repeat-5-0",
        "top_neurons/peak/repeat-5-0",
        "top_neurons/neuron/capital",
        "top_neurons/activation/capital",
        "top_neurons/peak/capital",
        "top_neurons/write/capital",
    ]
    assert readings(TopNeurons(), shadow("llama"), BLOCKS) == {}


@pytest.mark.parametrize("skip_first", [True, False])
def test_peak_is_where_the_neuron_fires_most_among_the_ranked_tokens(skip_first):
    got = readings(TopNeurons(skip_first=skip_first), shadow("llama"), PROBES)
    for probe in TEXTS:
        fired = got[f"top_neurons/activation/{probe.name}"].values
        peak = got[f"top_neurons/peak/{probe.name}"].values
        for layer, rank in np.ndindex(peak.shape):
            along = [abs(float(a)) for a in fired[layer, rank]]
            start = 1 if skip_first and len(along) > 1 else 0
            assert peak[layer, rank] == max(range(start, len(along)), key=along.__getitem__)


def expert_account(family: str, probe: Probe, layer: int, mixed: bool) -> tuple[np.ndarray, ...]:
    """Share and mean probability of each expert over the tokens after the first, token by token."""
    model = hugging_face(family, mixed=mixed)
    seen: list[Tensor] = []
    gate = model.model.layers[layer].mlp.gate
    handle = gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32)))
    try:
        with torch.no_grad():
            model(ids(probe), use_cache=False)
    finally:
        handle.remove()
    share, router = np.zeros(4), np.zeros(4)
    tokens = (seen[0] @ gate.weight.T).detach().double().numpy()[1:]
    for logits in tokens:
        probability = np.exp(logits) / np.exp(logits).sum()
        router += probability / len(tokens)
        for expert in sorted(range(4), key=lambda e: -probability[e])[:2]:
            share[expert] += 1 / len(tokens)
    return share, router


@pytest.mark.parametrize(
    ("family", "mixed"), [("mixtral", False), ("qwen3_moe", False), ("qwen3_moe", True)]
)
def test_experts(family, mixed):
    got = readings(TopNeurons(), shadow(family, mixed=mixed))
    layers = (0, 2) if mixed else (0, 1)
    for probe in TEXTS:
        share = got[f"top_neurons/expert_share/{probe.name}"]
        router = got[f"top_neurons/router/{probe.name}"]
        assert share.labels == ({"layer": ("0", "2")} if mixed else {})
        np.testing.assert_allclose(share.values.sum(1), 2, atol=1e-5)
        for i, layer in enumerate(layers):
            expected = expert_account(family, probe, layer, mixed)
            np.testing.assert_allclose(share.values[i], expected[0], atol=1e-6)
            np.testing.assert_allclose(router.values[i], expected[1], atol=1e-6)
    assert mixed == ("top_neurons/neuron/capital" in got)


def test_a_dense_layer_between_layers_of_experts():
    got = readings(TopNeurons(k=3), shadow("qwen3_moe", mixed=True))
    account = Account("qwen3_moe", CAPITAL, mixed=True)
    names, write = got["top_neurons/neuron/capital"], got["top_neurons/write/capital"]
    assert names.labels == write.labels == {"layer": ("1",)}
    assert names.values[0].tolist() == account.top(1, 3, skip=1)
    expected = [account.write(1, n, *answer(CAPITAL)) for n in account.top(1, 3, skip=1)]
    np.testing.assert_allclose(write.values[0], expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_padding_and_company_do_not_matter(family):
    alone = readings(TopNeurons(), shadow(family), [CAPITAL])
    longer = Probe("long", list(range(10, 70)))
    together = readings(TopNeurons(), shadow(family), [longer, *PROBES])
    for key, reading in alone.items():
        np.testing.assert_allclose(together[key].values, reading.values, atol=2e-6, rtol=1e-5)


def test_a_ranking_that_counts_padding_is_told_apart():
    """The check above can fail: padding tokens make other neurons fire most."""

    def unmasked(probes) -> list[int]:
        hook = "blocks.1.mlp.hook_post"
        row = [p.name for p in probes].index("capital")
        reduce = {hook: lambda post: post[row].abs().amax(0).topk(5).indices}
        post: Any = shadow("llama").run(encoded(probes), [reduce])[0][hook]
        return post.tolist()

    longer = Probe("long", list(range(10, 70)))
    assert unmasked([CAPITAL]) != unmasked([CAPITAL, longer])


def test_no_write_where_logits_are_rescaled():
    """Granite divides the logits: no write is better than one off by a factor."""
    from transformers import GraniteConfig, GraniteForCausalLM

    def granite(**scaling: Any) -> Shadow:
        config = GraniteConfig(
            vocab_size=tiny.VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **scaling,
        )
        return Shadow.of(GraniteForCausalLM(config).eval())

    assert has_direct_path(granite())
    assert "top_neurons/write/capital" in readings(TopNeurons(), granite(), [CAPITAL])
    for scaled in (granite(logits_scaling=8.0), granite(residual_multiplier=0.2)):
        got = readings(TopNeurons(), scaled, [CAPITAL])
        assert "top_neurons/activation/capital" in got and "top_neurons/write/capital" not in got


def test_half_precision_is_widened_first():
    """The same neurons from a bfloat16 activation and from its exact float32 copy."""
    batch = encoded()
    post = torch.randn(*batch.tokens.shape, 48).bfloat16()
    top: Any
    (top,) = (
        reduce
        for key, reduce in TopNeurons(k=6).taps(shadow("llama"), batch).items()
        if isinstance(key, Stack) and key.end == "mlp.hook_post"
    )
    rows = post[[row for row, probe in enumerate(PROBES) if probe.block is None]]
    both, each = torch.stack([rows, -rows]), slice(0, 2)
    for half, full in zip(top(both, each), top(both.float(), each), strict=True):
        assert torch.equal(half, full)
    assert top(both, each)[2].dtype == torch.float32


def test_what_cannot_be_shown():
    with pytest.raises(ValueError, match=r"k=0\) shows nothing"):
        TopNeurons(k=0)
    with pytest.raises(ValueError, match=r"k=49\): layer 0 has 48 neurons"):
        TopNeurons(k=49).taps(shadow("llama"), encoded())
    with pytest.raises(ValueError, match="no probe 'nobody'"):
        TopNeurons(probes=["nobody"]).taps(shadow("llama"), encoded())
