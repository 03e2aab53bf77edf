"""Run by test_distributed under two processes: four ways to train, each watched and not."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from tests.own_loop import adapted, rows, tracer
from tests.rollouts import trained as rewards
from tests.test_no_trace import fingerprint, sft, watcher
from tlens_callback import MemorySink

Train = Callable[[Path, MemorySink | None], nn.Module]


def trainer(folder: Path, sink: MemorySink | None) -> nn.Module:
    """TRL's trainer with the callback."""
    callbacks = [] if sink is None else [watcher(sinks=[sink])]
    return sft(folder, callbacks, eval_strategy="no", max_steps=3).model


def plain(folder: Path, sink: MemorySink | None) -> nn.Module:
    """A loop of one's own over torch's own parts, with a tracer."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(5)
    loader = DataLoader(rows(), batch_size=4, sampler=DistributedSampler(rows()))
    model = DistributedDataParallel(adapted().train())
    return loop(model, optimizer_of(model), loader, torch.Tensor.backward, folder, sink)


def accelerate(folder: Path, sink: MemorySink | None) -> nn.Module:
    """A loop of one's own as accelerate has it, with a tracer."""
    torch.manual_seed(5)
    accelerator, model = Accelerator(cpu=True), adapted().train()
    loader = DataLoader(rows(), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    return loop(model, optimizer, loader, accelerator.backward, folder, sink)


def rewarded(folder: Path, sink: MemorySink | None) -> nn.Module:
    """TRL's GRPO trainer, whose groups are spread over both processes; rollouts are looked at."""
    of = rewards.trainer(folder, per_device_train_batch_size=4, num_generations=8, max_steps=2)
    if sink is not None:
        rewards.look(sinks=[sink])[0].attach(of)
    of.train()
    if sink is not None:
        rows = [
            (ids[mask.bool()].tolist(), float(gain))
            for batch in of._buffered_inputs
            for ids, mask, gain in zip(
                *(batch[n] for n in ("completion_ids", "completion_mask", "advantages")),
                strict=True,
            )
        ]
        (folder / f"sampled-{dist.get_rank()}.json").write_text(json.dumps(rows))
        if sink.steps:
            seen = {n: sink.readings[f"rollouts/{n}"][1].values for n in ("token", "advantage")}
            ids = [[int(i) for i in row if i == i] for row in seen["token"]]
            looked = [*zip(ids, seen["advantage"].tolist(), strict=True)]
            (folder / "looked-at.json").write_text(json.dumps(looked))
    return of.model


def unlike(folder: Path, kept: list[nn.Module]) -> str:
    """What is said if only rank 0 attaches the callback, which all processes have."""
    of = rewards.trainer(folder, per_device_train_batch_size=4, num_generations=8, max_steps=2)
    look, _ = rewards.look()
    kept.append(of.model)
    if dist.get_rank() == 0:
        look.attach(of)
    else:
        of.add_callback(look)
    try:
        of.train()
    except ValueError as error:
        return str(error)
    return "nothing"


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def loop(
    model: nn.Module, optimizer: Any, loader: Any, backward: Any, folder: Path,
    sink: MemorySink | None,
) -> nn.Module:  # fmt: skip
    assert isinstance(model, DistributedDataParallel)
    with contextlib.ExitStack() as stack:
        watching = None if sink is None else stack.enter_context(tracer(model, sinks=[sink]))
        for _, batch in zip(range(3), loader, strict=False):
            loss = model(**batch).loss
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if watching is not None:
                watching.step(loss=loss)
                watching.save(folder / f"saved-{dist.get_rank()}")
    return model


def found(train: Train, folder: Path, sink: MemorySink | None, kept: list[nn.Module]) -> dict:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        model = train(folder, sink)
    kept.append(model)
    of = {
        "weights": repr(fingerprint(dict(model.named_parameters()))),
        "random": fingerprint(torch.get_rng_state()),
        "said": said.getvalue(),
    }
    if sink is None:
        return of
    of |= {"steps": list(sink.steps), "saved": (folder / f"saved-{dist.get_rank()}").exists()}
    if sink.steps:
        of["worst"] = float(max(sink.curve("fidelity/max_abs_diff")[1]))
    return of


def main(to: str) -> None:
    ways: tuple[Train, ...] = (trainer, plain, accelerate, rewarded)
    # A process that frees DDP's reducer may wait for ever: torch 2.13 joins gloo's thread under the
    # interpreter's lock, for which that thread waits. So all models are kept, and the process ends
    # without freeing them.
    kept: list[nn.Module] = []
    results: dict[str, Any] = {}
    # What is not watched comes first: nothing of the package has run by then.
    for which in ("without", "watched"):
        results[which] = {}
        for train in ways:
            sink = MemorySink() if which == "watched" else None
            folder = Path(to) / train.__name__
            results[which][train.__name__] = found(train, folder, sink, kept)
    results["unlike"] = unlike(Path(to) / "unlike", kept)
    (Path(to) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    # A process that ends with gloo's threads at work may be aborted.
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
