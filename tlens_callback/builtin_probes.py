"""The probes that are there when the user gives none."""

import logging
import random
from typing import Any

import numpy as np
import torch

from tlens_callback.probes import Probe, own_tokenizer, token_ids

logger = logging.getLogger("tlens_callback")


def repeated_blocks(context: int, *, sequences: int = 4) -> list[Probe]:
    """The built-in repeated blocks: three block lengths, `sequences` seeds each.

    Several lengths, because a head that learned "attend 15 tokens back" passes for an induction
    head at one length and at no other. All rows have about the same length, so that little is
    padding.

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
    """The first rows of the training data as probes; empty where they cannot be read by index.

    Reads the data set, not its loader: asking the loader for a batch would change the order of
    the training data. A data set that draws random numbers when read finds them as they were.
    """
    dataset = getattr(train_dataloader, "dataset", None)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return []
    python, numpy = random.getstate(), np.random.get_state()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            examples = [dataset[i] for i in range(min(rows, len(dataset)))]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    limit = min(tokens, context or tokens)
    tokenizer = own_tokenizer(tokenizer)
    probes = []
    for i, example in enumerate(examples):
        if not hasattr(example, "get"):
            continue
        content = example.get("input_ids", example.get("prompt", example.get("text")))
        try:
            ids = token_ids(Probe(f"train-{i}", content), tokenizer, 0)
        except (ValueError, TypeError) as error:
            logger.info("tlens: row %d of the training data makes no probe: %s", i, error)
            continue
        probes.append(Probe(f"train-{i}", ids[:limit]))
    return probes
