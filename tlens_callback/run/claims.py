"""Refuses an instrument that two observers would use at the same time."""

import gc
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakSet

from tlens_callback.interfaces import Instrument


class _Observer(Protocol):
    instruments: list[Instrument]

    @property
    def watching(self) -> bool: ...


_started: WeakSet[_Observer] = WeakSet()


def claim(observer: _Observer, instruments: Sequence[Instrument]) -> None:
    """Keeps the instruments for this observer for as long as it is watching.

    An instrument keeps what it measured before, so with two observers it would compare one model
    with the other.

    Raises:
        ValueError: if another observer that is watching has one of them.
    """

    def shared() -> list[str]:
        others = [one for one in _started if one is not observer and one.watching]
        held = {id(instrument) for other in others for instrument in other.instruments}
        return [instrument.name for instrument in instruments if id(instrument) in held]

    if shared():
        gc.collect()  # of a run that was interrupted and that nobody holds any more
    if found := shared():
        raise ValueError(
            f"The instrument {found[0]!r} is in use by another callback or tracer. It keeps what "
            f"it measured before, so it would compare one run with the other. Give each an object "
            f"of its own, such as HeadScores() twice."
        )
    _started.add(observer)
