"""Logit lens: reads what the model would answer if each layer were the last."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.selection import (
    checked_selection,
    chosen_rows,
    index_or_nan,
    last_tokens,
    place,
)
from tlens_callback.instruments.parts.texts import token_texts
from tlens_callback.meaning import Description, Meaning, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import LAST_LOGITS, Shadow, Stack, Taken, Taps, Unembedded
from tlens_callback.shadow.unembed import CHUNK, demand_equal, log_sum_exp, unembed


@dataclass(frozen=True)
class LogitLens:
    """Applies the model's final norm and unembedding to the residual stream after every layer.

    Let h_l be the residual stream after layer l at the probe's last token. Each layer then has its
    own logits, logit_l = scale(norm(h_l) @ W_U + b_U), and p_l = softmax(logit_l). The final norm
    divides by the size of this h_l; scale is the family's logit factor and soft cap. The last
    layer's logits are the model's output.

    - token, top: the k tokens of largest p_l, largest first, and p_l of each.
    - rank: number of tokens with a logit above the target's (its first token's), so 0 is the top.
    - probability: p_l[target]; like the rest, of the first token of a target of several.
    - logit_diff: logit_l[target] - logit_l[foil].
    - kl: KL(p_last || p_l) = sum_v p_last[v] (ln p_last[v] - ln p_l[v]); exactly 0 at the last.
    - entropy: -sum_v p_l[v] ln p_l[v].
    - first_layer: the smallest l such that rank is 0 at l and at every later layer; n_layers if
      the target is not the top token of the model's output.

    Early layers of many models do not write in the basis of the unembedding: there the lens shows
    what can be read by it, not everything that the layer encodes.

    Args:
        k: tokens per layer.
        probes: names of the probes to show. Default: every probe that is not a repeated block.
        every_token: also emit the `_by_pos` keys: top token, its probability, kl and entropy at
            every token of the chosen probes. Keeps the residual stream at these tokens until the
            last layer.
        every: measure at every n-th observation, as `every_token` is slow on long probes.

    Keys:
        logit_lens/token/<probe>: [layer, rank], index, 0..vocab_size-1; with the tokens as texts
        logit_lens/top/<probe>: [layer, rank], probability, 0..1
        logit_lens/rank/<probe>: [layer], rank, 0..vocab_size-1; for a probe with a target
        logit_lens/probability/<probe>: [layer], probability, 0..1; for a probe with a target
        logit_lens/logit_diff/<probe>: [layer], logit, -inf..inf; for a probe with a foil
        logit_lens/kl/<probe>: [layer], nats, 0..inf; rounding below 0 is shown as 0
        logit_lens/entropy/<probe>: [layer], nats, 0..ln vocab_size
        logit_lens/first_layer/<probe>: [], index, 0..n_layers; for a probe with a target
        logit_lens/token_by_pos/<probe>: [layer, pos], index, 0..vocab_size-1; the top token, with
            its text; if every_token
        logit_lens/top_by_pos/<probe>: [layer, pos], probability, 0..1; if every_token
        logit_lens/kl_by_pos/<probe>: [layer, pos], nats, 0..inf; if every_token
        logit_lens/entropy_by_pos/<probe>: [layer, pos], nats, 0..ln vocab_size; if every_token

    Reads:
        blocks.{layer}.hook_resid_post, unembedded; last_logits

    Cost:
        layers * (2 * k + 5) per probe; one unembedding of layers * probes rows, and with
        every_token of layers * tokens rows more. Logits are made 2^23 at a time.

    Source:
        nostalgebraist 2020 (interpreting GPT: the logit lens); Belrose et al. 2023 (KL to the
        output, entropy, and where the lens misleads).

    Raises:
        ValueError: k or every < 1; an empty or repeated selection; from `taps`, a probe that is
            unknown or k above the vocabulary; from `read`, a family whose output is not computed
            by this formula.
    """

    description: ClassVar[Description] = Description(
        title="Logit lens by layer",
        group="Answers",
        measures={
            "token": Meaning(
                title="Likeliest next tokens after each layer",
                axes=("layer", "rank"),
                headline=True,
                quantity=Quantity.NEXT_TOKEN,
                explanation=(
                    "the lens reads the last token only; LogitLens(every_token=True) reads every "
                    "token"
                ),
            ),
            "top": Meaning(
                title="Probability of the likeliest tokens, by layer",
                axes=("layer", "rank"),
                quantity=Quantity.NEXT_TOKEN_PROBABILITY,
            ),
            "rank": Meaning(
                title="Tokens likelier than the answer, by layer",
                axes=("layer",),
                quantity=Quantity.ANSWER_RANK,
                better="lower",
            ),
            "probability": Meaning(
                title="Probability of the answer, by layer",
                axes=("layer",),
                headline=True,
                quantity=Quantity.ANSWER_PROBABILITY,
                better="higher",
            ),
            "logit_diff": Meaning(
                title="Lead of the answer, by layer", axes=("layer",), better="higher"
            ),
            "kl": Meaning(
                title="KL divergence from the output, by layer", axes=("layer",), headline=True
            ),
            "entropy": Meaning(title="Entropy of the prediction, by layer", axes=("layer",)),
            "first_layer": Meaning(
                title="Layer from which the answer stays on top",
                axes=(),
                headline=True,
                quantity=Quantity.ANSWER_LAYER,
                better="lower",
            ),
            "token_by_pos": Meaning(
                sometimes=True,
                title="Likeliest next token after each layer, at each token",
                axes=("layer", "pos"),
            ),
            "top_by_pos": Meaning(
                sometimes=True,
                title="Probability of the likeliest token, by layer and token",
                axes=("layer", "pos"),
                headline=True,
            ),
            "kl_by_pos": Meaning(
                sometimes=True,
                title="KL divergence from the output, by layer and token",
                axes=("layer", "pos"),
            ),
            "entropy_by_pos": Meaning(
                sometimes=True,
                title="Entropy of the prediction, by layer and token",
                axes=("layer", "pos"),
            ),
        },
    )

    k: int = 5
    probes: Sequence[str] | None = None
    every_token: bool = False
    every: int = 1
    name: str = "logit_lens"

    def __post_init__(self) -> None:
        demand_numbers(self, k=1, every=1)
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        """One unembedding of all layers, compared with the model's output."""
        rows = chosen_rows(batch, self.probes)
        if not rows:
            return {}
        if self.k > shadow.vocab_size:
            raise ValueError(
                f"LogitLens(k={self.k}): the vocabulary has {shadow.vocab_size} tokens."
            )
        n_layers = shadow.n_layers
        row, target, foil = _answers(batch, tuple(rows))
        output: list[tuple[Tensor, Tensor]] = []

        def keep(logits: Float[Tensor, "probe vocab"]) -> Float[Tensor, " 0"]:
            final = logits[row].float()
            output[:] = [(final, log_sum_exp(final))]
            return logits.new_empty(0)

        def read(
            logits: Float[Tensor, "row vocab"], lse: Float[Tensor, " row"], part: slice
        ) -> tuple[Tensor, ...]:
            final, final_lse = output[0]
            # The rows are the layers of the first probe, those of the second, ...
            first, last = part.start // n_layers, (part.stop - 1) // n_layers
            of = torch.arange(part.start, part.stop, device=logits.device) // n_layers
            own = slice(first, first + 1) if first == last else of
            for probe in range(first, last + 1):
                at = (probe + 1) * n_layers - 1 - part.start
                if at < len(logits):
                    logits[at], lse[at] = final[probe], final_lse[probe]
            log_p_last = final[own] - final_lse[own, None]
            return _lens(logits, lse, log_p_last, self.k, target[of], foil[of])

        layers = tuple(range(n_layers))
        ends = Stack("hook_resid_post", layers, tokens=last_tokens(batch, rows))
        taps = {LAST_LOGITS: keep, ends: Unembedded(read)}
        return {**taps, **self._everywhere(shadow, batch, rows)} if self.every_token else taps

    def _everywhere(self, shadow: Shadow, batch: ProbeBatch, rows: Sequence[int]) -> Taps:
        """Keeps the layers' residual streams until the last layer is there to compare with."""
        kept: list[Tensor] = []
        tokens = tuple(place(batch, row, pos) for row in rows for pos in range(batch.lengths[row]))
        stack = Stack("hook_resid_post", tuple(range(shadow.n_layers)), tokens=tokens)

        def read(resid: Float[Tensor, "layer token d_model"], part: slice) -> tuple[Tensor, ...]:
            kept.append(resid)
            if part.stop < shadow.n_layers:
                return ()
            found = []
            at_once = max(1, CHUNK // shadow.vocab_size // shadow.n_layers)
            for some in torch.cat(kept).split(at_once, dim=1):
                logits = unembed(shadow, some)
                lse = log_sum_exp(logits)
                none = torch.zeros(some.shape[1], dtype=torch.long, device=some.device)
                log_p_last = logits[-1] - lse[-1, :, None]
                found.append(_lens(logits, lse, log_p_last, 1, none, none))
            kept.clear()
            return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))

        return {stack: read}

    def read(
        self, taken: Mapping[Any, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields one reading of each kind for each probe."""
        rows = chosen_rows(batch, self.probes)
        if not rows:
            return
        _, ends, *everywhere = taken.values()
        *found, off = ends
        demand_equal(off, shadow, type(self).__name__)
        token, top, numbers = (part.unflatten(0, (len(rows), shadow.n_layers)) for part in found)
        lengths = [batch.lengths[row] for row in rows]
        by_pos = zip(
            *(part.split(lengths, dim=1) for each in everywhere for part in each), strict=True
        )
        for at, row in enumerate(rows):
            yield from self._probe(token[at], top[at], numbers[at], batch, row)
            if self.every_token:
                best, p_best, more = next(by_pos)
                yield from self._by_pos(best, p_best, more, batch, row)

    def _probe(
        self,
        token: Real[Tensor, "layer rank"],
        top: Float[Tensor, "layer rank"],
        numbers: Float[Tensor, "layer measure"],
        batch: ProbeBatch,
        row: int,
    ) -> Iterator[Reading]:
        """Yields the readings at the last token of the probe in one row of the batch."""
        rank, probability, ahead, kl, entropy = numbers.T.numpy()
        axes, ranked = ("layer",), ("layer", "rank")
        columns = [
            ("token", token.numpy(), ranked, "index", None),
            ("top", top.numpy(), ranked, "probability", (0.0, 1.0)),
            ("kl", kl, axes, "nats", None),
            ("entropy", entropy, axes, "nats", _entropy_limits(batch)),
        ]
        if batch.targets[row] is not None:
            below = np.flatnonzero(rank > 0)
            first = np.array(below[-1] + 1 if len(below) else 0, np.float32)
            if np.isnan(rank[int(first) :]).any():
                first[()] = np.nan
            columns += [
                ("rank", rank, axes, "rank", None),
                ("probability", probability, axes, "probability", (0.0, 1.0)),
                ("first_layer", first, (), "index", (0.0, float(len(rank)))),
            ]
        if batch.foils[row] is not None:
            columns.append(("logit_diff", ahead, axes, "logit", None))
        yield from self._readings(columns, batch, row)

    def _by_pos(
        self,
        token: Float[Tensor, "layer pos 1"],
        top: Float[Tensor, "layer pos 1"],
        numbers: Float[Tensor, "layer pos measure"],
        batch: ProbeBatch,
        row: int,
    ) -> Iterator[Reading]:
        """Yields the readings at every token of the probe in one row of the batch."""
        kl, entropy = numbers[..., 3].numpy(), numbers[..., 4].numpy()
        axes = ("layer", "pos")
        columns = [
            ("token_by_pos", token[..., 0].numpy(), axes, "index", None),
            ("top_by_pos", top[..., 0].numpy(), axes, "probability", (0.0, 1.0)),
            ("kl_by_pos", kl, axes, "nats", None),
            ("entropy_by_pos", entropy, axes, "nats", _entropy_limits(batch)),
        ]
        yield from self._readings(columns, batch, row)

    def _readings(self, columns: Sequence[tuple], batch: ProbeBatch, row: int) -> Iterator[Reading]:
        for measure, values, axes, unit, limits in columns:
            named = measure.startswith("token")
            yield Reading(
                key=f"{self.name}/{measure}/{batch.probes[row].name}",
                values=values,
                axes=axes,
                unit=unit,
                labels={"pos": batch.labels[row]} if "pos" in axes else {},
                limits=limits,
                texts=token_texts(values, batch) if named else None,
            )


def _entropy_limits(batch: ProbeBatch) -> tuple[float, float]:
    """Returns the limits of an entropy over the vocabulary."""
    return 0.0, float(np.log(batch.vocab_size))


def _answers(
    batch: ProbeBatch, rows: tuple[int, ...]
) -> tuple[Int[Tensor, " probe"], Int[Tensor, " probe"], Int[Tensor, " probe"]]:
    """Returns the rows, and the targets and foils of their probes, on the device."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        # Without a target or foil the numbers are not used; token 0 is a placeholder.
        answers = [(row, batch.targets[row] or 0, batch.foils[row] or 0) for row in rows]
        row, target, foil = torch.tensor(answers, device=batch.tokens.device).T.contiguous()
        return row, target, foil

    return batch.once(("answers", rows), make)


def _lens(
    logits: Float[Tensor, "*rows vocab"],
    lse: Float[Tensor, "*rows"],
    log_p_last: Float[Tensor, "... vocab"],
    k: int,
    target: Int[Tensor, "..."],
    foil: Int[Tensor, "..."],
) -> tuple[
    Float[Tensor, "*rows rank"], Float[Tensor, "*rows rank"], Float[Tensor, "*rows measure"]
]:
    """Returns the top tokens, their probabilities, and five measures of each row.

    The measures are rank, probability, logit difference, KL divergence and entropy.
    """

    def pick(of: Tensor, token: Tensor) -> Tensor:
        return of.gather(-1, token.expand(of.shape[:-1])[..., None])

    token = logits.topk(k).indices
    at_target, at_foil = pick(logits, target), pick(logits, foil)
    rank = (logits > at_target).float().sum(-1)
    log_p = logits - lse[..., None]
    top = log_p.gather(-1, token).exp()
    p_target = pick(log_p, target)[..., 0].exp()
    entropy = -torch.linalg.vecdot(log_p.exp(), log_p)
    # The difference comes first: it is exactly 0 where both are equal.
    kl = torch.linalg.vecdot(log_p_last.exp(), log_p_last - log_p).clamp(min=0)
    numbers = [
        rank.masked_fill(p_target.isnan(), torch.nan),
        p_target,
        (at_target - at_foil)[..., 0],
        kl,
        entropy,
    ]
    return index_or_nan(token, top), top, torch.stack(numbers, dim=-1)
