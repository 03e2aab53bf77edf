"""Which experts a mixture-of-experts layer sends tokens to; `TopNeurons` reads it."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tlens_callback.shadow import Reduce, Shadow


def router_hook(layer: int) -> str:
    """The router's logits, [token, expert]."""
    return f"blocks.{layer}.mlp.gate.hook_out"


def routed_hook(layer: int) -> str:
    """The experts that each token is sent to, [token, chosen]."""
    return f"blocks.{layer}.mlp.hook_expert_indices"


def expert_taps(
    shadow: Shadow,
    layers: Iterable[int],
    row: Int[Tensor, " row"],
    counted: Bool[Tensor, "row pos"],
) -> dict[str, Reduce]:
    """Means over the counted tokens of some rows: router probabilities, and shares of the routed.

    Router outputs have all probes' tokens on one axis, padding included.
    """

    def by_probe(tokens: Tensor) -> Tensor:
        return tokens.reshape(-1, counted.shape[1], tokens.shape[-1])[row]

    def mean(values: Float[Tensor, "row pos expert"]) -> Float[Tensor, "row expert"]:
        return (values * counted[:, :, None]).sum(1) / counted.sum(1, keepdim=True)

    def router(logits: Float[Tensor, "token expert"]) -> Float[Tensor, "row expert"]:
        return mean(by_probe(logits).float().softmax(-1))

    def share(n_experts: int) -> Reduce:
        def routed(chosen: Int[Tensor, "token chosen"]) -> Float[Tensor, "row expert"]:
            hits = torch.nn.functional.one_hot(by_probe(chosen), n_experts).sum(2)
            return mean(hits.float())

        return routed

    taps: dict[str, Reduce] = {}
    for i in layers:
        taps[router_hook(i)] = router
        taps[routed_hook(i)] = share(shadow.bridge.blocks[i].mlp.gate.weight.shape[0])
    return taps
