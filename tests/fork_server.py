"""A process that has imported what the tests import, and forks for each that asks.

    python -m tests.fork_server ADDRESS

It listens at a Unix socket of this address, says so with a line on stdout, and ends with its stdin.
`tests.fork_client` asks: its streams, directory, environment and arguments become those of a fork,
which then runs, ends and is killed as a process of its own would be.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import weakref
from contextlib import suppress
from types import ModuleType
from typing import Any

IMPORTED = (
    "trl.trainer.sft_trainer",
    "trl.trainer.grpo_trainer",
    "wandb.sdk.launch",
    "tests.instruments.common",
    "tests.test_no_trace_instruments",
    "tests.training",
    "tlens_callback.cli",
    "tlens_callback.offline.stages",
    "tlens_callback.page.folder",
    "tlens_callback.run.observer",
    "tlens_callback.sinks.wandb.sink",
)


def import_all() -> None:
    """Without the garbage collection, for which each fork would copy all that it visits."""
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()


def asked_of(connection: socket.socket) -> tuple[list[int], dict[str, Any]]:
    """Streams of the client, and what it wants."""
    size, streams, *_ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb", buffering=0) as file:
        told, wanted = b"", int.from_bytes(size)
        while len(told) < wanted:
            if not (more := file.read(wanted - len(told))):
                os._exit(0)  # the client has gone
            told += more
    return streams, json.loads(told)


def follow(connection: socket.socket, child: int) -> None:
    """Passes on the signals of which the client tells. Where it was killed, so is the child."""
    while number := connection.recv(1):
        os.kill(child, number[0])
    os.kill(child, signal.SIGKILL)


def reap() -> None:
    """So that what the forks took counts as this process's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def forked(address: str) -> dict[str, Any]:
    """Returns in each fork, with what it is to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            reap()
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                reap()
                atexit._run_exitfuncs()
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    # This one stays between the client and the process that it wants.
    streams, asked = asked_of(connection)
    if (child := os.fork()) == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return asked
    for stream in (*streams, 0, 1, 2):
        os.close(stream)
    threading.Thread(target=follow, args=(connection, child), daemon=True).start()
    _, status = os.waitpid(child, 0)
    connection.sendall(status.to_bytes(4))
    os._exit(0)


def become(asked: dict[str, Any]) -> None:
    """Makes this fork a process that was started so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8")
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8")
    errors = "backslashreplace"
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", buffering=1, errors=errors)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ |= asked["environment"]
    # wandb makes a directory when it is imported, and removes it in the end: each has its own.
    weakref.finalize._registry.clear()
    sys.modules["wandb.sdk.data_types._private"].MEDIA_TMP.__init__("wandb-media")
    gc.enable()


def run(what: str, *rest: str) -> None:
    """Does what Python does with these arguments."""
    sys.modules["__main__"] = module = ModuleType("__main__")
    sys.path[0] = os.getcwd() if what in ("-m", "-c") else os.path.dirname(what)
    if what == "-m":
        sys.argv = list(rest)
        runpy._run_module_as_main(rest[0])
        return
    if what == "-c":
        code, *rest = rest
    else:
        module.__file__ = what
        with open(what, encoding="utf-8") as file:
            code = file.read()
    sys.argv = [what, *rest]
    exec(compile(code, what, "exec"), vars(module))


def end(code: int) -> None:
    """As Python does it, but for the second in which it frees all that was imported."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(address: str) -> None:
    import_all()
    asked = forked(address)
    become(asked)
    try:
        run(*asked["arguments"])
    except SystemExit as wanted:
        if not isinstance(wanted.code, int | None):
            raise
        end(wanted.code or 0)
    end(0)


if __name__ == "__main__":
    main(sys.argv[1])
