"""`Rule`: says when a number becomes an event."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tlens_callback.demands import demand_numbers
from tlens_callback.reading import Reading

HISTORY = 20
"""Observations that a number is compared with."""

_LEAST_HISTORY = 3


@dataclass(frozen=True)
class Rule:
    """Says when a number becomes an event.

    Args:
        key: the key of the reading to follow. If the reading has axes, each entry is followed.
        above, below: an entry that crosses this value upwards, or downwards, is an event. An entry
            that is beyond the value at the first observation has not crossed it.
        jump: an entry is an event if its distance from the median of its own last finite values is
            more than this, and more than six standard deviations (1.4826 times the median absolute
            deviation). At least 3 and at most the last 20 observations are compared. An entry that
            was finite and is not any more is an event too.

    Raises:
        ValueError: if none of the three is given, or jump is not positive.
    """

    key: str
    above: float | None = None
    below: float | None = None
    jump: float | None = None

    def __post_init__(self) -> None:
        demand_numbers(self)
        if self.above is None and self.below is None and self.jump is None:
            raise ValueError(f"Rule({self.key!r}) has no condition; give above=, below= or jump=.")
        if self.jump is not None and not self.jump > 0:
            raise ValueError(f"Rule({self.key!r}): jump must be more than 0, got {self.jump}.")

    def crossed(self, past: np.ndarray, new: np.ndarray) -> dict[str, np.ndarray]:
        """Returns, for each kind of event, which of the new entries it happened to.

        Args:
            past: [observation, ...], the last values, oldest first.
            new: [...], the values of now.
        """
        crossed: dict[str, np.ndarray] = {}
        if len(past):
            if self.above is not None:
                crossed[f"above {self.above:g}"] = (new > self.above) & (past[-1] <= self.above)
            if self.below is not None:
                crossed[f"below {self.below:g}"] = (new < self.below) & (past[-1] >= self.below)
            if self.jump is not None:
                crossed["not finite"] = ~np.isfinite(new) & np.isfinite(past[-1])
        if self.jump is not None and len(past) >= _LEAST_HISTORY:
            middle = _median(past)
            with np.errstate(invalid="ignore"):
                away, spread = np.abs(new - middle), _median(np.abs(past - middle))
            crossed["jumped"] = (away > np.maximum(self.jump, 6 * 1.4826 * spread)) & np.isfinite(
                new
            )
        return crossed


def entry(reading: Reading, at: Sequence[int]) -> str:
    """Returns the name of an entry of a reading, "layer 3 head 2 "; empty for a single number."""
    names = []
    for axis, i in zip(reading.axes, at, strict=True):
        name = reading.labels[axis][i] if axis in reading.labels else str(i)
        plain = name.isprintable() and name and " " not in name
        names.append(f"{axis} {name if plain else repr(name)} ")
    return "".join(names)


def _median(values: np.ndarray) -> np.ndarray:
    """Returns the median of the finite values over the first axis; NaN if there are none."""
    return np.ma.filled(np.ma.median(np.ma.masked_invalid(values), axis=0), np.nan)
