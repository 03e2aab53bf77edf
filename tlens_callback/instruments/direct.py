"""What a write to the residual stream is directly worth in logits."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.shadow import Shadow

_RESCALED = ("logit_scale", "logits_scaling", "residual_multiplier")
"""Configuration fields of families that scale what a block writes, or the logits (Granite,
Cohere): there the formulas of this file leave a factor out."""


def has_direct_path(shadow: Shadow) -> bool:
    """Whether logits are the unembedding of the normalised residual stream, and nothing else.

    A soft cap on the logits is allowed: a direct contribution is one to the logits before it.
    """
    config = shadow.bridge.original_model.config.get_text_config()  # type: ignore[operator, union-attr]
    return (
        "ln_final.hook_scale" in shadow.hooks
        and shadow.bridge.W_U.shape[0] == shadow.d_model
        and all(getattr(config, field, None) in (None, 1) for field in _RESCALED)
    )


def before_norm(
    norm: Any, direction: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """The direction at a norm's input that its output's `direction` is, up to the norm's scale.

    For x at the input, gain w (1 + weight where the family stores it so) and scale s:
    norm(x) . direction = x . before_norm(norm, direction) / s + a constant (the norm's bias).
    LayerNorm centres x, which is the same as centring the direction.
    """
    weight = getattr(norm, "weight", None)  # OLMo's norms have none
    if weight is not None:
        direction = direction * (weight.float() + 1 if norm.uses_weight_offset else weight.float())
    return direction if norm.uses_rms_norm else direction - direction.mean(-1, keepdim=True)


def towards(
    shadow: Shadow, targets: Sequence[int | None], foils: Sequence[int | None]
) -> Float[Tensor, "target d_model"]:
    """The residual directions of logit[target] - logit[foil], up to the final norm's scale.

    Without a foil, of logit[target] minus the mean logit over the vocabulary: softmax does not
    see what all logits have in common. Without a target, zero.
    """
    unembed = shadow.bridge.W_U  # [d_model, vocab]
    pairs = list(zip(targets, foils, strict=True))
    mean = None
    if any(target is not None and foil is None for target, foil in pairs):
        mean = unembed.mean(1, dtype=torch.float32)
    rows = []
    for target, foil in pairs:
        if target is None:
            rows.append(torch.zeros(unembed.shape[0], device=unembed.device))
        else:
            against = mean if foil is None else unembed[:, foil].float()
            assert against is not None
            rows.append(unembed[:, target].float() - against)
    return before_norm(shadow.bridge.ln_final, torch.stack(rows))
