"""Defines all colours: the ramps, the scales, and the range of values that they stand for.

Pictures and figures take them from here. The page is given `page_colours`, and its script
`colour.js` follows the same rules; a test compares the two.
"""

import math
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float, UInt8

from tlens_callback.reading import Reading

# Ten published stops of viridis (van der Walt & Smith, CC0); linear in between.
_SEQUENTIAL = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
# ColorBrewer's RdBu, blue to red; its middle is neutral.
_DIVERGING = "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f"
# The same with its two arms brought to equal lightness; from dark for dark pages.
_PAGE_LIGHT = "053061 1460a5 3c8ebd 8ec1da d0e4ef f7f7f7 fcdac6 f6a784 d8624f b71f2f 67001f"
_PAGE_DARK = "b1ddfc 73b6de 3c8dc1 226597 1c3e5b 1c1c1c 5f2c28 9e453a d8624f e99b79 f2d1bd"

LINES = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #7f3c8d #80864b #a53c3c #5a5a5a".split()
"""Colours of the curves in a figure, on white paper."""

# Colours of the page's curves: contrast 3 to 1 with paper and card in both themes.
_PAGE_LINES = "#0072b2 #d55e00 #009e73 #c06a9a #b87f00 #2e90c8 #9b59ab #80864b".split()

LINE = "#3b82c4"
"""Colour of a line or bar that stands alone, on a dark or a light page."""

BLANK = "#ccc"
"""Colour of a value that is not finite, in figures and pictures of matrices."""

UNCOLOURED = "#eef1f6"
"""Colour of a cell whose number only stands for a text."""

LEVELS = 240
"""Palette slots 0..239 are the colours of a range from its low to its high end."""

ZERO = 119
"""Palette slot of zero on a diverging scale; 0 and 238 are its ends."""

INK, PAPER = 240, 253
"""First and last palette slot of the ramp from ink to paper."""

NOT_A_NUMBER, MASKED = 254, 255
"""Palette slots of a value that is not finite and of what a query cannot see (key > query)."""

_BENT = 33
"""Stops of a square-root scale where only linear ones can be had."""


def ramp(stops: str, size: int) -> UInt8[np.ndarray, "size 3"]:
    """Gives `size` colours, [place, rgb], evenly spaced along the stops."""
    rgb = [_rgb(stop) for stop in stops.split()]
    at = np.arange(size) / (size - 1) * (len(rgb) - 1)
    channels = [np.interp(at, range(len(rgb)), channel) for channel in zip(*rgb, strict=True)]
    return (np.stack(channels, 1) + 0.5).astype(np.uint8)


def colour_table(*, diverging: bool = False) -> UInt8[np.ndarray, "256 3"]:
    """Gives the palette, [slot, rgb].

    It is viridis, then ink to paper, then red (not a number) and grey (masked). A diverging palette
    goes from blue over near-white at `ZERO` to red; not a number is green.
    """
    colours = ramp(_DIVERGING, 2 * ZERO + 1) if diverging else ramp(_SEQUENTIAL, LEVELS)
    colours = np.pad(colours, ((0, LEVELS - len(colours)), (0, 0)), "edge")
    grey = np.rint(np.linspace(25, 255, PAPER - INK + 1))[:, None].repeat(3, 1)
    extra = [[0, 170, 0] if diverging else [220, 30, 30], [222, 222, 226]]
    return np.concatenate([colours, grey, extra]).astype(np.uint8)


def colour_range(*readings: Reading) -> tuple[float, float]:
    """Gives the values at the two ends of the colours of readings that have the same limits.

    These are the limits. An infinite or missing limit is replaced by the smallest or largest finite
    value. A range with zero inside becomes symmetric around zero, for a diverging scale.
    """
    low, high = readings[0].limits or (-math.inf, math.inf)
    finite = np.concatenate([reading.values.ravel() for reading in readings])
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
    """Whether the limits are finite, so that the range is the same at every step."""
    return limits is not None and all(map(math.isfinite, limits))


def on_root_scale(reading: Reading, ends: tuple[float, float]) -> bool:
    """Whether the reading has the square-root scale of attention patterns. On a linear scale only
    the first token's column could be seen."""
    low, high = ends
    return reading.axes[-2:] == ("query", "key") and low in (0, -high)


def along_root(share: float, *, diverging: bool) -> float:
    """Gives the place 0..1 on a square-root colour bar of a share of the largest value; the share
    is 0..1, or -1..1 where the scale diverges."""
    bent = math.copysign(math.sqrt(abs(share)), share)
    return (1 + bent) / 2 if diverging else bent


def slots(p: Float[np.ndarray, "..."], limit: float | None = None) -> UInt8[np.ndarray, "..."]:
    """Gives the palette slot of each probability on the square-root scale.

    It is `round(sqrt(p) * (LEVELS - 1))`. With a `limit` the values go from -limit to limit, and it
    is `ZERO + round(sign(x) sqrt(|x|) ZERO)` with x = p / limit.
    """
    if limit is None:
        index = np.sqrt(np.clip(p, 0, 1)) * (LEVELS - 1) + 0.5
    else:
        x = np.clip(p / limit, -1, 1)
        index = ZERO + np.copysign(np.sqrt(np.abs(x)) * ZERO, x) + 0.5
    finite = np.isfinite(p)
    if finite.all():
        return index.astype(np.uint8)
    return np.where(finite, np.nan_to_num(index), NOT_A_NUMBER).astype(np.uint8)


def colours(reading: Reading, ends: tuple[float, float]) -> UInt8[np.ndarray, "... 3"]:
    """Gives the colour of each value, [..., rgb], on the scale of its reading.

    Args:
        ends: the `colour_range` of the whole reading, where this is a part of one.
    """
    high = ends[1]
    diverging = is_diverging(ends)
    if on_root_scale(reading, ends):
        index = slots(reading.values / high, 1.0 if diverging else None)
        return colour_table(diverging=diverging)[index]
    return linear_colours(reading.values, ends)


def linear_colours(values: np.ndarray, ends: tuple[float, float]) -> UInt8[np.ndarray, "... 3"]:
    """Gives the colour of each value, [..., rgb], on a linear scale between the ends."""
    low, high = ends
    diverging = is_diverging(ends)
    finite = np.isfinite(values)
    # In float64: the width of a range of large float32 may be infinite.
    share = np.clip((np.where(finite, values, low).astype(float) - low) / (high - low), 0, 1)
    index = np.rint(share * _last(diverging))
    index = np.where(finite, index, NOT_A_NUMBER).astype(np.uint8)
    return colour_table(diverging=diverging)[index]


def is_diverging(ends: tuple[float, float]) -> bool:
    """Whether colours over this range go from blue to red, with zero in the middle."""
    return ends[0] == -ends[1]


def bar_slots(size: int, *, diverging: bool) -> UInt8[np.ndarray, " size"]:
    """Gives the palette slots of a colour bar with `size` places."""
    return np.linspace(0, _last(diverging), size).round().astype(np.uint8)


def colour_scale(*, diverging: bool, root: bool) -> list[list[Any]]:
    """Gives a scale in plotly's form: shares of the range, each with its colour.

    Plotly's scales are linear. For a square-root scale the shares are squared, so that the figure
    can hold the values as they are.
    """
    names = (_DIVERGING if diverging else _SEQUENTIAL).split()
    along = np.linspace(0, 1, len(names))
    rgb: Any = [_rgb(name) for name in names]
    if root:
        along = np.linspace(0, 1, _BENT)
        rgb = colour_table(diverging=diverging)[bar_slots(_BENT, diverging=diverging)]
        side = 2 * along - 1
        along = (1 + np.copysign(side**2, side)) / 2 if diverging else along**2
    return [
        [share, "rgb({},{},{})".format(*one)]
        for share, one in zip(along.tolist(), rgb, strict=True)
    ]


def page_colours() -> dict[str, Any]:
    """Gives the colours that the page draws with, for JSON.

    Each table of colours is one hexadecimal text. The diverging ones have an odd size, so that zero
    has a colour of its own.
    """
    tables = {
        "sequential": ramp(_SEQUENTIAL, 256),
        "light": ramp(_PAGE_LIGHT, 257),
        "dark": ramp(_PAGE_DARK, 257),
    }
    return {**{name: table.tobytes().hex() for name, table in tables.items()}, "lines": _PAGE_LINES}


def _rgb(name: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(name)
    return red, green, blue


def _last(diverging: bool) -> int:
    """Gives the palette slot of the high end."""
    return 2 * ZERO if diverging else LEVELS - 1
