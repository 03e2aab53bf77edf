"""What happens inside rollouts, held against naive loops over plain forward passes."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.rollouts.test_tokens import adapted, batch_of, rollouts
from tlens_callback import Shadow
from tlens_callback.instruments.parts.selection import neuron_layers
from tlens_callback.rollouts import inside as module
from tlens_callback.rollouts.inside import inside, parts

FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3_moe", "opt"]


def found(family: str, few: Any, **settings: Any) -> tuple[Any, Shadow, dict[int, Any]]:
    """Model, shadow, and number of a rollout -> measure -> values."""
    model = adapted(family, target_modules="all-linear")
    shadow = Shadow.of(model, **settings)
    rows: dict[int, Any] = {}
    for part in parts(few, batch_of(shadow), 64):
        _, measures, received, _ = inside(shadow, part, range(len(part.which)))
        assert received is not None
        for row, i in enumerate(part.which):
            rows[i] = {name: value[row] for name, value in measures.items()}
            rows[i]["received"] = received[row]
    return model, shadow, rows


@torch.no_grad()
def plain(model: Any, one: Any) -> Any:
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*one.prompt, *one.completion]])
    return model(ids, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [24])
def test_attention_is_that_of_a_plain_forward_pass(family, tokens, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", tokens)
    few = rollouts()
    few[1] = type(few[1])(  # a completion that repeats itself
        few[1].prompt, (9, 10, 9, 11, 9, 10), 0, 1, (1.0,), 1.0, 1.0
    )
    model, shadow, rows = found(family, few)
    for i, one in enumerate(few):
        attentions = plain(model, one).attentions
        ids, p = [*one.prompt, *one.completion], len(one.prompt)
        for layer in range(shadow.n_layers):
            pattern = attentions[layer][0].double().numpy()
            for head in range(shadow.n_heads):
                asked = pattern[head, p:]
                assert rows[i]["attention_first"][layer, head] == pytest.approx(
                    asked[:, 0].mean(), abs=1e-6
                )
                assert rows[i]["attention_prompt"][layer, head] == pytest.approx(
                    asked[:, 1:p].sum(1).mean(), abs=1e-6
                )
                assert rows[i]["attention_answer"][layer, head] == pytest.approx(
                    asked[:, p:].sum(1).mean(), abs=1e-6
                )
                np.testing.assert_allclose(
                    rows[i]["received"][layer, head][: len(ids)], asked.mean(0), atol=1e-6
                )
                repeats = []
                for q in range(p, len(ids)):
                    after = [k for k in range(1, q + 1) if ids[k - 1] == ids[q]]
                    # The token itself is no earlier one: what comes after it is not there yet.
                    if after:
                        repeats.append(pattern[head, q, after].sum())
                wanted = np.mean(repeats) if repeats else 0.0
                assert rows[i]["repetition"][layer, head] == pytest.approx(wanted, abs=1e-6)


def written(bridge: Any, cache: Any, at: Any, completion: Any, x: torch.Tensor) -> float:
    """Mean over the sampled tokens of what a write adds to their logits."""
    final = cache["ln_final.hook_scale"][0, at].double()
    w_u, norm, x = bridge.W_U.double(), bridge.ln_final, x.double()
    unembedded = w_u[:, list(completion)] - w_u.mean(1, keepdim=True)
    gain = norm.weight.double() + (1 if norm.uses_weight_offset else 0)
    x = x if norm.uses_rms_norm else x - x.mean(1, keepdim=True)
    return float((x / final * gain * unembedded.T).sum(1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_direct_effects_are_what_is_missing_without_the_head(family, weights):
    """The final norm's scale held, each head's write is taken from the residual stream."""
    few = rollouts(lengths=((5, 6), (4, 3)))
    model, _, rows = found(family, few, weights=weights)
    merged = model.merge_and_unload()
    other = Shadow.of(merged)
    bridge: Any = other.bridge
    for i, one in enumerate(few):
        ids = torch.tensor([[*one.prompt, *one.completion]])
        at = torch.arange(len(one.prompt) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids)
        write = partial(written, bridge, cache, at, one.completion)
        for layer in range(other.n_layers):
            block = bridge.blocks[layer]
            z = cache[f"blocks.{layer}.attn.hook_z"][0, at]
            for head in range(other.n_heads):
                out = z[:, head].double() @ block.attn.W_O[head].double()
                if f"blocks.{layer}.ln1_post.hook_scale" in other.hooks:
                    post = block.ln1_post
                    scale = cache[f"blocks.{layer}.ln1_post.hook_scale"][0, at].double()
                    out = out / scale * (post.weight.double() + 1)
                assert rows[i]["direct"][layer, head] == pytest.approx(write(out), abs=2e-5)
            mlp = write(cache[f"blocks.{layer}.hook_mlp_out"][0, at])
            assert rows[i]["mlp_direct"][layer] == pytest.approx(mlp, abs=2e-5)
            if family in ("llama", "gpt2"):
                post = cache[f"blocks.{layer}.mlp.hook_post"][0, len(one.prompt) :].mean(0)
                np.testing.assert_allclose(rows[i]["neuron"][layer], post, atol=1e-5)


def test_direct_effects_add_up_to_the_logits():
    """Heads, MLPs, embedding and biases together are the logit minus the mean logit."""
    few = rollouts(lengths=((5, 6), (4, 3)))
    model, shadow, rows = found("llama", few)
    bridge: Any = shadow.bridge
    for i, one in enumerate(few):
        out = plain(model, one)
        at = slice(len(one.prompt) - 1, -1)
        logits = out.logits[0, at].double()
        own = logits.gather(1, torch.tensor(one.completion)[:, None])[:, 0] - logits.mean(1)
        embed, last = out.hidden_states[0][0, at].double(), out.hidden_states[-1][0, at].double()
        with torch.no_grad():
            _, cache = bridge.run_with_cache(torch.tensor([[*one.prompt, *one.completion]]))
        scale = cache["ln_final.hook_scale"][0, at].double()
        w_u = bridge.W_U.double()
        to = (w_u[:, list(one.completion)] - w_u.mean(1, keepdim=True)).T
        rest = (embed / scale * bridge.ln_final.weight.double() * to).sum(1)
        total = rows[i]["direct"].sum() + rows[i]["mlp_direct"].sum() + rest.mean()
        assert float(total) == pytest.approx(float(own.mean()), abs=1e-4)
        assert last.shape == embed.shape


def test_tokens_of_other_rollouts_and_padding_do_not_count():
    """A rollout alone has the numbers that it has beside longer ones."""
    few = rollouts()
    _, _, together = found("llama", few)
    for i, one in enumerate(few):
        _, _, alone = found("llama", [one])
        for name in ("direct", "attention_prompt", "repetition", "neuron", "mlp_direct"):
            assert torch.allclose(alone[0][name], together[i][name], atol=1e-5), name


def test_rollouts_are_cut_at_the_models_context():
    few = rollouts(lengths=((60, 20), (5, 4)))
    shadow = Shadow.of(adapted())
    of = parts(few, batch_of(shadow), 512)
    sizes = {i: n for part in of for i, n in zip(part.which, part.sizes, strict=True)}
    assert sizes == {0: tiny.CONTEXT - 60, 1: 4}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_lens_is_that_of_the_hidden_states(family):
    few = rollouts()
    model, shadow, rows = found(family, few)
    base = model.get_base_model()
    norm = base.transformer.ln_f if family == "gpt2" else base.model.norm
    cap = getattr(base.config, "final_logit_softcapping", None)
    for i, one in enumerate(few):
        out = plain(model, one)
        n = len(one.completion)
        spots = [round(x) for x in np.linspace(0, n - 1, 4)]
        ids = torch.tensor([one.completion[at] for at in spots])
        logs = []
        for layer in range(shadow.n_layers):
            h = out.hidden_states[layer + 1][0, len(one.prompt) - 1 : -1][spots]
            with torch.no_grad():
                # The last of them has the final norm already.
                z = base.lm_head(h if layer == shadow.n_layers - 1 else norm(h))
            z = z if cap is None else cap * torch.tanh(z / cap)
            logs.append(z.double().log_softmax(1))
        own = torch.stack([log.gather(1, ids[:, None])[:, 0] for log in logs])
        np.testing.assert_allclose(rows[i]["lens_logp"], own.mean(1), atol=3e-5)
        layers = []
        for at in range(4):
            first = shadow.n_layers
            while first and logs[first - 1][at].argmax() == ids[at]:
                first -= 1
            layers.append(first)
        assert float(rows[i]["lens_layer"]) == pytest.approx(np.mean(layers))


def test_a_family_that_unembeds_in_another_way_is_refused(monkeypatch):
    shadow = Shadow.of(adapted())
    (part, *_) = parts(rollouts(), batch_of(shadow), 64)
    usual = module.unembed
    monkeypatch.setattr(module, "unembed", lambda of, resid: 1.1 * usual(of, resid))
    with pytest.raises(ValueError, match="Rollouts: norm and unembedding of the last layer"):
        inside(shadow, part, [])


@pytest.mark.parametrize("dense", [[], [1], [0, 1]])
def test_neurons_are_those_of_layers_that_have_them(dense):
    """In a mixture of experts the bridge's hook_post is the layer's output; it has no neurons."""
    model: Any = tiny.model("qwen3_moe", mlp_only_layers=dense).eval()
    shadow = Shadow.of(model)
    assert neuron_layers(shadow) == dense
    for part in parts(rollouts(), batch_of(shadow), 64):
        numbers = inside(shadow, part, []).numbers
        if not dense:
            assert "neuron" not in numbers
            continue
        assert numbers["neuron"].shape[1] == len(dense)
        for row, i in enumerate(part.which):
            one = rollouts()[i]
            for at, layer in enumerate(dense):
                wanted = neurons(model.model.layers[layer].mlp, model, one)
                np.testing.assert_allclose(numbers["neuron"][row, at], wanted, atol=1e-5)


@torch.no_grad()
def neurons(mlp: Any, model: Any, one: Any) -> Any:
    """Mean over the sampled tokens of what enters the down projection."""
    kept: list[Any] = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    model(torch.tensor([[*one.prompt, *one.completion]]))
    handle.remove()
    return kept[0].view(-1, kept[0].shape[-1])[len(one.prompt) :].mean(0)
