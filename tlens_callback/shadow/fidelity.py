"""Measures how far the shadow is from the live model, and whether the difference is rounding."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow.shadow import Shadow
from tlens_callback.shadow.weights import unwrap

_CHUNK = 2**24
"""How many logits are compared at a time."""


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

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest live logit."""
        return self.max_abs_diff / self.scale if self.scale else self.max_abs_diff

    @property
    def close(self) -> bool:
        """Whether the difference is within rounding. NaN is not."""
        relative, kl = self.tolerance
        return self.relative <= relative and self.kl <= kl

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


@torch.no_grad()
def compare(
    model: nn.Module, shadow: Shadow, batch: ProbeBatch, *, reference: Tensor | None = None
) -> tuple[Fidelity, Tensor]:
    """Runs the probes through the live model and its shadow, and compares their logits.

    In half precision both run eager attention: kernels differ among themselves by as much as a
    small adapter's whole effect (SmolLM2-135M in bfloat16: KL 1e-3 between sdpa and eager).
    Memory: both models' logits of one probe, or of several short ones.

    Args:
        reference: [model, probe, vocab], the logits of an earlier call.

    Returns:
        The comparison, and the logits [model, probe, vocab] at each probe's last token, of the live
        model and of the shadow.
    """
    base: Any = unwrap(model)
    mirror = shadow.mirror
    coarse = max(shadow.dtype, mirror.coarsest, key=lambda dtype: torch.finfo(dtype).eps)
    half = coarse.itemsize < 4
    rough = half or _tf32(_device(base))
    rows = max(1, _CHUNK // (batch.tokens.shape[1] * shadow.vocab_size))
    worst = scale = gap = kl = agree = 0.0
    lasts, shadowed = [], []
    with as_inference(base, eager=half, autocast=mirror.coarsest if mirror.mixed else None):
        for at in range(0, len(batch.tokens), rows):
            tokens, mask = batch.tokens[at : at + rows], batch.mask[at : at + rows]
            # The class's forward, not the instance's: trainers patch the latter (autocast, losses).
            out = type(base).forward(base, input_ids=tokens.to(_device(base)), use_cache=False)
            live, mine = out.logits.to(shadow.device), shadow.logits(tokens)
            last = torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1
            lasts.append(live[last].float())
            shadowed.append(mine[last].float())
            gap = _worse(gap, (lasts[-1] - shadowed[-1]).abs().max())
            live, mine = live[mask], mine[mask]
            step = max(1, _CHUNK // shadow.vocab_size)
            for p, q in zip(live.split(step), mine.split(step), strict=True):
                p, q = p.float(), q.float()
                worst = _worse(worst, (p - q).abs().max())
                scale = _worse(scale, p.abs().max())
                agree += float((p.argmax(-1) == q.argmax(-1)).sum())
                log_p = p.log_softmax(-1)
                kl += float((log_p.exp() * (log_p - q.log_softmax(-1))).sum())
    n = int(batch.mask.sum())
    ends = torch.stack([torch.cat(lasts), torch.cat(shadowed)])
    moved = followed = None
    if reference is not None:
        live_change, shadow_change = ends - reference
        moved = float(live_change.abs().max())
        overlap = (live_change * shadow_change).sum()
        followed = float(overlap / live_change.square().sum()) if moved else None
    return Fidelity(
        max_abs_diff=worst,
        scale=scale,
        kl=kl / n if math.isnan(kl) else max(0.0, kl / n),
        top1_agreement=agree / n,
        gap=gap,
        moved=moved,
        followed=followed,
        eps=torch.finfo(coarse).eps if not rough else max(2**-11, torch.finfo(coarse).eps),
        # SmolLM2-135M with trained adapters: (0.16, 6e-3) in bfloat16, (3e-5, 1e-8) in float32. The
        # largest of millions of differences is mostly chance in half precision; KL decides there.
        tolerance=(0.5, 0.05) if rough else (1e-3, 1e-5),
    ), ends


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


@contextmanager
def as_inference(
    model: nn.Module, *, eager: bool = False, autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Borrows the live model for a forward pass and returns every setting as it was.

    Each module's training flag (which may differ among them), and with `eager` the attention
    implementation in each config. Autocast is off, or on in the dtype given.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    found = [vars(module).get("config") for module in modules] if eager else []
    configs = {id(config): config for config in found if config is not None}
    kinds = {i: vars(config).get("_attn_implementation_internal") for i, config in configs.items()}
    try:
        for module in modules:
            module.training = False
        for config in configs.values():
            vars(config)["_attn_implementation_internal"] = "eager"
        kind = _device(model).type
        with torch.no_grad(), torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for i, config in configs.items():
            vars(config)["_attn_implementation_internal"] = kinds[i]


def mismatch(model: nn.Module, fidelity: Fidelity, *, stale: bool = False) -> str:
    """Describes for the user why the shadow cannot be trusted."""
    if stale:
        return (
            f"the shadow of {type(model).__name__} did not follow the live model's update: the "
            f"live logits moved by {fidelity.moved:.1e}; the shadow's logits made "
            f"{fidelity.followed:.0%} of this change and are now {fidelity.gap:.1e} away from them"
        )
    return (
        f"the shadow of {type(model).__name__} is not the live model: {fidelity}; rounding allows "
        f"{fidelity.tolerance[0]:.0e} of the largest logit and KL {fidelity.tolerance[1]:.0e}. "
        f"Its readings would describe another model. Perhaps TransformerLens's bridge does not "
        f"support this family or this adapter"
    )
