"""Computes what a write to the residual stream adds directly to the logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.selection import z_hook
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.stacks import StackReduce
from tlens_callback.shadow.unembed import soft_cap, text_config

_RESCALED = ("logit_scale", "logits_scaling", "lm_head_multiplier", "residual_multiplier")
"""Configuration fields of families that scale what a block writes, or the logits (Granite,
Cohere, Falcon-H1). The formulas of this file do not contain these factors."""


def has_direct_path(shadow: Shadow) -> bool:
    """Returns whether the logits are just the unembedding of the normalised residual stream.

    A soft cap on the logits is allowed: direct contributions are to the logits before the cap.
    """
    config = text_config(shadow)
    return (
        "ln_final.hook_scale" in shadow.hooks
        and shadow.bridge.W_U.shape[0] == shadow.d_model
        and all(getattr(config, field, None) in (None, 1) for field in _RESCALED)
    )


def demand_direct_path(shadow: Shadow, name: str) -> None:
    """Raises a ValueError if heads, MLPs and biases do not sum to this model's logits."""
    if not has_direct_path(shadow):
        raise ValueError(
            f"{name}: the parts would not sum to this model's logits. Either these are "
            "more than the unembedding of its normalised residual stream (the model rescales them, "
            "or what its layers write), or the scale of its final norm has no hook point. Leave "
            "the instrument out."
        )
    for i in range(shadow.n_layers):
        if lacking := [hook for hook in (z_hook(i), mlp_hook(i)) if hook not in shadow.hooks]:
            raise ValueError(
                f"{name}: layer {i} of this model has no {lacking[0]!r}, so that the "
                f"parts would not sum to the logits; leave the instrument out."
            )
        if more := _other_parts(shadow, i):
            raise ValueError(
                f"{name}: layer {i} of this model has beside attention and MLP a "
                f"{more[0]!r}, so that heads and MLPs would not sum to the logits; leave the "
                f"instrument out."
            )


def _other_parts(shadow: Shadow, layer: int) -> list[str]:
    """Returns names of a layer's parts beside attention, MLP and norms (Falcon-H1: Mamba)."""
    start = f"blocks.{layer}."
    parts = [name.removeprefix(start).split(".") for name in shadow.hooks if name.startswith(start)]
    with_output = {part[0] for part in parts if len(part) == 2 and part[1] == "hook_out"}
    return sorted(n for n in with_output if n not in ("attn", "mlp") and not n.startswith("ln"))


def mlp_hook(layer: int) -> str:
    """Name of the hook point of what the MLP writes, [probe, pos, d_model]."""
    return f"blocks.{layer}.hook_mlp_out"


def before_norm(
    norm: Any, direction: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """Maps a direction at a norm's output to one at its input, up to the norm's scale.

    For x at the input, gain w (1 + weight where the family stores it so) and scale s:
    norm(x) . direction = x . before_norm(norm, direction) / s + a constant (the norm's bias).
    LayerNorm centres x, which is the same as centring the direction.
    """
    weight = getattr(norm, "weight", None)  # OLMo's norms have none
    if weight is not None:
        direction = direction * (weight.float() + 1 if norm.uses_weight_offset else weight.float())
    return direction if norm.uses_rms_norm else direction - direction.mean(-1, keepdim=True)


def answer_directions(
    shadow: Shadow, targets: Sequence[int | None], foils: Sequence[int | None]
) -> Float[Tensor, "target d_model"]:
    """Returns the residual directions of logit[target] - logit[foil], up to the final norm's scale.

    Without a foil, those of logit[target] minus the mean logit over the vocabulary: a constant in
    all logits does not change the softmax. Without a target, zero.
    """
    return before_norm(shadow.bridge.ln_final, unembedding_directions(shadow, targets, foils))


def unembedding_directions(
    shadow: Shadow, targets: Sequence[int | None], foils: Sequence[int | None]
) -> Float[Tensor, "target d_model"]:
    """Returns the directions of logit[target] - logit[foil] after the final norm."""
    return minus_foil(shadow.bridge.W_U.mT, targets, foils)


def minus_foil(
    of_token: Float[Tensor, "vocab ..."],
    targets: Sequence[int | None],
    foils: Sequence[int | None],
) -> Float[Tensor, "target ..."]:
    """Returns each target's row minus that of its foil, or minus the mean row; in float32."""
    pairs = list(zip(targets, foils, strict=True))
    mean = None
    if any(target is not None and foil is None for target, foil in pairs):
        mean = of_token.mean(0, dtype=torch.float32)
    rows = []
    for target, foil in pairs:
        if target is None:
            rows.append(torch.zeros_like(of_token[0], dtype=torch.float32))
        else:
            other = mean if foil is None else of_token[foil].float()
            assert other is not None
            rows.append(of_token[target].float() - other)
    return torch.stack(rows)


def uncapped(
    shadow: Shadow, logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch vocab"]:
    """Undoes the family's soft cap, cap * tanh(logit / cap); in float32.

    This magnifies the rounding of the logits by cosh(logit / cap) squared.
    """
    logits = logits.float()
    cap = soft_cap(shadow)
    if cap is None:
        return logits
    below_one = 1 - torch.finfo(torch.float32).eps / 2
    return cap * (logits / cap).clamp(-below_one, below_one).atanh()


def dots(
    weight: Float[Tensor, "... d_model"], direction: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row ..."]:
    """Multiplies each row of a weight with each direction, in the precision of `high_precision`.

    In that precision, because a trainer may have switched float32 matmuls to TF32; in pieces, so
    that the copy stays small beside the weight.
    """
    flat, to = weight.flatten(0, -2), high_precision(direction)
    # In this order: MKL takes ten times as long for piece @ to.mT.
    pieces = [to @ high_precision(some).mT for some in flat.split(max(1, 2**22 // flat.shape[1]))]
    product = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return product.unflatten(1, weight.shape[:-1])


def high_precision(x: Tensor) -> Tensor:
    """Converts to float64, or to float32 on a device without float64."""
    return x.float() if x.device.type == "mps" else x.double()


def head_writes(
    layers: Sequence[int],
    w_o: Callable[[int], Float[Tensor, "head d_head d_model"]],
    b_o: Callable[[int], Float[Tensor, " d_model"] | None],
    direction: Callable[[int], Float[Tensor, "row d_model"]],
) -> StackReduce:
    """Reduces z to what each head writes, and the output bias, before the norms divide.

    The direction is multiplied with W_O first, so that no head's output is ever computed. Weights
    are read in the pass, where a streamed layer has them.

    Args:
        layers: those of the stack.
        w_o, b_o, direction: of a layer.
    """

    def heads(
        z: Float[Tensor, "layer row head d_head"], part: slice
    ) -> tuple[Float[Tensor, "layer row head"], Float[Tensor, "layer row"]]:
        to = {layer: direction(layer) for layer in layers[part]}
        through = torch.stack([dots(w_o(layer), to[layer]) for layer in layers[part]])
        each = (high_precision(z) * through).sum(3)
        constant = each.new_zeros(each.shape[:2])
        for at, layer in enumerate(layers[part]):
            if (bias := b_o(layer)) is not None:
                constant[at] = dots(bias[None], to[layer])[:, 0]
        return each, constant

    return heads


def neuron_writes(
    k: int,
    layers: Sequence[int],
    w_out: Callable[[int], Float[Tensor, "neuron d_model"]],
    direction: Callable[[int], Float[Tensor, "row d_model"]],
) -> StackReduce:
    """Reduces to the k neurons that write most, and what they write before the norms divide."""

    def top(
        post: Float[Tensor, "layer row neuron"], part: slice
    ) -> tuple[Int[Tensor, "layer row rank"], Float[Tensor, "layer row rank"]]:
        through = [dots(w_out(layer), direction(layer)) for layer in layers[part]]
        write = high_precision(post) * torch.stack(through)
        index = write.abs().topk(k, dim=2).indices
        return index, write.gather(2, index)

    return top
