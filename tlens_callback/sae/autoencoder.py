"""`Autoencoder`: a sparse autoencoder as tensors, and what it computes."""

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalize = Literal["none", "norm", "layer_norm"]


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A sparse autoencoder of one of four architectures, which its fields determine.

    Let x be an activation, transformed according to `centred` and `normalize`, c = b_dec if
    `subtract_b_dec` and 0 otherwise, and h = (x - c) W_enc + b_enc:

    - standard (Bricken et al. 2023): f = relu(h).
    - top-k (Gao et al. 2024), with `k`: f = relu(h) at the k largest h, 0 elsewhere.
    - JumpReLU (Rajamanoharan et al. 2024b), with `threshold`: f = relu(h) where h > threshold, 0
      elsewhere, at h = threshold too.
    - gated (Rajamanoharan et al. 2024a), with `r_mag` and `b_mag`: f = relu((x - c) W_enc
      exp(r_mag) + b_mag) where h > 0, 0 elsewhere; `b_enc` is the bias of the gate.

    The reconstruction is f W_dec + b_dec, with the transformation undone.

    Args:
        W_enc: [d_in, feature].
        b_enc: [feature].
        W_dec: [feature, d_in].
        b_dec: [d_in].
        k: number of features that top-k keeps.
        threshold: [feature], JumpReLU's threshold itself, not its logarithm.
        r_mag, b_mag: [feature], weights and bias of the gated architecture's magnitudes.
        subtract_b_dec: whether `b_dec` is subtracted before encoding.
        normalize: "none"; "norm": x is scaled to norm sqrt(d_in); "layer_norm": (x - mean) /
            (std + 1e-5) over d_in, std with divisor d_in - 1. The reconstruction is scaled back,
            by std where it is the standard deviation.
        centred: the mean of x over d_in is subtracted first and added at the end. For autoencoders
            trained on a model with `center_writing_weights`, which the shadow's bridge is not.
        hook: name of the hook point whose activation it was trained on, if known.

    Raises:
        ValueError: for shapes that do not fit, or fields of two architectures.
    """

    W_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_in"]
    b_dec: Float[Tensor, " d_in"]
    k: int | None = None
    threshold: Float[Tensor, " feature"] | None = None
    r_mag: Float[Tensor, " feature"] | None = None
    b_mag: Float[Tensor, " feature"] | None = None
    subtract_b_dec: bool = True
    normalize: Normalize = "none"
    centred: bool = False
    hook: str | None = None

    def __post_init__(self) -> None:
        if self.W_enc.dim() != 2:
            raise ValueError(f"W_enc is [d_in, feature], got shape {tuple(self.W_enc.shape)}.")
        d_in, n = self.W_enc.shape
        expected = {"W_dec": (n, d_in), "b_dec": (d_in,)}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if not isinstance(tensor, Tensor):
                continue
            shape = expected.get(field.name, (n,))
            if field.name != "W_enc" and tensor.shape != shape:
                raise ValueError(
                    f"{field.name} has shape {tuple(tensor.shape)}; beside W_enc of shape "
                    f"{(d_in, n)} it has to be {shape}."
                )
            object.__setattr__(self, field.name, tensor.detach().float())
        if (self.r_mag is None) != (self.b_mag is None):
            raise ValueError(
                "A gated autoencoder has both r_mag and b_mag; one of them is missing."
            )
        marks = {"k": self.k, "threshold": self.threshold, "r_mag and b_mag": self.r_mag}
        if len(given := [name for name, value in marks.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} belong to different architectures; give one.")
        if self.k is not None and not 1 <= self.k <= n:
            raise ValueError(f"k={self.k} of {n} features: it has to be 1 to {n}.")
        if self.normalize not in ("none", "norm", "layer_norm"):
            raise ValueError(f"normalize={self.normalize!r}; it is 'none', 'norm' or 'layer_norm'.")

    @property
    def architecture(self) -> str:
        """ "standard", "topk", "jumprelu" or "gated"."""
        if self.k is not None:
            return "topk"
        if self.threshold is not None:
            return "jumprelu"
        return "standard" if self.r_mag is None else "gated"

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def to(self, device: torch.device | str) -> "Autoencoder":
        """Returns a copy on another device, or itself if it is there already."""
        device = torch.empty(0, dtype=torch.uint8, device=device).device
        if self.W_enc.device == device:
            return self
        tensors = {
            field.name: tensor.to(device)
            for field in fields(self)
            if isinstance(tensor := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """Returns the activation of each feature, which is never negative."""
        return self._features(self._enter(x)[0])

    def reconstruct(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch feature"], Float[Tensor, "*batch d_in"]]:
        """Returns the features, and the activation reconstructed from them."""
        entered, shift, scale = self._enter(x)
        features = self._features(entered)
        return features, (features @ self.W_dec + self.b_dec) * scale + shift

    def _features(self, x: Tensor) -> Tensor:
        x = x - self.b_dec if self.subtract_b_dec else x
        if self.r_mag is not None and self.b_mag is not None:
            projected = x @ self.W_enc
            size = (projected * self.r_mag.exp() + self.b_mag).relu()
            return size * (projected + self.b_enc > 0)
        h = x @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return h.relu() * (h > self.threshold)
        if self.k is not None:
            kept = h.topk(self.k, dim=-1)
            return torch.zeros_like(h).scatter_(-1, kept.indices, kept.values.relu())
        return h.relu()

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the transformed x, and the shift and the scale that undo the transformation."""
        x = x.float()
        shift, scale = x.new_zeros(()), x.new_ones(())
        if self.centred or self.normalize == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            x = x - shift
        if self.normalize == "layer_norm":
            scale = x.std(-1, keepdim=True)
            x = x / (scale + 1e-5)
        elif self.normalize == "norm":
            # Avoids division by zero for an activation of zero.
            scale = x.norm(dim=-1, keepdim=True).clamp(min=1e-30) / self.d_in**0.5
            x = x / scale
        return x, shift, scale


def fvu(x: Float[Tensor, "token d_in"], rebuilt: Float[Tensor, "token d_in"]) -> float:
    """Computes the fraction of variance unexplained: sum |x - rebuilt|^2 / sum |x - mean of x|^2.

    Both sums over all tokens and dimensions, the mean over tokens. 0 is perfect, 1 is as good
    as the mean, more is worse than the mean; nan if all x are equal.
    """
    x = x.double()
    missed = (x - rebuilt.double()).square().sum()
    variance = (x - x.mean(0)).square().sum()
    return float(missed / variance) if variance > 0 else float("nan")
