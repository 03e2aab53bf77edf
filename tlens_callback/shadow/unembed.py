"""Turns a residual stream into logits, as the model does for its output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

CHUNK = 2**23
"""How many logits to compute at a time: 32 MiB in float32, and a few copies while they are read.
Many rows at once, because reading W_U costs as much as computing a row."""

IN_CACHE = 2**20
"""How many logits are read at a time on a CPU, several times over: 4 MiB, which its caches hold."""


@dataclass(frozen=True)
class Unembedded:
    """What a tap has in place of a reduction, to read the logits that a residual stream would give.

    Its key is a `Stack` of residual streams with tokens. Their rows, in the order of tokens and,
    for each token, of layers, are unembedded together with those of all other instruments, a piece
    at a time, as soon as the forward pass is over and the reductions of "logits" and "last_logits"
    have run. The results are concatenated along the first axis. Behind them stands the `gap`
    between such logits and the model's own; `demand_equal` says whether it is rounding.

    Attributes:
        reduce: takes [row, vocab] logits in float32, their [row] log-sum-exp, and which of all rows
            these are; returns few numbers.
    """

    reduce: Callable[[Tensor, Tensor, slice], Tensor | tuple[Tensor, ...]]


class Unembeds(Protocol):
    """The part of a `Shadow` that unembedding needs."""

    bridge: Any
    hooks: Mapping[str, nn.Module]
    device: torch.device
    dtype: torch.dtype


@torch.no_grad()
def unembed(
    shadow: Unembeds, resid: Float[Tensor, "*batch d_model"]
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
        head = shadow.bridge.unembed
        logits = head.original_component(hidden).float()
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    return logits if cap is None else cap * torch.tanh(logits / cap)


def pieces(
    shadow: Unembeds, requests: Sequence[Float[Tensor, "row d_model"]]
) -> Iterator[tuple[int, slice, Float[Tensor, "row vocab"], Float[Tensor, " row"]]]:
    """Unembeds the rows of several requests together.

    Yields:
        The number of a request, which of its rows these are, their logits, and the log-sum-exp.
    """
    vocab = shadow.bridge.unembed.original_component.weight.shape[0]
    most = IN_CACHE if shadow.device.type == "cpu" else CHUNK
    together, few = (max(1, size // vocab) for size in (CHUNK, most))
    at, row = 0, 0  # the request whose turn it is, and its first row that is not done
    for resid in torch.cat(list(requests)).split(together):
        logits, done = unembed(shadow, resid), 0
        while done < len(logits):
            stop = min(row + few, len(requests[at]), row + len(logits) - done)
            part = logits[done : done + stop - row]
            yield at, slice(row, stop), part, log_sum_exp(part)
            done, row = done + stop - row, stop
            if row == len(requests[at]):
                at, row = at + 1, 0


def log_sum_exp(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """Returns ln sum exp(logits); NaN where one is infinite, which leaves no probabilities."""
    lse = logits.logsumexp(-1)
    return lse.masked_fill(lse.isposinf(), torch.nan)


def gap(
    unembedded: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, ""]:
    """Returns how far the last layer's unembedded residual stream is from the model's own logits.

    It is the largest absolute difference, as a share of the largest absolute logit.
    """
    logits = logits.float()
    largest = logits.abs().amax().clamp(min=torch.finfo(logits.dtype).tiny)
    return (unembedded - logits).abs().amax() / largest


def demand_equal(off: Tensor, shadow: Unembeds, name: str) -> None:
    """Refuses a family whose output is computed differently than in `unembed`.

    Raises:
        ValueError: if `off`, a `gap`, is larger than rounding; `name` is the instrument that checks
            it. Not if it is NaN: then the model's own output is NaN.
    """
    allowed = _allowed(shadow)
    if float(off) > allowed:
        raise ValueError(
            f"{name}: norm and unembedding of the last layer are {float(off):.1e} of the largest "
            f"logit away from this {type(shadow.bridge.original_model).__name__}'s output, and "
            f"rounding allows {allowed:.0e}. This family computes its logits in a way that the "
            f"lens does not know; leave the instrument out."
        )


def unembeds(shadow: Unembeds, resid: Tensor, logits: Tensor) -> bool:
    """Whether `unembed` turns a residual stream into the model's own logits of it."""
    return not float(gap(unembed(shadow, resid), logits)) > _allowed(shadow)


def _allowed(shadow: Unembeds) -> float:
    return 1e-3 if shadow.dtype.itemsize >= 4 else 2e-2


def _before_head(shadow: Unembeds) -> tuple[Any, Any]:
    """Returns the modules between the last layer and the head: norm and projection, or None.

    Not the bridge's own norm, whose hook points would fire while other instruments listen.
    """
    if "ln_final.hook_out" in shadow.hooks:
        return shadow.bridge.ln_final.original_component, None
    # OPT with word_embed_proj_dim has a projection, which the bridge leaves inside the model
    # (transformer-lens 4.3.0), and the norm with it.
    model = shadow.bridge.original_model
    decoder = getattr(getattr(model, "model", None), "decoder", None)
    return getattr(decoder, "final_layer_norm", None), getattr(decoder, "project_out", None)


def soft_cap(shadow: Unembeds) -> float | None:
    """Returns the bound of the family's soft cap on logits, or None."""
    return getattr(text_config(shadow), "final_logit_softcapping", None)


def text_config(shadow: Unembeds) -> Any:
    """Returns the configuration of the language model, also if it is part of a larger model."""
    return shadow.bridge.original_model.config.get_text_config()
