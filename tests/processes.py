"""Processes that need not import torch and transformers once more.

A start of Python takes some seven seconds where it trains, nearly all of it imports. Here each is a
fork of one process that has imported the same (`tests.fork_server`), with arguments, directory,
environment, streams and an end of its own.
"""

import atexit
import functools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENT = dict(os.environ)
"""That of the tests, which one of them may change for itself."""


def python() -> list[str]:
    """What begins a command in the place of `sys.executable`, where no fresh Python is tested."""
    return [sys.executable, "-I", "-S", str(HERE / "fork_client.py"), _server()]


def torchrun(processes: int) -> list[str]:
    """What begins a command that so many processes run, connected with each other."""
    launch = [*python(), "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*launch, f"--master_port={free_port()}", "--no-python", *python()]


def free_port() -> int:
    """A port at which nobody listens, for processes that are to meet there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def _server() -> str:
    """Address of the server, which ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="tlens-forks-")
    address = f"{folder.name}/socket"
    path = os.pathsep.join([str(HERE.parent), ENVIRONMENT.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fork_server", address],
        cwd=HERE.parent,
        env={**ENVIRONMENT, "PYTHONPATH": path.rstrip(os.pathsep)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None and server.stdout is not None
    while (said := server.stdout.readline()) != b"ready\n":
        assert said, "the server of forks has ended"
    server.stdout.close()

    def end() -> None:
        server.communicate()
        folder.cleanup()

    atexit.register(end)
    return address


def run_command(
    *arguments: Any,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",
    first: str = "",
) -> subprocess.CompletedProcess[str]:
    """Runs `tlens-callback` with these arguments to its end, as `subprocess.run` would.

    Args:
        first: what is done in the new process before anything else.
    """
    code = f"{first}\nfrom tlens_callback.cli import main\nmain(prog_name='tlens-callback')"
    return subprocess.run(
        [*python(), "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=env,
        input=input,
        capture_output=True,
        text=True,
        timeout=300,
    )
