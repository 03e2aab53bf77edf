"""Measures how far the shadow is from the live model, and whether the difference is rounding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow.live import foreign_attention, logits_of
from tlens_callback.shadow.shadow import Shadow
from tlens_callback.shadow.unembed import CHUNK, IN_CACHE, unembed, unembeds
from tlens_callback.shadow.weights import unwrap

_CHUNK = 2**26
"""How many logits of the live model are there at a time: 256 MiB in float32."""

_SAME_ATTENTION = 5e-3
"""Largest KL in nats between two implementations of the same attention in half precision."""


class FidelityError(RuntimeError):
    """Raised if the shadow does not compute what the live model computes."""


_DESCRIPTION = Description(
    title="Shadow against model",
    group="Training",
    measures={
        "max_abs_diff": Meaning(title="Largest difference of a logit", axes=(), better="lower"),
        "kl": Meaning(title="KL from the model", axes=(), headline=True, better="lower"),
        "top1_agreement": Meaning(title="Same likeliest token", axes=(), better="higher"),
    },
)


@dataclass(frozen=True)
class Fidelity:
    """The differences between live model and shadow over the real tokens of all probes.

    Attributes:
        max_abs_diff: largest difference of two logits, logits.
        scale: largest live logit by magnitude, logits. It is not finite if the live model's
            logits are not; then there is nothing to compare.
        kl: mean over tokens of KL(live || shadow), nats; rounding below 0 is shown as 0.
        top1_agreement: share of tokens with the same most likely next token.
        gap: largest live-shadow difference at the probes' last tokens, logits.
        moved: largest change of a live logit there since the reference was taken, logits; None
            without a reference.
        followed: share of that change, over all logits there, that the shadow has made too; None
            without a reference or a change.
        eps: relative rounding of the models' precision.
        tolerance: (max_abs_diff / scale, kl) that rounding alone may reach in that precision.
        attention: the attention implementations of the live model that are not transformers' own;
            in half precision only, where they have a comparison of their own.
        attention_kl: mean over tokens of KL(live || live with eager attention), nats, for these.
    """

    max_abs_diff: float
    scale: float
    kl: float
    top1_agreement: float
    gap: float
    moved: float | None
    followed: float | None
    eps: float
    tolerance: tuple[float, float]
    attention: Sequence[str] = ()
    attention_kl: float = 0.0

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest live logit."""
        return self.max_abs_diff / self.scale if self.scale else self.max_abs_diff

    @property
    def close(self) -> bool:
        """Whether the difference is within rounding. NaN is not."""
        relative, kl = self.tolerance
        return self.relative <= relative and self.kl <= kl and self.same_attention

    @property
    def same_attention(self) -> bool:
        """Whether the live model's attention is the eager attention of its class, up to rounding.

        In half precision the kernels of transformers differ by KL 3e-4 on models of random weights
        and 1e-3 on SmolLM2-135M; twice the scale of the scores in a small model by 1e-2.
        """
        return self.attention_kl <= _SAME_ATTENTION

    def telling(self, first: "Fidelity") -> bool:
        """Whether the live model has moved so far that a missed update would be visible.

        In bfloat16 one update is often less than rounding; then only a later comparison can show
        it.
        """
        noise = max(first.gap, self.eps * self.scale)
        return self.moved is not None and self.moved > 10 * noise

    def stale(self, first: "Fidelity") -> bool:
        """Whether the shadow holds older weights than the live model.

        A shadow that missed an update has not moved as the live model has, which shows once
        `telling` is true. The distance between the two shows less: in half precision, where
        adapters are merged, rounding grows with training beyond what an update moves.
        """
        return self.telling(first) and self.followed is not None and self.followed < 0.25

    def readings(self) -> list[Reading]:
        """The figures as readings `fidelity/*`."""
        figures = (
            ("max_abs_diff", self.max_abs_diff, "logit"),
            ("kl", self.kl, "nats"),
            ("top1_agreement", self.top1_agreement, "fraction"),
        )
        return [
            Reading(
                key=f"fidelity/{name}",
                values=np.asarray(value),
                unit=unit,
                description=_DESCRIPTION,
            )
            for name, value, unit in figures
        ]

    def __str__(self) -> str:
        return (
            f"max logit difference {self.max_abs_diff:.1e} ({self.relative:.1e} of the largest), "
            f"KL {self.kl:.1e} nats, top-1 agreement {self.top1_agreement:.1%}"
        )


@dataclass(frozen=True, eq=False)
class Ran:
    """What a pass of the shadow over the probes left, so that its logits can be compared.

    Attributes:
        resid: [probe, pos, d_model], the residual stream after the last layer.
        ends: [probe, vocab], the logits at each probe's last token.
    """

    resid: Tensor
    ends: Tensor


@torch.no_grad()
def compare(
    model: nn.Module,
    shadow: Shadow,
    batch: ProbeBatch,
    *,
    reference: Tensor | None = None,
    ran: Ran | None = None,
) -> tuple[Fidelity, Tensor]:
    """Runs the probes through the live model and its shadow, and compares their logits.

    In half precision both run eager attention where the live model's attention is one of
    transformers' own: these kernels differ among themselves by as much as a small adapter's whole
    effect (SmolLM2-135M in bfloat16: KL 1e-3 between sdpa and eager). A model with an attention
    function that somebody else registered runs as it is, and a second time with eager attention,
    since merged weights alone may cost more KL than another function of attention does.
    Memory: both models' logits of one probe, or of several short ones.

    Args:
        reference: [model, probe, vocab], the logits of an earlier call.
        ran: a pass of the shadow over the probes. None: it runs them.

    Returns:
        The comparison, and the logits [model, probe, vocab] at each probe's last token, of the live
        model and of the shadow.
    """
    base: Any = unwrap(model)
    mirror, device = shadow.mirror, _device(base)
    coarse = max(shadow.dtype, mirror.roughest, key=lambda dtype: torch.finfo(dtype).eps)
    half = coarse.itemsize < 4
    rough = half or _tf32(device)
    foreign = foreign_attention(base)
    rows = max(1, _CHUNK // (batch.tokens.shape[1] * shadow.vocab_size))
    if ran is not None and not unembeds(shadow, ran.resid[:1, batch.lengths[0] - 1], ran.ends[:1]):
        ran = None
    differences, among_kernels = _Differences(), _Differences()
    lasts, shadowed = [], []
    gap = 0.0

    def logits(tokens: Tensor, *, eager: bool) -> Tensor:
        autocast = mirror.coarsest if mirror.mixed else None
        if shadow.ranks is not None and shadow.ranks.sharded:
            found = shadow.ranks.logits(tokens, eager=eager, autocast=autocast)
        else:
            found = logits_of(base, tokens.to(device), eager=eager, autocast=autocast)
        return found.to(shadow.device)

    for at in range(0, len(batch.tokens), rows):
        tokens, mask = batch.tokens[at : at + rows], batch.mask[at : at + rows]
        live = logits(tokens, eager=half and not foreign)
        mine = shadow.logits(tokens) if ran is None else unembed(shadow, ran.resid[at : at + rows])
        last = torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1
        lasts.append(live[last].float())
        shadowed.append(mine[last].float())
        gap = _worse(gap, (lasts[-1] - shadowed[-1]).abs().max())
        differences.add(live, mine, mask)
        if half and foreign:
            among_kernels.add(live, logits(tokens, eager=True), mask)
    ends = torch.stack([torch.cat(lasts), torch.cat(shadowed)])
    moved = followed = None
    if reference is not None:
        live_change, shadow_change = ends - reference
        moved = float(live_change.abs().max())
        overlap = (live_change * shadow_change).sum()
        followed = float(overlap / live_change.square().sum()) if moved else None
    return Fidelity(
        max_abs_diff=differences.worst,
        scale=differences.scale,
        kl=differences.kl,
        top1_agreement=differences.agreement,
        gap=gap,
        moved=moved,
        followed=followed,
        eps=torch.finfo(coarse).eps if not rough else max(2**-11, torch.finfo(coarse).eps),
        # SmolLM2-135M with trained adapters: (0.16, 6e-3) in bfloat16, (3e-5, 1e-8) in float32. The
        # largest of millions of differences is mostly chance in half precision; KL decides there.
        tolerance=(0.5, 0.05) if rough else (1e-3, 1e-5),
        attention_kl=among_kernels.kl,
        attention=foreign if half else (),
    ), ends


@torch.no_grad()
def sees_ahead(shadow: Shadow, batch: ProbeBatch) -> bool:
    """Whether a token's logits depend on tokens behind it.

    In such a model the padding behind a probe would change its readings, and the comparison with
    the live model, which gets the same padding, would not show it. One pass over a few tokens of
    the longest probe, twice: the second time with another token at the end. In a causal model the
    logits before it are the same, in half precision too, for both go through the same kernels.
    """
    row = max(range(len(batch.lengths)), key=batch.lengths.__getitem__)
    pair = batch.tokens[row, : min(batch.lengths[row], 8)].repeat(2, 1)
    known = batch.tokens[batch.mask]
    others = known[known != pair[0, -1]]
    if len(others) == 0 or pair.shape[1] < 2:
        return False
    pair[1, -1] = others[0]
    one, other = shadow.logits(pair)[:, :-1]
    differences = _Differences()
    differences.add(one, other, torch.ones_like(pair[0, 1:], dtype=torch.bool))
    return differences.worst > 0.01 * differences.scale


class _Differences:
    """Sums over tokens of how far some logits are from those that they should be."""

    def __init__(self) -> None:
        self.worst = self.scale = self._kl = self._agree = 0.0
        self._tokens = 0

    def add(self, live: Tensor, mine: Tensor, mask: Tensor) -> None:
        """Adds the tokens in the mask; the logits of both are [..., vocab]."""
        real = mask.flatten().nonzero()[:, 0]
        most = IN_CACHE if live.device.type == "cpu" else CHUNK
        for some in real.split(max(1, most // live.shape[-1])):
            p, q = (of.flatten(0, -2)[some].float() for of in (live, mine))
            self.worst = _worse(self.worst, (p - q).abs().max())
            self.scale = _worse(self.scale, p.abs().max())
            self._agree += float((p.argmax(-1) == q.argmax(-1)).sum())
            log_p = p.log_softmax(-1)
            self._kl += float((log_p.exp() * log_p.sub_(q.log_softmax(-1))).sum())
        self._tokens += len(real)

    @property
    def agreement(self) -> float:
        return self._agree / self._tokens

    @property
    def kl(self) -> float:
        """KL(live || mine) per token, nats; rounding below 0 is shown as 0. 0 without tokens."""
        kl = self._kl / max(1, self._tokens)
        return kl if math.isnan(kl) else max(0.0, kl)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _worse(so_far: float, value: Tensor) -> float:
    """The maximum of both, or NaN if either is NaN."""
    new = float(value)
    return new if math.isnan(new) or new > so_far else so_far


def _tf32(device: torch.device) -> bool:
    """Whether float32 products are rounded to TF32 here."""
    if device.type != "cuda":
        return False
    matmul: Any = torch.backends.cuda.matmul
    # The older switch raises once the newer one (torch 2.9) was used.
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def mismatch(model: nn.Module, fidelity: Fidelity, *, stale: bool = False) -> str:
    """Describes for the user why the shadow cannot be trusted."""
    if stale:
        return (
            f"the shadow of {type(model).__name__} did not follow the live model's update: the "
            f"live logits moved by {fidelity.moved:.1e}; the shadow's logits made "
            f"{fidelity.followed:.0%} of this change and are now {fidelity.gap:.1e} away from them"
        )
    if not fidelity.same_attention:
        return (
            f"{type(model).__name__} runs an attention function of its own "
            f"({', '.join(fidelity.attention)}) that is not the attention of its class: with eager "
            f"attention its logits are KL {fidelity.attention_kl:.1e} away, where rounding allows "
            f"{_SAME_ATTENTION:.0e}. The shadow computes the attention of the class, so its "
            f"readings would describe another model"
        )
    return (
        f"the shadow of {type(model).__name__} is not the live model: {fidelity}; rounding allows "
        f"{fidelity.tolerance[0]:.0e} of the largest logit and KL {fidelity.tolerance[1]:.0e}. "
        f"Its readings would describe another model. Perhaps TransformerLens's bridge does not "
        f"support this family or this adapter"
    )
