"""Interventions and circuits in families on no list, against Hugging Face's own modules; and the
families whose heads the bridge does not cut out, which are refused."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import tiny
from tests.shadow.test_other_families import FALCON, OTHERS, SMALL
from tests.training import CAPITAL
from tlens_callback import (
    ActivationPatching,
    Composition,
    CopyingScores,
    HeadAblation,
    Probe,
    ProbeBatch,
    Shadow,
    observe,
)
from tlens_callback.instruments.parts.circuits import circuits

HEADS, D_HEAD = 4, 8
CORRUPT = Probe("rome", "the capital of Italy is")
LATENT = {
    **SMALL,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
"""Keys and values behind a latent, and values of another width than queries."""

MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **OTHERS,
    "cohere, normed queries": ("Cohere", {**SMALL, "use_qk_norm": True}),
    "falcon": ("Falcon", {**FALCON, "multi_query": True, "alibi": False}),
    "gemma": ("Gemma", {**SMALL, "head_dim": 8, "num_key_value_heads": 1}),
    "glm4": ("Glm4", {**SMALL, "head_dim": 8}),
    "olmo3": ("Olmo3", {**SMALL, **MIXED}),
    "starcoder2": ("Starcoder2", {**SMALL, "num_key_value_heads": 1}),
}
EXPERTS = ("granitemoe", "gpt_oss")
GEMMA4 = ("Gemma4Text", {**SMALL, **MIXED, "head_dim": 8, "global_head_dim": 16})
STABLELM2 = ("StableLm", {**SMALL, "qk_layernorm": True})
JETMOE = ("JetMoe", {**SMALL, "kv_channels": 8})


def built(of: tuple[str, dict[str, Any]]) -> Any:
    name, settings = of
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
        tiny._randomise(made)
    made.set_attn_implementation("eager")
    return made.eval()


def layers(of: Any) -> list[Any]:
    return next(
        list(m)
        for n, m in of.named_modules()
        if n.endswith((".layers", ".h")) and isinstance(m, torch.nn.ModuleList)
    )


def output(layer: Any) -> Any:
    """The output matrix of attention; its input is the heads' z side by side."""
    names = ("o_proj", "self_attn.dense", "self_attention.dense")
    return next(m for n, m in layer.named_modules() if n.endswith(names))


@cache
def batch() -> ProbeBatch:
    return ProbeBatch.encode([CAPITAL], tiny.tokenizer(), vocab_size=tiny.VOCAB, context=64)


@contextmanager
def changed(module: Any, edit: Callable[[torch.Tensor], torch.Tensor]):
    """What enters the module goes through a function."""

    def before(_, args, kwargs):
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def kept(into: dict[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(value):
        into[name] = value.clone()
        return value

    return keep


@torch.no_grad()
def difference(of: Any, tokens: torch.Tensor) -> float:
    logits = of(tokens, use_cache=False).logits[0, -1].double()
    return float(logits[batch().targets[0]] - logits[batch().foils[0]])


def slab(head: int) -> slice:
    return slice(head * D_HEAD, (head + 1) * D_HEAD)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_residual_streams_are_hugging_faces(family):
    of, probes = built(FAMILIES[family]), batch()
    asked = [HeadAblation(mode="zero"), ActivationPatching(CAPITAL.name, CORRUPT)]
    got = {r.key: r.values for r in observe(Shadow.of(built(FAMILIES[family])), probes, asked)}
    tokens, corrupt = probes.tokens, probes.beside([CORRUPT]).tokens
    clean, base = difference(of, tokens), difference(of, corrupt)
    ablated, patched = np.zeros((2, HEADS)), np.zeros((2, HEADS))
    resid = np.zeros((2, tokens.shape[1]))
    for i, layer in enumerate(layers(of)):
        source: dict[str, torch.Tensor] = {}

        def put(name, at, source=source):
            def edit(value):
                value = value.clone()
                value[at] = source[name][at]
                return value

            return edit

        with changed(layer, kept(source, "resid")), changed(output(layer), kept(source, "z")):
            difference(of, tokens)
        source["zero"] = torch.zeros_like(source["z"])
        for head in range(HEADS):
            with changed(output(layer), put("zero", (..., slab(head)))):
                ablated[i, head] = difference(of, tokens) - clean
            with changed(output(layer), put("z", (..., slab(head)))):
                patched[i, head] = difference(of, corrupt) - base
        for pos in range(tokens.shape[1]):
            with changed(layer, put("resid", (0, pos))):
                resid[i, pos] = difference(of, corrupt) - base
    name = CAPITAL.name
    for key, expected, scale in (
        (f"head_ablation/logit_diff/{name}", ablated, 1),
        (f"activation_patching/head/{name}", patched, clean - base),
        (f"activation_patching/resid/{name}", resid, clean - base),
    ):
        np.testing.assert_allclose(got[key] * scale, expected, atol=2e-5, err_msg=key)
        assert np.abs(expected).max() > 1e-2, key
        assert np.abs(got[key] * scale - np.roll(expected, 1, 1)).max() > 1e-2, key


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EXPERTS])
def test_what_heads_read_is_hugging_faces(family):
    """Of one token, which attends to itself: without biases z is x W_V over the norm's scale."""
    of = built(FAMILIES[family])
    with torch.no_grad():
        for name, parameter in of.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    shadow = Shadow.of(of)
    for i, layer in enumerate(layers(of)):
        c = circuits(shadow, i)
        v = c.v.repeat_interleave(c.shared, 0)
        for token in (7, 20, 41):
            got: dict[str, torch.Tensor] = {}

            with (
                changed(layer, kept(got, "x")),
                changed(output(layer), kept(got, "z")),
                torch.no_grad(),
            ):
                of(torch.tensor([[token]]), use_cache=False)
            x, z = (value.double().flatten() for value in got.values())
            assert torch.cosine_similarity(z, (x @ v).flatten(), dim=0) > 1 - 1e-6
            assert torch.cosine_similarity(z, (x @ v.roll(1, 2)).flatten(), dim=0) < 0.9


def test_norms_of_queries_and_keys_that_centre():
    """Cohere's, with a gain for each head."""
    of = built(FAMILIES["cohere, normed queries"])
    got = circuits(Shadow.of(of), 1)
    layer = layers(of)[1]
    gain = layer.input_layernorm.weight.double()
    for name, weights in (("q", got.q), ("k", got.k)):
        w = getattr(layer.self_attn, f"{name}_proj").weight.double()
        norm = getattr(layer.self_attn, f"{name}_norm").weight.double()
        x = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y = (w @ ((x - x.mean()) * gain)).view(HEADS, D_HEAD)
        expected = (y - y.mean(1, keepdim=True)) * norm
        torch.testing.assert_close((x @ weights).detach(), expected.detach())


@pytest.mark.parametrize(
    "asked",
    [
        HeadAblation(),
        HeadAblation(mode="zero", method="first_order"),
        ActivationPatching(CAPITAL.name, CORRUPT),
    ],
)
def test_heads_that_the_bridge_does_not_cut_out_are_refused(asked):
    of = Shadow.of(built(("DeepseekV3", LATENT)))
    with pytest.raises(ValueError, match="4 heads into 6 pieces"):
        observe(of, batch(), [asked])
    whole = ActivationPatching(CAPITAL.name, CORRUPT, parts=["resid", "attn", "mlp"])
    assert all(np.isfinite(reading.values).all() for reading in observe(of, batch(), [whole]))


@pytest.mark.slow
@pytest.mark.parametrize("family", [("DeepseekV3", LATENT), GEMMA4, STABLELM2, JETMOE])
@pytest.mark.parametrize("instrument", [CopyingScores(), Composition()])
def test_attention_without_such_weights_is_refused(family, instrument):
    with pytest.raises(ValueError, match=r"layer 0 of this .* Leave the instrument out"):
        instrument.taps(Shadow.of(built(family)), batch())


def test_embeddings_with_a_norm_are_refused():
    with pytest.raises(ValueError, match="a norm between its embeddings"):
        CopyingScores().taps(Shadow.of(built(OTHERS["bloom"])), batch())


def test_a_part_that_no_layer_has_is_named():
    of = Shadow.of(built(JETMOE))
    with pytest.raises(ValueError, match=r"hook_z.* Leave 'head' out"):
        ActivationPatching(CAPITAL.name, CORRUPT).taps(of, batch())


@pytest.mark.slow
def test_heads_of_several_widths():
    """Gemma 4's layers of local attention have narrower heads."""
    of = Shadow.of(built(GEMMA4))
    exact, estimate = (
        {r.key: r.values for r in observe(of, batch(), [HeadAblation(method=method, checked=8)])}
        for method in ("exact", "first_order")
    )
    key = f"head_ablation/logit_diff/{CAPITAL.name}"
    assert estimate[key].shape == exact[key].shape == (2, HEADS)
    error = np.abs(estimate[key] - exact[key]).max()
    assert estimate[f"head_ablation/logit_diff_error/{CAPITAL.name}"] == pytest.approx(error)
    assert np.corrcoef(estimate[key].ravel(), exact[key].ravel())[0, 1] > 0.5
