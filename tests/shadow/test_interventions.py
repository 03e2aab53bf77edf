"""Replaced activations and skipped layers, against models whose weights say the same."""

import copy
from typing import Any

import pytest
import torch

from tests import tiny
from tests.instruments.common import encoded, hugging_face, shadow
from tests.instruments.surgery import OUTPUT, module
from tlens_callback.shadow import interventions
from tlens_callback.shadow.interventions import Variants, captured, edited, effects, starting_at


def inputs(of, batch) -> list[Any]:
    """[probe, pos, d_model] per layer, what enters it."""
    names = [f"blocks.{i}.hook_resid_pre" for i in range(of.n_layers)]
    taken = of.run(batch, [{name: lambda value: value.clone() for name in names}])
    return [taken[0][name] for name in names]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_starting_at_a_layer_is_the_whole_pass(family):
    """Bit for bit, and the layers before it do not run."""
    of, batch = shadow(family), encoded()
    whole, resid = of.logits(batch.tokens), inputs(of, batch)
    with starting_at(of, 1, resid[1]):  # finds out, once, how the layers return what they return
        of.logits(batch.tokens)
    for layer in range(of.n_layers):
        ran = []
        handles = [
            block.attn.register_forward_hook(lambda *_, i=i: ran.append(i))  # noqa: B023
            for i, block in enumerate(of.bridge.blocks)
        ]
        try:
            with starting_at(of, layer, resid[layer]):
                logits = of.logits(batch.tokens)
        finally:
            for handle in handles:
                handle.remove()
        assert ran == list(range(layer, of.n_layers))
        torch.testing.assert_close(logits, whole, rtol=0, atol=0)
    torch.testing.assert_close(of.logits(batch.tokens), whole, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2"])
def test_what_enters_is_what_counts(family):
    """Another residual stream gives another output: the one of the probe it comes from."""
    of, batch = shadow(family), encoded()
    resid = inputs(of, batch)
    n = min(batch.lengths)
    whole = of.logits(batch.tokens)[:, :n]
    turned = torch.roll(resid[1], 1, 0)
    with starting_at(of, 1, turned):
        logits = of.logits(batch.tokens)[:, :n]
    torch.testing.assert_close(logits, torch.roll(whole, 1, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_zeroed_head_is_a_head_without_an_output_matrix(family):
    of, batch = shadow(family), encoded()
    layer, head = 1, 2
    other = copy.deepcopy(hugging_face(family))
    d_head = of.bridge.blocks[layer].attn.W_O.shape[1]
    output = module(other, layer, OUTPUT[family])
    weight = output.weight.T if type(output).__name__ == "Conv1D" else output.weight
    with torch.no_grad():
        weight[:, head * d_head : (head + 1) * d_head] = 0

    def zero(z):
        z = z.clone()
        z[:, :, head] = 0
        return z

    with edited(of, {f"blocks.{layer}.attn.hook_z": zero}):
        logits = of.logits(batch.tokens)
    for row, n in enumerate(batch.lengths):
        with torch.no_grad():
            expected = other(batch.tokens[row : row + 1, :n], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, :n], expected, rtol=1e-4, atol=1e-4)
    assert (logits - of.logits(batch.tokens)).abs().max() > 1e-2


def test_gradients_reach_an_activation_and_no_weight():
    of, batch = shadow("gpt2"), encoded()
    leaf = []

    def graph(value):
        leaf.append(value.detach().requires_grad_())
        return leaf[0]

    with edited(of, {"blocks.1.hook_resid_pre": graph}):
        logits = of.logits(batch.tokens, grad=True)
    (gradient,) = torch.autograd.grad(logits[:, 0, 5].sum(), leaf)
    assert gradient[:, 0].abs().max() > 0
    assert gradient[:, 1:].abs().max() == 0
    assert all(p.grad is None for p in of.bridge.parameters())
    assert of.logits(batch.tokens).grad_fn is None


def test_everything_is_put_back_after_an_error():
    of, batch = shadow("llama"), encoded()
    whole = of.logits(batch.tokens)

    def fails(value):
        raise RuntimeError("no")

    with (
        pytest.raises(RuntimeError),
        edited(of, {"blocks.1.hook_resid_pre": fails}),
        starting_at(of, 1, inputs(of, batch)[1]),
    ):
        of.logits(batch.tokens)
    assert all("forward" not in vars(block) for block in of.bridge.blocks)
    assert torch.equal(of.logits(batch.tokens), whole)


def doubled(value, which):
    """Variant i doubles position i."""
    value[range(len(which)), which] *= 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_effects_are_those_of_one_edited_pass_each(family, rows):
    """In the order asked for, whatever shares a batch, and against the whole pass."""
    of = shadow(family)
    tokens = encoded().tokens[3, :9]
    positions = torch.tensor([4, 8])
    which = torch.tensor([2, 0, 7])
    hooks = ["blocks.1.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.1.hook_resid_pre"]
    asked = [Variants(int(hook[7]), hook, which, doubled) for hook in hooks]
    clean, found = effects(of, tokens, asked, lambda x: x, positions=positions, rows=rows)
    whole = of.logits(tokens[None])[:, positions]
    torch.testing.assert_close(clean, whole, rtol=1e-5, atol=1e-5)
    for hook, effect in zip(hooks, found, strict=True):
        for at, moved in zip(which.tolist(), effect, strict=True):

            def double(value, at=at):
                value = value.clone()
                value[:, at] *= 2
                return value

            with edited(of, {hook: double}):
                expected = of.logits(tokens[None])[0, positions] - whole[0]
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=2e-5)
    assert found[1].abs().max() > 1e-2


@pytest.mark.parametrize("tokens, sizes", [(48, [7]), (24, [4, 4]), (1, [2] * 6)])
def test_a_long_text_goes_through_with_few_others(tokens, sizes, monkeypatch):
    """By the tokens of a batch, the text itself included; with the same result."""
    of, text = shadow("llama"), encoded().tokens[0, :6]
    asked = [Variants(0, "blocks.0.hook_mlp_out", torch.arange(6), doubled)]
    _, (expected,) = effects(of, text, asked, lambda x: x, rows=64)
    monkeypatch.setattr(interventions, "TOKENS", tokens)
    seen = []

    def score(logits):
        seen.append(len(logits))
        return logits

    _, (found,) = effects(of, text, asked, score, rows=64)
    assert seen == [*sizes, 1]  # the last is the text as it is
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_who_sees_an_edit():
    """Who listened before sees the model's own activation, who comes inside the `with` the new."""
    of, batch, seen = shadow("llama"), encoded(), []
    point: Any = of.hooks["blocks.0.attn.hook_z"]

    def listens(z, hook):
        seen.append(bool(z.any()))

    handles = [point.add_hook(listens)]
    with edited(of, {"blocks.0.attn.hook_z": torch.zeros_like}):
        handles.append(point.add_hook(listens))
        of.logits(batch.tokens)
    for handle in handles:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)
    assert seen == [True, False]


def test_only_the_layers_behind_an_effect_run():
    of, tokens = shadow("llama"), encoded().tokens[0, :6]
    asked = [Variants(1, "blocks.1.hook_mlp_out", torch.arange(6), doubled)]
    effects(of, tokens, asked, lambda x: x, rows=64)  # finds out what the layers return
    ran = []
    handles = [
        block.attn.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(of.bridge.blocks)
    ]
    try:
        effects(of, tokens, asked, lambda x: x, rows=4)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1, 1, 1]  # the text as it is, and the second layer for 4 and for 2 variants


@pytest.mark.parametrize("fails", ["change", "score"])
def test_effects_leave_nothing_behind_after_an_error(fails):
    of, tokens = shadow("llama"), encoded().tokens[0, :6]
    whole = of.logits(tokens[None])

    def no(*_):
        raise RuntimeError("no")

    asked = Variants(
        1, "blocks.1.hook_mlp_out", torch.arange(6), no if fails == "change" else doubled
    )
    with pytest.raises(RuntimeError, match="no"):
        effects(of, tokens, [asked], no if fails == "score" else lambda x: x, rows=64)
    assert all("forward" not in vars(block) for block in of.bridge.blocks)
    assert not any(getattr(point, "fwd_hooks", []) for point in of.hooks.values())
    assert torch.equal(of.logits(tokens[None]), whole)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_captured_activations_are_nodes_of_the_graph(family):
    """Also those behind another captured one; without `grad` there is no graph."""
    of, tokens = shadow(family), encoded().tokens[0, :6]
    names = [f"blocks.{i}.attn.hook_z" for i in range(2)]
    logits, got = captured(of, tokens, names, torch.tensor([5]), grad=True)
    slopes = torch.autograd.grad(logits[0, 0, 7], [got[name] for name in names])
    assert all(slope.abs().max() > 0 for slope in slopes)
    assert all(p.grad is None for p in of.bridge.parameters())
    plain, same = captured(of, tokens, names, torch.tensor([5]))
    assert torch.equal(plain, logits)
    assert not any(value.requires_grad for value in (plain, *same.values()))


def test_an_unknown_hook_point_is_named():
    of = shadow("llama")
    with (
        pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_pattern"),
        edited(of, {"blocks.0.attn.hook_z": lambda z: z, "blocks.0.attn.hook_patern": lambda p: p}),
    ):
        pass
    assert not of.hooks["blocks.0.attn.hook_z"].fwd_hooks
