"""All attention patterns of one probe as one labelled PNG, without a browser or matplotlib."""

import io
import zlib
from functools import lru_cache, reduce

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from tlens_callback.reading import Reading
from tlens_callback.render.text import INK, PAPER, RAMP, drawable, font, lines, shorten

LEVELS = 240
"""Palette slots 0..239: the colours of attention 0..1. Slots 240..253 are ink and paper."""

ZERO = 119
"""Palette slot of no change; 0 and 238 are the ends of a diverging scale."""

NOT_A_NUMBER, MASKED = 254, 255
"""Palette slots of a value that is not finite and of what a query cannot see (key > query)."""

# Ten published stops of viridis (van der Walt & Smith, CC0); linear in between.
_STOPS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725".split()
_TICKS = (0, 0.02, 0.1, 0.25, 0.5, 1)
# ColorBrewer's RdBu, blue to red; its middle is neutral.
_TWO_SIDED = "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f".split()
_TWO_SIDED_TICKS = (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)
_EDGE, _GAP, _BAR, _BAR_TOP = 10, 2, (170, 10), 31
_NARROWEST = 440
_MANY = 6_000_000


def palette(*, diverging: bool = False) -> UInt8[np.ndarray, "256 3"]:
    """[slot, rgb]: viridis, then ink to paper, then red (not a number) and grey (masked).

    Diverging: blue, near-white at `ZERO`, red; not a number is green.
    """
    names = _TWO_SIDED if diverging else _STOPS
    stops = np.array([[int(name[i : i + 2], 16) for i in (0, 2, 4)] for name in names])
    last = 2 * ZERO if diverging else LEVELS - 1
    at = np.arange(LEVELS) / last * (len(stops) - 1)
    colours = [np.interp(at, range(len(stops)), stops[:, i]) for i in range(3)]
    grey = np.linspace(25, 255, PAPER - INK + 1)[:, None].repeat(3, 1)
    extra = np.array([[0, 170, 0] if diverging else [220, 30, 30], [222, 222, 226]])
    return np.rint(np.concatenate([np.stack(colours, 1), grey, extra])).astype(np.uint8)


def slots(p: Float[np.ndarray, "..."], limit: float | None = None) -> UInt8[np.ndarray, "..."]:
    """Palette slot of each probability: `round(sqrt(p) * (LEVELS - 1))`.

    The square root, since on a linear scale nothing but the first token's column shows. With a
    `limit`, of values from -limit to limit, x = p / limit: `ZERO + round(sign(x) sqrt(|x|) ZERO)`.
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


def mosaic(reading: Reading, *, step: int | None = None) -> bytes:
    """One PNG of a `("layer", "head", "query", "key")` reading: a row per layer, a column per head.

    Colours run over the fixed range 0..1 on a square-root scale, so that two steps compare; over
    limits that are symmetric around zero they diverge, from blue to red, on a square-root scale to
    either side. Keys after the query are grey; in a model that sees them they are drawn. A cell is
    at least 48 pixels wide. Of many heads on a long probe (more than six million values) a pixel
    is the value farthest from zero in a square of them, and the picture says so. Labels of "layer"
    and "head" name rows and columns (a selection of layers), labels of "key" are listed below the
    picture.

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
    image.putpalette(palette(diverging=limit is not None).tobytes())
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
    """x of limits (-x, x); None of others."""
    low, high = reading.limits or (0, 1)
    return high if low == -high and np.isfinite(high) else None


def _fit(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The values, or in each square of `pooled` x `pooled` the one farthest from zero where they
    are too many."""
    side = max(values.shape[2:])
    pooled = min(int(np.ceil(np.sqrt(values.size / _MANY))), side // 48)
    if pooled <= 1:
        return values, 1
    for axis in (2, 3):
        fill = [(0, 0)] * 4
        fill[axis] = (0, -values.shape[axis] % pooled)
        values = np.moveaxis(np.pad(values, fill), axis, -1)
        squares = [values[..., i::pooled] for i in range(pooled)]
        high = reduce(np.maximum, squares)
        if not (values >= 0).all():
            low = reduce(np.minimum, squares)
            # What is not a number fails the comparison, and is the smallest, too.
            high = np.where(high >= -low, high, low)
        values = np.moveaxis(high, -1, axis)
    return values, pooled


def _cells(patterns: np.ndarray, limit: float | None) -> np.ndarray:
    """[layer, head, y, x]: palette slots, each value a square of whole pixels."""
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
    """What stands above the cells (guide, colour bar, heads), beside (layers), below (tokens)."""
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
    last = LEVELS - 1 if limit is None else 2 * ZERO
    for tick in _TICKS if limit is None else _TWO_SIDED_TICKS:
        along = np.sqrt(tick) if limit is None else (1 + np.copysign(np.sqrt(abs(tick)), tick)) / 2
        x = bar + round(along * (long - 1))
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
    colours = np.linspace(0, last, long).round().astype(np.uint8)
    canvas[_BAR_TOP : _BAR_TOP + thick, bar : bar + long] = colours
    parts = canvas[:top], canvas[top:bottom, :left], canvas[bottom:]
    return parts[0].copy(), parts[1].copy(), parts[2].copy()


def _names(reading: Reading, axis: str, letter: str) -> tuple[str, ...]:
    """Labels of an axis, a plain number with its letter: L5, H1."""
    size = reading.values.shape[reading.axes.index(axis)]
    names = reading.labels.get(axis) or [str(i) for i in range(size)]
    return tuple(letter + name if name.isdecimal() else drawable(name)[:16] for name in names)
