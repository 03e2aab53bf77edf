"""Run by test_tracer_distributed under two processes: a loop under DDP, watched or not."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from tests.own_loop import adapted, rows, tracer
from tlens_callback import MemorySink


def main(folder: str, watched: str, how: str) -> None:
    torch.manual_seed(5)
    model = adapted().train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    if how == "accelerate":
        accelerator = Accelerator(cpu=True)
        loader = DataLoader(rows(), batch_size=4, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        backward = accelerator.backward
    else:
        dist.init_process_group("gloo")
        model, backward = DistributedDataParallel(model), torch.Tensor.backward
        loader = DataLoader(rows(), batch_size=4, sampler=DistributedSampler(rows()))
    rank, sink = dist.get_rank(), MemorySink()
    out = Path(folder) / f"out-{rank}"

    def train(watching=None):
        for _, batch in zip(range(3), loader, strict=False):
            loss = model(**batch).loss
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if watching is not None:
                watching.step(loss=loss)
                watching.save(out)

    assert isinstance(model, DistributedDataParallel)
    if watched == "1":
        with tracer(model, sinks=[sink]) as watching:
            train(watching)
    else:
        train()
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    found = {
        "weights": digest.hexdigest(),
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "steps": list(sink.steps),
        "saved": out.exists(),
        "worst": max((float(r.values) for r in sink.readings["fidelity/max_abs_diff"].values())
                     if sink.readings else [0.0]),
    }  # fmt: skip
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))
    # A process that ends with gloo's threads at work may be aborted.
    dist.barrier()
    dist.destroy_process_group()
    # And one that frees DDP's reducer may wait for ever: torch 2.13 joins gloo's thread under the
    # interpreter's lock, for which that thread waits.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
