"""Replaced activations and skipped layers, against models whose weights say the same."""

import copy

import pytest
import torch

from tests import tiny
from tests.instruments.common import PROBES, encoded, hugging_face, shadow
from tlens_callback.intervene import edited, starting_at


def inputs(of, batch):
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
        pass
    for layer in range(of.n_layers):
        ran = []
        handles = [
            block.attn.register_forward_hook(lambda *_, i=i: ran.append(i))
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
    outputs = [m for n, m in other.named_modules() if n.endswith(OUTPUT[family])]
    assert len(outputs) == of.n_layers
    weight = outputs[layer].weight
    if type(outputs[layer]).__name__ == "Conv1D":
        weight = weight.T
    with torch.no_grad():
        weight[:, head * d_head : (head + 1) * d_head] = 0

    def zero(z):
        z = z.clone()
        z[:, :, head] = 0
        return z

    with edited(of, {f"blocks.{layer}.attn.hook_z": zero}):
        logits = of.logits(batch.tokens)
    for row, probe in enumerate(PROBES):
        n = batch.lengths[row]
        with torch.no_grad():
            expected = other(batch.tokens[row : row + 1, :n], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, :n], expected, rtol=1e-4, atol=1e-4)
    assert (logits - of.logits(batch.tokens)).abs().max() > 1e-2


OUTPUT = {
    **dict.fromkeys(tiny.FAMILIES, "self_attn.o_proj"),
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "gptj": "attn.out_proj",
    "opt": "self_attn.out_proj",
}


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


def test_an_unknown_hook_point_is_named():
    of = shadow("llama")
    with (
        pytest.raises(ValueError, match="blocks.0.attn.hook_pattern"),
        edited(of, {"blocks.0.attn.hook_z": lambda z: z, "blocks.0.attn.hook_patern": lambda p: p}),
    ):
        pass
    assert not of.hooks["blocks.0.attn.hook_z"].fwd_hooks
