"""Makes the probes that are used when the user gives none."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from tlens_callback.probes.encoding import chat_ids, own_tokenizer, token_ids
from tlens_callback.probes.probe import Probe
from tlens_callback.probes.shuffled import Shuffled

logger = logging.getLogger("tlens_callback")


def repeated_blocks(context: int, *, sequences: int = 4) -> list[Probe]:
    """Makes the built-in repeated blocks: three block lengths, with `sequences` seeds each.

    There are several lengths because a head that has only learned to attend 15 tokens back looks
    like an induction head at one length. All rows have about the same length, so that there is
    little padding.

    Args:
        context: longest input of the model, tokens. Short contexts get shorter blocks.
    """
    room = min(context, 49) - 1
    shapes = [(max(2, room // (2 * times)), 2 * times) for times in (1, 2, 3)]
    if len({block for block, _ in shapes}) < 3:
        raise ValueError(
            f"A context of {context} tokens is too short for repeated blocks of three lengths; "
            f"give your own Probe.repeated(...)."
        )
    return [
        Probe.repeated(f"repeat-{block}-{seed}", block=block, times=times, seed=seed)
        for block, times in shapes
        for seed in range(sequences)
    ]


def first_rows(
    train_dataloader: Any, tokenizer: Any, *, context: int | None, rows: int = 2, tokens: int = 48
) -> list[Probe]:
    """Makes probes of the first rows of the training data; none where rows cannot be read by index.

    It reads the data set, not its loader: asking the loader for a batch would change the order of
    the training data. The random states are put back afterwards, in case the data set draws random
    numbers. It never raises, since nobody asked for these probes.
    """
    dataset: Any = getattr(train_dataloader, "dataset", None)
    if isinstance(dataset, IterableDataset):
        return []
    tokenizer = own_tokenizer(tokenizer)
    probes = []
    for i in range(rows):
        try:
            with _random_states_kept():
                example = dataset[i]
            ids = _row_ids(example, tokenizer)
        except Exception as error:
            logger.info("tlens: row %d of the training data makes no probe: %r", i, error)
            continue
        if ids:
            probes.append(Probe(f"train-{i}", ids[: min(tokens, context or tokens)]))
    return probes


def training_rows(
    train_dataloader: Any, tokenizer: Any, *, tokens: int = 128
) -> "TrainingRows | None":
    """Makes a function that gives the next n rows of the training data as token ids, cut to
    `tokens`; None where rows cannot be read by index."""
    dataset: Any = getattr(train_dataloader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return None
    try:
        size = len(dataset)
    except TypeError:
        return None
    return TrainingRows(dataset, own_tokenizer(tokenizer), size, tokens)


class TrainingRows:
    """Gives the next n rows of the training data as token ids.

    The rows come in an order of their own, which begins again after the last. Rows that cannot be
    read are left out. The data set's loader and the random states stay as they are.

    Attributes:
        bos: whether the rows begin with the BOS token; None where they do not tell.
    """

    def __init__(self, dataset: Any, tokenizer: Any, size: int, tokens: int) -> None:
        self._dataset, self._tokenizer, self._tokens = dataset, tokenizer, tokens
        self._order, self._position = Shuffled(size), 0
        self.bos = self._begin_with_bos(min(size, 8))

    def __call__(self, n: int) -> list[list[int]]:
        rows: list[list[int]] = []
        size = len(self._order)
        for _ in range(min(2 * n, size)):
            if len(rows) == n:
                break
            index, self._position = self._order(self._position % size), self._position + 1
            if ids := self._row(index):
                rows.append(ids[: self._tokens])
        return rows

    def _row(self, index: int, *, encoded: bool = False) -> list[int]:
        """Reads one row; with `encoded`, only if it holds token ids."""
        try:
            with _random_states_kept():
                example = self._dataset[index]
                if encoded and not _id_columns(example):
                    return []
                return _row_ids(example, self._tokenizer)
        except Exception as error:
            logger.info("tlens: row %d of the training data is left out: %r", index, error)
            return []

    def _begin_with_bos(self, count: int) -> bool | None:
        token = getattr(self._tokenizer, "bos_token_id", None)
        if token is None:
            return None
        rows = [row for i in range(count) if (row := self._row(i, encoded=True))]
        if not rows:
            return None
        # A long stream of texts may be cut into rows anywhere.
        if all(token not in row for row in rows):
            return False
        if any(row[0] != token for row in rows):
            return None
        return None if _begins_chats(token, self._tokenizer) else True


def _begins_chats(bos: int, tokenizer: Any) -> bool:
    """Whether the chat template begins with the BOS token: then rows may be chats, and do not tell
    how a text begins."""
    hello = Probe("chat", [{"role": "user", "content": "Hello"}])
    try:
        return chat_ids(hello, tokenizer)[:1] == [bos]
    except Exception:
        return False


_TEXT_COLUMNS = ("prompt", "messages", "conversations", "text")
"""Columns of texts and chats that a trainer encodes itself, as GRPO and GKD do."""


def _id_columns(example: Any) -> list[str]:
    """The columns of an example that hold the token ids of a text, best first."""
    return [name for name in ("input_ids", "prompt_ids") if example.get(name) is not None]


_NOT_TEXT = ("image", "images", "pixel_values", "video", "videos", "audio", "audios")
"""Columns of what a model reads beside text."""


def _row_ids(example: Any, tokenizer: Any) -> list[int]:
    """Gives the token ids of one example, without padding.

    Raises:
        ValueError: for an example with an image; without it, its text would be another example.
    """
    held = {name: example.get(name) for name in _NOT_TEXT}
    if beside := [n for n, one in held.items() if one is not None and not _is_empty(one)]:
        raise ValueError(f"the row has {beside[0]!r} beside its text")
    if not (columns := _id_columns(example)):
        columns = [name for name in _TEXT_COLUMNS if example.get(name) is not None]
        return token_ids(Probe("row", example[columns[0]]), tokenizer, vocab_size=0)
    ids = [int(token) for token in example[columns[0]]]
    if (mask := example.get("attention_mask")) is not None:
        return [token for token, real in zip(ids, mask, strict=True) if real]
    pad = getattr(tokenizer, "pad_token_id", None)
    # Where padding is also the first or the last token of a text, one of it is kept.
    edges = (getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None))
    spare = 1 if pad in edges else 0
    while ids[-1:] == [pad] and ids[-1 - spare :] == [pad] * (1 + spare):
        ids.pop()
    while ids[:1] == [pad] and ids[: 1 + spare] == [pad] * (1 + spare):
        ids.pop(0)
    return ids


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 0


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
