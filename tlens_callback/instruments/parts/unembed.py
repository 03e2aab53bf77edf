"""A residual stream as logits, the way the model's own output makes them, and as tokens."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.parts.direct import soft_cap, text_config
from tlens_callback.probes import ProbeBatch
from tlens_callback.shadow import Shadow

CHUNK = 2**23
"""Logits to make at a time, in elements: 32 MiB in float32, and a few copies while they are read.
Many rows at once, because a row alone costs as much as the reading of W_U."""


@torch.no_grad()
def unembed(
    shadow: Shadow, resid: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch vocab"]:
    """logits = scale(norm(resid) @ W_U + b_U), in float32; of the last layer's residual stream
    they are the model's output.

    The norm is the model's final one with its gain, offset and bias, its division by the size of
    *this* resid included; scale is the family's factor on the logits (Cohere, Granite) and its
    soft cap (Gemma 2). Norm and head compute in the precision of `resid`: give it the residual
    stream's own, as the model does. No hook point fires.
    """
    config, cap = text_config(shadow), soft_cap(shadow)
    norm, project = _before_head(shadow)
    with torch.autocast(shadow.device.type, enabled=False):
        hidden = resid if norm is None else norm(resid)
        hidden = hidden if project is None else project(hidden)
        head: Any = shadow.bridge.unembed
        logits = head.original_component(hidden).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1)
    logits = logits / (getattr(config, "logits_scaling", None) or 1)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def gap(
    unembedded: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, ""]:
    """How far the unembedded residual stream of the last layer is from the model's own logits
    there, as a share of the largest."""
    logits = logits.float()
    largest = logits.abs().amax().clamp(min=torch.finfo(logits.dtype).tiny)
    return (unembedded - logits).abs().amax() / largest


def demand_equal(off: Tensor, shadow: Shadow, name: str) -> None:
    """Refuses a family whose output is made in another way than `unembed` knows.

    Raises:
        ValueError: where `off`, a `gap`, is more than rounding; `name` is the instrument that
            wants it. Not where it is NaN: then the model's own output is.
    """
    allowed = 1e-3 if shadow.dtype.itemsize >= 4 else 2e-2
    if float(off) > allowed:
        raise ValueError(
            f"{name}: norm and unembedding of the last layer are {float(off):.1e} of the largest "
            f"logit away from this {type(shadow.bridge.original_model).__name__}'s output, and "
            f"rounding allows {allowed:.0e}. This family computes its logits in a way that the "
            f"lens does not know; leave the instrument out."
        )


def token_texts(tokens: np.ndarray, batch: ProbeBatch) -> np.ndarray:
    """The tokens as a person reads them, in an array of the same shape; of NaN nothing."""
    distinct, back = np.unique(tokens, return_inverse=True)
    texts = np.array(
        ["" if token != token else batch.token_text(int(token)) for token in distinct],
        dtype=np.str_,
    )
    return texts[back].reshape(tokens.shape)


def _before_head(shadow: Shadow) -> tuple[Any, Any]:
    """The modules between the last layer and the head: norm and projection, or None.

    Not the bridge's own norm: that one's hook points would fire, and others listen there.
    """
    if "ln_final.hook_out" in shadow.hooks:
        norm: Any = shadow.bridge.ln_final
        return norm.original_component, None
    # OPT with word_embed_proj_dim has a projection, which the bridge leaves inside the model
    # (transformer-lens 4.3.0), and the norm with it.
    model: Any = shadow.bridge.original_model
    decoder = getattr(getattr(model, "model", None), "decoder", None)
    return getattr(decoder, "final_layer_norm", None), getattr(decoder, "project_out", None)
