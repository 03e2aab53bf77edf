"""What `measure_growth.py` measures: readings of any size, training rows, and a tiny model."""

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tlens_callback import Probe, ProbeBatch, Reading, Shadow, fast, observe
from tlens_callback.probes.builtin import repeated_blocks, training_rows

MATRICES = 20
TOKENS = 16


@dataclass(frozen=True)
class Growing:
    """The sizes of a run.

    Attributes:
        layers, heads: of the model; an observation has 20 matrices of all heads.
        probes: each has an attention pattern over 16 tokens, a loss at each of them, the five
            likeliest tokens after each layer, and the probability and rank of its target.
        keys: how many readings an observation has at least; numbers fill it up.
    """

    observations: int = 20
    layers: int = 16
    heads: int = 8
    probes: int = 4
    keys: int = 0

    def said(self, what: str) -> str:
        """Returns the size that a table is about."""
        if what == "heads":
            return f"{self.layers} x {self.heads}"
        return f"{getattr(self, what, self.observations):,}"


def readings(growing: Growing, step: int) -> list[Reading]:
    """Returns one observation. Values move by some percent of themselves from step to step."""
    rng = np.random.default_rng(step)
    start = np.random.default_rng(0)
    shape = (growing.layers, growing.heads)
    found = [
        number("trainer/loss", 4 * np.exp(-step / 100)),
        number("cost/seconds", rng.random()),
    ]
    for i in range(MATRICES):
        score = start.beta(0.3, 3, shape) * np.exp(0.01 * step * start.normal(0, 0.1, shape))
        found.append(
            Reading(
                key=f"head_scores/{'induction' if i == 0 else f'measure{i}'}",
                values=np.clip(score * (1 + 0.01 * rng.normal(0, 1, shape)), 0, 1),
                axes=("layer", "head"),
                unit="probability",
                limits=(0, 1),
            )
        )
    tokens = [f" word{i}" for i in range(TOKENS)]
    both = {"query": tokens, "key": tokens}
    words = np.array([f" word{i}" for i in range(5 * growing.layers)]).reshape(-1, 5)
    for i in range(growing.probes):
        logits = start.normal(0, 1.5, (*shape, TOKENS, TOKENS)).astype(np.float32)
        logits += 0.1 * rng.standard_normal(logits.shape, np.float32)
        weights = np.tril(np.exp(logits))
        found += [
            Reading(
                key=f"attention_patterns/pattern/probe{i}",
                values=weights / weights.sum(-1, keepdims=True),
                axes=("layer", "head", "query", "key"),
                unit="probability",
                labels=both,
                limits=(0, 1),
            ),
            Reading(
                key=f"token_loss/loss/probe{i}",
                values=rng.gamma(2, 1, TOKENS),
                axes=("token",),
                unit="nats",
                labels={"token": tokens},
            ),
            Reading(
                key=f"logit_lens/top/probe{i}",
                values=np.sort(rng.random(words.shape))[:, ::-1] / 5,
                axes=("layer", "rank"),
                unit="probability",
                texts=words,
            ),
            number(f"target_scores/probability/probe{i}", rng.random(), "probability"),
            number(f"target_scores/rank/probe{i}", int(rng.integers(100)), "count"),
        ]
    more = growing.keys - len(found)
    return [*found, *(number(f"own/number{i}", x) for i, x in enumerate(rng.random(max(more, 0))))]


def number(key: str, value: float, unit: str = "x") -> Reading:
    if key.startswith("trainer/"):
        return Reading(
            key=key, values=np.array([value]), axes=("update",), unit=unit, labels={"update": ["0"]}
        )
    return Reading(key=key, values=np.array(value), axes=(), unit=unit)


class Rows:
    """Training data that make a row when it is asked for, and have no text."""

    bos_token_id = pad_token_id = eos_token_id = None

    def __init__(self, size: int) -> None:
        self.size = size
        self.dataset = self

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": [5, 6, i % 7]}

    def read(self, n: int) -> list[list[int]]:
        """Reads n rows in the order of the package."""
        rows = training_rows(self, self)
        assert rows is not None
        return rows(n)


def observed(words: int) -> Callable[[], list[Reading]]:
    """Makes a tiny model with a vocabulary of so many words, and returns what observes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    shadow = Shadow.of(LlamaForCausalLM(config).eval())
    ids = np.random.default_rng(0).integers(3, words, (4, 48)).tolist()
    probes = [Probe(f"probe{i}", row, target=7, foil=8) for i, row in enumerate(ids)]
    batch = ProbeBatch.encode(probes + repeated_blocks(1024), vocab_size=words)
    instruments = fast()
    return lambda: observe(shadow, batch, instruments)


class Memory:
    """How many megabytes this process takes at most, beyond what it took at the last `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, and not used again
        except AttributeError:
            pass
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the largest so far becomes that of now
        except OSError:
            pass
        self._before = self._read("VmRSS")

    def more(self) -> float | None:
        now, before = self._read("VmHWM"), self._before
        return None if now is None or before is None else max(0.0, now - before)

    def _read(self, name: str) -> float | None:
        try:
            with open("/proc/self/status") as file:
                lines: dict[str, Any] = dict(line.split(":", 1) for line in file)
        except OSError:
            return None
        return int(lines[name].split()[0]) / 1e3
