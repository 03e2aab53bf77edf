"""The tiny families taken apart in float64: what each module adds to the last logits."""

from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny
from tests.instruments.common import encoded, ids
from tests.instruments.naive_lens import final_norm
from tlens_callback import Probe

POST_NORMS = ("gemma2", "gemma3_text", "olmo2")


def layers_of(model: Any) -> Any:
    inner = getattr(model, "model", None) or getattr(model, "transformer", None) or model.gpt_neox
    return getattr(inner, "layers", None) or getattr(inner, "h", None) or inner.decoder.layers


def out_of(layer: Any, family: str) -> nn.Module:
    """The attention's output projection."""
    if family == "gpt2":
        return layer.attn.c_proj
    if family == "gptj":
        return layer.attn.out_proj
    if family == "gpt_neox":
        return layer.attention.dense
    return layer.self_attn.out_proj if family == "opt" else layer.self_attn.o_proj


def mlp_of(layer: Any, family: str) -> nn.Module:
    """What gives the MLP's addition to the residual stream."""
    if family in POST_NORMS:
        return layer.post_feedforward_layernorm
    return layer.fc2 if family == "opt" else layer.mlp


class Account:
    """One pass of an untouched model in float64, and what its modules add to the last logits.

    A part is what the lead of the target changes by if it is taken out of the last token's final
    residual stream, the scale of the final norm (and of a post-norm) kept.
    """

    @torch.no_grad()
    def __init__(self, model: Any, family: str, probe: Probe) -> None:
        batch = encoded([probe])
        self.family, self.target, self.foil = family, batch.targets[0], batch.foils[0]
        self.model, self.norm = model, final_norm(model, family)
        self.layers = list(layers_of(model))
        self.seen: dict[Any, Tensor] = {}
        watched = {"final": self.norm, "embed": self.layers[0]}
        for i, layer in enumerate(self.layers):
            watched["z", i] = out_of(layer, family)
            watched["mlp", i] = mlp_of(layer, family)
            if family in POST_NORMS:
                watched["attention", i] = layer.post_attention_layernorm
        handles = [
            module.register_forward_hook(self._keep(key), with_kwargs=True)
            for key, module in watched.items()
        ]
        try:
            self.logits = model(ids(probe), use_cache=False).logits[0, -1].double()
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, key: Any) -> Any:
        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            if key[0] == "mlp":
                value = output[0] if isinstance(output, tuple) else output
            self.seen[key] = value.reshape(-1, value.shape[-1])[-1].double()

        return keep

    @torch.no_grad()
    def through(self, norm: Any, at: Tensor, x: Tensor) -> Tensor:
        """norm(x) with the scale it has at `at`, without its bias."""
        gain = norm.weight + 1 if self.family.startswith("gemma") else norm.weight
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        if isinstance(norm, nn.LayerNorm):
            at, x = at - at.mean(), x - x.mean()
        return x / (at.pow(2).mean() + eps).sqrt() * gain

    def lead(self, logits: Tensor) -> float:
        other = logits.mean() if self.foil is None else logits[self.foil]
        return float(logits[self.target] - other)

    @torch.no_grad()
    def worth(self, x: Tensor) -> float:
        """What x in the final residual stream adds to the lead."""
        head = self.model.get_output_embeddings()
        return self.lead(self.through(self.norm, self.seen["final"], x) @ head.weight.T)

    @torch.no_grad()
    def head(self, i: int, h: int) -> float:
        """What is missing if the head's slice of the output projection's input is zeroed."""
        out, z = out_of(self.layers[i], self.family), self.seen["z", i]
        width = len(z) // 4
        without = z.clone()
        without[h * width : (h + 1) * width] = 0
        return self.attention(i, out(z) - out(without))

    @torch.no_grad()
    def attention(self, i: int, written: Tensor | None = None) -> float:
        if written is None:
            written = out_of(self.layers[i], self.family)(self.seen["z", i])
        if self.family in POST_NORMS:
            norm = self.layers[i].post_attention_layernorm
            written = self.through(norm, self.seen["attention", i], written)
        return self.worth(written)

    @torch.no_grad()
    def bias(self) -> float:
        outs = [out_of(layer, self.family) for layer in self.layers]
        total = sum(
            self.attention(i, out.bias)
            for i, out in enumerate(outs)
            if getattr(out, "bias", None) is not None
        )
        head = self.model.get_output_embeddings()
        if getattr(self.norm, "bias", None) is not None:
            total += self.lead(self.norm.bias @ head.weight.T)
        return total + (0 if head.bias is None else self.lead(head.bias))

    def answer(self) -> float:
        """The model's own lead, its soft cap undone."""
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return self.lead(cap * (self.logits / cap).atanh() if cap else self.logits)


def in_float64(family: str, **overrides: Any) -> Any:
    model = tiny.model(family, **overrides).double()
    model.set_attn_implementation("eager")
    # The grouped matmul of the experts knows no float64.
    model.config._experts_implementation = "eager"
    return model
