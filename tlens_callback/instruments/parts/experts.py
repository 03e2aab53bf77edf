"""Reads to which experts a mixture-of-experts layer sends tokens; used by `TopNeurons`."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tlens_callback.shadow import Reduce, Shadow


def router_hook(layer: int) -> str:
    """Name of the hook point of the router's logits, [token, expert]."""
    return f"blocks.{layer}.mlp.gate.hook_out"


def routed_hook(layer: int) -> str:
    """Name of the hook point of the experts that each token is sent to, [token, chosen]."""
    return f"blocks.{layer}.mlp.hook_expert_indices"


def expert_taps(
    shadow: Shadow,
    layers: Iterable[int],
    row: Int[Tensor, " row"],
    counted: Bool[Tensor, "row pos"],
) -> dict[str, Reduce]:
    """Reduces to means over the counted tokens: router probabilities, and shares of each expert.

    Router outputs have all probes' tokens on one axis, with padding.
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
