"""A training loop without a trainer, on the data of `tests.training`, to be watched by a tracer."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from tests import tiny
from tests.training import CAPITAL, SENTENCES
from tlens_callback import MemorySink, Tracer


def rows() -> list[dict[str, torch.Tensor]]:
    """What `tests.training.trainer` trains on."""
    encoded = [tiny.tokenizer()(s, padding="max_length", max_length=16) for s in SENTENCES]
    ids = [torch.tensor(one["input_ids"]) for one in encoded]
    return [{"input_ids": one, "labels": one} for one in ids]


def adapted(family: str = "llama", **config: Any) -> nn.Module:
    """With dropout, so that training draws random numbers."""
    settings = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.3, "target_modules": "all-linear"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny.model(family), LoraConfig(**{**settings, **config}))


def tracer(model: nn.Module, **settings: Any) -> Tracer:
    """One that raises, and keeps what it sees in memory unless told otherwise."""
    sinks = settings.pop("sinks", [MemorySink()])
    probes = settings.pop("probes", [CAPITAL])
    return Tracer(
        model, tiny.tokenizer(), probes,
        **{"sinks": sinks, "every_n_steps": 1, "on_error": "raise", **settings},
    )  # fmt: skip


class Loop:
    """Batches of four, AdamW; all that a loop keeps, so that it can be stopped and gone on with.

    Args:
        batches: to a step of the optimizer.
    """

    def __init__(
        self, model: nn.Module, *, lr: float = 1e-2, shuffle: bool = False, batches: int = 1
    ) -> None:
        self.model, self.batches, self.shuffle = model.train(), batches, shuffle
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        self.losses: list[float] = []
        self._data: Iterator[Any] = iter(())

    def _batch(self) -> dict[str, torch.Tensor]:
        if (batch := next(self._data, None)) is None:
            self._data = iter(DataLoader(rows(), batch_size=4, shuffle=self.shuffle))
            batch = next(self._data)
        return batch

    def run(self, steps: int, tracer: Any = None, *, autocast: bool = False) -> None:
        """That many optimizer steps more; what `tracer` is told is the loss."""
        for _ in range(steps):
            total = 0.0
            for _ in range(self.batches):
                with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                    loss = self.model(**self._batch()).loss / self.batches
                loss.backward()
                total += loss.item()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(total)
            if tracer is not None:
                with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                    tracer.step(loss=total)


def compared(one: MemorySink, other: MemorySink) -> tuple[set[str], float]:
    """Keys that only one has, and the largest difference in the others; inf where axes, labels,
    texts or steps differ. What it cost is left out."""
    worst = 0.0
    for key in one.readings.keys() & other.readings.keys():
        a, b = one.readings[key], other.readings[key]
        if a.keys() != b.keys():
            return {key}, float("inf")
        for x, y in [] if key.startswith("cost/") else [(a[step], b[step]) for step in a]:
            if (x.axes, x.labels, str(x.texts)) != (y.axes, y.labels, str(y.texts)):
                worst = float("inf")
            else:
                np.testing.assert_array_equal(np.isnan(x.values), np.isnan(y.values))
                worst = max(worst, float(np.nanmax(np.abs(x.values - y.values), initial=0)))
    return one.readings.keys() ^ other.readings.keys(), worst
