"""A small training of several processes in which something goes wrong; see scripts/rank_faults."""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests import engines, engines_script
from tests.processes import free_port
from tests.training import CAPITAL
from tlens_callback import FrozenWeights, HeadScores, MemorySink, TLensCallback
from tlens_callback.shadow import ranks
from tlens_callback.shadow.gather import Gather
from tlens_callback.shadow.ranks import Ranks
from tlens_callback.shadow.shadow import Shadow

TIMEOUT = 6
"""Seconds after which the training's own collectives fail."""


class Broken:
    """Does something at the first reduction of a step."""

    name = "broken"
    act: Callable[[], None] = staticmethod(lambda: None)
    in_read = False

    def taps(self, shadow: Any, batch: Any) -> Any:
        act = self.act if not self.in_read else (lambda: None)

        def reduce(resid: torch.Tensor) -> torch.Tensor:
            act()
            return resid[:, 0]

        return {f"blocks.{i}.hook_resid_post": reduce for i in range(shadow.n_layers)}

    def read(self, taken: Any, shadow: Any, batch: Any) -> Any:
        if self.in_read:
            self.act()
        return iter(())


class Clock(TrainerCallback):
    """Knows the step; and Ctrl-C in the terminal, which reaches all processes."""

    step = 0
    interrupts = -1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        Clock.step = state.global_step + 1
        if Clock.step == self.interrupts:
            os.kill(os.getpid(), signal.SIGINT)


def at(step: int, act: Callable[[], None], *, call: int = 1) -> Callable[[], None]:
    """Acts at one call after this step of the optimizer, and at no other."""
    left = [call]

    def called() -> None:
        if Clock.step == step:
            left[0] -= 1
            if left[0] == 0:
                act()

    return called


def fail() -> None:
    raise RuntimeError("injected")


def no_memory() -> None:
    raise torch.OutOfMemoryError("injected")


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def before(owner: Any, name: str, act: Callable[[], None]) -> None:
    """Acts before each call of this method."""
    method = getattr(owner, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        act()
        return method(self, *args, **kwargs)

    setattr(owner, name, call)


def spoil(place: str, step: int) -> tuple[Broken, MemorySink]:
    """Puts the fault in its place, in the process where it belongs."""
    broken, sink = Broken(), MemorySink()
    first = os.environ["RANK"] == "0"
    Clock.interrupts = step if place == "interrupt all" else -1
    in_reduction: dict[str, Callable[[], None]] = {
        "reduction": fail,
        "read": fail,
        "interrupt": kill(signal.SIGINT),
        "kill": kill(signal.SIGKILL),
        "slow": lambda: time.sleep(2 * TIMEOUT),
    }
    elsewhere: dict[str, tuple[Any, str, Callable[[], None], int]] = {
        "sink": (MemorySink, "write", fail, 1),
        "sync": (Shadow, "sync", fail, 1),
        "room": (Ranks, "_gather", no_memory, 5),
        "gather": (Gather, "run", fail, 5),
        "gather in read": (Gather, "run", fail, 9),
        "interrupt gather": (Gather, "run", kill(signal.SIGINT), 5),
        "kill gather": (Gather, "run", kill(signal.SIGKILL), 5),
        "forward": (Ranks, "_logits", fail, 1),
        "silence": (Ranks, "_end", lambda: time.sleep(1e6), 1),
    }
    in_peer: dict[str, tuple[Any, str, Callable[[], None], int]] = {
        "peer room": (Ranks, "_gather", no_memory, 5),
        "kill peer": (Ranks, "_gather", kill(signal.SIGKILL), 5),
        "slow peer": (Ranks, "serve", lambda: time.sleep(3), 1),
    }
    if first and place in in_reduction:
        broken.act, broken.in_read = at(step, in_reduction[place]), place == "read"
    if place in (found := elsewhere if first else in_peer):
        owner, name, act, call = found[place]
        before(owner, name, at(step, act, call=call))
    return broken, sink


def train(engine: str, place: str, on_error: Any, step: int) -> dict[str, Any]:
    """Trains as one of the processes, and tells how it ended."""
    engines.prepare(engine)
    # It is ignored in what a shell has started in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    broken, sink = spoil(place, step)
    look = TLensCallback(
        [CAPITAL], instruments=[HeadScores(), FrozenWeights(every=1), broken], every_n_steps=1,
        sinks=[sink], on_error=on_error, writing="inline",
    )  # fmt: skip
    without = place == "unwatched" or (place == "alone" and os.environ["RANK"] != "0")
    watched = [] if without else [Clock(), look]
    ranks._MEET = ranks._MEET_WHOLE = timedelta(seconds=3)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = engines_script.trainer(
                engine, "sft", "lora", watched, folder, ddp_timeout=TIMEOUT
            )
            began = time.monotonic()
            done.train()
        ended = {"ended": "well", **engines_script.traces(done), "steps": list(sink.steps)}
    except BaseException as error:
        ended = {"ended": type(error).__name__, "text": str(error)[:300]}
    return ended | {"seconds": round(time.monotonic() - began, 1)}


def start(world: int, *what: Any) -> list[tuple[int, Any]]:
    """Starts the processes of a training, which say in a file how it ended.

    They are forked, since it takes many seconds to import what they need; and not started by
    torchrun, which ends those that wait.
    """
    port = free_port()
    started = []
    for rank in range(world):
        file = tempfile.NamedTemporaryFile("w+", suffix=".json")
        if (process := os.fork()) == 0:
            try:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                said = os.open(file.name + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(said, 1)
                os.dup2(said, 2)
                ended = train(*what)
                file.write(json.dumps(ended))
                file.flush()
            finally:
                os._exit(0)
        started.append((process, file))
    return started


def ends(started: list[tuple[int, Any]], limit: float) -> list[dict[str, Any] | None]:
    """How each process ended; None for one that was still there after so many seconds."""
    until, found = time.monotonic() + limit, []
    for process, file in started:
        while os.waitpid(process, os.WNOHANG)[0] == 0:
            if time.monotonic() > until:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                found.append(None)
                break
            time.sleep(0.02)
        else:
            said = Path(file.name).read_text()
            found.append(json.loads(said) if said else {"ended": "killed"})
        Path(file.name + ".log").unlink(missing_ok=True)
        file.close()
    return found
