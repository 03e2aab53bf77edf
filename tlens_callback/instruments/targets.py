"""Measures how likely the model finds each probe's target."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken


@dataclass(frozen=True)
class TargetScores:
    """Measures probability, rank and loss of each probe's target, and its lead over the foil.

    Let `logit` be the model's output at the probe's last token. Then probability =
    softmax(logit)[target]; loss = -ln probability; rank = number of tokens with a logit above the
    target's, so 0 is the top; logit_diff = logit[target] - logit[foil]. Nothing is emitted for a
    probe without a target.

    A target of several tokens is read behind the probe token by token, each after those before it:
    loss is the sum of -ln p over its tokens, and probability the product. rank is that of its first
    token. If target or foil has several tokens, logit_diff is the foil's loss minus the target's,
    which for one token each is the same number.

    Keys:
        target_scores/probability/<probe>: [], probability, 0..1
        target_scores/rank/<probe>: [], rank, 0..vocab_size-1
        target_scores/loss/<probe>: [], nats, 0..inf
        target_scores/logit_diff/<probe>: [], logit, -inf..inf; for a probe with a foil
        target_scores/loss_by_token/<probe>: [answer], nats, 0..inf; -ln p of each token, for a
            target of several

    Reads:
        last_logits; for a target or foil of several tokens, all logits of it in a forward pass of
        its own

    Cost:
        4 per probe with a target. A target or foil of several tokens takes one forward pass of its
        probe.

    Source:
        Wang et al. 2022 (logit difference), section 2.

    Raises:
        ValueError: from `taps`, if no probe has a target.
    """

    description: ClassVar[Description] = Description(
        title="The answer",
        group="Answers",
        needs=Needs.TARGET,
        measures={
            "probability": Meaning(
                title="Probability of the answer",
                axes=(),
                headline=True,
                quantity=Quantity.ANSWER_PROBABILITY,
                better="higher",
            ),
            "rank": Meaning(
                title="Tokens likelier than the answer",
                axes=(),
                headline=True,
                quantity=Quantity.ANSWER_RANK,
                better="lower",
            ),
            "loss": Meaning(title="Loss of the answer", axes=(), better="lower"),
            "loss_by_token": Meaning(
                title="Loss of each token of the answer", axes=("answer",), sometimes=True
            ),
            "logit_diff": Meaning(
                title="Lead of the answer",
                axes=(),
                headline=True,
                quantity=Quantity.ANSWER_LEAD,
                better="higher",
            ),
        },
    )

    name: str = "target_scores"

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """One reduction of the last logits: [probe with a target, measure]."""
        rows = _rows(batch)
        if not rows:
            raise ValueError(
                f"{type(self).__name__}: none of the probes has a target; give one, "
                f"Probe(..., target=' Paris')."
            )
        device = batch.tokens.device
        row = torch.tensor(rows, device=device)
        target = torch.tensor([batch.targets[i] for i in rows], device=device)
        # Without a foil the difference is not used; the target is a placeholder for the foil.
        foils = [batch.targets[i] if batch.foils[i] is None else batch.foils[i] for i in rows]
        foil = torch.tensor(foils, device=device)

        def score(logits: Float[Tensor, "probe vocab"]) -> Float[Tensor, "chosen 4"]:
            logits = logits[row].float()
            at_target = logits.gather(1, target[:, None])
            loss = logits.logsumexp(1) - at_target[:, 0]
            rank = torch.where(loss.isnan(), loss, (logits > at_target).sum(1).float())
            ahead = (at_target - logits.gather(1, foil[:, None]))[:, 0]
            return torch.stack([(-loss).exp(), rank, loss, ahead], dim=1)

        return {"last_logits": score}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterable[Reading]:
        """Yields one number of each kind for each probe."""
        rows = _rows(batch)
        scores = taken["last_logits"]
        assert isinstance(scores, Tensor)
        for row, score in zip(rows, scores, strict=True):
            probability, rank, loss, ahead = score
            probe, foil = batch.probes[row].name, batch.foil_tokens[row]
            target = batch.target_tokens[row]
            of_foil, by_token = loss + ahead, None
            if len(target) > 1:
                by_token = _losses(shadow, batch, row, target)
                loss = by_token.sum()
                probability = (-loss).exp()
            if len(foil) > 1:
                of_foil = _losses(shadow, batch, row, foil).sum()
            if max(len(target), len(foil)) > 1:
                ahead = of_foil - loss
            yield Reading(
                key=f"{self.name}/probability/{probe}",
                values=probability.numpy(),
                unit="probability",
                limits=(0.0, 1.0),
            )
            yield Reading(key=f"{self.name}/rank/{probe}", values=rank.numpy(), unit="rank")
            yield Reading(key=f"{self.name}/loss/{probe}", values=loss.numpy(), unit="nats")
            if foil:
                yield Reading(
                    key=f"{self.name}/logit_diff/{probe}", values=ahead.numpy(), unit="logit"
                )
            if by_token is not None:
                yield Reading(
                    key=f"{self.name}/loss_by_token/{probe}",
                    values=by_token.numpy(),
                    axes=("answer",),
                    unit="nats",
                    labels={"answer": [batch.token_text(token) for token in target]},
                )


def _losses(
    shadow: Shadow, batch: ProbeBatch, row: int, answer: Sequence[int]
) -> Float[Tensor, " answer"]:
    """Computes -ln p of each token of an answer, behind the probe and the tokens before it."""
    prompt = batch.tokens[row, : batch.lengths[row]]
    own = torch.tensor(answer, device=prompt.device)
    tokens = torch.cat([prompt, own[:-1]])
    positions = torch.arange(len(prompt) - 1, len(tokens), device=prompt.device)
    logits = shadow.logits(tokens[None], positions)[0].float()
    return F.cross_entropy(logits, own, reduction="none").cpu()


def _rows(batch: ProbeBatch) -> list[int]:
    return [i for i, target in enumerate(batch.targets) if target is not None]
