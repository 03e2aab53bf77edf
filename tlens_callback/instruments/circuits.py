"""What heads read from and write to the residual stream: their weights with the norms folded in."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.direct import before_norm, wide
from tlens_callback.shadow import Shadow


@dataclass(frozen=True, eq=False)
class Circuits:
    """The weights of one layer's heads, for row vectors, without biases and the norms' scales.

    In front of Q, K and V stands the centring and the gain of the norm that the layer reads
    through, if it has one; behind Q and K the gains of the norms of queries and keys; behind O the
    gain (and centring) of the norm that the layer writes through (Gemma 2 and 3, OLMo 2). In
    float64, or float32 where the device has none.

    Attributes:
        q, o: of every head.
        k, v: of every head that has its own: `shared` query heads in a row read each.
    """

    q: Float[Tensor, "head d_model d_head"]
    k: Float[Tensor, "kv_head d_model d_head"]
    v: Float[Tensor, "kv_head d_model d_head"]
    o: Float[Tensor, "head d_head d_model"]

    @property
    def shared(self) -> int:
        """Query heads a key-value head."""
        return len(self.q) // len(self.k)


def circuits(shadow: Shadow, layer: int) -> Circuits:
    """Of the shadow's current weights."""
    block: Any = shadow.bridge.blocks[layer]
    attn: Any = block.attn
    parts = dict(block.named_children())
    q, k, v, o = (wide(getattr(attn, name).detach()) for name in ("W_Q", "W_K", "W_V", "W_O"))
    if "ln1" in parts:
        q, k, v = (before_norm(parts["ln1"], w.mT).mT for w in (q, k, v))
    inner = dict(attn.named_children())
    if "q_norm" in inner:
        q = _scaled(inner["q_norm"], q)
    if "k_norm" in inner:
        k = _scaled(inner["k_norm"], k)
    if "ln1_post" in parts:
        norm: Any = parts["ln1_post"]
        o = (o if norm.uses_rms_norm else o - o.mean(-1, keepdim=True)) * _gain(norm)
    return Circuits(q, k, v, o)


def _gain(norm: Any) -> Float[Tensor, " n"] | float:
    weight = getattr(norm, "weight", None)
    if weight is None:
        return 1.0
    return wide(weight.detach()) + (1 if norm.uses_weight_offset else 0)


def _scaled(
    norm: Any, w: Float[Tensor, "head d_model d_head"]
) -> Float[Tensor, "head d_model d_head"]:
    """With the gain of a norm over each head's queries or keys, or over all heads' together."""
    gain = _gain(norm)
    if isinstance(gain, Tensor) and gain.numel() > w.shape[-1]:
        gain = gain.view(len(w), 1, -1)
    return w * gain
