"""CopyingScores and Composition equal what whole matrices of Hugging Face's weights give."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.instruments.common import encoded, hugging_face, readings, shadow
from tests.instruments.surgery import OUTPUT, layers
from tlens_callback import Shadow, observe
from tlens_callback.instruments import copying
from tlens_callback.instruments.composition import Composition, random_composition
from tlens_callback.instruments.copying import CopyingScores

EVERY_TOKEN = tuple(range(tiny.VOCAB))
HEADS, D_HEAD = 4, 8


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def reading_of(norm: Any, offset: int = 0) -> np.ndarray:
    """[d_model, d_model]: what a norm does to a row vector, up to its scale and bias."""
    gain = np.diag(array(norm.weight) + offset)
    if not isinstance(norm, torch.nn.LayerNorm):
        return gain
    width = len(gain)
    return (np.eye(width) - np.full((width, width), 1 / width)) @ gain


FINAL = {
    **dict.fromkeys(("gpt2", "gptj"), "transformer.ln_f"),
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
}
BEFORE = {"gpt2": "ln_1", "gptj": "ln_1", "opt": "self_attn_layer_norm"}


def projections(family: str, block: Any) -> list[np.ndarray]:
    """Q, K, V and O of all heads side by side, for row vectors."""
    weight = array(block.get_submodule(OUTPUT[family]).weight)
    o = weight if family == "gpt2" else weight.T
    if family == "gpt2":
        return [*np.split(array(block.attn.c_attn.weight), 3, axis=1), o]
    if family == "gpt_neox":  # head by head: its queries, its keys, its values
        fused = array(block.attention.query_key_value.weight).reshape(HEADS, 3, D_HEAD, 32)
        return [*(fused[:, i].reshape(-1, 32).T for i in range(3)), o]
    if family == "phi3":
        return [*np.split(array(block.self_attn.qkv_proj.weight).T, [32, 48], axis=1), o]
    attn = block.get_submodule(OUTPUT[family].rpartition(".")[0])
    return [*(array(getattr(attn, f"{n}_proj").weight).T for n in "qkv"), o]


def whole(family: str, model: Any = None) -> SimpleNamespace:
    """Per layer and head, OV and QK as [d_model, d_model], and the embeddings: norms folded in."""
    model = hugging_face(family) if model is None else model
    offset = 1 if family.startswith("gemma") else 0
    ov, qk = [], []
    for block in layers(model):
        q, k, v, o = projections(family, block)
        before = behind = np.eye(32)
        if family != "olmo2":
            before = reading_of(getattr(block, BEFORE.get(family, "input_layernorm")), offset)
        if family in ("gemma2", "gemma3_text", "olmo2"):
            behind = reading_of(block.post_attention_layernorm, offset)
        attn = block.get_submodule(OUTPUT[family].rpartition(".")[0])
        if hasattr(attn, "q_norm"):
            gain_q, gain_k = (array(n.weight) + offset for n in (attn.q_norm, attn.k_norm))
            q = q * np.resize(gain_q, q.shape[1])
            k = k * np.resize(gain_k, k.shape[1])
        shared = q.shape[1] // k.shape[1]
        ov.append([])
        qk.append([])
        for h in range(HEADS):
            own, kv = (slice(i * D_HEAD, (i + 1) * D_HEAD) for i in (h, h // shared))
            ov[-1].append(before @ v[:, kv] @ o[own] @ behind)
            qk[-1].append(before @ q[:, own] @ k[:, kv].T @ before.T)
    final = model.get_submodule(FINAL.get(family, "model.norm"))
    return SimpleNamespace(
        ov=np.array(ov),
        qk=np.array(qk),
        embed=array(model.get_input_embeddings().weight),
        unembed=reading_of(final, offset) @ array(model.get_output_embeddings().weight).T,
    )


def scores(circuit: np.ndarray) -> float:
    eigenvalues = np.linalg.eigvals(circuit)
    return float(eigenvalues.real.sum() / np.abs(eigenvalues).sum())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_copying_equals_the_whole_circuit(family):
    of = whole(family)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(tiny.VOCAB, generator=generator).tolist()
    other = {t: order[i - 1] for i, t in enumerate(order)}
    assert all(other[t] != t for t in other)
    taken_by = np.array([other[t] for t in range(tiny.VOCAB)])
    mean = of.unembed.mean(1, keepdims=True)
    got = readings(CopyingScores(tokens=EVERY_TOKEN), shadow(family))
    literal = readings(CopyingScores(tokens=EVERY_TOKEN, centred=False), shadow(family))
    for layer in range(2):
        for head in range(HEADS):
            place, ov = (layer, head), of.ov[layer, head]
            circuit = of.embed @ ov @ of.unembed
            centred = circuit - circuit.mean(1, keepdims=True)
            permuted = of.embed[taken_by] @ ov @ (of.unembed - mean)
            wanted = {
                "eigenvalue": scores(centred),
                "eigenvalue_permuted": scores(permuted),
                "top5": np.mean([t in np.argsort(-circuit[t])[:5] for t in EVERY_TOKEN]),
                "top5_permuted": np.mean(
                    [other[t] in np.argsort(-circuit[t])[:5] for t in EVERY_TOKEN]
                ),
            }
            for measure, value in wanted.items():
                reading = got[f"copying_scores/{measure}"]
                assert reading.values[place] == pytest.approx(value, abs=1e-5), (place, measure)
            raw = literal["copying_scores/eigenvalue"].values[place]
            assert raw == pytest.approx(scores(circuit), abs=1e-5)
    assert np.abs(got["copying_scores/eigenvalue"].values).max() > 0.1


def test_the_norms_matter():
    """The comparison above can fail: without the gains the scores are others."""
    of, got = whole("gemma2"), readings(CopyingScores(), shadow("gemma2"))
    model = hugging_face("gemma2")
    bare = array(model.get_output_embeddings().weight).T
    bare = bare - bare.mean(1, keepdims=True)
    without = scores(of.embed @ of.ov[0, 0] @ bare)
    assert abs(without - got["copying_scores/eigenvalue"].values[0, 0]) > 1e-2


def one_head(sign: float | None, shift: float = 0.0) -> Any:
    """A model with one head as wide as the stream: the identity times `sign`, or a random one.

    `shift`: how far all embeddings stand off in one direction.
    """
    model = tiny.model(
        "llama", num_attention_heads=1, num_key_value_heads=1, head_dim=32, hidden_size=32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
        model.model.embed_tokens.weight += shift
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        for layer in model.model.layers if sign is not None else ():
            turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
            layer.self_attn.v_proj.weight.copy_(turn.Q)
            layer.self_attn.o_proj.weight.copy_(turn.Q.T * sign)
    return model


def test_heads_built_by_hand():
    signs = 1.0, -1.0, None
    got = {sign: readings(CopyingScores(), Shadow.of(one_head(sign))) for sign in signs}
    for sign in signs[:2]:
        eigenvalue = got[sign]["copying_scores/eigenvalue"].values
        np.testing.assert_allclose(eigenvalue, sign, atol=1e-5)
    assert (got[1.0]["copying_scores/top5"].values > 0.95).all()
    assert (got[-1.0]["copying_scores/top5"].values == 0).all()
    assert np.abs(got[None]["copying_scores/eigenvalue"].values).max() < 0.3
    assert got[None]["copying_scores/top5"].values.max() < 0.3
    for readings_ in got.values():
        assert np.abs(readings_["copying_scores/eigenvalue_permuted"].values).max() < 0.5
        assert readings_["copying_scores/top5_permuted"].values.max() < 0.3


def test_what_all_tokens_share_is_not_copying():
    """One direction makes the literal score of +-1 with no copying in it; its control says so."""
    of = Shadow.of(one_head(None, shift=5.0))
    literal, centred = (readings(CopyingScores(centred=c), of) for c in (False, True))
    assert np.abs(literal["copying_scores/eigenvalue"].values).min() > 0.8
    assert np.abs(literal["copying_scores/eigenvalue_permuted"].values).min() > 0.8
    assert np.abs(centred["copying_scores/eigenvalue"].values).max() < 0.3
    assert np.abs(centred["copying_scores/eigenvalue_permuted"].values).max() < 0.3
    copier = readings(CopyingScores(), Shadow.of(one_head(1.0, shift=5.0)))
    assert copier["copying_scores/eigenvalue"].values.min() > 0.95


@pytest.mark.parametrize("chunk", [3, 7, 50])
def test_dropping_tokens_early_changes_nothing(chunk, monkeypatch):
    shadows = shadow("llama"), Shadow.of(one_head(1.0))
    at_once = [readings(CopyingScores(), of) for of in shadows]
    monkeypatch.setattr(copying, "_CHUNK", chunk)
    in_pieces = [readings(CopyingScores(), of) for of in shadows]
    for one, other in zip(at_once, in_pieces, strict=True):
        for key in one:
            np.testing.assert_allclose(one[key].values, other[key].values, atol=1e-6)


def test_the_tokens_that_are_drawn():
    batch = encoded()
    drawn = CopyingScores(tokens=20)._tokens(batch, tiny.VOCAB).tolist()
    assert len(set(drawn)) == 20
    assert not set(drawn) & set(tiny.tokenizer().all_special_ids)
    given = CopyingScores(tokens=[5, 9])
    assert given.tokens == (5, 9)
    assert len(CopyingScores(tokens=5000)._tokens(batch, tiny.VOCAB)) < tiny.VOCAB


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tokens": 1}, "at least 2"),
        ({"tokens": [7]}, "at least 2|at least two"),
        ({"tokens": [-1, 4]}, "token ids"),
        ({"tokens": [4, 4]}, "twice"),
        ({"every": 0}, "every >= 1"),
    ],
)
def test_arguments_of_copying_are_checked(arguments, match):
    with pytest.raises(ValueError, match=match):
        CopyingScores(**arguments)


def test_says_why_where_the_formula_does_not_hold():
    with pytest.raises(ValueError, match="token id 96 is outside"):
        readings(CopyingScores(tokens=[1, 96]), shadow("llama"))
    projected = Shadow.of(tiny.model("opt", word_embed_proj_dim=16))
    with pytest.raises(ValueError, match="16"):
        readings(CopyingScores(), projected)
    with pytest.raises(ValueError, match="one layer of attention"):
        readings(Composition(), Shadow.of(tiny.model("llama", num_hidden_layers=1)))
    for field in ("k", "every"):
        with pytest.raises(ValueError, match=field):
            Composition(**{field: 0})


@pytest.mark.parametrize("seen", [0, 1])
def test_weights_that_are_no_numbers_have_no_score(seen, capfd):
    """Nor does LAPACK complain; heads of whole weights keep theirs."""
    model = tiny.model("llama", num_key_value_heads=4)
    whole_ones = readings(CopyingScores(), Shadow.of(model))
    model.model.layers[seen].self_attn.o_proj.weight.data[:, :D_HEAD] = torch.nan
    got = readings(CopyingScores(), Shadow.of(model))
    for key, reading in got.items():
        broken = np.zeros((2, HEADS), dtype=bool)
        broken[seen, 0] = True
        assert (np.isnan(reading.values) == broken).all(), key
        kept, before = reading.values[~broken], whole_ones[key].values[~broken]
        np.testing.assert_allclose(kept, before, atol=1e-6)
    assert "MKL" not in "".join(capfd.readouterr())


def naive(one: np.ndarray, other: np.ndarray) -> float:
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(np.linalg.norm(one @ other) / norms)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_composition_equals_whole_matrices(family):
    of, got = whole(family), readings(Composition(k=5), shadow(family))
    baseline = float(got["composition/baseline"].values)
    assert got["composition/strongest"].labels["kind"] == ("q", "k", "v")
    for i, kind in enumerate("qkv"):
        pairs = {}
        for h1 in range(HEADS):
            for h2 in range(HEADS):
                second = {"q": of.qk[1, h2], "k": of.qk[1, h2].T, "v": of.ov[1, h2]}[kind]
                pairs[f"L1H{h2}<-L0H{h1}"] = naive(of.ov[0, h1], second) - baseline
        strongest = got["composition/strongest"]
        assert strongest.texts is not None
        ranked = sorted(pairs, key=lambda name: -pairs[name])[:5]
        assert strongest.texts[i].tolist() == ranked
        np.testing.assert_allclose(strongest.values[i], [pairs[n] for n in ranked], atol=1e-6)
        matrix = got[f"composition/{kind}"].values
        assert matrix[1, 0] == pytest.approx(max(pairs.values()), abs=1e-6)
        assert matrix[0].tolist() == [0, 0] and matrix[1, 1] == 0


def test_composition_equals_transformer_lens():
    """Its own scores are raw, so the norms' gains are set to one; three layers of shared keys."""
    model = tiny.model("llama", num_hidden_layers=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
    of = Shadow.of(model)
    got = readings(Composition(k=100), of)
    baseline = float(got["composition/baseline"].values)
    for i, kind in enumerate("QKV"):
        theirs = of.bridge.all_composition_scores(kind).scores - baseline
        named = {
            f"L{l2}H{h2}<-L{l1}H{h1}": float(theirs[l1, h1, l2, h2])
            for l1 in range(3)
            for l2 in range(l1 + 1, 3)
            for h1 in range(HEADS)
            for h2 in range(HEADS)
        }
        strongest = got["composition/strongest"]
        assert strongest.texts is not None and strongest.values.shape == (3, len(named))
        ours = dict(zip(strongest.texts[i].tolist(), strongest.values[i].tolist(), strict=True))
        assert ours == pytest.approx(named, abs=1e-5)
        for l1 in range(3):
            for l2 in range(l1 + 1, 3):
                best = max(v for n, v in named.items() if n[:2] == f"L{l2}" and f"-L{l1}" in n)
                matrix = got[f"composition/{kind.lower()}"].values
                assert matrix[l2, l1] == pytest.approx(best, abs=1e-5)


def test_the_baseline_is_that_of_random_matrices():
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(200):
        a, b, c, d = (generator.standard_normal(s) for s in ((32, 8), (8, 32)) * 2)
        drawn.append(naive(a @ b, c @ d))
    error = np.std(drawn) * math.sqrt(1 / 200 + 1 / 32)
    assert abs(random_composition(32, 8) - np.mean(drawn)) < 4 * error
    assert random_composition(256, 16) == pytest.approx(1 / 16, rel=0.02)


def test_random_heads_do_not_compose_and_chosen_ones_do():
    model = tiny.model("llama", num_key_value_heads=4)
    with torch.no_grad():
        one, two = model.model.layers[0].self_attn, model.model.layers[1].self_attn
        # Head 3 of layer 1 takes its values from where head 2 of layer 0 writes.
        gain = model.model.layers[1].input_layernorm.weight
        two.v_proj.weight[24:32] = one.o_proj.weight[:, 16:24].T / gain
        one.o_proj.weight[:, :8] = 0
    got = readings(Composition(k=1000), Shadow.of(model))
    strongest = got["composition/strongest"]
    assert strongest.texts is not None and np.isfinite(strongest.values).all()
    assert strongest.texts[2, 0] == "L1H3<-L0H2"
    assert strongest.values[2, 0] > 0.2 > 2 * strongest.values[2, 1]
    assert strongest.values[:2].max() < 0.1, "random heads"
    named = dict(zip(strongest.texts[0].tolist(), strongest.values[0].tolist(), strict=True))
    baseline = float(got["composition/baseline"].values)
    for head in range(HEADS):
        assert named[f"L1H{head}<-L0H0"] == pytest.approx(-baseline, abs=1e-6)
    copied = readings(CopyingScores(), Shadow.of(model))
    for key, reading in copied.items():
        assert reading.values[0, 0] == 0, f"{key}: a head that writes nothing"


def test_half_precision_and_the_global_state():
    model = tiny.model("llama").bfloat16()
    of, state = Shadow.of(model), torch.get_rng_state()
    got = observe(of, encoded(), [CopyingScores(), Composition()])
    assert torch.equal(state, torch.get_rng_state())
    wide = observe(Shadow.of(model.float()), encoded(), [CopyingScores(), Composition()])
    for one, other in zip(got, wide, strict=True):
        np.testing.assert_allclose(one.values, other.values, atol=1e-6)
