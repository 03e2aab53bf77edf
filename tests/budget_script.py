"""Run by test_budget under two processes, whose clocks do not go alike: a loop with a budget."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.own_loop import Loop, adapted, tracer
from tests.pretend_clock import Clock
from tlens_callback import MemorySink

CLOCKS = [{"train": 1.0, "look": 2.0}, {"train": 1.0, "look": 11.0}]
"""By rank."""

STEPS, EVERY, BUDGET = 50, 2, 0.25


def watched(model: torch.nn.Module, clock: Clock) -> dict[str, list[int]]:
    """The steps after which this process came together with the others, and those it observed."""
    loop = Loop(model)
    sink = MemorySink()
    wanted = {"instruments": [clock.watched], "every_n_steps": EVERY, "budget": BUDGET}
    with clock.ticks(), tracer(model, sinks=[sink], **wanted) as watching:
        for _ in range(STEPS):
            clock.now += clock.train
            loop.run(1, watching)
        # The last step has been observed as a multiple.
        met = [] if watching.ranks is None else sorted(watching.ranks.steps)
    return {"met": met, "observed": list(sink.steps)}


def main(to: str) -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(adapted())
    found = watched(model, Clock(**CLOCKS[dist.get_rank()]))
    (Path(to) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # Freeing DDP's reducer may wait for ever, as in tests.distributed_script.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
