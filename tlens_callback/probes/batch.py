"""`ProbeBatch`: the probes as tensors, the same for the whole run."""

import copy
import logging
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tlens_callback.probes.probe import Probe

logger = logging.getLogger("tlens_callback")


@dataclass(frozen=True, eq=False)
class ProbeBatch:
    """The probes of a run, tokenised once and right-padded to one rectangle.

    Attributes:
        probes: the probes, one row each.
        tokens: [probe, pos], token ids, on the shadow's device; padding holds id 0.
        mask: [probe, pos], True where there is a real token.
        labels: per probe, one printable string per real token.
        targets, foils: per probe, a token id or None.
        vocab_size, context: number of token ids, and longest input in tokens, of the model.
        tokenizer: a copy of the trainer's, or None.
        training: a function that gives the token ids of the next n rows of the training data; None
            where these cannot be read.
    """

    probes: tuple[Probe, ...]
    tokens: Int[Tensor, "probe pos"]
    mask: Bool[Tensor, "probe pos"]
    labels: tuple[tuple[str, ...], ...]
    targets: tuple[int | None, ...]
    foils: tuple[int | None, ...]
    vocab_size: int
    context: int | None = None
    tokenizer: Any = field(default=None, repr=False)
    training: Callable[[int], list[list[int]]] | None = field(default=None, repr=False)

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
        return self.mask.sum(1) - 1

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
    ) -> "ProbeBatch":
        """Tokenises the probes, with a copy of the tokenizer, so that the trainer's stays as it is.

        Args:
            tokenizer: the trainer's `processing_class`; may be None for token ids and repeated
                blocks.
            vocab_size: number of token ids that the model embeds.
            context: longest input that the model takes, in tokens.
            training: see the attribute.

        Raises:
            ValueError: no probes, two of one name, a text without a tokenizer, chat without a
                chat template, more tokens than `context`, ids outside the vocabulary, or a target
                that is not one token.
        """
        own = own_tokenizer(tokenizer)
        return cls._encode(probes, own, vocab_size, context, device, training)

    @classmethod
    def _encode(
        cls,
        probes: Sequence[Probe],
        tokenizer: Any,
        vocab_size: int,
        context: int | None,
        device: torch.device | str,
        training: Callable[[int], list[list[int]]] | None = None,
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
        rows = [token_ids(probe, tokenizer, vocab_size) for probe in probes]
        for probe, row in zip(probes, rows, strict=True):
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
        return cls(
            probes=tuple(probes),
            tokens=tokens.to(device),
            mask=mask.to(device),
            labels=tuple(tuple(_label(tokenizer, i) for i in row) for row in rows),
            targets=tuple(_answer(p, "target", tokenizer, vocab_size) for p in probes),
            foils=tuple(_answer(p, "foil", tokenizer, vocab_size) for p in probes),
            vocab_size=vocab_size,
            context=context,
            tokenizer=tokenizer,
            training=training,
        )

    def beside(self, probes: Sequence[Probe]) -> "ProbeBatch":
        """Makes a batch of other probes for the same model, for a forward pass of their own.

        Raises:
            ValueError: as `encode`.
        """
        return ProbeBatch._encode(
            probes, self.tokenizer, self.vocab_size, self.context, self.tokens.device
        )

    def token_text(self, token: int) -> str:
        """Writes a token so that a person can read it; without a tokenizer, its number."""
        return _label(self.tokenizer, int(token))


def own_tokenizer(tokenizer: Any) -> Any:
    """Copies the tokenizer, since calls change its settings of padding and truncation.

    Of a multimodal processor it copies the tokenizer inside.
    """
    return copy.deepcopy(getattr(tokenizer, "tokenizer", tokenizer))


def token_ids(probe: Probe, tokenizer: Any, vocab_size: int) -> list[int]:
    """Encodes a probe as token ids; the tokenizer is a copy made by `own_tokenizer`.

    Raises:
        ValueError: a text without a tokenizer, chat without a chat template, or a vocabulary too
            small for a random block.
    """
    content: Any = probe.content
    if probe.block is not None:
        return _repeated_ids(probe, tokenizer, vocab_size)
    if not isinstance(content, str) and isinstance(content[0], int):
        return [int(i) for i in content]
    if tokenizer is None:
        raise ValueError(
            f"Probe {probe.name!r} needs a tokenizer, but there is none. Pass one "
            f"(to a trainer as processing_class=), or give the probe as token ids."
        )
    if isinstance(content, str):
        return list(tokenizer(content)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"Probe {probe.name!r} is a chat, but the tokenizer has no chat template. "
            f"Give the prompt as text."
        )
    messages = [dict(message) for message in content]
    ends_open = messages[-1].get("role") == "assistant"
    encoded = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=not ends_open,
        continue_final_message=ends_open,
    )
    return list(encoded["input_ids"])


def _repeated_ids(probe: Probe, tokenizer: Any, vocab_size: int) -> list[int]:
    assert probe.block is not None
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        start = getattr(tokenizer, "eos_token_id", None)
    start = 0 if start is None else int(start)
    special = {
        start,
        *(getattr(tokenizer, "all_special_ids", None) or ()),
        *getattr(tokenizer, "added_tokens_decoder", ()),
    }
    # Rows of the embedding beyond the tokenizer's vocabulary are never trained.
    known = min(vocab_size, len(tokenizer)) if tokenizer is not None else vocab_size
    ordinary = torch.ones(known, dtype=torch.bool)
    ordinary[[i for i in special if 0 <= i < known]] = False
    usable = ordinary.nonzero()[:, 0]
    if len(usable) < probe.block:
        raise ValueError(
            f"Probe {probe.name!r}: a block of {probe.block} distinct tokens needs a vocabulary "
            f"of at least as many ordinary tokens; there are {len(usable)}."
        )
    generator = torch.Generator().manual_seed(1000 * probe.seed + probe.block)
    chosen = usable[torch.randperm(len(usable), generator=generator)[: probe.block]]
    return [start] + chosen.tolist() * probe.times


def _answer(probe: Probe, role: str, tokenizer: Any, vocab_size: int) -> int | None:
    text = getattr(probe, role)
    if text is None:
        return None
    if not isinstance(text, str):
        text = operator.index(text)
        if not 0 <= text < vocab_size:
            raise ValueError(
                f"The {role} of probe {probe.name!r} is token id {text}, outside the model's "
                f"vocabulary of {vocab_size}."
            )
        return text
    if tokenizer is None:
        raise ValueError(
            f"The {role} {text!r} of probe {probe.name!r} needs a tokenizer, but there "
            f"is none. Give the token id."
        )
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        pieces = [_label(tokenizer, i) for i in ids]
        if len(tokenizer(" " + text, add_special_tokens=False)["input_ids"]) == 1:
            instead = f"with the space before it, it is: {role}={' ' + text!r}."
        else:
            first = f", such as {role}={pieces[0]!r}" if pieces else ""
            instead = f"the first piece alone may do{first}, and a leading space matters."
        raise ValueError(
            f"The {role} {text!r} of probe {probe.name!r} is {len(ids)} tokens: {pieces}. It "
            f"must be one token; {instead}"
        )
    # Behind plain text a word begins with its space; without it, it is another token.
    if isinstance(probe.content, str) and not probe.content[-1:].isspace() and text[0].isalnum():
        spaced = list(tokenizer(" " + text, add_special_tokens=False)["input_ids"])
        if len(spaced) == 1 and spaced != ids:
            logger.warning(
                "tlens: the %s %r of probe %r has no leading space, and after text the model is "
                "likelier to write %r.",
                *(role, text, probe.name, " " + text),
            )
    return int(ids[0])


def _label(tokenizer: Any, token: int) -> str:
    """Writes a token so that a person can read it; a part of a character keeps its name in the
    vocabulary."""
    if tokenizer is None:
        return str(token)
    text = tokenizer.decode([token])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text
