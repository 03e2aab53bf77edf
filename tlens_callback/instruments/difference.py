"""Reads the change of the residual stream since the first observation as tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.baseline import first_value, probes_suffix
from tlens_callback.instruments.parts.selection import (
    checked_selection,
    chosen_rows,
    index_or_nan,
    last_tokens,
    tokens_after_first,
)
from tlens_callback.instruments.parts.texts import token_texts
from tlens_callback.meaning import Description, Meaning, Needs
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import LAST_LOGITS, Shadow, Stack, Taken, Taps
from tlens_callback.shadow.unembed import CHUNK, demand_equal, gap, unembed


@dataclass(frozen=True)
class DifferenceLens:
    """Applies the logit lens to the mean change of the residual stream since the first observation.

    Let h_l(t) be the residual stream after layer l at token t, h0_l(t) the same at the first
    observation, and N the number of tokens of the chosen probes without the first of each:

    - d_l = 1/N sum_t (h_l(t) - h0_l(t)). Every token counts equally, so a long probe counts more.
      For one probe alone, use `DifferenceLens(probes=[...], name=...)`.
    - norm = |d_l| / median_t |h0_l(t)|.
    - x_l = lens(sqrt(d_model) d_l / |d_l|) - lens(0), where lens is the model's current final
      norm, unembedding, logit factor and soft cap. As in the source, the final norm divides by the
      size of the difference itself, not by that of the whole residual stream as in the model. The
      difference is scaled to root mean square 1, so that the norm's epsilon does not flatten a
      small one. lens(0) contains only the biases of norm and head, which do not belong to a
      difference; without biases, x_l is the source's formula up to epsilon.
    - token, probability: the k tokens of largest softmax(x_l), largest first, and their values.

    The source reads random text that is unrelated to the training data: what appears there is what
    training writes everywhere. Such probes are the control for probes about the training subject.
    If norm is 0 (at the first observation, or in a layer below all adapters), there is nothing to
    read: tokens are 0 without a text, and the probabilities are uniform. If norm is below the
    rounding error (bfloat16: below 1e-3), the tokens are noise.

    Args:
        k: tokens per layer.
        probes: names of the probes whose tokens count. Default: every probe that is not a repeated
            block.

    Keys:
        difference_lens/token: [layer, rank], index, 0..vocab_size-1; with the tokens as texts
        difference_lens/probability: [layer, rank], probability, 0..1
        difference_lens/norm: [layer], fraction, 0..inf; exactly 0 at the first observation

    Reads:
        blocks.{layer}.hook_resid_post, last_logits

    Cost:
        layers * (2 * k + 1); one unembedding of layers + probes rows, 2^23 logits at a time. Keeps
        layers * (d_model + 1) numbers from the first observation.

    Source:
        Minder et al. 2025 (narrow fine-tuning leaves readable traces in activation differences;
        the logit lens part of their activation difference lens, there for each of the first five
        positions).

    Raises:
        ValueError: k < 1; an empty or repeated selection; from `taps`, an unknown probe, no probe
            of two tokens, or k above the vocabulary; from `read`, a family whose output is not
            norm and unembedding of the last layer.
    """

    description: ClassVar[Description] = Description(
        title="Tokens that training adds",
        group="Changes",
        needs=Needs.EARLIER,
        measures={
            "token": Meaning(
                title="Tokens that training adds",
                axes=("layer", "rank"),
                headline=True,
                of_run=True,
            ),
            "probability": Meaning(
                title="Probability of these tokens", axes=("layer", "rank"), of_run=True
            ),
            "norm": Meaning(title="Size of what training adds", axes=("layer",), of_run=True),
        },
    )

    k: int = 10
    probes: Sequence[str] | None = None
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "difference_lens"

    def __post_init__(self) -> None:
        demand_numbers(self)
        if self.k < 1:
            raise ValueError(f"DifferenceLens(k={self.k}) shows no token; give k >= 1.")
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """Keeps the layers' means on the device until all of them are unembedded together."""
        rows = chosen_rows(batch, self.probes)
        if not rows:
            return {}
        if self.k > shadow.vocab_size:
            raise ValueError(
                f"DifferenceLens(k={self.k}): the vocabulary has {shadow.vocab_size} tokens."
            )
        tokens = tokens_after_first(batch, rows)
        if not tokens:
            raise ValueError(
                "DifferenceLens leaves out the first token of each probe, and the probes have no "
                "other tokens. Give probes of at least two tokens."
            )
        names, n_layers = probes_suffix(batch, rows), shadow.n_layers
        kept: list[tuple[Tensor, Tensor]] = []
        row = batch.once(("rows", *rows), lambda: torch.tensor(rows, device=batch.tokens.device))
        ends: list[Tensor] = []

        def keep(resid: Float[Tensor, "layer token d_model"], part: slice) -> tuple[()]:
            size = torch.linalg.vector_norm(resid, dim=2, dtype=torch.float32)
            kept.append((resid.mean(1, dtype=torch.float32), size.quantile(0.5, dim=1)))
            return ()

        def keep_ends(resid: Float[Tensor, "1 row d_model"], part: slice) -> tuple[()]:
            ends.append(resid[0])
            return ()

        def read(logits: Float[Tensor, "probe vocab"]) -> tuple[Tensor, ...]:
            mean, size = (torch.cat(parts) for parts in zip(*kept, strict=True))
            end = ends.pop()
            kept.clear()
            difference = mean - first_value(self.baseline, "mean" + names, mean)
            norm = difference.norm(dim=1) / first_value(self.baseline, "size" + names, size)
            # Zero and the last layer share one unembedding, which costs as much as one row.
            bias, *unembedded = unembed(shadow, torch.cat([torch.zeros_like(end[:1]), end]))
            off = gap(torch.stack(unembedded), logits[row])
            return off, norm, *_read(shadow, difference, bias, end.dtype, self.k)

        layers = tuple(range(n_layers))
        last = Stack("hook_resid_post", layers[-1:], tokens=last_tokens(batch, rows))
        return {
            Stack("hook_resid_post", layers, tokens=tokens): keep,
            last: keep_ends,
            LAST_LOGITS: read,
        }

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields for each layer the tokens, their probabilities and the size of the change."""
        if not taken:
            return
        off, norm, token, probability = taken[LAST_LOGITS]
        demand_equal(off, shadow, type(self).__name__)
        texts = np.where(norm.numpy()[:, None] > 0, token_texts(token.numpy(), batch), "")
        ranked = ("layer", "rank")
        yield Reading(
            key=f"{self.name}/token", values=token.numpy(), axes=ranked, unit="index", texts=texts
        )
        yield Reading(
            key=f"{self.name}/probability",
            values=probability.numpy(),
            axes=ranked,
            unit="probability",
            limits=(0.0, 1.0),
        )
        yield Reading(
            key=f"{self.name}/norm", values=norm.numpy(), axes=("layer",), unit="fraction"
        )


def _read(
    shadow: Shadow,
    difference: Float[Tensor, "layer d_model"],
    bias: Float[Tensor, " vocab"],
    dtype: torch.dtype,
    k: int,
) -> tuple[Float[Tensor, "layer rank"], Float[Tensor, "layer rank"]]:
    """Returns the top tokens of each layer's difference, and their probabilities.

    `bias` is lens(0). `dtype` is that of the residual stream, in which norm and head compute.
    """
    size = difference.norm(dim=1, keepdim=True)
    unit = difference * (difference.shape[1] ** 0.5 / torch.where(size > 0, size, 1))
    unit = unit.to(dtype)
    tokens, probabilities = [], []
    for group, moved in zip(
        *(part.split(max(1, CHUNK // shadow.vocab_size)) for part in (unit, size > 0)), strict=True
    ):
        top = (unembed(shadow, group) - bias).softmax(-1).topk(k)
        tokens.append(index_or_nan(torch.where(moved, top.indices, 0), top.values))
        probabilities.append(top.values)
    return torch.cat(tokens), torch.cat(probabilities)
