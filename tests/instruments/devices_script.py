"""Run by test_devices in a process of its own, on the pretend device.

python -m tests.instruments.devices_script every FAMILIES DTYPES, or culprits, or spread
"""

import inspect
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import tiny
from tests.instruments import pretend_device
from tests.instruments.common import encoded
from tests.instruments.pretend_device import DEVICE, WrongDevice
from tests.shadow.test_shadow import lora
from tests.test_no_trace_instruments import every_instrument
from tlens_callback import ProbeBatch, Reading, Shadow, observe
from tlens_callback.run import baselines
from tlens_callback.shadow import Reduce, Stack, Taken, Taps, Unembedded

ROWS = [[1, *((7 * row + i) % 80 + 10 for i in range(20))] for row in range(8)]


class Waits(RuntimeError):
    """A reduction for which the CPU waits."""


@dataclass
class Strict:
    """An instrument that fails where one of its reductions waits."""

    instrument: Any

    def __getattr__(self, name: str) -> Any:  # name, baseline, optional
        return getattr(self.instrument, name)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Taps:
        def strict(key: str | Stack, reduce: Any) -> Any:
            if isinstance(reduce, Unembedded):
                return Unembedded(strict(key, reduce.reduce))

            def reduction(*args: Tensor | slice) -> Taken:
                before = len(pretend_device.waits)
                taken = reduce(*args)
                if found := pretend_device.waits[before:]:
                    raise Waits(f"{self.instrument.name} at {key}: {found}")
                return taken

            return reduction

        taps = self.instrument.taps(shadow, batch)
        return {key: strict(key, reduce) for key, reduce in taps.items()}


def strict(instruments: Iterable[Any]) -> list[Any]:
    return [Strict(instrument) for instrument in instruments]


def batch_on(device: Any) -> ProbeBatch:
    on_cpu = encoded()
    return ProbeBatch.encode(
        on_cpu.probes,
        on_cpu.tokenizer,
        vocab_size=tiny.VOCAB,
        context=tiny.CONTEXT,
        device=device,
        training=lambda n: ROWS[:n],
    )


@torch.no_grad()
def moved(shadow: Shadow, model: Any) -> Shadow:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(1.5)
    shadow.sync()
    return shadow


def every(families: str, dtypes: str) -> None:
    """Each instrument at first, after the adapters moved, and after a resume."""
    for family in families.split(","):
        for dtype in dtypes.split(","):
            model = lora(tiny.model(family), lora_dropout=0.0).to(getattr(torch, dtype))
            model = pretend_device.to_device(model)
            shadow, batch = Shadow.of(model), batch_on(DEVICE)
            assert shadow.device == batch.tokens.device == DEVICE
            before, after = strict(every_instrument()), strict(every_instrument())
            observe(shadow, batch, before)
            observe(moved(shadow, model), batch, before)
            about = baselines.conditions(batch, shadow.dtype, "a run")
            with tempfile.TemporaryDirectory() as folder:
                baselines.write(Path(folder, "memory"), baselines.of(before), about)
                assert baselines.restore(
                    Path(folder, "memory"), baselines.of(after), about, shadow.device
                )
            resumed = observe(moved(shadow, model), batch, after)
            assert {one.name for one in after} == {reading.instrument for reading in resumed}


@dataclass
class Culprit:
    reduce: Reduce
    name: str = "culprit"

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        return {"blocks.1.hook_resid_post": self.reduce}

    def read(self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch) -> list[Reading]:
        return []


def culprits() -> None:
    """Each is found; what a GPU does without waiting is not."""
    shadow = Shadow.of(pretend_device.to_device(tiny.model("llama")))
    batch, rows = batch_on(DEVICE), torch.tensor([0, 2])
    rows_there, drawn = rows.to(DEVICE), torch.Generator().manual_seed(0)
    guilty: list[tuple[type[Exception], Reduce]] = [
        (WrongDevice, lambda x: x[rows]),
        (WrongDevice, lambda x: x.index_select(0, rows)),
        (WrongDevice, lambda x: x + torch.ones(x.shape)),
        (WrongDevice, lambda x: torch.ones(2) * x.sum()),
        (WrongDevice, lambda x: torch.rand(2, device=x.device, generator=drawn)),
        (RuntimeError, lambda x: torch.from_numpy(x.numpy())),
        (RuntimeError, lambda x: torch.tensor(np.asarray(x))),
        (Waits, lambda x: x / x.max().item()),
        (Waits, lambda x: x if x.sum() > 0 else -x),
        (Waits, lambda x: x[x > 0]),
        (Waits, lambda x: x[[0, 2]]),
        (Waits, lambda x: x.cpu().sum()),
        (Waits, lambda x: x[torch.tensor([0, 2], device=x.device)]),
        (Waits, lambda x: torch.linalg.svdvals(x[0])),
    ]
    for expected, reduce in guilty:
        try:
            observe(shadow, batch, strict([Culprit(reduce)]))
        except expected:
            continue
        raise AssertionError(f"not found: {inspect.getsource(reduce)}")
    for reduce in (
        lambda x: x[rows_there],
        lambda x: x * torch.tensor(2.0) + torch.ones(2, device=x.device).sum(),
        lambda x: torch.where(x > 0, x, 0.0).sum(2).topk(2).values.bfloat16(),
    ):
        observe(shadow, batch, strict([Culprit(reduce)]))


def spread(devices: str) -> None:
    """A live model on two devices has a shadow on either, which reads what it reads on one.

    `devices` are those of the shadow and of the model's first layer, "far of near".
    """
    device, first = ({"far": DEVICE, "near": "cpu"}[one] for one in devices.split(" of "))

    def looks(model: Any, device: Any) -> list[Reading]:
        shadow, batch = Shadow.of(model, device=device), batch_on(device)
        instruments = strict(every_instrument())
        assert shadow.device == torch.device(device)
        return [
            *observe(shadow, batch, instruments),
            *observe(moved(shadow, model), batch, instruments),
        ]

    def adapted() -> Any:
        torch.manual_seed(0)
        return lora(tiny.model("llama"), lora_dropout=0.0)

    wanted = looks(adapted(), "cpu")
    model, other = adapted(), adapted()
    far: Any = pretend_device.to_device(other)
    mixed, rest = (far, model) if first == DEVICE else (model, far)
    mixed.base_model.model.model.layers[1] = rest.base_model.model.model.layers[1]
    assert next(mixed.parameters()).device == torch.device(first)
    assert len({parameter.device for parameter in mixed.parameters()}) == 2
    for one, other in zip(wanted, looks(mixed, device), strict=True):
        assert one.key == other.key
        np.testing.assert_allclose(other.values, one.values, atol=1e-5, err_msg=one.key)


def main(what: str, *args: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with pretend_device.Machine():
        {"every": every, "culprits": culprits, "spread": spread}[what](*args)


if __name__ == "__main__":
    main(*sys.argv[1:])
