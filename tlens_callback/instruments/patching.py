"""Where the answer is carried: activations of one prompt put into the run of another."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.selection import layer_labels, picked, rows_named
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
    """How much of the clean answer comes back when one clean activation enters the corrupt run.

    With D = logit[target] - logit[foil] at the last token, and D(patched) that of the corrupt
    prompt while one of its activations is replaced by the clean prompt's at the same place, and
    everything behind it is computed anew (denoising):

    value = (D(patched) - D(corrupt)) / (D(clean) - D(corrupt))

    0: no effect, 1: the clean answer is back whole; below 0 and above 1 occur. The target is the
    clean probe's; so is the foil, or else the corrupt probe's target takes its place. What is
    replaced:

    - resid: the residual stream that enters the layer, at one position.
    - attn, mlp: what the layer's attention or MLP adds to the residual stream, at one position.
    - head: a head's output before the output matrix, at all positions.

    Left of the first token in which the prompts differ nothing is replaced: the value is 0.
    The other direction (noising: what of the clean answer breaks) is the pair given the other way
    round, each probe with a target.

    Args:
        clean: name of a probe with a target. Without it, every pair among the probes is patched:
            `<name>` and `<name>-corrupt`, as a file of probes makes them with `corrupt:`.
        corrupt: name of another probe, or a `Probe` that no other instrument is shown. As many
            tokens as the clean one. Without it, `<clean>-corrupt`.
        parts: what to replace.
        rows: patched runs computed side by side in one batch; fewer of prompts so long that the
            batch would have more than 2048 tokens.
        every: ask at every n-th observation.

    Keys:
        activation_patching/resid/<probe>: [layer, pos], fraction, -inf..inf; under the clean
            probe's name, labelled with its tokens
        activation_patching/attn/<probe>: [layer, pos], fraction, -inf..inf
        activation_patching/mlp/<probe>: [layer, pos], fraction, -inf..inf
        activation_patching/head/<probe>: [layer, head], fraction, -inf..inf
        activation_patching/clean/<probe>: [], logit, -inf..inf; D(clean)
        activation_patching/corrupt/<probe>: [], logit, -inf..inf; D(corrupt). Where the two come
            near each other their difference, the divisor, makes small effects look large; within
            rounding of each other the fractions are NaN

    Reads:
        in passes of its own: blocks.{layer}.hook_resid_pre, blocks.{layer}.hook_attn_out,
        blocks.{layer}.hook_mlp_out, blocks.{layer}.attn.hook_z

    Cost:
        For each pair: for each of resid, attn and mlp, patched positions * layers *
        (layers + 1) / 2 passes of the prompt through one layer; for head, n_heads in the place of
        the positions. Of the layers before the patch only those run that others of its batch need.

    Source:
        Meng et al. 2022 (causal tracing); Wang et al. 2022 (heads); Zhang & Nanda 2023 (the
        metric, and what to patch).

    Raises:
        ValueError: no, unknown or repeated parts, rows < 1, every < 1, corrupt without clean; from
            `taps`, a part that no layer has, no pair, a probe that is not there, no target or no
            foil, prompts of different lengths or of the same tokens; from `read`, for heads, a
            model whose hook_z is not cut into heads; from the first `read`,
            D(clean) = D(corrupt) to rounding.
    """

    description: ClassVar[Description] = Description(
        title="What brings the answer back",
        group="Answers",
        measures={
            "resid": Meaning(
                title="Answer that comes back with the residual stream",
                axes=("layer", "pos"),
                headline=True,
            ),
            "attn": Meaning(
                title="Answer that comes back with an attention layer", axes=("layer", "pos")
            ),
            "mlp": Meaning(title="Answer that comes back with an MLP", axes=("layer", "pos")),
            "head": Meaning(
                title="Answer that comes back with a head", axes=("layer", "head"), headline=True
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
        parts = picked(self.parts, "parts")
        if unknown := [part for part in parts or () if part not in get_args(Part)]:
            raise ValueError(
                f"ActivationPatching(parts=...) has {unknown[0]!r}; they are {get_args(Part)}."
            )
        for argument in ("rows", "every"):
            if getattr(self, argument) < 1:
                raise ValueError(
                    f"ActivationPatching({argument}={getattr(self, argument)}): give "
                    f"{argument} >= 1."
                )
        if self.clean is None and self.corrupt is not None:
            raise ValueError("ActivationPatching(corrupt=...): name the clean probe too, clean=...")
        object.__setattr__(self, "parts", parts)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Nothing of the shared pass; the pairs and the parts are checked."""
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
        """Of each pair a matrix of each part, and the two logit differences they lie between."""
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
        # One that was asked for by name is kept as it was before there could be several.
        known = "gap" if self.clean is not None else f"gap/{pair.name}"
        if not math.isfinite(gap):
            gap = float("nan")
        elif abs(gap) <= torch.finfo(shadow.dtype).eps * float(ends.abs().max()):
            if known not in self.baseline:
                raise ValueError(
                    f"ActivationPatching: logit[target] - logit[foil] is {clean:.4g} on the clean "
                    f"probe {pair.name!r} and {corrupt:.4g} on the corrupt one, the same to "
                    f"rounding, so no share of the way between them can be given. Take a corrupt "
                    f"prompt with another answer, or another foil."
                )
            gap = float("nan")
        self.baseline.setdefault(known, torch.tensor(gap))
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
        """Part -> layer -> hook point, of the layers that have it."""
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
                f"ActivationPatching needs a pair of probes, 'x' and 'x-corrupt', and among "
                f"{names} there is none. In a file of probes corrupt: makes one; in Python "
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
                f"a foil that is another token, or the corrupt one a target, which is the foil "
                f"then. Here target and foil are {target} and {foil}."
            )
        labels, others = batch.labels[row], beside.labels[other]
        if len(labels) != len(others):
            raise ValueError(
                f"ActivationPatching puts activations of one prompt where those of the other "
                f"stand, token by token, but the probes {clean_name!r} and {name!r} have "
                f"{len(labels)} and {len(others)} tokens: {list(labels)} and {list(others)}. "
                f"Word one of them so that they match."
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
    """The clean probe's name, the tokens of the two prompts, the clean one's as text, and the two
    answers."""

    name: str
    clean: Int[Tensor, " pos"]
    corrupt: Int[Tensor, " pos"]
    labels: tuple[str, ...]
    target: int
    foil: int

    @property
    def positions(self) -> Int[Tensor, " patched"]:
        """From the first token in which the prompts differ: to its left they are one run."""
        first = int((self.clean != self.corrupt).nonzero()[0])
        return torch.arange(first, len(self.clean), device=self.clean.device)

    def answers(self, logits: Float[Tensor, "variant kept vocab"]) -> Float[Tensor, "variant 2"]:
        """The last token's logits of target and foil."""
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
