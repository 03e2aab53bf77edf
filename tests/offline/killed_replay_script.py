"""Run by cli/test_replay: replays that end in the middle, each in a process of its own, and go on.

    python -m tests.offline.killed_replay_script FOLDER MODE...

FOLDER/whole is from one that nothing ends.
A mode is the signal, where it comes and the how manieth time: "SIGKILL Loader.load 3". In
FOLDER/MODE are then the two exit codes ("status") and what was said; the run is FOLDER/run.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1"}

from tlens_callback.checkpoints.loader import Loader
from tlens_callback.cli import main
from tlens_callback.offline.replay_record import Record
from tlens_callback.run.observer import Observer
from tlens_callback.sinks import LocalSink

PLACES = {place.__name__: place for place in (Loader, Observer, Record, LocalSink)}


def ends(name: str, where: str, count: str) -> None:
    kind, _, method = where.partition(".")
    was, left = getattr(PLACES[kind], method), [int(count)]

    def act(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), getattr(signal, name))
        return was(*args, **kwargs)

    setattr(PLACES[kind], method, act)


def in_a_child(folder: Path, mode: str, asked: list[str]) -> int:
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(folder / "said.txt", "a")
        if mode != "whole":
            ends(*mode.split())
        try:
            main(asked)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(int(end.code or 0))  # Taking the interpreter down takes seconds.
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder: Path, modes: list[str]) -> None:
    # What a shell starts in the background inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    features = 'TrainedFeatures("blocks.1.hook_resid_pre", steps=3, every=2)'

    def asked(mode: str) -> list[str]:
        words = ["replay", str(folder / "run"), "--out", str(folder / mode / "store")]
        words += ["-i", "fast", "-i", "HeadAblation(every=3)", "-i", features]
        words += ["--device", "cpu", "--no-repeats"]
        return [*words, "--prompt", "the capital of France is", "--target", " Paris"]

    # Here, so that what it imports is there in the children.
    main(asked("whole"), standalone_mode=False)
    for mode in modes:
        (folder / mode).mkdir(exist_ok=True)
        first = in_a_child(folder / mode, mode, asked(mode))
        second = in_a_child(folder / mode, "whole", asked(mode))
        (folder / mode / "status").write_text(f"{first} {second}")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
