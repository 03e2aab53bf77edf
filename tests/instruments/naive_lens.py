"""Residual streams and logits of the tiny families in float64, without a bridge."""

from typing import Any

import numpy as np
import torch

from tests.instruments.common import ids
from tlens_callback import Probe

_LAYER_NORMS = {
    "gpt2": "transformer.ln_f",
    "gptj": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
}
"""Where the final norm is; the other families have an RMS norm in `model.norm`."""


def final_norm(model: Any, family: str) -> Any:
    return model.get_submodule(_LAYER_NORMS.get(family, "model.norm"))


@torch.no_grad()
def residuals(model: Any, family: str, probe: Probe) -> np.ndarray:
    """[layer, pos, d_model], leaving each layer, from a forward pass of this probe alone."""
    seen = []
    handle = final_norm(model, family).register_forward_pre_hook(lambda _, args: seen.append(*args))
    try:
        states = model(ids(probe), output_hidden_states=True, use_cache=False).hidden_states
    finally:
        handle.remove()
    # The last of Hugging Face's hidden states has been through the norm already.
    return torch.stack([*states[1:-1], seen[0]])[:, 0].double().numpy()


def unembedded(
    model: Any, family: str, resid: np.ndarray, *, gain: bool = True, cap: bool = True
) -> np.ndarray:
    """[..., d_model] to [..., vocab]; without the norm's gain or the soft cap for a control."""
    norm, head = final_norm(model, family), model.get_output_embeddings()
    weight = norm.weight.detach().double().numpy() + family.startswith("gemma")
    bias = 0.0
    if family in _LAYER_NORMS:
        resid = resid - resid.mean(-1, keepdims=True)
        bias = norm.bias.detach().double().numpy()
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    x = resid / np.sqrt((resid**2).mean(-1, keepdims=True) + eps)
    x = (x * weight if gain else x) + bias
    logits = x @ head.weight.detach().double().numpy().T
    if head.bias is not None:
        logits = logits + head.bias.detach().double().numpy()
    return 30.0 * np.tanh(logits / 30.0) if family == "gemma2" and cap else logits
