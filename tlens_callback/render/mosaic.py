"""Draws all attention patterns of one probe as one labelled PNG, without browser or matplotlib."""

import io
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from tlens_callback.palette import (
    MASKED,
    PAPER,
    ZERO,
    along_root,
    bar_slots,
    colour_table,
    slots,
)
from tlens_callback.reading import Reading
from tlens_callback.render.slices import farthest_from_zero
from tlens_callback.render.text import RAMP, drawable, font, lines, shorten

# Shares of the largest value that have a number on the colour bar.
_TICKS = (0, 0.02, 0.1, 0.25, 0.5, 1)
_DIVERGING_TICKS = (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)
_EDGE, _GAP, _BAR, _BAR_TOP = 10, 2, (170, 10), 31
_NARROWEST = 440
_MANY = 6_000_000


def mosaic(reading: Reading, *, step: int | None = None) -> bytes:
    """Draws a `("layer", "head", "query", "key")` reading as one PNG, with a row for each layer and
    a column for each head.

    Colours run over the fixed range 0..1 on a square-root scale, so that steps can be compared.
    Where the limits are symmetric around zero, they go from blue to red, with the square root on
    both sides. Keys after the query are grey, unless the model sees them. A cell is at least 48
    pixels wide. Of more than six million values (many heads and a long probe) each pixel shows the
    value farthest from zero in a square of them, and the picture says so. Labels of "layer" and
    "head" name the rows and columns, labels of "key" are listed below the picture.

    Args:
        reading: probabilities, `limits` (0, 1) or none; or their change, `limits` (-x, x).
        step: written into the title.

    Raises:
        ValueError: for other axes, other limits or no values.
    """
    if not is_mosaic(reading):
        raise ValueError(
            f"A mosaic needs axes ('layer', 'head', 'query', 'key'), values and limits (0, 1) or "
            f"(-x, x); {reading.key!r} has {reading.axes} of shape {reading.values.shape} "
            f"and limits {reading.limits}."
        )
    patterns, pooled = _fit(reading.values)
    limit = _limit(reading)
    cells = _cells(patterns, limit)
    layers, heads, height, width = cells.shape
    above, beside, below = _surroundings(
        (height, width),
        _names(reading, "layer", "L"),
        _names(reading, "head", "H"),
        tuple(reading.labels.get("key", ())),
        pooled,
        limit,
    )
    top, left = above.shape[0], beside.shape[1]
    bottom = top + beside.shape[0]
    canvas = np.full((bottom + below.shape[0], above.shape[1]), PAPER, np.uint8)
    canvas[:top], canvas[top:bottom, :left], canvas[bottom:] = above, beside, below
    title = ["" if step is None else f"step {step}", reading.probe or ""]
    title.append(f"{reading.instrument}/{reading.measure}")
    strip = _title(" · ".join(filter(None, title)), canvas.shape[1])
    canvas[: strip.shape[0]] = strip
    grid = np.full((layers, height + _GAP, heads, width + _GAP), PAPER, np.uint8)
    grid[:, :height, :, :width] = cells.transpose(0, 2, 1, 3)
    grid = grid.reshape(bottom - top, -1)
    canvas[top:bottom, left : left + grid.shape[1]] = grid
    image = Image.fromarray(canvas, "P")
    image.putpalette(colour_table(diverging=limit is not None).tobytes())
    out = io.BytesIO()
    # Run lengths alone are faster than zlib's search for repeats, and here also smaller.
    image.save(out, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return out.getvalue()


def is_mosaic(reading: Reading) -> bool:
    """Whether `mosaic` can draw this reading."""
    axes = ("layer", "head", "query", "key")
    limits = reading.limits in (None, (0, 1)) or _limit(reading) is not None
    return reading.axes == axes and reading.values.size > 0 and limits


def _limit(reading: Reading) -> float | None:
    """Gives x where the limits are (-x, x), otherwise None."""
    low, high = reading.limits or (0, 1)
    return high if low == -high and np.isfinite(high) else None


def _fit(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Gives the values and 1; or, where they are too many, of each square of n x n values the one
    farthest from zero, and n."""
    side = max(values.shape[2:])
    pooled = min(int(np.ceil(np.sqrt(values.size / _MANY))), side // 48)
    pooled = max(1, pooled)
    return farthest_from_zero(farthest_from_zero(values, 2, pooled), 3, pooled), pooled


def _cells(patterns: np.ndarray, limit: float | None) -> np.ndarray:
    """Gives the palette slots, [layer, head, y, x], with each value as a square of whole pixels."""
    layers, heads, queries, keys = patterns.shape
    index = slots(patterns, limit)
    hidden = ~np.tri(queries, keys, dtype=bool)
    if (index[:, :, hidden] == (0 if limit is None else ZERO)).all():
        index[:, :, hidden] = MASKED
    side = max(queries, keys)
    scale = max(-(-48 // side), min(640 // heads, 640 // layers, 200) // side)
    return index if scale == 1 else index.repeat(scale, 2).repeat(scale, 3)


def _title(text: str, width: int) -> np.ndarray:
    strip = Image.new("L", (width, 26), 255)
    face = font(15)
    text = shorten(drawable(text, " "), width - 2 * _EDGE, face)
    ImageDraw.Draw(strip).text((_EDGE, 7), text, 0, face)
    return RAMP[np.asarray(strip)]


# The same at every step of a run, and dearer than the cells.
@lru_cache(maxsize=64)
def _surroundings(
    cell: tuple[int, int],
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    tokens: tuple[str, ...],
    pooled: int,
    limit: float | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws what is above the cells (guide, colour bar, heads), beside (layers), below (tokens)."""
    height, width = cell[0] + _GAP, cell[1] + _GAP
    small = font(11)
    guide = ["row: layer, column: head", "in a cell: query down, key across, grey: masked"]
    if pooled > 1:
        what = "largest" if limit is None else "farthest from 0"
        guide.append(f"a pixel: {what} of {pooled} x {pooled} values")
    left = _EDGE + 6 + int(max(small.getlength(name) for name in rows))
    total = max(_NARROWEST, left + len(columns) * width + _EDGE)
    top = 42 + 14 * len(guide)
    bottom = top + len(rows) * height
    caption = lines([f"{i}:{drawable(token)}" for i, token in enumerate(tokens)], total - 2 * _EDGE)
    page = Image.new("L", (total, bottom + 8 + 15 * len(caption) + _EDGE), 255)
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(guide):
        draw.text((_EDGE, 29 + 14 * i), line, 60, small)
    (long, thick), bar = _BAR, total - _BAR[0] - 16
    diverging = limit is not None
    for tick in _DIVERGING_TICKS if diverging else _TICKS:
        x = bar + round(along_root(tick, diverging=diverging) * (long - 1))
        draw.line((x, _BAR_TOP + thick, x, _BAR_TOP + thick + 2), 60)
        draw.text((x, _BAR_TOP + thick + 3), f"{tick * (limit or 1):g}", 60, small, anchor="ma")
    for i, name in enumerate(rows):
        y = top + i * height + cell[0] // 2
        draw.text((left - 4, y), name, 0, small, anchor="rm")
    for i, name in enumerate(columns):
        x = left + i * width + cell[1] // 2
        draw.text((x, top - 3), shorten(name, cell[1], small), 0, small, anchor="ms")
    for i, line in enumerate(caption):
        draw.text((_EDGE, bottom + 6 + 15 * i), line, 0, font(12))
    canvas = RAMP[np.asarray(page)]
    canvas[_BAR_TOP : _BAR_TOP + thick, bar : bar + long] = bar_slots(long, diverging=diverging)
    parts = canvas[:top], canvas[top:bottom, :left], canvas[bottom:]
    return parts[0].copy(), parts[1].copy(), parts[2].copy()


def _names(reading: Reading, axis: str, letter: str) -> tuple[str, ...]:
    """Gives the labels of an axis; a number with its letter: L5, H1."""
    size = reading.values.shape[reading.axes.index(axis)]
    names = reading.labels.get(axis) or [str(i) for i in range(size)]
    return tuple(letter + name if name.isdecimal() else drawable(name)[:16] for name in names)
