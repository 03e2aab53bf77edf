"""`ProbeBatch`: the probes as tensors, the same for the whole run."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tlens_callback.probes.answers import answer_tokens
from tlens_callback.probes.encoding import own_tokenizer, token_ids
from tlens_callback.probes.names import token_name
from tlens_callback.probes.probe import Probe

logger = logging.getLogger("tlens_callback")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ProbeBatch:
    """The probes of a run, tokenised once and right-padded to one rectangle.

    Attributes:
        probes: the probes, one row each.
        tokens: [probe, pos], token ids, on the shadow's device; padding holds id 0.
        mask: [probe, pos], True where there is a real token.
        labels: per probe, one printable string per real token.
        target_tokens, foil_tokens: per probe, the token ids in order; none for a probe without.
        vocab_size, context: number of token ids, and longest input in tokens, of the model.
        tokenizer: a copy of the trainer's, or None.
        training: a function that gives the token ids of the next n rows of the training data; None
            where these cannot be read.
        bos: whether texts begin with the BOS token, as the rows of the training data do; None: as
            the tokenizer does it.
        placeholders: ids of tokens in the place of which the model reads an image, a video or a
            sound.
    """

    probes: tuple[Probe, ...]
    tokens: Int[Tensor, "probe pos"]
    mask: Bool[Tensor, "probe pos"]
    labels: tuple[tuple[str, ...], ...]
    target_tokens: tuple[tuple[int, ...], ...]
    foil_tokens: tuple[tuple[int, ...], ...]
    vocab_size: int
    context: int | None = None
    tokenizer: Any = field(default=None, repr=False)
    training: Callable[[int], list[list[int]]] | None = field(default=None, repr=False)
    bos: bool | None = None
    placeholders: frozenset[int] = frozenset()
    _once: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns what `make` returned the first time that it was asked for under this key.

        For what depends on the batch alone, such as indices: an index that is made anew at each
        observation is copied to the device each time, and the device is waited for.
        """
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    @property
    def targets(self) -> tuple[int | None, ...]:
        """Per probe the first token id of its target, or None, for what needs one token."""
        return tuple(next(iter(answer), None) for answer in self.target_tokens)

    @property
    def foils(self) -> tuple[int | None, ...]:
        """Per probe the first token id of its foil, or None."""
        return tuple(next(iter(answer), None) for answer in self.foil_tokens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of real tokens of each probe."""
        return tuple(len(names) for names in self.labels)

    @property
    def n_plain(self) -> int:
        """Number of probes that are not repeated blocks."""
        return sum(probe.block is None for probe in self.probes)

    @property
    def last(self) -> Int[Tensor, " probe"]:
        """[probe], position of each probe's last real token, on the device of `tokens`."""
        return self.once("last", lambda: self.mask.sum(1) - 1)

    @classmethod
    def encode(
        cls,
        probes: Sequence[Probe],
        tokenizer: Any = None,
        *,
        vocab_size: int,
        context: int | None = None,
        device: torch.device | str = "cpu",
        training: Callable[[int], list[list[int]]] | None = None,
        placeholders: frozenset[int] = frozenset(),
    ) -> "ProbeBatch":
        """Tokenises the probes, with a copy of the tokenizer, so that the trainer's stays as it is.

        Args:
            tokenizer: the trainer's `processing_class`; may be None for token ids and repeated
                blocks.
            vocab_size: number of token ids that the model embeds.
            context: longest input that the model takes, in tokens.
            training: see the attribute. If it has an attribute `bos`, this becomes that of the
                batch.
            placeholders: see the attribute. No repeated block has them.

        Raises:
            ValueError: no probes, two of one name, a text without a tokenizer, chat without a
                chat template, more tokens than `context` (with those of a target), ids outside the
                vocabulary or among `placeholders`, or a target that is empty.
        """
        own = own_tokenizer(tokenizer)
        bos = getattr(training, "bos", None)
        about = vocab_size, context, device, placeholders
        return cls._encode(probes, own, *about, training=training, bos=bos)

    @classmethod
    def _encode(
        cls,
        probes: Sequence[Probe],
        tokenizer: Any,
        vocab_size: int,
        context: int | None,
        device: torch.device | str,
        placeholders: frozenset[int],
        *,
        training: Callable[[int], list[list[int]]] | None = None,
        bos: bool | None = None,
    ) -> "ProbeBatch":
        """Does the work of `encode`, with a tokenizer that is already a copy."""
        if not probes:
            raise ValueError("There are no probes. Give at least one Probe.")
        names = [probe.name for probe in probes]
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise ValueError(
                f"Two probes are named {twice[0]!r}. Names are parts of keys, so each needs "
                f"its own."
            )
        rows = [
            token_ids(probe, tokenizer, vocab_size, bos=bos, without=placeholders)
            for probe in probes
        ]
        for probe, row in zip(probes, rows, strict=True):
            _check_row(probe, row, vocab_size, context)
            if at := placeholders.intersection(row):
                raise ValueError(
                    f"Probe {probe.name!r} has the token {token_name(tokenizer, min(at))!r}, in "
                    f"the place of which the model reads an image, a video or a sound. A probe is "
                    f"text alone. Leave the token out."
                )
        targets, foils = (
            tuple(
                answer_tokens(probe, role, tokenizer, row, vocab_size, bos=bos)
                for probe, row in zip(probes, rows, strict=True)
            )
            for role in ("target", "foil")
        )
        for each in zip(probes, rows, targets, foils, strict=True):
            _check_answers(*each, tokenizer, context)
        width = max(len(row) for row in rows)
        area, needed = len(rows) * width**2, sum(len(row) ** 2 for row in rows)
        if area > 8 * needed and area > 2**20:
            longest = max(range(len(rows)), key=lambda i: len(rows[i]))
            logger.warning(
                "tlens: probe %r is %d tokens long, and the other %d are padded to that: attention "
                "takes %d times the memory it needs. Shorten it, or give it a callback of its own.",
                *(names[longest], width, len(rows) - 1, area // needed),
            )
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        names_of = {i: token_name(tokenizer, i) for i in {*chain.from_iterable(rows)}}
        return cls(
            probes=tuple(probes),
            tokens=tokens.to(device),
            mask=mask.to(device),
            labels=tuple(tuple(names_of[i] for i in row) for row in rows),
            target_tokens=targets,
            foil_tokens=foils,
            vocab_size=vocab_size,
            context=context,
            tokenizer=tokenizer,
            training=training,
            bos=bos,
            placeholders=placeholders,
        )

    def beside(self, probes: Sequence[Probe]) -> "ProbeBatch":
        """Makes a batch of other probes for the same model, for a forward pass of their own.

        Raises:
            ValueError: as `encode`.
        """
        about = self.vocab_size, self.context, self.tokens.device, self.placeholders
        return ProbeBatch._encode(probes, self.tokenizer, *about, bos=self.bos)

    def token_text(self, token: int) -> str:
        """Writes a token so that a person can read it; without a tokenizer, its number."""
        return token_name(self.tokenizer, int(token))


def _check_row(probe: Probe, row: Sequence[int], vocab_size: int, context: int | None) -> None:
    """Refuses a probe that the model cannot take."""
    if context is not None and len(row) > context:
        raise ValueError(
            f"Probe {probe.name!r} is {len(row)} tokens long; the model's context is "
            f"{context}. Shorten it."
        )
    if bad := [i for i in row if not 0 <= i < vocab_size]:
        raise ValueError(
            f"Probe {probe.name!r} has token id {bad[0]}, outside the model's vocabulary "
            f"of {vocab_size}. Is this the model's own tokenizer?"
        )


def _check_answers(
    probe: Probe,
    row: Sequence[int],
    target: Sequence[int],
    foil: Sequence[int],
    tokenizer: Any,
    context: int | None,
) -> None:
    """Refuses answers for which the context has no room, and warns of two that begin alike."""
    longest = max(len(target), len(foil))
    if longest < 2:
        return
    if context is not None and len(row) + longest - 1 > context:
        raise ValueError(
            f"Probe {probe.name!r} is {len(row)} tokens long and its target or foil {longest}; "
            f"the model's context is {context}. Shorten one of them."
        )
    if target and foil and target[0] == foil[0]:
        logger.warning(
            "tlens: target and foil of probe %r begin with the same token, %r, so that what "
            "compares one token of each finds no difference. Put their common beginning at the "
            "end of the prompt.",
            *(probe.name, token_name(tokenizer, target[0])),
        )
