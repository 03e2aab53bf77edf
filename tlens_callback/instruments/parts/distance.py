"""Distances between two patterns or two activations; exactly 0 for equal ones."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def with_sink(pattern: Float[Tensor, "head query key"]) -> Float[Tensor, "head query outcome"]:
    """Adds one more key to each row, with the attention that the row lacks to sum to one."""
    return torch.cat([pattern, (1 - pattern.sum(-1, keepdim=True)).clamp(min=0)], -1)


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


def relative_distance(
    now: Float[Tensor, "token d"], first: Float[Tensor, "token d"]
) -> Float[Tensor, " token"]:
    """Returns |now - first| / |first|; exactly 0 for equal vectors, also for zero ones."""
    moved = (now - first).norm(dim=-1)
    return torch.where(moved == 0, 0, moved / first.norm(dim=-1))


def cka_distance(x: Float[Tensor, "token d"], y: Float[Tensor, "token e"]) -> Float[Tensor, ""]:
    """Returns 1 - the unbiased linear CKA of at least four tokens; exactly 0 if they are equal."""
    return (unit(_centred_gram(x), (0, 1)) - unit(_centred_gram(y), (0, 1))).square().sum() / 2


def _centred_gram(x: Float[Tensor, "token d"]) -> Float[Tensor, "token token"]:
    """Returns the U-centred Gram matrix u; sum(u * v) / (n (n - 3)) is the unbiased HSIC."""
    # In float64, which TF32 does not affect; for few tokens it is cheap.
    x = x.double() - x.double().mean(0)
    n = len(x)
    gram = (x @ x.T).fill_diagonal_(0)
    sums = gram.sum(1) / (n - 2)
    centred = gram - sums - sums[:, None] + sums.sum() / (n - 1)
    return centred.fill_diagonal_(0)
