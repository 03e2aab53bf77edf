"""From values to colours: the range that they cover, and the colour of each."""

import math
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import UInt8

from tlens_callback.reading import Reading
from tlens_callback.render.mosaic import LEVELS, NOT_A_NUMBER, ZERO, palette, slots

_STOPS = 16


def colour_range(*alike: Reading) -> tuple[float, float]:
    """The values at the two ends of the colours of these readings, which have the same limits.

    The limits; in place of an infinite one, and where there are none, the smallest or largest
    finite value. A range with zero inside becomes symmetric around zero, for a diverging scale.
    """
    low, high = alike[0].limits or (-math.inf, math.inf)
    finite = np.concatenate([reading.values.ravel() for reading in alike])
    finite = finite[np.isfinite(finite)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low = least if math.isinf(low) else low
    high = most if math.isinf(high) else high
    if low < 0 < high:
        high = max(-low, high)
        return -high, high
    # One is nothing beside a large number.
    return low, high if high > low else low + max(1, abs(low) * 1e-6)


def is_fixed(limits: tuple[float, float] | None) -> TypeGuard[tuple[float, float]]:
    """Whether the limits are a range by themselves, the same at every step."""
    return limits is not None and all(map(math.isfinite, limits))


def on_root_scale(reading: Reading, ends: tuple[float, float]) -> bool:
    """Whether its colours are those of attention, a square root of the share of the range: on a
    linear scale nothing but the first token's column shows."""
    low, high = ends
    return reading.axes[-2:] == ("query", "key") and low in (0, -high)


def colours(reading: Reading, ends: tuple[float, float]) -> UInt8[np.ndarray, "... 3"]:
    """[..., rgb] of each value. `ends` as of `colour_range`, of the whole of which this is a
    part."""
    low, high = ends
    diverging = low == -high
    if on_root_scale(reading, ends):
        index = slots(reading.values / high, 1.0 if diverging else None)
        return palette(diverging=diverging)[index]
    return linear_colours(reading.values, ends)


def linear_colours(values: np.ndarray, ends: tuple[float, float]) -> UInt8[np.ndarray, "... 3"]:
    """[..., rgb] of each value, evenly between the ends."""
    low, high = ends
    diverging = low == -high
    finite = np.isfinite(values)
    # In float64: the width of a range of large float32 may be infinite.
    share = np.clip((np.where(finite, values, low).astype(float) - low) / (high - low), 0, 1)
    index = np.rint(share * (2 * ZERO if diverging else LEVELS - 1))
    index = np.where(finite, index, NOT_A_NUMBER).astype(np.uint8)
    return palette(diverging=diverging)[index]


def colour_scale(*, diverging: bool, root: bool) -> list[list[Any]]:
    """Plotly's: shares of the range, each with its colour. For a square-root scale the shares are
    its squares, so that the figure holds the values as they are."""
    table = palette(diverging=diverging)
    last = 2 * ZERO if diverging else LEVELS - 1
    stops = []
    for along in np.linspace(0, 1, 2 * _STOPS + 1):
        red, green, blue = table[round(along * last)]
        side = 2 * along - 1
        bent = (1 + math.copysign(side**2, side)) / 2 if diverging else along**2
        stops.append([float(bent if root else along), f"rgb({red},{green},{blue})"])
    return stops
