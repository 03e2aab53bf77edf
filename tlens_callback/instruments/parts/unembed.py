"""Turns a residual stream into logits, as the model does for its output, and into tokens."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.parts.direct import soft_cap, text_config
from tlens_callback.probes import ProbeBatch
from tlens_callback.shadow import Shadow

CHUNK = 2**23
"""How many logits to compute at a time: 32 MiB in float32, and a few copies while they are read.
Many rows at once, because reading W_U costs as much as computing a row."""


@torch.no_grad()
def unembed(
    shadow: Shadow, resid: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch vocab"]:
    """Computes logits = scale(norm(resid) @ W_U + b_U), in float32.

    For the last layer's residual stream they are the model's output. norm is the model's final one
    with its gain, offset and bias, and divides by the size of *this* resid; scale is the family's
    factor on the logits (Cohere, Granite) and its soft cap (Gemma 2). Norm and head compute in the
    precision of `resid`, which should be the residual stream's, as in the model. No hook fires.
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
    """Returns how far the last layer's unembedded residual stream is from the model's own logits.

    It is the largest absolute difference, as a share of the largest absolute logit.
    """
    logits = logits.float()
    largest = logits.abs().amax().clamp(min=torch.finfo(logits.dtype).tiny)
    return (unembedded - logits).abs().amax() / largest


def demand_equal(off: Tensor, shadow: Shadow, name: str) -> None:
    """Refuses a family whose output is computed differently than in `unembed`.

    Raises:
        ValueError: if `off`, a `gap`, is larger than rounding; `name` is the instrument that checks
            it. Not if it is NaN: then the model's own output is NaN.
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
    """Returns the tokens as readable texts, in an array of the same shape; NaN becomes ''."""
    distinct, back = np.unique(tokens, return_inverse=True)
    texts = np.array(
        ["" if token != token else batch.token_text(int(token)) for token in distinct],
        dtype=np.str_,
    )
    return texts[back].reshape(tokens.shape)


def _before_head(shadow: Shadow) -> tuple[Any, Any]:
    """Returns the modules between the last layer and the head: norm and projection, or None.

    Not the bridge's own norm, whose hook points would fire while other instruments listen.
    """
    if "ln_final.hook_out" in shadow.hooks:
        norm: Any = shadow.bridge.ln_final
        return norm.original_component, None
    # OPT with word_embed_proj_dim has a projection, which the bridge leaves inside the model
    # (transformer-lens 4.3.0), and the norm with it.
    model: Any = shadow.bridge.original_model
    decoder = getattr(getattr(model, "model", None), "decoder", None)
    return getattr(decoder, "final_layer_norm", None), getattr(decoder, "project_out", None)
