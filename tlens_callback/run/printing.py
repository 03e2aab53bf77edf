"""Prints lines on the terminal of a training run, and logs warnings of it; neither ever raises."""

import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress

from tqdm import tqdm

from tlens_callback.interfaces import Sink
from tlens_callback.visible import visible

logger = logging.getLogger("tlens_callback")


def print_lines(lines: Sequence[str]) -> None:
    """Prints lines without breaking a progress bar.

    Letters that the terminal cannot show, and signs that it would obey, are printed as escapes. It
    never raises: a terminal that is closed, or a full disk under it, is not worth a run.
    """
    with suppress(Exception):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        for line in lines:
            tqdm.write(visible(line).encode(encoding, "backslashreplace").decode(encoding))


def warn(text: str, *values: object, error: BaseException | None = None) -> None:
    """Logs a warning, with the traceback of `error` if one is given.

    It never raises: `logging` does if the stream that it writes to is closed.
    """
    with suppress(Exception):
        said = visible(text % values if values else text)
        logger.warning("%s", said, exc_info=error, stacklevel=2)


def report(what: str, error: BaseException) -> None:
    """Logs that an instrument or a sink failed during training and is not used any more."""
    warn(
        "tlens: %s raised %s: %s. It is not used any more; training goes on.",
        what,
        type(error).__name__,
        error,
        error=error,
    )


def sink_lines(sinks: Iterable[Sink]) -> list[str]:
    """Returns a line for each sink: what `str` says of it, or the name of its class."""
    return [f"tlens: {_name(sink)}" for sink in sinks]


def _name(sink: Sink) -> str:
    with suppress(Exception):
        if type(sink).__str__ is not object.__str__:
            return str(sink)
    return type(sink).__name__
