"""Distances between two patterns or two activations; exactly 0 for equal ones."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def js_terms(p: Float[Tensor, "..."], q: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns what each outcome adds to the Jensen-Shannon divergence, in bits.

    1/2 p log2(p / m) + 1/2 q log2(q / m) with p = m (1 + t) and q = m (1 - t): no digits are lost
    where p is near q, and equal numbers give exactly 0.
    """
    both = p + q
    t = (p - q) / both.clamp(min=torch.finfo(both.dtype).tiny)
    nats = torch.special.xlog1py(1 + t, t) + torch.special.xlog1py(1 - t, -t)
    return nats * both * (0.25 / math.log(2))


def unit(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divides x by its norm over `dim`; zero stays zero."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / norm.clamp(min=torch.finfo(x.dtype).tiny)


def cosine_distance(a: Float[Tensor, "... d"], b: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """Returns 1 - cosine; exactly 0 for equal vectors, 1/2 between a zero vector and another."""
    return (unit(a, -1) - unit(b, -1)).square().sum(-1) / 2


def distances(
    now: Float[Tensor, "*batch d"], first: Float[Tensor, "*batch d"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Returns `cosine_distance`, and |now - first| / |first|; exactly 0 for equal vectors, also for
    zero ones."""
    now, first = now.float(), first.float()
    tiny = torch.finfo(now.dtype).tiny
    size, before = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (now, first))
    far = torch.linalg.vector_norm(now - first, dim=-1)
    apart = now / size.clamp(min=tiny) - first / before.clamp(min=tiny)
    relative = torch.where(far == 0, 0, far / before[..., 0])
    return torch.linalg.vector_norm(apart, dim=-1).square() / 2, relative


def cka_distance(
    gram: Float[Tensor, "*batch token token"], other: Float[Tensor, "*batch token token"]
) -> Float[Tensor, "*batch"]:
    """Returns 1 - the unbiased linear CKA of two `unit_gram`; exactly 0 if they are equal."""
    return (gram - other).square().sum((-2, -1)) / 2


def unit_gram(x: Float[Tensor, "*batch token d"]) -> Float[Tensor, "*batch token token"]:
    """Returns u / |u|, where u is the U-centred Gram matrix of at least four tokens.

    sum(u * v) / (n (n - 3)) is the unbiased HSIC. In float64, which TF32 does not affect; for few
    tokens it is cheap.
    """
    x = x.double()
    x = x - x.mean(-2, keepdim=True)
    n = x.shape[-2]
    gram = x @ x.mT
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    sums = gram.sum(-1) / (n - 2)
    centred = gram - sums[..., None, :] - sums[..., None]
    centred += (sums.sum(-1) / (n - 1))[..., None, None]
    centred.diagonal(dim1=-2, dim2=-1).zero_()
    return unit(centred, (-2, -1))
