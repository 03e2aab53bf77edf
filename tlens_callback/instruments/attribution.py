"""Direct logit attribution: measures what each head, MLP and neuron adds to the answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.neurons import FINAL, NEURONS
from tlens_callback.instruments.parts.baseline import changes, first_value
from tlens_callback.instruments.parts.direct import (
    before_norm,
    demand_direct_path,
    dots,
    head_writes,
    high_precision,
    minus_foil,
    neuron_writes,
    uncapped,
    unembedding_directions,
)
from tlens_callback.instruments.parts.selection import (
    alike,
    checked_selection,
    index_or_nan,
    last_tokens,
    layer_labels,
    neuron_layers,
    of_layers,
    plain_rows,
    rows_named,
)
from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import LAST_LOGITS, Shadow, Stack, Taken, Taps
from tlens_callback.shadow.unembed import soft_cap

EMBED = "blocks.0.hook_resid_pre"
HEADS, MLP = "attn.hook_z", "hook_mlp_out"
ATTN_NORM, MLP_NORM = "ln1_post", "ln2_post"
"""The norms behind attention and MLP, which few families have."""


@dataclass(frozen=True)
class LogitAttribution:
    """Measures what each component adds directly to the answer's logit lead; the parts sum to it.

    The lead is logit[target] - logit[foil] at the probe's last token, before any soft cap; without
    a foil, logit[target] minus the mean logit over the vocabulary. Of a target or foil of several
    tokens, the first counts. The scale s_final of the final norm, and that of a post-norm, are
    treated as constants, so that each x in the residual stream adds

        c(x) = (x * gain_final / s_final) . (W_U[target] - W_U[foil])

    LayerNorm also centres x. Without a foil, the mean of W_U over the vocabulary replaces the
    foil's row. All at the last token:

    - head: c(z_h W_O[h]); with a post-norm (Gemma 2 and 3, OLMo 2)
      c(z_h W_O[h] * gain_post / s_post).
    - attention: the sum of the layer's heads and of its output bias b_O, treated the same way.
    - mlp: c of everything that the layer's MLP adds to the residual stream, with its output bias
      and its post-norm; in a mixture of experts, all experts together, with the shared ones.
    - embed: c of what enters the first layer: the token embedding and, if learned, the position's.
    - bias: the part that does not depend on the input: the output biases of all attention layers,
      the final norm's bias times W_U[target] - W_U[foil], and b_U[target] - b_U[foil]. MLP biases
      are in mlp.
    - total: embed + all of head + all of mlp + bias.
    - remainder: the model's own lead, from its logits with the soft cap undone, minus total. It is
      the model's rounding error: about 1e-6 of the parts' absolute sum in float32, and up to 1e-2
      of it in bfloat16, which is a few tenths of a logit.
    - head_change, mlp_change: head and mlp minus what they were at the first observation.
    - neuron, neuron_write: for each layer the neurons n of largest |c(a_n W_out[n])|, largest
      first, and c(a_n W_out[n]) itself. a_n is the input of the MLP's output projection; with a
      post-norm, W_out[n] is multiplied by gain_post / s_post. Layers of experts have none.

    Only direct contributions are measured, not what a head does through later layers.

    Args:
        probes: names of the probes to show, each with a target. Default: every probe that has a
            target and is not a repeated block.
        neurons: how many neurons of each layer to show.

    Keys:
        logit_attribution/head/<probe>: [layer, head], logit, -inf..inf
        logit_attribution/head_change/<probe>: [layer, head], logit, -inf..inf
        logit_attribution/attention/<probe>: [layer], logit, -inf..inf
        logit_attribution/mlp/<probe>: [layer], logit, -inf..inf
        logit_attribution/mlp_change/<probe>: [layer], logit, -inf..inf
        logit_attribution/embed/<probe>: [], logit, -inf..inf
        logit_attribution/bias/<probe>: [], logit, -inf..inf
        logit_attribution/total/<probe>: [], logit, -inf..inf
        logit_attribution/remainder/<probe>: [], logit, -inf..inf; 0 to rounding
        logit_attribution/neuron/<probe>: [layer, rank], index, 0..d_mlp-1; if neurons > 0
        logit_attribution/neuron_write/<probe>: [layer, rank], logit, -inf..inf; if neurons > 0

    Reads:
        blocks.{layer}.hook_resid_pre of layer 0, blocks.{layer}.attn.hook_z,
        blocks.{layer}.ln1_post.hook_scale, blocks.{layer}.hook_mlp_out, ln_final.hook_scale,
        last_logits; for neurons: blocks.{layer}.mlp.hook_post, blocks.{layer}.ln2_post.hook_scale

    Cost:
        layers * (n_heads + 2 + 2 * neurons) per probe; for each layer one product of W_O (and of
        W_out for neurons) with a vector per probe; one pass over W_U if a probe has no foil.

    Source:
        Elhage et al. 2021 (direct path, per head); Wang et al. 2022, section 3.1 (logit
        difference).

    Raises:
        ValueError: neurons < 0; an empty or repeated selection; from `taps`, no probe with a
            target, an unknown probe or one without a target, more neurons than a layer has, a
            family that is known to rescale its logits or what its layers write, a final norm whose
            scale has no hook point, or a layer without attention heads; from `read`, a family with
            a remainder larger than rounding (not checked where logits have a soft cap, which
            magnifies rounding without limit).
    """

    description: ClassVar[Description] = Description(
        title="What each head adds to the answer",
        group="Answers",
        needs=Needs.TARGET,
        measures={
            "head": Meaning(
                title="What each head adds to the answer",
                axes=("layer", "head"),
                headline=True,
                quantity=Quantity.DIRECT_EFFECT,
            ),
            "head_change": Meaning(
                title="Change in what each head adds", axes=("layer", "head"), of_run=True
            ),
            "attention": Meaning(
                title="What each layer's heads add to the answer", axes=("layer",)
            ),
            "mlp": Meaning(
                title="What each MLP adds to the answer",
                axes=("layer",),
                quantity=Quantity.DIRECT_EFFECT,
            ),
            "mlp_change": Meaning(
                title="Change in what each MLP adds", axes=("layer",), of_run=True
            ),
            "embed": Meaning(title="What the embedding adds", axes=()),
            "bias": Meaning(title="What the biases add", axes=()),
            "total": Meaning(
                title="What all components add", axes=(), quantity=Quantity.DIRECT_TOTAL
            ),
            "remainder": Meaning(
                title="Lead that no component explains", axes=(), quantity=Quantity.DIRECT_REMAINDER
            ),
            "neuron": Meaning(title="Top neurons", axes=("layer", "rank"), sometimes=True),
            "neuron_write": Meaning(title="What they add", axes=("layer", "rank"), sometimes=True),
        },
    )

    probes: Sequence[str] | None = None
    neurons: int = 0
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "logit_attribution"

    def __post_init__(self) -> None:
        demand_numbers(self)
        if self.neurons < 0:
            raise ValueError(
                f"LogitAttribution(neurons={self.neurons}): give the number of neurons to show for "
                f"each layer, or 0 for none."
            )
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One number for each component and row, before the norms divide, and the norms' scales."""
        rows = self._rows(batch)
        if not rows:
            raise ValueError(
                f"{type(self).__name__}: none of the probes has a target; give one, "
                f"Probe(..., target=' Paris')."
            )
        demand_direct_path(shadow, type(self).__name__)
        bridge: Any = shadow.bridge
        targets, foils = [batch.targets[i] for i in rows], [batch.foils[i] for i in rows]
        row = batch.once(("rows", *rows), lambda: torch.tensor(rows, device=batch.tokens.device))
        last, tokens = batch.last[row], last_tokens(batch, rows)
        read = unembedding_directions(shadow, targets, foils)
        direction = high_precision(before_norm(bridge.ln_final, read))
        constant = minus_foil(bridge.b_U, targets, foils)
        if getattr(bridge.ln_final, "bias", None) is not None:
            constant = constant + dots(bridge.ln_final.bias[None], read)[:, 0]
        layers = tuple(range(shadow.n_layers))

        def through(norm: str) -> Callable[[int], Float[Tensor, "row d_model"]]:
            """Returns the direction in front of a layer's norm of this name, if it has one."""

            def to(layer: int) -> Float[Tensor, "row d_model"]:
                if f"blocks.{layer}.{norm}.hook_scale" not in shadow.hooks:
                    return direction
                return before_norm(getattr(bridge.blocks[layer], norm), direction)

            return to

        def scale_and_constant(of: Float[Tensor, "probe pos 1"]) -> tuple[Tensor, Tensor]:
            return of[row, last, 0], constant

        def part(x: Float[Tensor, "... d_model"]) -> Float[Tensor, "..."]:
            return (high_precision(x) * direction).sum(-1)

        def lead(logits: Float[Tensor, "probe vocab"]) -> Float[Tensor, " row"]:
            each = zip(uncapped(shadow, logits[row]), targets, foils, strict=True)
            return torch.cat([minus_foil(logit, [t], [f]) for logit, t, f in each])

        taps: dict[Any, Any] = {
            EMBED: lambda x: part(x[row, last]),
            Stack(HEADS, layers, tokens=tokens): head_writes(
                layers,
                lambda i: bridge.blocks[i].attn.W_O,
                lambda i: getattr(bridge.blocks[i].attn, "b_O", None),
                through(ATTN_NORM),
            ),
            Stack(MLP, layers, tokens=tokens): lambda x, _: part(x),
            FINAL: scale_and_constant,
            LAST_LOGITS: lead,
        }
        neurons = neuron_layers(shadow) if self.neurons else []
        for alike_layers in alike(neurons, lambda i: len(bridge.blocks[i].mlp.W_out)):
            if self.neurons > (there := len(bridge.blocks[alike_layers[0]].mlp.W_out)):
                raise ValueError(
                    f"LogitAttribution(neurons={self.neurons}): layer {alike_layers[0]} has "
                    f"{there} neurons."
                )
            taps[Stack(NEURONS, alike_layers, tokens=tokens)] = neuron_writes(
                self.neurons, alike_layers, lambda i: bridge.blocks[i].mlp.W_out, through(MLP_NORM)
            )
        for norm, of in ((ATTN_NORM, layers), (MLP_NORM, tuple(neurons))):
            end = f"{norm}.hook_scale"
            if scaled := tuple(i for i in of if f"blocks.{i}.{end}" in shadow.hooks):
                taps[Stack(end, scaled, tokens=tokens)] = lambda scale, _: scale[..., 0]
        return taps

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields for each probe the parts, their sum, the remainder, and the changes."""
        got: Any = taken
        final, constant = (part.double() for part in got[FINAL])  # [row]
        layers = range(shadow.n_layers)

        def scales(norm: str, of: Sequence[int]) -> Float[Tensor, "layer row"]:
            there = of_layers(taken, f"{norm}.hook_scale")
            none = torch.ones_like(final)
            return torch.stack([final * there.get(i, (none,))[0] for i in of])

        after = scales(ATTN_NORM, layers)
        (heads, biases), mlps = (
            next(value for key, value in got.items() if isinstance(key, Stack) and key.end == end)
            for end in (HEADS, MLP)
        )
        head, bias, mlp = heads / after[:, :, None], biases / after, mlps / final
        embed = got[EMBED] / final
        constant = bias.sum(0) + constant
        total = embed + head.sum((0, 2)) + mlp.sum(0) + constant
        size = embed.abs() + head.abs().sum((0, 2)) + mlp.abs().sum(0) + constant.abs()
        remainder = got[LAST_LOGITS] - total
        _check_sum((remainder.abs() / size).max(), shadow)
        numbers = {
            "embed": embed,
            "bias": constant,
            "total": total,
            "remainder": remainder,
        }
        neurons = neuron_layers(shadow) if self.neurons else []
        of_neurons = of_layers(taken, NEURONS)
        for at, row in enumerate(self._rows(batch)):
            probe = batch.probes[row].name
            yield from self._with_change("head", probe, head[:, at], ("layer", "head"))
            yield self._reading("attention", probe, head[:, at].sum(1) + bias[:, at], ("layer",))
            yield from self._with_change("mlp", probe, mlp[:, at], ("layer",))
            for measure, number in numbers.items():
                yield self._reading(measure, probe, number[at])
            if neurons:
                index, write = (
                    torch.stack([part[at] for part in parts])
                    for parts in zip(*(of_neurons[i] for i in neurons), strict=True)
                )
                write = write / scales(MLP_NORM, neurons)[:, at, None]
                axes, labels = ("layer", "rank"), layer_labels(neurons, shadow)
                known = index_or_nan(index, write)
                yield self._reading("neuron", probe, known, axes, "index", labels)
                yield self._reading("neuron_write", probe, write, axes, "logit", labels)

    def between(
        self, first: Mapping[str, Reading], last: Mapping[str, Reading]
    ) -> Iterator[Reading]:
        """Yields the changes from `first` to `last`."""
        of = {"head_change": "head", "mlp_change": "mlp"}
        return changes(self.name, first, last, of)

    def _with_change(
        self, measure: str, probe: str, values: Tensor, axes: tuple[str, ...]
    ) -> Iterator[Reading]:
        values = values.float()
        change = values - first_value(self.baseline, f"{measure}/{probe}", values)
        yield self._reading(measure, probe, values, axes)
        yield self._reading(f"{measure}_change", probe, change, axes)

    def _reading(
        self,
        measure: str,
        probe: str,
        values: Tensor,
        axes: tuple[str, ...] = (),
        unit: str = "logit",
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> Reading:
        key = f"{self.name}/{measure}/{probe}"
        return Reading(key=key, values=values.numpy(), axes=axes, unit=unit, labels=labels or {})

    def _rows(self, batch: ProbeBatch) -> list[int]:
        if self.probes is None:
            return [i for i in plain_rows(batch) if batch.targets[i] is not None]
        rows = rows_named(batch, self.probes)
        if without := [batch.probes[i].name for i in rows if batch.targets[i] is None]:
            raise ValueError(
                f"LogitAttribution: probe {without[0]!r} has no target to attribute. Give it one, "
                f"Probe({without[0]!r}, ..., target=...), or leave the probe out."
            )
        return rows


def _check_sum(off: Tensor, shadow: Shadow) -> None:
    """Refuses a family whose logits are more than the sum of the parts.

    `off` is the largest remainder, as a share of the parts. NaN passes: then the model's own
    output is NaN.
    """
    # SmolLM2-135M: 1e-6, in bfloat16 0.01; a family with a part left out: 0.2 and more, but less
    # where this part is small.
    allowed = 1e-3 if shadow.dtype.itemsize >= 4 else 0.1
    if float(off) > allowed and soft_cap(shadow) is None:
        raise ValueError(
            f"LogitAttribution: the parts miss the answer of this "
            f"{type(shadow.bridge.original_model).__name__} by {float(off):.1e} of their absolute "
            f"sum, and rounding explains at most {allowed:.0e}. This family computes its logits in "
            f"a way that the parts do not cover; leave the instrument out."
        )
