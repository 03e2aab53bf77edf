"""Run by test_distributed under two processes: SFT with or without the callback."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.test_no_trace import sft, watcher
from tlens_callback import MemorySink


def main(folder: str, watched: str) -> None:
    memory = MemorySink()
    callbacks = [watcher(sinks=[memory])] if watched == "1" else []
    trainer = sft(Path(folder), callbacks, eval_strategy="no", max_steps=3)
    digest = hashlib.sha256()
    for _, parameter in sorted(trainer.model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    rank = dist.get_rank()
    found = {"weights": digest.hexdigest(), "steps": list(memory.steps)}
    if watched == "1" and rank == 0:
        found["worst"] = float(max(memory.curve("fidelity/max_abs_diff")[1]))
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))
    # A process that ends with gloo's threads at work may be aborted.
    dist.barrier()
    dist.destroy_process_group()
    # And one that frees DDP's reducer may wait for ever: torch 2.13 joins gloo's thread under the
    # interpreter's lock, for which that thread waits.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
