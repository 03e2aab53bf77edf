"""Run by test_writing: trainings that end badly, each in a process of its own that ends as such do.

    python -m tests.stopped_script FOLDER MODE...

Each is watched with sinks so slow that the last observation still waits when training is over.
"""

import atexit
import os
import signal
import sys
import threading
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

from transformers import TrainerCallback

from tests.training import CAPITAL, Constant, trainer
from tlens_callback import LocalSink, TLensCallback, WandbSink


class Ends(TrainerCallback):
    def __init__(self, mode):
        self.mode = mode

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            OVER.set()
            if self.mode.startswith("sigint"):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            raise RuntimeError("training failed")


OVER, FINISHED = threading.Event(), threading.Event()
"""The training has ended; so has its W&B run."""


def slow(sink, mode):
    """Writes the last two steps when training is over; in the controls, when it would be lost."""

    def write(self, readings, *, step, write=sink.write):
        if step > 2:
            OVER.wait(60)
            time.sleep(0.4)
        if step > 2 and mode == "raises, no exit":
            time.sleep(60)  # the process ends before
        if step > 2 and mode == "wandb, no seam":
            FINISHED.wait(60)
        write(self, readings, step=step)

    sink.write = write


def watched(folder, mode):
    callback = TLensCallback([CAPITAL], instruments=[Constant()], every_n_steps=1)
    if "wandb" not in mode:
        slow(LocalSink, mode)
        run = trainer(folder, callback)
        run.add_callback(Ends(mode))
        if mode == "raises, no exit":
            run.add_callback(TakesBack(callback))
        run.train()
        return
    import wandb

    slow(WandbSink, mode)
    os.environ |= {f"WANDB{kind}_DIR": str(folder) for kind in ("", "_DATA", "_CACHE", "_CONFIG")}
    if mode == "wandb, no seam":
        WandbSink.before_finish = lambda self, wait: None
    wandb.init(project="test")
    run = trainer(folder / "out", callback)
    run.add_callback(Ends(mode))
    try:
        run.train()
    finally:
        wandb.finish()
        FINISHED.set()


class TakesBack(TrainerCallback):
    """The control: takes back what was to be done at the end of the interpreter."""

    def __init__(self, callback):
        self.callback = callback

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            writer = self.callback.observer.writer
            writer._watch_exit = lambda: None
            atexit.unregister(writer._at_exit)


def main(folder: Path, modes: list[str]) -> None:
    # What a shell starts in the background inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Forked, so that the packages are imported once; each child ends like a script of its own.
    children = []
    for mode in modes:
        (folder / mode).mkdir()
        child = os.fork()
        if child == 0:
            sys.stderr = open(folder / mode / "stderr.txt", "w")
            sys.stdout = open(folder / mode / "stdout.txt", "w")
            watched(folder / mode, mode)
            return
        children.append(child)
    for mode, child in zip(modes, children, strict=True):
        _, status = os.waitpid(child, 0)
        (folder / mode / "status").write_text(str(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
