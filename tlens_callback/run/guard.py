"""`guarded`: keeps what fails while watching from ending a training run."""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol

from tlens_callback.run.observer import Observer
from tlens_callback.run.printing import warn
from tlens_callback.run.settings import Settings
from tlens_callback.shadow.ranks import RankError, Ranks

P = ParamSpec("P")


class _Watcher(Protocol):
    """A callback or a tracer: it has an observer while it watches a run."""

    settings: Settings
    observer: Observer | None
    ranks: Ranks | None


def guarded(
    event: Callable[Concatenate[Any, P], None],
) -> Callable[Concatenate[Any, P], None]:
    """Makes a method of a watcher safe to call from a training run.

    If it raises, and `on_error` is not "raise", watching ends: a warning is logged, what was
    observed is written, and training goes on. Ctrl-C passes, and so does what ends the training in
    all processes.
    """

    @wraps(event)
    def call(self: _Watcher, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            event(self, *args, **kwargs)
        except RankError:
            raise
        except Exception as error:
            if self.settings.on_error == "raise" or (self.ranks and self.ranks.broken):
                raise
            end_watching(self, error)

    return call


def end_watching(watcher: _Watcher, error: Exception) -> None:
    """Ends watching after an error that nothing else has handled; it never raises."""
    observer, watcher.observer = watcher.observer, None
    warn(
        "tlens: watching failed (%s: %s) and ends here; training goes on.",
        type(error).__name__,
        error,
        error=error,
    )
    if observer is not None:
        with suppress(Exception):
            observer.close()
