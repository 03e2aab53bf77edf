"""Measures from weights which heads read what earlier heads write."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.circuits import Circuits, circuits, demand_circuits
from tlens_callback.instruments.parts.direct import high_precision
from tlens_callback.instruments.parts.selection import attention_layers
from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken

KINDS = ("q", "k", "v")


@dataclass(frozen=True)
class Composition:
    """Measures how strongly queries, keys and values of later heads read what a head writes.

    It uses weights alone. For row vectors, let OV = W_V W_O and QK = W_Q W_K^T, [d_model, d_model],
    of head h1 in layer l1 and of head h2 in a later layer l2:

    - q: ||OV1 QK2|| / (||OV1|| ||QK2||) - baseline
    - k: ||OV1 QK2^T|| / (||OV1|| ||QK2||) - baseline
    - v: ||OV1 OV2|| / (||OV1|| ||OV2||) - baseline

    The norms are Frobenius norms. baseline is the mean of ||M N|| / (||M|| ||N||) over 32 random
    pairs: M and N are each the product of a [d_model, d_head] and a [d_head, d_model] matrix with
    standard normal entries. It is near 1 / sqrt(d_model). The gain and the centring of the norms
    before the layers are folded into W_Q, W_K and W_V, those of the norms of queries and keys into
    W_Q and W_K, and those of a norm after the layer into W_O; the norms' scales cancel. Heads that
    share keys and values share W_K and W_V. Rotary embeddings rotate queries and keys by their
    distance, which QK does not contain: for such models q and k are the composition at distance 0,
    by content alone. A head of zeros scores -baseline.

    Args:
        k: number of pairs to name for each kind.
        every: measure at every n-th observation.

    Keys:
        composition/q: [layer, source], score, -1..1; the maximum over the pairs of a head in the
            layer and a head in the source layer; 0 where the source is not an earlier layer
        composition/k: [layer, source], score, -1..1; like q
        composition/v: [layer, source], score, -1..1; like q
        composition/strongest: [kind, rank], score, -1..1; for each kind the k largest, descending;
            the texts name the reading and the writing head: L5H1<-L4H11
        composition/baseline: [], score, 0..1

    Reads:
        The shadow's weights; no activations.

    Cost:
        3 * (layers^2 + k). Per pair of layers, with n = heads * d_head: at most
        6 * n^2 * (d_model + d_head) operations, fewer where heads share keys and values, and
        2 * n^2 numbers of memory; 4 * n * d_head numbers per layer are kept meanwhile. All in
        float64, which is slow on consumer GPUs: raise `every` there.

    Source:
        Elhage et al. 2021, "Path Expansion" and "Analyzing a Two-Layer Model" (composition, the
        baseline of random matrices).

    Raises:
        ValueError: k < 1, every < 1; from `taps`, fewer than two layers of attention, or attention
            without such weights.
    """

    description: ClassVar[Description] = Description(
        title="Heads that read other heads",
        group="Heads",
        measures={
            "q": Meaning(title="Query composition", axes=("layer", "source"), headline=True),
            "k": Meaning(title="Key composition", axes=("layer", "source")),
            "v": Meaning(title="Value composition", axes=("layer", "source")),
            "strongest": Meaning(
                title="Strongest pairs of heads", axes=("kind", "rank"), headline=True
            ),
            "baseline": Meaning(title="Composition of random weights", axes=(), headline=True),
        },
    )

    k: int = 10
    every: int = 10
    name: str = "composition"

    def __post_init__(self) -> None:
        demand_numbers(self, k=1, every=1)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Returns no reductions: this instrument reads weights alone."""
        layers = attention_layers(shadow, type(self).__name__)
        if len(layers) < 2:
            raise ValueError(
                f"{type(self).__name__}: heads compose across layers, and this model has one layer "
                f"of attention. Leave the instrument out."
            )
        demand_circuits(shadow, layers, type(self).__name__)
        return {}

    @torch.no_grad()
    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields the maxima by pair of layers, and the names of the strongest pairs."""
        layers = attention_layers(shadow, type(self).__name__)
        triangles = {layer: _Triangles.of(circuits(shadow, layer)) for layer in layers}
        heads, d_head, d_model = circuits(shadow, layers[0]).o.shape
        baseline = random_composition(d_model, d_head)
        maxima = torch.zeros(len(KINDS), shadow.n_layers, shadow.n_layers, dtype=torch.float64)
        best, where = [], []
        kept = min(self.k, heads * heads)
        for at, source in enumerate(layers):
            writer = _writer(circuits(shadow, source), triangles[source])
            for layer in layers[at + 1 :]:
                scores = _scores(writer, circuits(shadow, layer), triangles[layer]) - baseline
                flat = scores.flatten(1).cpu()  # [kind, source head and head]
                maxima[:, layer, source] = flat.amax(1)
                strongest = flat.topk(kept, dim=1)
                best.append(strongest.values)
                named = strongest.indices
                pair = torch.stack([named // heads, named % heads], 2)
                place = torch.tensor([source, layer]).expand_as(pair)
                where.append(torch.stack([place, pair], 3))  # [kind, rank, end, layer or head]
        for kind, matrix in zip(KINDS, maxima, strict=True):
            yield Reading(
                key=f"{self.name}/{kind}",
                values=matrix.numpy(),
                axes=("layer", "source"),
                unit="score",
            )
        found = torch.cat(best, 1)
        top = found.topk(min(self.k, found.shape[1]), dim=1)
        ends = torch.cat(where, 1)
        texts = [
            [
                "" if score != score else _name(*ends[i, j].flatten().tolist())
                for j, score in zip(row, top.values[i].tolist(), strict=True)
            ]
            for i, row in enumerate(top.indices)
        ]
        yield Reading(
            key=f"{self.name}/strongest",
            values=top.values.numpy(),
            axes=("kind", "rank"),
            unit="score",
            labels={"kind": KINDS},
            texts=np.array(texts),
        )
        key = f"{self.name}/baseline"
        yield Reading(key=key, values=np.array(baseline), unit="score", limits=(0.0, 1.0))


@dataclass(frozen=True, eq=False)
class _Triangles:
    """The triangles R of a layer's weights, [head, d_head, d_head].

    They replace the weights in norms of products: ||X W|| = ||X R^T|| for W^T = QR.

    Attributes:
        q, k, v: triangles of W_Q, W_K and W_V.
        o: of W_O^T.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    @classmethod
    def of(cls, c: Circuits) -> "_Triangles":
        q, k, v, o = (torch.linalg.qr(w, mode="r").R for w in (c.q, c.k, c.v, c.o.mT))
        k, v = (r.repeat_interleave(c.shared, 0) for r in (k, v))
        # Divided by the norm of QK or OV, so that every product that ends with them is, too.
        qk, ov = _norms(q @ k.mT), _norms(v @ o.mT)
        return cls(q=q / qk, k=k / qk, v=v / ov, o=o / ov)


def _norms(product: Float[Tensor, "head n m"]) -> Float[Tensor, "head 1 1"]:
    """Returns the norm of each product; 1 for a product of zero, which so stays zero."""
    norm = torch.linalg.vector_norm(product, dim=(1, 2), keepdim=True)
    return norm.where(norm > 0, 1.0)


def _writer(c: Circuits, triangles: _Triangles) -> Float[Tensor, "source_head d_head d_model"]:
    """Returns OV / ||OV|| of each head as d_head rows, up to an orthogonal matrix on the left."""
    return triangles.v @ c.o


def _scores(
    writer: Float[Tensor, "source_head d_head d_model"], c: Circuits, triangles: _Triangles
) -> Float[Tensor, "kind source_head head"]:
    """Returns ||OV1 N|| / (||OV1|| ||N||) for N = QK2, QK2^T and OV2."""
    sources, rows = len(writer), writer.flatten(0, 1)
    kinds = []
    for into, end in ((c.q, triangles.k), (c.k, triangles.q), (c.v, triangles.o)):
        own = len(into)  # number of these matrices; each serves `shared` heads
        read = (rows @ into.transpose(0, 1).flatten(1)).unflatten(1, (own, -1)).transpose(0, 1)
        ends = end.unflatten(0, (own, -1))  # [own, shared, d_head, d_head]
        product = (read @ ends.flatten(1, 2).mT).unflatten(2, ends.shape[1:3])
        norm = torch.linalg.vector_norm(product.unflatten(1, (sources, -1)), dim=(2, 4))
        kinds.append(norm.transpose(0, 1).flatten(1))  # from [source head, own, shared]
    return torch.stack(kinds)


@lru_cache(maxsize=8)
def random_composition(d_model: int, d_head: int, draws: int = 32) -> float:
    """Returns the mean of ||M N|| / (||M|| ||N||) for random M and N of rank d_head."""
    generator = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(draws):
        m, n = (_random(d_model, d_head, generator) for _ in range(2))
        triangles = _Triangles.of(m)
        # Layers of one head: score q, in which W_Q and W_K are random matrices like any other.
        scores.append(float(_scores(_writer(m, triangles), n, _Triangles.of(n))[0, 0, 0]))
    return float(np.mean(scores))


def _random(d_model: int, d_head: int, generator: torch.Generator) -> Circuits:
    q, k, v, o = (
        high_precision(torch.randn(1, d_model, d_head, dtype=torch.float32, generator=generator))
        for _ in range(4)
    )
    return Circuits(q, k, v, o.mT)


def _name(source: int, source_head: int, layer: int, head: int) -> str:
    return f"L{layer}H{head}<-L{source}H{source_head}"
