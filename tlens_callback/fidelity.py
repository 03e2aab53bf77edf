"""How far the shadow is from the live model, and whether that is rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow
from tlens_callback.weights import unwrap

_CHUNK = 2**24
"""Logits held at a time, in elements."""


class FidelityError(RuntimeError):
    """The shadow computes something else than the live model."""


@dataclass(frozen=True)
class Fidelity:
    """Live against shadow over the real tokens of all probes.

    Attributes:
        max_abs_diff: largest difference of two logits, logits.
        relative: the same as a share of the largest live logit.
        kl: mean over tokens of KL(live || shadow), nats; rounding below 0 is shown as 0.
        top1_agreement: share of tokens with the same most likely next token.
        moved: largest change of a live logit at the probes' last tokens since the reference was
            taken, logits; None without a reference.
        gap: largest live-shadow difference at those tokens, logits.
        tolerance: (relative, kl) that rounding alone may reach in the models' precision.
    """

    max_abs_diff: float
    relative: float
    kl: float
    top1_agreement: float
    moved: float | None
    gap: float
    tolerance: tuple[float, float]

    @property
    def close(self) -> bool:
        """Whether the difference is within rounding. NaN is not."""
        relative, kl = self.tolerance
        return self.relative <= relative and self.kl <= kl

    def stale(self, first: "Fidelity") -> bool:
        """Whether the shadow seems to hold older weights than the live model.

        A shadow that missed an update differs from the live model by what the update did. True
        where the gap is most of the live model's own movement and well above the gap at the
        start. In bfloat16 a first update can be smaller than rounding; then this cannot tell.
        """
        if not self.moved:
            return False
        return self.gap > 0.5 * self.moved and self.gap > 10 * first.gap

    def readings(self) -> list[Reading]:
        """The figures as readings `fidelity/*`."""
        figures = (
            ("max_abs_diff", self.max_abs_diff, "logit"),
            ("kl", self.kl, "nats"),
            ("top1_agreement", self.top1_agreement, "fraction"),
        )
        return [
            Reading(key=f"fidelity/{name}", values=np.asarray(value), unit=unit)
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
    """Runs the probes through the live model and its shadow.

    In half precision both run eager attention: kernels differ among themselves by as much as a
    small adapter's whole effect (SmolLM2-135M in bfloat16: KL 1e-3 between sdpa and eager).

    Args:
        reference: [probe, vocab], the live logits of an earlier call.

    Returns:
        The comparison, and the live logits [probe, vocab] at each probe's last token.
    """
    base = unwrap(model)
    device = next(base.parameters()).device
    half = shadow.dtype.itemsize < 4 or next(base.parameters()).dtype.itemsize < 4
    rows = max(1, _CHUNK // (batch.tokens.shape[1] * shadow.vocab_size))
    worst = scale = gap = kl = agree = 0.0
    lasts = []
    with as_inference(base, eager=half):
        for at in range(0, len(batch.tokens), rows):
            tokens, mask = batch.tokens[at : at + rows], batch.mask[at : at + rows]
            # The class's forward, not the instance's: trainers patch the latter (autocast, losses).
            live = type(base).forward(base, input_ids=tokens.to(device), use_cache=False).logits  # type: ignore
            live = live.to(shadow.device).float()
            mine = shadow.logits(tokens).float()
            last = torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1
            lasts.append(live[last])
            gap = _worse(gap, (live[last] - mine[last]).abs().max())
            live, mine = live[mask], mine[mask]
            worst = _worse(worst, (live - mine).abs().max())
            scale = _worse(scale, live.abs().max())
            agree += float((live.argmax(-1) == mine.argmax(-1)).sum())
            log_p, log_q = live.log_softmax(-1), mine.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
    n = int(batch.mask.sum())
    live_last = torch.cat(lasts)
    moved = None if reference is None else float((live_last - reference).abs().max())
    return Fidelity(
        max_abs_diff=worst,
        relative=worst / scale if scale > 0 else worst,
        kl=max(0.0, kl / n) if kl == kl else kl,
        top1_agreement=agree / n,
        moved=moved,
        gap=gap,
        tolerance=(0.25, 0.05) if half or _tf32(device) else (1e-3, 1e-5),
    ), live_last


def _worse(so_far: float, value: Tensor) -> float:
    """The maximum, where NaN wins."""
    new = float(value)
    return new if new != new or new > so_far else so_far


def _tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32


@contextmanager
def as_inference(model: nn.Module, *, eager: bool = False) -> Iterator[None]:
    """Borrows the live model for a forward pass and returns every setting as it was.

    Each module's training flag (which may differ among them), and with `eager` the attention
    implementation in each config.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    configs = (
        {id(c): c for m in modules if (c := vars(m).get("config")) is not None} if eager else {}
    )
    kinds = {i: vars(config).get("_attn_implementation_internal") for i, config in configs.items()}
    device = next(model.parameters()).device
    try:
        for module in modules:
            module.training = False
        for config in configs.values():
            vars(config)["_attn_implementation_internal"] = "eager"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for i, config in configs.items():
            vars(config)["_attn_implementation_internal"] = kinds[i]
