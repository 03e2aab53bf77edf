"""Shows what the model answers to each probe."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.selection import checked_selection, chosen_rows
from tlens_callback.instruments.parts.texts import token_texts
from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading, legible
from tlens_callback.shadow import Reduce, Shadow, Taken
from tlens_callback.shadow.generation import UNKNOWN, end_tokens, greedy


@dataclass(frozen=True)
class Generations:
    """Shows what the model answers to each probe, and where the answer differs from the last one.

    The answer is greedy: always the likeliest next token, without temperature or penalties, so that
    no random number is drawn and only the weights decide. It ends before an end token,
    after `tokens` tokens, or where the model's context ends. Let a be an answer of n tokens, and b
    that of the observation before, of m tokens:

    - answer: a as one text. length: n. token: the ids of a.
    - same: number of tokens at the beginning that a and b share; n if a = b.
    - changed: 1 - same / max(n, m), mean over the probes: 0 if no answer has changed, 1 if all
      begin with another token. Two empty answers are equal.

    At the first observation there is nothing to compare with: same is n, and changed is 0. So it is
    where a resumed run observes its checkpoint again. A small change of the weights can turn one
    token, and those behind it follow: how much of an answer has changed does not measure how far
    the model has.

    The end tokens are those of the live model's generation config. An answer also ends before a
    token in the place of which the model would read an image, a video or a sound.

    Args:
        tokens: how many tokens an answer has at most.
        probes: names of the probes. Default: every probe that is not a repeated block.
        every: answer at every n-th observation.

    Keys:
        generations/answer: [prompt], index, 0..inf; the answers as texts, the probes as labels
        generations/length: [prompt], count, 0..tokens
        generations/same: [prompt], count, 0..tokens
        generations/changed: [], fraction, 0..1
        generations/token: [prompt, answer], index, 0..vocab_size-1; with the tokens as texts; NaN
            behind the end of an answer

    Reads:
        Nothing from the shared forward pass.

    Cost:
        probes * (tokens + 3). A forward pass of its own over the probes, and `tokens` - 1 over one
        token of each, for all probes together: with four texts of 48 tokens 2.7 times as long as
        the shared forward pass with repeated blocks (SmolLM2-135M, one CPU core). If the model has
        layers without attention or reads images, only probes of one length go together. Streamed
        weights are merged anew in each of these passes.

    Source:
        None; the decoding is that of `generate(do_sample=False)` in transformers.

    Raises:
        ValueError: tokens or every < 1; an empty or repeated selection; from `taps`, an unknown
            probe.
    """

    description: ClassVar[Description] = Description(
        title="Answers to the probes",
        group="Answers",
        measures={
            "answer": Meaning(
                title="What the model answers",
                axes=("prompt",),
                headline=True,
                explanation="The likeliest continuation, token by token.",
            ),
            "length": Meaning(title="Length of the answer", axes=("prompt",), headline=True),
            "same": Meaning(
                title="Tokens of the answer before the first that has changed",
                axes=("prompt",),
                headline=True,
                of_run=True,
            ),
            "changed": Meaning(
                title="Share of the answers that has changed since the observation before",
                axes=(),
                headline=True,
                of_run=True,
            ),
            "token": Meaning(title="Tokens of the answer", axes=("prompt", "answer")),
        },
    )

    tokens: int = 32
    probes: Sequence[str] | None = None
    every: int = 1
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "generations"

    def __post_init__(self) -> None:
        demand_numbers(self, tokens=1, every=1)
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Checks the choice of probes; returns no reductions."""
        chosen_rows(batch, self.probes)
        return {}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Generates the answers, and compares them with those of the observation before."""
        rows = chosen_rows(batch, self.probes)
        if not rows:
            return
        prompts = [batch.tokens[row, : batch.lengths[row]].tolist() for row in rows]
        ends = end_tokens(shadow) | batch.placeholders
        answers = greedy(shadow, prompts, self.tokens, ends)
        names = [batch.probes[row].name for row in rows]
        befores = [self._before(name, now) for name, now in zip(names, answers, strict=True)]
        known = np.array([UNKNOWN not in answer for answer in answers])
        same = np.array([_shared(*pair) for pair in zip(answers, befores, strict=True)])
        length, before = (np.array([len(one) for one in of]) for of in (answers, befores))
        token = np.full((len(rows), self.tokens), np.nan)
        for row in known.nonzero()[0]:
            token[row, : length[row]] = answers[row]
        texts = [_text(one, batch) if k else "" for one, k in zip(answers, known, strict=True)]
        labels = {"prompt": names}
        for measure, unit, values in (
            ("answer", "index", np.arange(len(rows))),
            ("length", "count", length),
            ("same", "count", same),
        ):
            yield Reading(
                key=f"{self.name}/{measure}",
                values=np.where(known, values, np.nan),
                axes=("prompt",),
                unit=unit,
                labels=labels,
                texts=np.array(texts) if measure == "answer" else None,
            )
        longer = np.maximum(length, before)
        changed = np.where(known, (longer - same) / longer.clip(min=1), np.nan)
        yield Reading(
            key=f"{self.name}/changed", values=changed.mean(), unit="fraction", limits=(0.0, 1.0)
        )
        yield Reading(
            key=f"{self.name}/token",
            values=token,
            axes=("prompt", "answer"),
            unit="index",
            labels=labels,
            texts=token_texts(token, batch),
        )

    def _before(self, name: str, answer: list[int]) -> list[int]:
        """Returns the answer of the observation before, and keeps this one in its place."""
        before = self.baseline.get(name)
        self.baseline[name] = torch.tensor(answer, dtype=torch.long)
        return answer if before is None else before.tolist()


def _text(answer: Sequence[int], batch: ProbeBatch) -> str:
    between = " " if batch.tokenizer is None else ""
    return between.join(legible([batch.token_text(token) for token in answer]))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many tokens two answers have in common at their beginning."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
