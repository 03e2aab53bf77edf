"""Measures from weights which heads raise the token that they read."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.circuits import Circuits, circuits, demand_circuits
from tlens_callback.instruments.parts.direct import before_norm, high_precision
from tlens_callback.instruments.parts.selection import (
    attention_layers,
    checked_selection,
    layer_labels,
)
from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import ProbeBatch, special_ids
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken

_TOP = 5
_CHUNK = 2048
"""How many rows of the vocabulary are in float64 at a time."""


@dataclass(frozen=True)
class CopyingScores:
    """Measures how far each head, when it attends to a token, raises the logit of that token.

    It uses weights alone. For row vectors, the full OV circuit of a head is C = W_E W_V W_O W_U,
    [vocab, vocab]: row t is what the head adds to the logits if it attends only to the embedding of
    t, up to the norms' scales. The gain and the centring of the norm before the layer are folded
    into W_V, those of a norm after it into W_O, and those of the final norm into W_U.

    With `centred` the mean of each row, which does not change the softmax, is subtracted from C:
    W_U minus its mean over the vocabulary takes the place of W_U.

    - eigenvalue: sum Re(lambda) / sum |lambda| over the eigenvalues of C, which are those of
      W_O W_U W_E W_V, [d_head, d_head], and zeros. A head that copies every direction has 1, one
      that suppresses has -1, and one unrelated to copying is near 0. A head that writes nothing
      has 0. NaN if weights are not finite, as for all measures here.
    - top5: share of tokens t with C[t, t] among the five largest of C[t, :], over the whole
      vocabulary; a tie counts against t.
    - eigenvalue_permuted, top5_permuted: the control. The same, but the embedding of t is paired
      with another token, s(t): s(t)'s row of W_E for the eigenvalues, C[t, s(t)] for top5. s is one
      fixed random cycle. The control measures what all tokens share, which is not copying: one
      direction common to all embeddings can give a score of +-1 by itself, and does so in trained
      models if `centred` is False.

    Position embeddings, biases, attention and the layers between are left out: the input of every
    head is the embedding as it comes out of the layer's norm. A head that copies what an early MLP
    makes of the embedding scores lower here than it does in the model. Heads that share keys and
    values share W_V.

    Args:
        tokens: how many tokens top5 is computed over, or their ids. Drawn evenly from the
            tokenizer's ordinary tokens, the same at every observation (standard error at most
            0.5 / sqrt(tokens)).
        centred: False takes the eigenvalues of C without centring. top5 is the same either way.
        every: measure at every n-th observation.

    Keys:
        copying_scores/eigenvalue: [layer, head], fraction, -1..1
        copying_scores/eigenvalue_permuted: [layer, head], fraction, -1..1
        copying_scores/top5: [layer, head], fraction, 0..1
        copying_scores/top5_permuted: [layer, head], fraction, 0..1

    Reads:
        The shadow's weights; no activations.

    Cost:
        4 per head; 4 * vocab * d_model^2 operations for W_U W_E and its control, and at least
        2 * tokens * 2048 * d_model per head: the search for a token ends
        when five others are ahead of it, so heads that copy cost more, up to the whole vocabulary.
        The eigenvalues are computed on the CPU: seconds for a thousand heads of d_head 128.

    Source:
        Elhage et al. 2021, "Summarizing OV/QK matrices" (eigenvalues); Wang et al. 2022, section
        3.3 and appendix (copy score; there on the stream after the first MLP).

    Raises:
        ValueError: fewer than 2 tokens, negative ids or an id twice, every < 1; from `taps`, an id
            outside the vocabulary, no attention or attention without such weights, embeddings of
            another width than the residual stream, or embeddings with a norm of their own (BLOOM).
    """

    description: ClassVar[Description] = Description(
        title="Heads that copy",
        group="Heads",
        measures={
            "eigenvalue": Meaning(
                title="Copying score from eigenvalues", axes=("layer", "head"), headline=True
            ),
            "eigenvalue_permuted": Meaning(
                title="Copying with tokens exchanged (control)", axes=("layer", "head")
            ),
            "top5": Meaning(
                title="Share of tokens copied into the top five", axes=("layer", "head")
            ),
            "top5_permuted": Meaning(
                title="Copying with tokens exchanged (control)", axes=("layer", "head")
            ),
        },
    )

    tokens: int | Sequence[int] = 64
    centred: bool = True
    every: int = 10
    name: str = "copying_scores"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"CopyingScores(every={self.every}): give every >= 1.")
        number, least = self.tokens, 0
        if not isinstance(number, int):
            ids: Any = checked_selection(number, "tokens")
            object.__setattr__(self, "tokens", tuple(operator.index(i) for i in ids))
            number, least = len(ids), min(self._ids)
        if number < 2 or least < 0:
            raise ValueError(
                f"CopyingScores(tokens={self.tokens}): give a number of tokens to draw, at least "
                f"2, or at least two token ids."
            )

    @property
    def _ids(self) -> tuple[int, ...]:
        return self.tokens if isinstance(self.tokens, tuple) else ()

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Returns no reductions: this instrument reads weights alone."""
        layers = attention_layers(shadow, type(self).__name__)
        demand_circuits(shadow, layers, type(self).__name__)
        if "embed_ln" in dict(shadow.bridge.named_children()):
            raise ValueError(
                f"{type(self).__name__}: this model has a norm between its embeddings and its "
                f"residual stream, which the formula leaves out. Leave the instrument out."
            )
        w_e, w_u = shadow.bridge.W_E, shadow.bridge.W_U
        if not w_e.shape[1] == w_u.shape[0] == shadow.d_model:
            raise ValueError(
                f"{type(self).__name__}: this model's embedding has width {w_e.shape[1]}, its "
                f"unembedding {w_u.shape[0]} and its residual stream {shadow.d_model}. The formula "
                f"does not cover the projections between them. Leave the instrument out."
            )
        if bad := [i for i in self._ids if i >= min(len(w_e), w_u.shape[1])]:
            raise ValueError(
                f"{type(self).__name__}: token id {bad[0]} is outside the model's vocabulary of "
                f"{min(len(w_e), w_u.shape[1])}."
            )
        return {}

    @torch.no_grad()
    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields four matrices by layer and head."""
        layers = attention_layers(shadow, type(self).__name__)
        w_e, w_u = shadow.bridge.W_E.detach(), shadow.bridge.W_U.detach()
        # Rows that only one of the two matrices has belong to no token.
        vocabulary = min(len(w_e), w_u.shape[1])
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(vocabulary, generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        other = other.to(w_e.device)
        token = self._tokens(batch, vocabulary).to(w_e.device)
        products = self._vocab_products(shadow, w_e, w_u, other)
        cores, tops = [], []
        for layer in layers:
            of = circuits(shadow, layer)
            v = of.v.repeat_interleave(of.shared, 0)
            # One after the other: a batched matmul would copy `products` once per head.
            by_product = torch.stack([of.o @ m @ v for m in products])  # [own or other, head]
            cores.append(by_product.cpu())
            tops.append(_share_in_top(shadow, of, w_e, w_u, token, other[token]).cpu())
        score = copying(torch.stack(cores, 1))
        labels = layer_labels(layers, shadow)
        for i, which in enumerate(("", "_permuted")):
            yield Reading(
                key=f"{self.name}/eigenvalue{which}",
                values=score[i].numpy(),
                axes=("layer", "head"),
                unit="fraction",
                labels=labels,
                limits=(-1.0, 1.0),
            )
            yield Reading(
                key=f"{self.name}/top5{which}",
                values=torch.stack(tops)[:, i].numpy(),
                axes=("layer", "head"),
                unit="fraction",
                labels=labels,
                limits=(0.0, 1.0),
            )

    def _vocab_products(
        self,
        shadow: Shadow,
        w_e: Float[Tensor, "vocab d_model"],
        w_u: Float[Tensor, "d_model vocab"],
        other: Int[Tensor, " vocab"],
    ) -> Float[Tensor, "2 d_model d_model"]:
        """Returns W_U W_E with the final norm folded in, [own or other, d_model, d_model].

        First with each token's own embedding, then with the other token's.
        """
        width = w_e.shape[1]
        sums = high_precision(w_e.new_zeros(2, width, width))
        mean_out, all_in = (high_precision(w_e.new_zeros(width)) for _ in range(2))
        for start in range(0, len(other), 4 * _CHUNK):
            rows = slice(start, min(start + 4 * _CHUNK, len(other)))
            out, own = _unembedding(shadow, w_u, rows), high_precision(w_e[rows])
            sums[0] += out.mT @ own
            sums[1] += out.mT @ high_precision(w_e[other[rows]])
            mean_out += out.sum(0) / len(other)
            all_in += own.sum(0)
        return sums - torch.outer(mean_out, all_in) if self.centred else sums

    def _tokens(self, batch: ProbeBatch, vocabulary: int) -> Int[Tensor, " token"]:
        if self._ids:
            return torch.tensor(self._ids)
        tokenizer = batch.tokenizer
        # Rows of the embedding beyond the tokenizer's vocabulary are never trained.
        known = vocabulary if tokenizer is None else min(vocabulary, len(tokenizer))
        special = special_ids(tokenizer)
        usable = np.array([i for i in range(known) if i not in special])
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(len(usable), generator=generator)[: self.tokens]  # type: ignore[misc]
        return torch.from_numpy(usable)[drawn]


def copying(matrices: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """Returns sum Re(lambda) / sum |lambda| over the eigenvalues.

    It is 0 if all are 0, and NaN if a matrix is not finite.
    """
    finite = matrices.isfinite().all(-1).all(-1)
    # LAPACK raises an error for matrices that are not finite.
    eigenvalues = torch.linalg.eigvals(matrices.where(finite[..., None, None], 0.0))
    size = eigenvalues.abs().sum(-1)
    score = torch.where(size > 0, eigenvalues.real.sum(-1) / size, 0.0).clamp(-1, 1)
    return score.where(finite, torch.nan)


def _unembedding(
    shadow: Shadow, w_u: Float[Tensor, "d_model vocab"], rows: slice | Tensor
) -> Float[Tensor, "token d_model"]:
    """Returns these tokens' rows of the unembedding, with the final norm's gain and centring."""
    return before_norm(shadow.bridge.ln_final, high_precision(w_u[:, rows].mT))


def _share_in_top(
    shadow: Shadow,
    of: Circuits,
    w_e: Float[Tensor, "vocab d_model"],
    w_u: Float[Tensor, "d_model vocab"],
    token: Int[Tensor, " token"],
    other: Int[Tensor, " token"],
) -> Float[Tensor, "2 head"]:
    """Returns the share of tokens in each head's top five: themselves, and their other tokens."""
    read = (high_precision(w_e[token]) @ of.v).repeat_interleave(of.shared, 0)
    written = (read @ of.o).flatten(0, 1)  # [head and token, d_model]
    asked = torch.stack([token, other]).repeat(1, len(of.o))  # [own or other, head and token]
    at = torch.stack([(written * _unembedding(shadow, w_u, ids)).sum(1) for ids in asked])
    ahead = torch.zeros_like(asked)
    unknown = at.isnan() | at.isinf()
    # A token is decided when five are ahead of it, which the first chunk settles for most.
    live = torch.arange(asked.shape[1], device=token.device)
    vocabulary = min(len(w_e), w_u.shape[1])
    for start in range(0, vocabulary, _CHUNK):
        rows = slice(start, min(start + _CHUNK, vocabulary))
        logits = written[live] @ _unembedding(shadow, w_u, rows).mT
        ids = torch.arange(rows.start, rows.stop, device=token.device)
        itself = asked[:, live, None] == ids
        ahead[:, live] += ((logits >= at[:, live, None]) & ~itself).sum(2)
        unknown[:, live] |= logits.isnan().any(1)
        live = live[(ahead[:, live] < _TOP).any(0)]
        if not len(live):
            break
    # No comparison with NaN is true, so a token counted as in the top five may be unknown.
    among = (ahead < _TOP).float().masked_fill(unknown & (ahead < _TOP), torch.nan)
    return among.unflatten(1, (len(of.o), -1)).mean(2)
