"""Measures the spectrum of each LoRA update, by layer and module."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.direct import high_precision
from tlens_callback.instruments.parts.module_grid import ModuleGrid
from tlens_callback.meaning import Description, Meaning, Needs
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken
from tlens_callback.shadow.low_rank import LowRankUpdate, low_rank_updates

_PIECE = 2**18
"""At most this many entries of one factor are processed at once, unless one update has more."""


@dataclass(frozen=True)
class AdapterSpectrum:
    """Measures size, spectrum and direction of the update that LoRA adds to each weight.

    Let U = B A be the current update of the weight W, with its scaling and with all active adapters
    together, and sigma_1 >= sigma_2 >= ... its singular values:

    - norm: ||U||_F = sqrt(sum sigma_i^2).
    - relative_norm: ||U||_F / ||W||_F, W without the update; 0 where W is zero.
    - top: sigma_1.
    - stable_rank: ||U||_F^2 / sigma_1^2.
    - effective_rank: exp(-sum p_i ln p_i), p_i = sigma_i / sum sigma; 1 exactly for rank 1.
    - singular_values: the first k, which are 0 beyond the rank.
    - rotation: the cosine between U and the update U' at the observation before,
      <U, U'>_F / (||U||_F ||U'||_F): 1 for an update that keeps its direction. 1 also at the first
      observation, and where U or U' is zero and so has no direction. If the adapter's bits have
      not changed since the observation before, the rotation read there is repeated: a resumed run
      begins with its checkpoint's update.

    An update of zero, with which LoRA starts, has norm, ranks and singular values 0. PiSSA and
    OLoRA take a part of the weight out of W and start with it as the update: there, only the
    difference from the first observation is a change. All measures are computed from r x r
    matrices, where r is the rank: the singular values are those of R_B R_A^T, with R the triangles
    of the QR decompositions of B and A^T; <U, U'> = sum((B^T B') * (A A'^T)). They are computed in
    float64, or in float32 on a device without float64; the differences of B' and A' from B and A
    are in float32. ||W|| is computed once if W is frozen.

    A module that is adapted in every adapted layer is a column of the matrices. All others
    (embeddings, a module adapted only in some layers) are under `_elsewhere`, named by their paths.
    Adapters are left out if their update is not just such a product (DoRA, LoRA with a bias of its
    own, LoHa, OFT, IA3 ...) or if they are on stacked experts.

    Args:
        k: number of singular values to keep.

    Keys:
        adapter_spectrum/norm: [layer, module], norm, 0..inf
        adapter_spectrum/relative_norm: [layer, module], fraction, 0..inf
        adapter_spectrum/top: [layer, module], norm, 0..inf
        adapter_spectrum/stable_rank: [layer, module], rank, 0..r
        adapter_spectrum/effective_rank: [layer, module], rank, 0..r
        adapter_spectrum/rotation: [layer, module], cosine, -1..1
        adapter_spectrum/singular_values: [layer, module, rank], norm, 0..inf
        adapter_spectrum/norm_elsewhere: [weight], norm, 0..inf; if there are such weights, as below
        adapter_spectrum/relative_norm_elsewhere: [weight], fraction, 0..inf
        adapter_spectrum/top_elsewhere: [weight], norm, 0..inf
        adapter_spectrum/stable_rank_elsewhere: [weight], rank, 0..r
        adapter_spectrum/effective_rank_elsewhere: [weight], rank, 0..r
        adapter_spectrum/rotation_elsewhere: [weight], cosine, -1..1
        adapter_spectrum/singular_values_elsewhere: [weight, rank], norm, 0..inf

    Reads:
        The live model's adapters; no activations.

    Cost:
        adapted weights * (6 + k). The A and B of the last observation are kept in memory and beside
        checkpoints.

    Source:
        Roy & Vetterli 2007, section 2 (effective rank); Rudelson & Vershynin 2007 (stable rank).

    Raises:
        ValueError: k < 1; from `taps`, if no active adapter is plain LoRA.
    """

    description: ClassVar[Description] = Description(
        title="Adapters by layer and module",
        group="Weights",
        needs=Needs.ADAPTER,
        measures={
            f"{measure}{where}": Meaning(
                title=title + of,
                axes=(*axes, "rank") if measure == "singular_values" else axes,
                headline=measure in ("relative_norm", "singular_values"),
                of_run=measure == "rotation",
                sometimes=where != "",
            )
            for where, of, axes in (
                ("", "", ("layer", "module")),
                ("_elsewhere", ", outside the layers", ("weight",)),
            )
            for measure, title in {
                "norm": "Size of the update",
                "relative_norm": "Size of the update, relative to its weight",
                "top": "Largest singular value",
                "stable_rank": "Stable rank",
                "effective_rank": "Effective rank",
                "rotation": "Direction, compared with the observation before",
                "singular_values": "Singular values",
            }.items()
        },
    )

    k: int = 8
    name: str = "adapter_spectrum"
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        demand_numbers(self)
        if self.k < 1:
            raise ValueError(
                f"AdapterSpectrum(k={self.k}) keeps no singular value; give k >= 1, such as 8."
            )

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Returns no reductions: this instrument reads weights alone."""
        if next(low_rank_updates(shadow, numbers=False), None) is None:
            raise ValueError(
                f"{type(self).__name__}: no active adapter of this model is plain LoRA on a "
                f"matrix, so there is no low-rank update to measure. Leave the instrument out; "
                f"UpdateSparsity measures how far weights move under any training."
            )
        return {}

    @torch.no_grad()
    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields one matrix by layer and module for each measure."""
        updates = list(low_rank_updates(shadow, numbers=False))
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, update in enumerate(updates):
            by_shape.setdefault((*update.b.shape, update.a.shape[1]), []).append(i)
        keys = [_key([updates[i] for i in members]) for members in by_shape.values()]
        sizes: dict[str, Tensor] = {}
        if any(f"weight/{key}" not in self.baseline for key in keys) or any(
            update.trained for update in updates
        ):
            sizes = {u.name: _norm(u.weight).to(shadow.device) for u in low_rank_updates(shadow)}
        measures = torch.zeros(len(updates), 6, dtype=torch.float64)
        sigmas = torch.zeros(len(updates), self.k, dtype=torch.float64)
        kept: dict[str, Tensor] = {}
        for members in by_shape.values():
            measured, sigma = self._measure([updates[i] for i in members], sizes, shadow, kept)
            measures[members] = measured.cpu().double()
            sigmas[members, : sigma.shape[1]] = sigma.cpu().double()
        self.baseline.clear()
        self.baseline.update(kept)
        widest = max(min(*shape) for shape in by_shape)
        sigmas = sigmas[:, : min(self.k, widest)]
        grid = ModuleGrid.of([update.name for update in updates], shadow.layers_path)
        for column, (measure, unit) in enumerate(_UNITS.items()):
            yield from grid.readings(
                f"{self.name}/{measure}",
                measures[:, column].numpy(),
                shadow,
                unit=unit,
                limits=(-1.0, 1.0) if measure == "rotation" else None,
            )
        key = f"{self.name}/singular_values"
        yield from grid.readings(key, sigmas.numpy(), shadow, unit="norm", more=("rank",))

    def _measure(
        self,
        updates: list[LowRankUpdate],
        sizes_now: Mapping[str, Tensor],
        shadow: Shadow,
        kept: dict[str, Tensor],
    ) -> tuple[Float[Tensor, "update measure"], Float[Tensor, "update rank"]]:
        """Returns the measures of updates of one shape, and up to k singular values.

        Adds to `kept` what the next observation compares with.

        Args:
            sizes_now: norms of the weights under the updates; {} for those in the baseline.
        """
        device = shadow.device
        b = torch.stack([u.b.to(device) for u in updates])
        a = torch.stack([u.a.to(device) for u in updates])
        key = _key(updates)
        if sizes_now:
            sizes = torch.stack([sizes_now[u.name] for u in updates])
        else:
            sizes = self.baseline[f"weight/{key}"]
        last = [self.baseline.get(f"{part}/{key}") for part in ("b", "a")]
        sigma, product = _products_in_pieces(b, a, *last)
        norm = sigma.square().sum(1).sqrt()
        rotation = torch.ones_like(norm)
        if product is not None:
            last_norm = self.baseline[f"norm/{key}"].to(norm.dtype)
            both = norm * last_norm
            rotation = torch.where(both == 0, 1.0, (product / both).clamp(-1, 1))
            # Comparing bits is slow, so only updates whose norm has hardly changed are compared.
            same = (norm - last_norm).abs() <= torch.finfo(norm.dtype).eps ** 0.5 * norm
            if same.any():
                same &= (b == last[0]).flatten(1).all(1) & (a == last[1]).flatten(1).all(1)
                rotation = torch.where(same, self.baseline[f"rotation/{key}"], rotation)
        kept |= {f"b/{key}": b, f"a/{key}": a, f"norm/{key}": norm, f"weight/{key}": sizes}
        kept[f"rotation/{key}"] = rotation
        top = sigma[:, 0]
        share = sigma / sigma.sum(1, keepdim=True)
        effective = torch.special.entr(share).sum(1).exp()
        zero = torch.zeros_like(norm)
        measures = [
            norm,
            torch.where(sizes > 0, norm / sizes, zero),
            top,
            torch.where(top == 0, zero, (norm / top).square()),
            torch.where(top == 0, zero, effective),
            rotation,
        ]
        return torch.stack(measures, 1), sigma[:, : self.k]


_UNITS = {
    "norm": "norm",
    "relative_norm": "fraction",
    "top": "norm",
    "stable_rank": "rank",
    "effective_rank": "rank",
    "rotation": "cosine",
}


def _key(updates: list[LowRankUpdate]) -> str:
    """Names updates of one shape in the baseline: only those of the same weights are compared, and
    others may be adapted later in a run."""
    which = zlib.crc32("\n".join(update.name for update in updates).encode())
    shape = len(updates), *updates[0].b.shape, updates[0].a.shape[1]
    return "x".join(map(str, shape)) + f"-{which:08x}"


def products(
    b: Float[Tensor, "update row rank"],
    a: Float[Tensor, "update rank column"],
    last_b: Float[Tensor, "update row rank"] | None = None,
    last_a: Float[Tensor, "update rank column"] | None = None,
) -> tuple[Float[Tensor, "update least"], Float[Tensor, " update"] | None]:
    """Returns the singular values of each b @ a, and its inner product with the last update.

    The min(row, rank, column) largest singular values, descending; the others are 0. All are NaN
    if a factor is not finite. The inner product is None if no last update is given.
    """
    left, right = high_precision(b), high_precision(a.mT)
    left_gram, right_gram = left.mT @ left, right.mT @ right
    core = _triangles(left, left_gram) @ _triangles(right, right_gram).mT
    finite = core.isfinite().flatten(1).all(1)
    sigma = torch.linalg.svdvals(core.where(finite[:, None, None], 0.0))
    sigma = sigma.where(finite[:, None], torch.nan)
    if last_b is None or last_a is None:
        return sigma, None
    # float32 is enough for the differences: everything else has the error of float64.
    both = ((b, last_b), (a.mT, last_a.mT))
    moved = [_at_least_float32(x).mT @ (_at_least_float32(x) - y) for x, y in both]
    return sigma, ((left_gram - moved[0]) * (right_gram - moved[1])).sum((1, 2))


def _triangles(
    x: Float[Tensor, "update long rank"], gram: Float[Tensor, "update rank rank"]
) -> Float[Tensor, "update least rank"]:
    """Returns the R of each x = QR, up to the signs of its rows."""
    if x.shape[1] < x.shape[2]:
        return torch.linalg.qr(x, mode="r").R
    # Cholesky takes half the time, but the Gram matrix squares the condition number of the
    # normalised columns. Where that is bad, small singular values would be lost.
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    lower, failed = torch.linalg.cholesky_ex(gram / (length[:, :, None] * length[:, None]))
    least = lower.diagonal(dim1=1, dim2=2).amin(1)
    bad = (failed != 0) | ~(least > torch.finfo(x.dtype).eps ** 0.25)
    triangles = lower.mT * length[:, None]
    if bad.any():
        triangles[bad] = torch.linalg.qr(x[bad], mode="r").R
    return triangles


def _products_in_pieces(
    b: Tensor, a: Tensor, last_b: Tensor | None, last_a: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Computes `products` for as many updates at a time as fit into a CPU's cache."""
    at_once = max(1, _PIECE // (b.shape[2] * max(b.shape[1], a.shape[2])))
    factors = [(None,) * len(b) if x is None else x.split(at_once) for x in (b, a, last_b, last_a)]
    sigma, product = zip(*(products(*part) for part in zip(*factors, strict=False)), strict=True)
    return torch.cat(sigma), None if product[0] is None else torch.cat(product)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(weight: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return high_precision(torch.linalg.vector_norm(weight, dtype=dtype))
