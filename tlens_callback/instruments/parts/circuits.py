"""The weights by which heads read and write the residual stream, with the norms folded in."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tlens_callback.instruments.parts.direct import before_norm, high_precision
from tlens_callback.shadow import Shadow

WEIGHTS = ("W_Q", "W_K", "W_V", "W_O")
NORMS = ("ln1", "ln1_post", "q_norm", "k_norm")


@dataclass(frozen=True, eq=False)
class Circuits:
    """The weights of one layer's heads, for row vectors, without biases and without norms' scales.

    Folded in are: before Q, K and V, the centring and the gain of the norm that the layer reads
    through, if it has one; after Q and K, the gains (and centring) of the norms of queries and
    keys; after O, those of the norm that the layer writes through (Gemma 2 and 3, OLMo 2). In
    float64, or in float32 on a device without float64.

    Attributes:
        q, o: one matrix for each query head.
        k, v: one matrix for each key-value head, which `shared` consecutive query heads read.
    """

    q: Float[Tensor, "head d_model d_head"]
    k: Float[Tensor, "kv_head d_model d_head"]
    v: Float[Tensor, "kv_head d_model d_head"]
    o: Float[Tensor, "head d_head d_model"]

    @property
    def shared(self) -> int:
        """Number of query heads for each key-value head."""
        return len(self.q) // len(self.k)


def circuits(shadow: Shadow, layer: int) -> Circuits:
    """Returns the circuits of one layer from the shadow's current weights."""
    with shadow.layer(layer):
        attn, norms = _attention_and_norms(shadow, layer)
        q, k, v, o = (high_precision(getattr(attn, name).detach().clone()) for name in WEIGHTS)
        if "ln1" in norms:
            q, k, v = (before_norm(norms["ln1"], w.mT).mT for w in (q, k, v))
        if "q_norm" in norms:
            q = _after_norm(norms["q_norm"], q)
        if "k_norm" in norms:
            k = _after_norm(norms["k_norm"], k)
        if "ln1_post" in norms:
            o = _after_norm(norms["ln1_post"], o)
        return Circuits(q, k, v, o)


def demand_circuits(shadow: Shadow, layers: Iterable[int], name: str) -> None:
    """Refuses attention whose weights cannot be read head by head.

    Raises:
        ValueError: for keys and values behind a latent (DeepSeek), heads of several widths
            (Gemma 4), or norms that the bridge does not split (StableLM 2's of queries and keys);
            `name` is the instrument that needs them.
    """
    for layer in layers:
        attn, norms = _attention_and_norms(shadow, layer)
        try:
            for weight in WEIGHTS:
                getattr(attn, weight)
            for norm in norms.values():
                _ = norm.uses_rms_norm, norm.uses_weight_offset
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise ValueError(
                f"{name}: the attention of layer {layer} of this "
                f"{type(shadow.bridge.original_model).__name__} does not consist of weights by "
                f"head and norms of a known kind: {error} Leave the instrument out."
            ) from error


def _attention_and_norms(shadow: Shadow, layer: int) -> tuple[Any, dict[str, Any]]:
    """Returns the layer's attention, and the norms around and inside it."""
    block: Any = shadow.bridge.blocks[layer]
    parts = {**dict(block.named_children()), **dict(block.attn.named_children())}
    return block.attn, {name: parts[name] for name in NORMS if name in parts}


def _after_norm(norm: Any, w: Float[Tensor, "head n width"]) -> Float[Tensor, "head n width"]:
    """Folds the gain and the centring of a norm into the weights w whose output it normalises.

    The norm is over each head by itself, or over all heads together.
    """
    if not norm.uses_rms_norm:
        w = w - w.mean(-1, keepdim=True)
    if getattr(norm, "weight", None) is None:
        return w
    gain = high_precision(norm.weight.detach()) + (1 if norm.uses_weight_offset else 0)
    return w * (gain.view(len(w), 1, -1) if gain.numel() > w.shape[-1] else gain)
