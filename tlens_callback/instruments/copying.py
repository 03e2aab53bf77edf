"""Which heads write the token that they read."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.circuits import Circuits, circuits, demand_circuits
from tlens_callback.instruments.parts.direct import before_norm, wide
from tlens_callback.instruments.parts.selection import attention_layers, layer_labels, picked
from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken

_TOP = 5
_CHUNK = 2048
"""Rows of the vocabulary in float64 at a time."""


@dataclass(frozen=True)
class CopyingScores:
    """How far each head's output on a token, by itself, raises that token.

    From weights alone. For row vectors, with the gain and the centring of the norm in front of the
    layer folded into W_V, those of a norm behind it into W_O and those of the final norm into W_U,
    the full OV circuit of a head is C = W_E W_V W_O W_U, [vocab, vocab]: row t is what the head
    adds to the logits where it attends to the embedding of t alone, up to the norms' scales.

    With `centred` the mean of each row is taken from C, which the softmax does not see: W_U less
    its mean over the vocabulary.

    - eigenvalue: sum Re(lambda) / sum |lambda| over the eigenvalues of C, which are those of
      W_O W_U W_E W_V, [d_head, d_head], and zeros. 1 copies every direction, -1 suppresses, a head
      with nothing to do with copying is near 0. 0 for a head that writes nothing, NaN for weights
      that are not finite, as for all of these.
    - top5: share of tokens t with C[t, t] among the five largest of C[t, :], over the whole
      vocabulary; equals do not count for t.
    - eigenvalue_permuted, top5_permuted: the control. The same where the embedding of t belongs to
      another token, s(t): from s(t)'s row of W_E for the eigenvalues, from C[t, s(t)] for top5. s
      is one fixed random cycle. What remains in it is no copying, but what all tokens share: one
      direction that all embeddings have in common can make a score of +-1 by itself, and does in
      trained models where `centred` is False.

    Position embeddings, biases, attention and the layers between are not in it; the input of every
    head is the embedding as the layer's norm passes it on. A head that copies from what an early
    MLP made of the embedding scores less than it does in the model. Heads that share keys and
    values have W_V in common.

    Args:
        tokens: how many tokens top5 is taken over, drawn evenly from the tokenizer's ordinary ones
            and the same at every observation (standard error at most 0.5 / sqrt(tokens)); or their
            ids.
        centred: False takes the eigenvalues of C as it is. top5 is the same either way.
        every: ask at every n-th observation.

    Keys:
        copying_scores/eigenvalue: [layer, head], fraction, -1..1
        copying_scores/eigenvalue_permuted: [layer, head], fraction, -1..1
        copying_scores/top5: [layer, head], fraction, 0..1
        copying_scores/top5_permuted: [layer, head], fraction, 0..1

    Reads:
        No activations: the shadow's weights.

    Cost:
        4 per head; 4 * vocab * d_model^2 operations for W_U W_E and its control, and at least
        2 * tokens * 2048 * d_model per head: a token that five of the vocabulary have overtaken is
        dropped, so heads that copy cost more than others, up to the whole vocabulary. The
        eigenvalues are computed on the CPU: seconds for a thousand heads of 128.

    Source:
        Elhage et al. 2021, "Summarizing OV/QK matrices" (eigenvalues); Wang et al. 2022, section
        3.3 and appendix (copy score; there on the stream behind the first MLP).

    Raises:
        ValueError: fewer than 2 tokens, negative ids or an id twice, every < 1; from `taps`, an id
            outside the vocabulary, no attention or one that has no such weights, embeddings of
            another width than the stream, or a norm of their own (BLOOM).
    """

    description: ClassVar[Description] = Description(
        title="Heads that copy",
        group="Heads",
        measures={
            "eigenvalue": Meaning(
                title="Copying by eigenvalues", axes=("layer", "head"), headline=True
            ),
            "eigenvalue_permuted": Meaning(
                title="The same with tokens exchanged", axes=("layer", "head")
            ),
            "top5": Meaning(title="Copying among the five likeliest", axes=("layer", "head")),
            "top5_permuted": Meaning(
                title="The same with tokens exchanged", axes=("layer", "head")
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
            ids: Any = picked(number, "tokens")
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
        """None: it is of weights alone."""
        layers = attention_layers(shadow, type(self).__name__)
        demand_circuits(shadow, layers, type(self).__name__)
        if "embed_ln" in dict(shadow.bridge.named_children()):
            raise ValueError(
                f"{type(self).__name__}: this model has a norm between its embeddings and its "
                f"residual stream, which is not in the formula. Leave the instrument out."
            )
        w_e, w_u = shadow.bridge.W_E, shadow.bridge.W_U
        if not w_e.shape[1] == w_u.shape[0] == shadow.d_model:
            raise ValueError(
                f"{type(self).__name__}: this model's embeddings are {w_e.shape[1]} and its "
                f"unembedding {w_u.shape[0]} wide, its residual stream {shadow.d_model}; what "
                f"stands between is not in the formula. Leave the instrument out."
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
        """Four matrices by layer and head."""
        layers = attention_layers(shadow, type(self).__name__)
        w_e, w_u = shadow.bridge.W_E.detach(), shadow.bridge.W_U.detach()
        # Rows that only one of the two has belong to no token.
        vocabulary = min(len(w_e), w_u.shape[1])
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(vocabulary, generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        other = other.to(w_e.device)
        token = self._tokens(batch, vocabulary).to(w_e.device)
        through = self._through(shadow, w_e, w_u, other)
        cores, tops = [], []
        for layer in layers:
            of = circuits(shadow, layer)
            v = of.v.repeat_interleave(of.shared, 0)
            # One after the other: batched, matmul would copy `through` once per head.
            cores.append(torch.stack([of.o @ m @ v for m in through]).cpu())  # [own or other, head]
            tops.append(_in_top(shadow, of, w_e, w_u, token, other[token]).cpu())
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

    def _through(
        self,
        shadow: Shadow,
        w_e: Float[Tensor, "vocab d_model"],
        w_u: Float[Tensor, "d_model vocab"],
        other: Int[Tensor, " vocab"],
    ) -> Float[Tensor, "2 d_model d_model"]:
        """W_U W_E, [own or other, d_model, d_model], with the final norm folded in: of each
        token's own embedding, and of the other one's."""
        width = w_e.shape[1]
        sums = wide(w_e.new_zeros(2, width, width))
        mean_out, all_in = (wide(w_e.new_zeros(width)) for _ in range(2))
        for start in range(0, len(other), 4 * _CHUNK):
            rows = slice(start, min(start + 4 * _CHUNK, len(other)))
            out, own = _unembedding(shadow, w_u, rows), wide(w_e[rows])
            sums[0] += out.mT @ own
            sums[1] += out.mT @ wide(w_e[other[rows]])
            mean_out += out.sum(0) / len(other)
            all_in += own.sum(0)
        return sums - torch.outer(mean_out, all_in) if self.centred else sums

    def _tokens(self, batch: ProbeBatch, vocabulary: int) -> Int[Tensor, " token"]:
        if self._ids:
            return torch.tensor(self._ids)
        tokenizer = batch.tokenizer
        # Rows of the embedding beyond the tokenizer's vocabulary are never trained.
        known = vocabulary if tokenizer is None else min(vocabulary, len(tokenizer))
        special = {
            *(getattr(tokenizer, "all_special_ids", None) or ()),
            *getattr(tokenizer, "added_tokens_decoder", ()),
        }
        usable = np.array([i for i in range(known) if i not in special])
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(len(usable), generator=generator)[: self.tokens]  # type: ignore[misc]
        return torch.from_numpy(usable)[drawn]


def copying(matrices: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """sum Re(lambda) / sum |lambda| over the eigenvalues; 0 where all are 0, NaN where a matrix is
    not finite."""
    finite = matrices.isfinite().all(-1).all(-1)
    # LAPACK complains of what is not finite.
    eigenvalues = torch.linalg.eigvals(matrices.where(finite[..., None, None], 0.0))
    size = eigenvalues.abs().sum(-1)
    score = torch.where(size > 0, eigenvalues.real.sum(-1) / size, 0.0).clamp(-1, 1)
    return score.where(finite, torch.nan)


def _unembedding(
    shadow: Shadow, w_u: Float[Tensor, "d_model vocab"], rows: slice | Tensor
) -> Float[Tensor, "token d_model"]:
    """Of these tokens, with the final norm's gain and centring in front."""
    return before_norm(shadow.bridge.ln_final, wide(w_u[:, rows].mT))


def _in_top(
    shadow: Shadow,
    of: Circuits,
    w_e: Float[Tensor, "vocab d_model"],
    w_u: Float[Tensor, "d_model vocab"],
    token: Int[Tensor, " token"],
    other: Int[Tensor, " token"],
) -> Float[Tensor, "2 head"]:
    """Share of the tokens among the five that each head writes most: themselves, and the others."""
    read = (wide(w_e[token]) @ of.v).repeat_interleave(of.shared, 0)
    written = (read @ of.o).flatten(0, 1)  # [head and token, d_model]
    asked = torch.stack([token, other]).repeat(1, len(of.o))  # [own or other, head and token]
    at = torch.stack([(written * _unembedding(shadow, w_u, ids)).sum(1) for ids in asked])
    ahead = torch.zeros_like(asked)
    unknown = at.isnan() | at.isinf()
    # Five ahead of it, and a token is out: the first chunk settles most, and none needs the rest.
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
    # Nothing is ahead of what is no number, and what is no number is ahead of nothing.
    among = (ahead < _TOP).float().masked_fill(unknown & (ahead < _TOP), torch.nan)
    return among.unflatten(1, (len(of.o), -1)).mean(2)
