"""Finds where the answer is carried, by patching activations of one prompt into another."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.selection import checked_selection, layer_labels, rows_named
from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken
from tlens_callback.shadow.interventions import Variants, captured, demand_heads, effects

Part = Literal["resid", "attn", "mlp", "head"]
HOOKS: dict[str, str] = {
    "resid": "blocks.{}.hook_resid_pre",
    "attn": "blocks.{}.hook_attn_out",
    "mlp": "blocks.{}.hook_mlp_out",
    "head": "blocks.{}.attn.hook_z",
}


@dataclass(frozen=True)
class ActivationPatching:
    """Measures how much of the clean answer one clean activation restores in the corrupt run.

    Let D = logit[target] - logit[foil] at the last token. D(patched) is that of the corrupt prompt
    when one of its activations is replaced by the clean prompt's at the same place and everything
    after it is computed again (denoising):

    value = (D(patched) - D(corrupt)) / (D(clean) - D(corrupt))

    0 means no effect, 1 that the clean answer is fully restored; values below 0 and above 1 occur.
    The target is that of the clean probe. So is the foil; if the clean probe has none, the foil is
    the target of the corrupt probe. Of several tokens, the first counts. What is replaced:

    - resid: the residual stream that enters the layer, at one position.
    - attn, mlp: what the layer's attention or MLP adds to the residual stream, at one position.
    - head: a head's output before the output matrix, at all positions.

    Before the first token in which the prompts differ, nothing is replaced and the value is 0. For
    the other direction (noising: what breaks the clean answer), exchange the two probes; then both
    need a target.

    Args:
        clean: name of a probe with a target. Without it, every pair among the probes is patched:
            `<name>` and `<name>-corrupt`, which `corrupt:` in a file of probes makes.
        corrupt: name of another probe, or a `Probe` that other instruments do not see, with as many
            tokens as the clean one. Default: `<clean>-corrupt`.
        parts: what to replace.
        rows: patched runs computed together in one batch; fewer for prompts so long that the batch
            would have more than 2048 tokens.
        every: measure at every n-th observation.

    Keys:
        activation_patching/resid/<probe>: [layer, pos], fraction, -inf..inf; with the name and
            the tokens of the clean probe
        activation_patching/attn/<probe>: [layer, pos], fraction, -inf..inf
        activation_patching/mlp/<probe>: [layer, pos], fraction, -inf..inf
        activation_patching/head/<probe>: [layer, head], fraction, -inf..inf
        activation_patching/clean/<probe>: [], logit, -inf..inf; D(clean)
        activation_patching/corrupt/<probe>: [], logit, -inf..inf; D(corrupt). Where the two are
            close, their difference, the divisor, makes small effects look large; where they are
            equal up to rounding, the fractions are NaN

    Reads:
        In forward passes of its own: blocks.{layer}.hook_resid_pre, blocks.{layer}.hook_attn_out,
        blocks.{layer}.hook_mlp_out, blocks.{layer}.attn.hook_z

    Cost:
        For each pair: for each of resid, attn and mlp, patched positions * layers *
        (layers + 1) / 2 passes of the prompt through one layer; for head, n_heads instead of the
        positions. Layers before the patch run only where others of its batch need them.

    Source:
        Meng et al. 2022 (causal tracing); Wang et al. 2022 (heads); Zhang & Nanda 2023 (the
        metric, and what to patch).

    Raises:
        ValueError: no, unknown or repeated parts, rows < 1, every < 1, corrupt without clean; from
            `taps`, a part that no layer has, no pair, an unknown probe, no target or no foil,
            prompts of different lengths or of the same tokens; from `read`, for heads, a model
            whose hook_z has no head axis; from the first `read`, D(clean) = D(corrupt) up to
            rounding.
    """

    description: ClassVar[Description] = Description(
        title="Patching: what restores the answer",
        group="Answers",
        measures={
            "resid": Meaning(
                title="Answer restored by the residual stream",
                axes=("layer", "pos"),
                headline=True,
            ),
            "attn": Meaning(title="Answer restored by an attention layer", axes=("layer", "pos")),
            "mlp": Meaning(title="Answer restored by an MLP", axes=("layer", "pos")),
            "head": Meaning(
                title="Answer restored by a head", axes=("layer", "head"), headline=True
            ),
            "clean": Meaning(title="Lead of the answer, clean prompt", axes=(), headline=True),
            "corrupt": Meaning(title="Lead of the answer, corrupt prompt", axes=(), headline=True),
        },
    )

    clean: str | None = None
    corrupt: str | Probe | None = None
    parts: Sequence[Part] = ("resid", "attn", "mlp", "head")
    rows: int = 64
    every: int = 10
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "activation_patching"

    def __post_init__(self) -> None:
        parts = checked_selection(self.parts, "parts")
        if unknown := [part for part in parts or () if part not in get_args(Part)]:
            raise ValueError(
                f"ActivationPatching(parts=...) has {unknown[0]!r}; known are {get_args(Part)}."
            )
        demand_numbers(self, rows=1, every=1)
        if self.clean is None and self.corrupt is not None:
            raise ValueError(
                "ActivationPatching(corrupt=...): name the clean probe too, with clean=..."
            )
        object.__setattr__(self, "parts", parts)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Checks the pairs and the parts; returns no reductions of the shared forward pass."""
        self._pairs(batch)
        for part, by_layer in self._hooks(shadow).items():
            if not by_layer:
                raise ValueError(
                    f"ActivationPatching: no layer of this model has the hook point "
                    f"{HOOKS[part].format('{layer}')!r}. Leave {part!r} out of parts."
                )
        return {}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields for each pair a matrix of each part, and D(clean) and D(corrupt)."""
        for pair in self._pairs(batch):
            yield from self._read(pair, shadow)

    def _read(self, pair: "_Pair", shadow: Shadow) -> Iterator[Reading]:
        hooks = self._hooks(shadow)
        names = [hook for by_layer in hooks.values() for hook in by_layer.values()]
        last = torch.tensor([len(pair.clean) - 1], device=pair.clean.device)
        logits, source = captured(shadow, pair.clean, names, last)
        for hook in hooks.get("head", {}).values():
            demand_heads(source[hook], shadow, type(self).__name__)
        heads, positions = torch.arange(shadow.n_heads, device=last.device), pair.positions
        patches = [
            Variants(i, hook, heads, partial(_put_heads, source[hook]))
            if part == "head"
            else Variants(i, hook, positions, partial(_put_positions, source[hook]))
            for part, by_layer in hooks.items()
            for i, hook in by_layer.items()
        ]
        run, moved = effects(
            shadow, pair.corrupt, patches, pair.answers, positions=last, rows=self.rows
        )
        ends = torch.cat([pair.answers(logits), run]).cpu().double()
        clean, corrupt = (ends[:, 0] - ends[:, 1]).tolist()
        gap = clean - corrupt
        # A pair given by name keeps the key that older checkpoints have.
        known = "gap" if self.clean is not None else f"gap/{pair.name}"
        if not math.isfinite(gap):
            gap = float("nan")
        elif abs(gap) <= torch.finfo(shadow.dtype).eps * float(ends.abs().max()):
            if known not in self.baseline:
                raise ValueError(
                    f"ActivationPatching: logit[target] - logit[foil] is {clean:.4g} on the clean "
                    f"probe {pair.name!r} and {corrupt:.4g} on the corrupt one, the same to "
                    f"rounding, so the share that a patch restores is undefined. Take a corrupt "
                    f"prompt with another answer, or another foil."
                )
            gap = float("nan")
        self.baseline.setdefault(known, torch.tensor(gap, dtype=torch.float32))
        shares = iter((to - of) / gap for to, of in (m.cpu().double().T for m in moved))
        for part, by_layer in hooks.items():
            axis = "head" if part == "head" else "pos"
            size = len(pair.clean) if axis == "pos" else shadow.n_heads
            values = np.full((len(by_layer), size), 0 * gap)
            for row in values:
                share = next(shares).numpy()
                row[size - len(share) :] = share
            yield Reading(
                key=f"{self.name}/{part}/{pair.name}",
                values=values,
                axes=("layer", axis),
                unit="fraction",
                labels={
                    **layer_labels(list(by_layer), shadow),
                    **({"pos": pair.labels} if axis == "pos" else {}),
                },
            )
        for measure, value in (("clean", clean), ("corrupt", corrupt)):
            yield Reading(
                key=f"{self.name}/{measure}/{pair.name}", values=np.asarray(value), unit="logit"
            )

    def _hooks(self, shadow: Shadow) -> dict[str, dict[int, str]]:
        """Returns part -> layer -> hook point, for the layers that have it."""
        return {
            part: {
                i: HOOKS[part].format(i)
                for i in range(shadow.n_layers)
                if HOOKS[part].format(i) in shadow.hooks
            }
            for part in self.parts
        }

    def _pairs(self, batch: ProbeBatch) -> "list[_Pair]":
        if self.clean is not None:
            return [self._pair(batch, self.clean, self.corrupt or f"{self.clean}-corrupt")]
        names = [probe.name for probe in batch.probes]
        pairs = [(name, f"{name}-corrupt") for name in names if f"{name}-corrupt" in names]
        if not pairs:
            raise ValueError(
                f"ActivationPatching needs a pair of probes, 'x' and 'x-corrupt', and there is "
                f"none among {names}. In a file of probes corrupt: makes one; in Python give "
                f"Probe('x', 'The capital of France is', target=' Paris', foil=' Rome') and "
                f"Probe('x-corrupt', 'The capital of Italy is'), or "
                f"ActivationPatching(clean=..., corrupt=...)."
            )
        return [self._pair(batch, clean, corrupt) for clean, corrupt in pairs]

    def _pair(self, batch: ProbeBatch, clean_name: str, given: str | Probe) -> "_Pair":
        beside = batch.beside([given]) if isinstance(given, Probe) else batch
        name = given.name if isinstance(given, Probe) else given
        (row,), (other,) = rows_named(batch, [clean_name]), rows_named(beside, [name])
        target = batch.targets[row]
        foil = beside.targets[other] if batch.foils[row] is None else batch.foils[row]
        if target is None or foil is None or target == foil:
            raise ValueError(
                f"ActivationPatching measures logit[target] - logit[foil] on the probes "
                f"{clean_name!r} (clean) and {name!r} (corrupt): give the clean one a target, and "
                f"a foil that is another token; or give the corrupt one a target, which then is "
                f"the foil. Here target and foil are {target} and {foil}."
            )
        labels, others = batch.labels[row], beside.labels[other]
        if len(labels) != len(others):
            raise ValueError(
                f"ActivationPatching replaces activations of one prompt by those of the other, "
                f"token by token, but the probes {clean_name!r} and {name!r} have "
                f"{len(labels)} and {len(others)} tokens: {list(labels)} and {list(others)}. "
                f"Change one of the texts so that both have the same number."
            )
        clean, corrupt = batch.tokens[row, : len(labels)], beside.tokens[other, : len(labels)]
        if torch.equal(clean, corrupt):
            raise ValueError(
                f"The probes {clean_name!r} and {name!r} are the same tokens {list(labels)}: "
                f"ActivationPatching needs a corrupt prompt that differs."
            )
        return _Pair(clean_name, clean, corrupt, labels, target, foil)


@dataclass(frozen=True)
class _Pair:
    """A clean and a corrupt prompt, under the name of the clean probe.

    `labels` are the clean prompt's tokens as texts.
    """

    name: str
    clean: Int[Tensor, " pos"]
    corrupt: Int[Tensor, " pos"]
    labels: tuple[str, ...]
    target: int
    foil: int

    @property
    def positions(self) -> Int[Tensor, " patched"]:
        """The positions from the first differing token on; before it the two runs are equal."""
        first = int((self.clean != self.corrupt).nonzero()[0])
        return torch.arange(first, len(self.clean), device=self.clean.device)

    def answers(self, logits: Float[Tensor, "variant kept vocab"]) -> Float[Tensor, "variant 2"]:
        """Returns the last token's logits of target and foil."""
        return logits[:, -1, [self.target, self.foil]].float()


def _put_positions(
    source: Float[Tensor, "1 pos d_model"], value: Tensor, positions: Int[Tensor, " variant"]
) -> None:
    value[torch.arange(len(positions), device=value.device), positions] = source[0, positions]


def _put_heads(
    source: Float[Tensor, "1 pos head d_head"], value: Tensor, heads: Int[Tensor, " variant"]
) -> None:
    variant = torch.arange(len(heads), device=value.device)
    value[variant, :, heads] = source[0, :, heads].transpose(0, 1)
