"""Prints lines on the terminal of a training run."""

import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from tlens_callback.interfaces import Sink


def print_lines(lines: Sequence[str]) -> None:
    """Prints lines without breaking a progress bar; letters that the terminal cannot show are
    printed as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in lines:
        tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding))


def sink_lines(sinks: Iterable[Sink]) -> list[str]:
    """Returns a line for each sink: what `str` says of it, or the name of its class."""
    named = [
        type(sink).__name__ if type(sink).__str__ is object.__str__ else str(sink) for sink in sinks
    ]
    return [f"tlens: {name}" for name in named]
