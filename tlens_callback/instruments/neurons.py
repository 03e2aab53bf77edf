"""Reads which neurons fire most, on which tokens, and what they add to the answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.direct import (
    answer_directions,
    before_norm,
    has_direct_path,
)
from tlens_callback.instruments.parts.experts import expert_taps, routed_hook, router_hook
from tlens_callback.instruments.parts.selection import (
    alike,
    checked_selection,
    chosen_rows,
    index_or_nan,
    last_tokens,
    layer_labels,
    mlp_norm_hook,
    neuron_layers,
    of_layers,
)
from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow, Stack, Taken, Taps
from tlens_callback.shadow.stacks import StackReduce

FINAL, NEURONS, MLP_NORM = "ln_final.hook_scale", "mlp.hook_post", "ln2_post.hook_scale"


@dataclass(frozen=True)
class TopNeurons:
    """Reads the MLP neurons that fire most in each layer, or the experts of a layer that has them.

    Let a_n(pos) be the input of the MLP's output projection (gated models: act(gate) * up):

    - neuron: the k neurons n of largest max over pos of |a_n(pos)|, largest first; pos runs over
      the probe's tokens, without the first if `skip_first`.
    - activation: a_n(pos) of each of them on every token, also the first.
    - write: what the neuron adds directly to logit[target] - logit[foil] at the last token, before
      any soft cap, with the scales s of the norms held constant:
      a_n(last) * (W_out[n] * gain_post / s_post) * gain_final / s_final . u,
      u = W_U[target] - W_U[foil].
      The post-norm factor is there only in families with a post-norm (Gemma 2 and 3, OLMo 2);
      LayerNorm also centres. Without a foil, the mean of W_U over the vocabulary replaces
      W_U[foil]: write is then the contribution to logit[target] minus the mean logit. Of a target
      or foil of several tokens, the first counts.
    - expert_share: share of the same tokens that are routed to the expert; the shares sum to the
      number of experts that each token is sent to.
    - router: mean over the same tokens of the router's softmax over all experts.

    A model may have both kinds of layer: each reading contains the layers of its kind, with their
    names.

    Args:
        k: neurons per layer.
        probes: names of the probes to show. Default: every probe that is not a repeated block.
        skip_first: leave the first token out of the ranking; it is often an attention sink
            with massive activations, which would fill the list. A probe of one token keeps it.

    Keys:
        top_neurons/neuron/<probe>: [layer, rank], index, 0..d_mlp-1
        top_neurons/activation/<probe>: [layer, rank, pos], activation, -inf..inf
        top_neurons/peak/<probe>: [layer, rank], index, 0..length-1; where |a_n(pos)| is largest
            among the ranked tokens
        top_neurons/write/<probe>: [layer, rank], logit, -inf..inf; for a probe with a target, in
            families whose logits are just the unembedded final norm
        top_neurons/expert_share/<probe>: [layer, expert], fraction, 0..1; mixture-of-experts layers
        top_neurons/router/<probe>: [layer, expert], probability, 0..1; mixture-of-experts layers

    Reads:
        blocks.{layer}.mlp.hook_post; for write: blocks.{layer}.ln2_post.hook_scale,
        ln_final.hook_scale; for experts: blocks.{layer}.mlp.gate.hook_out,
        blocks.{layer}.mlp.hook_expert_indices

    Cost:
        layers * k * (2 + length) per probe; experts: 2 * layers * n_experts per probe.

    Source:
        Geva et al. 2021 (neurons as memories); Elhage et al. 2021 (direct contributions); Sun et
        al. 2024 (massive activations on the first token).

    Raises:
        ValueError: k < 1; an empty or repeated selection; from `taps`, an unknown probe, or more
            neurons than a layer has.
    """

    description: ClassVar[Description] = Description(
        title="Neurons that fire most",
        group="Neurons and features",
        measures={
            "neuron": Meaning(title="Index of the neurons that fire most", axes=("layer", "rank")),
            "activation": Meaning(
                title="Neurons that fire most", axes=("layer", "rank", "pos"), headline=True
            ),
            "peak": Meaning(title="Token on which each neuron fires most", axes=("layer", "rank")),
            "write": Meaning(
                sometimes=True, title="What each neuron adds to the answer", axes=("layer", "rank")
            ),
            "expert_share": Meaning(
                sometimes=True,
                title="Share of the tokens that each expert takes",
                axes=("layer", "expert"),
                headline=True,
            ),
            "router": Meaning(
                sometimes=True, title="Probability of each expert", axes=("layer", "expert")
            ),
        },
    )

    k: int = 5
    probes: Sequence[str] | None = None
    skip_first: bool = True
    name: str = "top_neurons"

    def __post_init__(self) -> None:
        demand_numbers(self)
        if self.k < 1:
            raise ValueError(f"TopNeurons(k={self.k}) shows nothing; give k >= 1.")
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """Reductions of the layers' neurons or routers, and of the norms' scales."""
        rows = chosen_rows(batch, self.probes)
        if not rows:
            return {}
        row, last, counted = batch.once(
            ("neurons", self.skip_first, *rows), lambda: self._places(batch, rows)
        )
        direction = self._directions(shadow, batch, rows)
        blocks: Any = shadow.bridge.blocks
        scaled = [i for i in neuron_layers(shadow) if mlp_norm_hook(i) in shadow.hooks]

        def to(layer: int) -> Float[Tensor, "row d_model"]:
            assert direction is not None
            return before_norm(blocks[layer].ln2_post, direction) if layer in scaled else direction

        def w_out(layer: int) -> Float[Tensor, "neuron d_model"]:
            return blocks[layer].mlp.W_out

        taps: dict[Any, Any] = {}
        for layers in alike(neuron_layers(shadow), lambda i: len(w_out(i))):
            if self.k > (there := len(w_out(layers[0]))):
                raise ValueError(f"TopNeurons(k={self.k}): layer {layers[0]} has {there} neurons.")
            stack = Stack(NEURONS, layers, rows=tuple(rows))
            writes = None if direction is None else partial(_writes, layers, w_out, to)
            taps[stack] = _top_neurons(self.k, last, counted, writes)
        if direction is not None and taps:
            taps[FINAL] = lambda scale: scale[row, last, 0]
            if scaled:
                tokens = last_tokens(batch, rows)
                taps[Stack(MLP_NORM, tuple(scaled), tokens=tokens)] = lambda scale, part: scale[
                    ..., 0
                ]
        return taps | expert_taps(shadow, _expert_layers(shadow), row, counted)

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields one reading of each kind for each probe."""
        rows = chosen_rows(batch, self.probes)
        neurons, experts = neuron_layers(shadow), _expert_layers(shadow)
        for at, row in enumerate(rows):
            if neurons:
                yield from self._neurons(taken, shadow, batch, neurons, at, row)
            if not experts:
                continue
            share, router = (
                torch.stack([taken[hook(i)][at] for i in experts])
                for hook in (routed_hook, router_hook)
            )
            # A router whose outputs are NaN still sends tokens somewhere.
            share = share.masked_fill(router.isnan(), torch.nan)
            for measure, unit, values in (
                ("expert_share", "fraction", share),
                ("router", "probability", router),
            ):
                yield Reading(
                    key=f"{self.name}/{measure}/{batch.probes[row].name}",
                    values=values.numpy(),
                    axes=("layer", "expert"),
                    unit=unit,
                    labels=layer_labels(experts, shadow),
                    limits=(0.0, 1.0),
                )

    def _neurons(
        self,
        taken: Mapping[Any, Taken],
        shadow: Shadow,
        batch: ProbeBatch,
        layers: list[int],
        at: int,
        row: int,
    ) -> Iterator[Reading]:
        """Yields the neurons of one row's probe, which is the `at`-th of the chosen ones."""
        probe, labels = batch.probes[row].name, layer_labels(layers, shadow)
        found = of_layers(taken, NEURONS)
        index, fired, *write = (
            torch.stack(parts)[:, at] for parts in zip(*(found[i] for i in layers), strict=True)
        )  # each [layer, rank, ...]
        counted = self._counted(batch, torch.tensor([row], device=batch.mask.device)).cpu()
        size = fired.abs().masked_fill(~counted, -1)
        largest, peak = size.amax(-1), size.argmax(-1)
        # Another neuron might have fired more, so this one is not shown as the one that did.
        fired = fired.masked_fill(largest.isnan()[..., None], torch.nan)
        yield Reading(
            key=f"{self.name}/neuron/{probe}",
            values=index_or_nan(index, largest).numpy(),
            axes=("layer", "rank"),
            unit="index",
            labels=labels,
        )
        yield Reading(
            key=f"{self.name}/activation/{probe}",
            values=fired[..., : batch.lengths[row]].numpy(),
            axes=("layer", "rank", "pos"),
            unit="activation",
            labels={**labels, "pos": batch.labels[row]},
        )
        yield Reading(
            key=f"{self.name}/peak/{probe}",
            values=index_or_nan(peak, largest).numpy(),
            axes=("layer", "rank"),
            unit="index",
            labels=labels,
        )
        if not write or batch.targets[row] is None:
            return
        none = torch.ones(len(batch.probes), dtype=torch.float32)
        norms = of_layers(taken, MLP_NORM)
        scales = torch.stack([norms.get(i, (none,))[0][at] for i in layers])
        yield Reading(
            key=f"{self.name}/write/{probe}",
            values=(write[0] / scales[:, None] / taken[FINAL][at]).numpy(),
            axes=("layer", "rank"),
            unit="logit",
            labels=labels,
        )

    def _places(
        self, batch: ProbeBatch, rows: Sequence[int]
    ) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"], Bool[Tensor, "row pos"]]:
        """Returns the rows, the positions of their last tokens, and which tokens count."""
        row = torch.tensor(rows, device=batch.tokens.device)
        return row, batch.last[row], self._counted(batch, row)

    def _counted(self, batch: ProbeBatch, row: Int[Tensor, " row"]) -> Bool[Tensor, "row pos"]:
        counted = batch.mask[row].clone()
        if self.skip_first:
            counted[:, 0] = counted.sum(1) == 1
        return counted

    def _directions(
        self, shadow: Shadow, batch: ProbeBatch, rows: list[int]
    ) -> Float[Tensor, "row d_model"] | None:
        """Returns each probe's direction: zero without a target, None if no probe has a target."""
        targets = [batch.targets[i] for i in rows]
        if all(target is None for target in targets) or not has_direct_path(shadow):
            return None
        return answer_directions(shadow, targets, [batch.foils[i] for i in rows])


def _top_neurons(
    k: int,
    last: Int[Tensor, " row"],
    counted: Bool[Tensor, "row pos"],
    writes: Callable[[Tensor, Tensor, slice], Tensor] | None,
) -> StackReduce:
    """Reduces to each row's top k neurons, activations, and writes before the norms divide."""

    def top(a: Float[Tensor, "layer row pos neuron"], part: slice) -> tuple[Tensor, ...]:
        peak = a.abs().masked_fill_(~counted[:, :, None], -1).amax(2)
        index = peak.topk(k, dim=2).indices  # [layer, row, rank]
        fired = a.gather(3, index[:, :, None].expand(-1, -1, a.shape[2], -1)).mT.float()
        if writes is None:
            return index, fired
        at_last = fired.gather(3, last[:, None, None].expand(*index.shape, 1))[..., 0]
        return index, fired, writes(index, at_last, part)

    return top


def _writes(
    layers: Sequence[int],
    w_out: Callable[[int], Float[Tensor, "neuron d_model"]],
    to: Callable[[int], Float[Tensor, "row d_model"]],
    index: Int[Tensor, "layer row rank"],
    activation: Float[Tensor, "layer row rank"],
    part: slice,
) -> Float[Tensor, "layer row rank"]:
    """Returns what some neurons write along the direction, with these activations."""
    # Product and sum, not a matmul: a trainer may have switched those to TF32.
    some = torch.stack([w_out(layer)[at] for layer, at in zip(layers[part], index, strict=True)])
    directions = torch.stack([to(layer) for layer in layers[part]])
    return activation * (some.float() * directions[:, :, None]).sum(3)


def _expert_layers(shadow: Shadow) -> list[int]:
    neurons = neuron_layers(shadow)
    return [
        i
        for i in range(shadow.n_layers)
        if i not in neurons and routed_hook(i) in shadow.hooks and router_hook(i) in shadow.hooks
    ]
