"""Processes of the command line that need not import torch and transformers once more.

A start of the command takes some six seconds, nearly all of it imports. multiprocessing's fork
server imports the same once; each process is a fork of it, with arguments, directory, environment,
streams and an exit code of its own.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["tlens_callback.offline.stages", "tlens_callback.run.observer", "tlens_callback.page.folder"]
)


def run_command(
    *arguments: Any,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",
    first: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `tlens-callback` with these arguments to its end, as `subprocess.run` would.

    Args:
        first: called in the new process before anything else.
    """
    arguments = tuple(map(str, arguments))
    pipes = [_server.Pipe(duplex=False) for _ in range(3)]
    (stdin, give), (out, stdout), (err, stderr) = pipes
    streams = stdin, stdout, stderr
    target = (arguments, str(cwd or Path.cwd()), dict(os.environ if env is None else env), first)
    process = _server.Process(target=_command, args=(streams, *target))
    process.start()
    for end in streams:
        end.close()
    with ThreadPoolExecutor(2) as readers:
        read = [readers.submit(_all, end) for end in (out, err)]
        with os.fdopen(os.dup(give.fileno()), "w") as file:
            file.write(input)
        give.close()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
        said, told = (reader.result() for reader in read)
    return subprocess.CompletedProcess(arguments, process.exitcode, said, told)


def _all(connection: Any) -> str:
    with os.fdopen(os.dup(connection.fileno()), encoding="utf-8") as file:
        connection.close()
        return file.read()


def _command(
    streams: Sequence[Any],
    arguments: Sequence[str],
    cwd: str,
    env: Mapping[str, str],
    first: Callable[[], None] | None,
) -> None:
    import atexit

    from tlens_callback.cli import main

    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = open(0, encoding="utf-8")
    sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", buffering=1) for fd in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= env
    if first is not None:
        first()
    try:
        main(arguments, prog_name="tlens-callback")
    finally:
        atexit._run_exitfuncs()
