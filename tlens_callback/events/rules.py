"""`Rule`: when a number is worth an event."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tlens_callback.reading import Reading

HISTORY = 20
"""Observations that a number is compared with."""

_ENOUGH = 3


@dataclass(frozen=True)
class Rule:
    """When a number is worth an event.

    Args:
        key: of the reading to follow; if it has axes, each of its entries.
        above, below: an event when an entry crosses this value upwards, or downwards. One that
            is beyond it at the first observation has not crossed it.
        jump: an event when an entry is further than this, and further than six standard deviations
            (1.4826 times the median absolute deviation), from the median of its own last finite
            values, of at most 20 observations, once there are 3; and when it is finite no more.

    Raises:
        ValueError: without any of the three, or for a jump that is not positive.
    """

    key: str
    above: float | None = None
    below: float | None = None
    jump: float | None = None

    def __post_init__(self) -> None:
        if self.above is None and self.below is None and self.jump is None:
            raise ValueError(f"Rule({self.key!r}) asks for nothing; give above=, below= or jump=.")
        if self.jump is not None and not self.jump > 0:
            raise ValueError(f"Rule({self.key!r}): jump is more than 0, got {self.jump}.")

    def crossed(self, past: np.ndarray, new: np.ndarray) -> dict[str, np.ndarray]:
        """What has happened -> which of the new entries it has happened to.

        Args:
            past: [observation, ...], the last values, oldest first.
            new: [...]
        """
        crossed: dict[str, np.ndarray] = {}
        if len(past):
            if self.above is not None:
                crossed[f"above {self.above:g}"] = (new > self.above) & (past[-1] <= self.above)
            if self.below is not None:
                crossed[f"below {self.below:g}"] = (new < self.below) & (past[-1] >= self.below)
            if self.jump is not None:
                crossed["not finite"] = ~np.isfinite(new) & np.isfinite(past[-1])
        if self.jump is not None and len(past) >= _ENOUGH:
            middle = _median(past)
            with np.errstate(invalid="ignore"):
                away, spread = np.abs(new - middle), _median(np.abs(past - middle))
            crossed["jumped"] = (away > np.maximum(self.jump, 6 * 1.4826 * spread)) & np.isfinite(
                new
            )
        return crossed


def entry(reading: Reading, at: Sequence[int]) -> str:
    """Which entry of a reading with axes: "layer 3 head 2 "; empty for a number."""
    names = []
    for axis, i in zip(reading.axes, at, strict=True):
        name = reading.labels[axis][i] if axis in reading.labels else str(i)
        plain = name.isprintable() and name and " " not in name
        names.append(f"{axis} {name if plain else repr(name)} ")
    return "".join(names)


def _median(values: np.ndarray) -> np.ndarray:
    """Over the first axis, of the finite ones; not finite where there are none."""
    return np.ma.filled(np.ma.median(np.ma.masked_invalid(values), axis=0), np.nan)
