"""`with_bar`: draws a progress bar that leaves nothing behind."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def with_bar(items: Iterable[T], **settings: Any) -> Iterable[T]:
    """Returns the items with a progress bar, or without one where it cannot be drawn (a terminal
    that is closed, a full disk).

    Args:
        settings: tqdm's own.
    """
    try:
        return _Bar(items, **settings)
    except Exception:
        return items


class _Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
    """tqdm's bar without its thread and exit function, which would stay after training."""

    monitor_interval = 0

    def display(self, *args: Any, **kwargs: Any) -> Any:
        with suppress(Exception):
            return super().display(*args, **kwargs)

    def close(self) -> None:
        with suppress(Exception):
            super().close()
