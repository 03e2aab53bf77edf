"""Reads activations at one hook point, and the model's loss when they are replaced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.sae.autoencoder import Autoencoder, fvu
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.interventions import edited

_LOGITS = 2**26
"""At most so many logits at once: 256 MiB in float32."""

Replace = Callable[[Tensor], Tensor | None]
"""Takes [token, d_in] and returns its replacement, or None to leave it unchanged."""


def counted_tokens(batch: ProbeBatch, rows: Sequence[int]) -> Bool[Tensor, "row pos"]:
    """Returns which tokens of these rows count: all but padding and the first of each row.

    Activations at BOS have another size than all others.
    """
    mask = batch.mask[list(rows)].clone()
    mask[:, 0] = False
    return mask


def activations(
    shadow: Shadow, hook: str, tokens: Int[Tensor, "row pos"], counted: Bool[Tensor, "row pos"]
) -> Float[Tensor, "token d_in"]:
    """Returns the activations at the counted tokens, on the shadow's device, in float32."""
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(_flatten_heads(hook, value, tokens)[counted].float())
        return value

    with torch.no_grad(), edited(shadow, {hook: keep}):
        shadow.logits(tokens, torch.zeros(1, dtype=torch.long, device=tokens.device))
    if not kept:
        raise _unreached_error(hook)
    return kept[0]


def training_activations(
    shadow: Shadow, hook: str, batch: ProbeBatch, rows: int, length: int
) -> Float[Tensor, "token d_in"] | None:
    """Returns the `activations` of the next training rows, each cut to `length` tokens.

    None if there are no rows to read.
    """
    given = batch.training(rows) if batch.training is not None and rows else []
    limit = min(length, batch.context or length)
    cut = [list(ids)[:limit] for ids in given]
    probes = [Probe(f"row-{i}", ids) for i, ids in enumerate(cut) if len(ids) > 1]
    if not probes:
        return None
    beside = batch.beside(probes)
    counted = counted_tokens(beside, range(len(probes)))
    return activations(shadow, hook, beside.tokens, counted)


def loss_with(
    shadow: Shadow,
    hook: str,
    tokens: Int[Tensor, "row pos"],
    counted: Bool[Tensor, "row pos"],
    replace: Replace,
) -> float:
    """Computes the mean next-token loss in nats with the counted tokens' activations replaced.

    The mean is over the predictions of a counted token from a counted token. The rows go through
    forward passes of their own, a few rows at a time if the logits of all would be large.
    """
    source, predicted = counted[:, :-1], counted[:, 1:]
    total, n = 0.0, 0
    step = max(1, _LOGITS // (tokens.shape[1] * shadow.vocab_size))
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)

        def edit(value: Tensor, part: slice = part) -> Tensor:
            flat = _flatten_heads(hook, value, tokens[part])
            put = replace(flat[counted[part]].float())
            if put is None:
                return value
            changed = flat.clone()
            changed[counted[part]] = put.to(changed.dtype)
            return changed.view(value.shape)

        with torch.no_grad(), edited(shadow, {hook: edit}):
            logits = shadow.logits(tokens[part])
        at = source[part] & predicted[part]
        target = tokens[part, 1:][at]
        total += float(F.cross_entropy(logits[:, :-1][at].float(), target, reduction="sum"))
        n += len(target)
    return total / n


@dataclass(frozen=True, eq=False)
class SpliceResult:
    """The features of an autoencoder in the model, and how well it fits there.

    Attributes:
        features: [token, feature], at the counted tokens that are not massive; NaN where the
            activation is NaN or infinite.
        counted: [row, pos], whether the token is among these.
        massive: number of counted tokens that are massive.
        fvu: fraction of variance unexplained over the same tokens.
        loss: "clean", "zero" and "sae": of the unchanged model, with zeros, and with the
            reconstruction at the hook point.
    """

    features: Float[Tensor, "token feature"]
    counted: Bool[Tensor, "row pos"]
    massive: int
    fvu: float
    loss: dict[str, float]

    @property
    def is_known(self) -> bool:
        """Whether all of these activations are finite; otherwise what fires is unknown."""
        return not bool(self.features.isnan().any())

    @property
    def recovered(self) -> float:
        """(zero - sae) / (zero - clean); nan if zeros change the loss by less than 1e-4."""
        span = self.loss["zero"] - self.loss["clean"]
        missed = self.loss["zero"] - self.loss["sae"]
        return missed / span if abs(span) >= 1e-4 else float("nan")


def splice(
    shadow: Shadow,
    hook: str,
    tokens: Int[Tensor, "row pos"],
    counted: Bool[Tensor, "row pos"],
    sae: Autoencoder,
) -> SpliceResult:
    """Runs three forward passes: unchanged, with zeros, and with the reconstruction.

    Massive activations are never replaced.

    Raises:
        ValueError: if activations and autoencoder have different widths, or the hook point is not
            reached.
    """
    kept: list[Tensor] = []
    loss = {"clean": loss_with(shadow, hook, tokens, counted, lambda x: kept.append(x))}
    if not kept:
        raise _unreached_error(hook)
    x = torch.cat(kept)
    if x.shape[1] != sae.d_in:
        raise ValueError(
            f"The autoencoder takes activations of width {sae.d_in} and {hook!r} has {x.shape[1]}. "
            f"Is it for another model, or another hook point?"
        )
    features, rebuilt = sae.reconstruct(x)
    # Activations that are not finite are not massive: they count, and their features are NaN.
    unknown = ~x.isfinite().all(1)
    features = features.masked_fill(unknown[:, None], torch.nan)
    small = ordinary(x) | unknown
    for name, put in (("zero", torch.zeros_like(x)), ("sae", rebuilt)):
        parts = iter(torch.where(small[:, None], put, x).split([len(part) for part in kept]))
        loss[name] = loss_with(shadow, hook, tokens, counted, lambda _, parts=parts: next(parts))
    where = counted.clone()
    where[counted] = small
    return SpliceResult(
        features=features[small],
        counted=where,
        massive=len(x) - int(small.sum()),
        fvu=fvu(x[small], rebuilt[small]),
        loss=loss,
    )


def ordinary(x: Float[Tensor, "token d_in"]) -> Bool[Tensor, " token"]:
    """Returns which activations are not massive: those of finite norm, up to 10 times the median.

    Heads attend to some tokens, such as a delimiter at the start of a text, when there is nothing
    else to attend to. These have norms a hundred times those of others (Sun et al. 2024), and a
    single one outweighs all others in a sum of squares.
    """
    norm = x.norm(dim=1)
    finite = norm.isfinite()
    return (norm <= 10 * norm[finite].median()) & finite


def _unreached_error(hook: str) -> ValueError:
    return ValueError(f"The forward pass never reached the hook point {hook!r}.")


def _flatten_heads(hook: str, value: Tensor, tokens: Tensor) -> Tensor:
    """Returns the activations as [row, pos, d_in], with heads concatenated."""
    if value.shape[:2] != tokens.shape or value.dim() < 3:
        raise ValueError(
            f"{hook!r} has shape {tuple(value.shape)}; an autoencoder needs [probe, pos, ...]. "
            f"Take one such as 'blocks.0.hook_resid_post'."
        )
    return value.flatten(2)
