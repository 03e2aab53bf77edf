"""Draws all matrices of one instrument as one labelled PNG, for where no figure can be shown."""

import io
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from tlens_callback.palette import BLANK, is_diverging, linear_colours
from tlens_callback.reading import Reading
from tlens_callback.render.plain import cut
from tlens_callback.render.score_panels import (
    COLUMNS,
    LONGEST_NAME,
    Panel,
    check_panels,
    score_panels,
)
from tlens_callback.render.text import drawable, font, shorten

_WIDEST, _EDGE, _GAP_X, _GAP_Y = 1200, 12, 26, 18
_PANEL, _CELL, _LOWEST = 250, 32, 12
"""In pixels: width of a panel's cells, of the widest cell; least height of a row with a name."""

_BAR = (120, 9)
_NARROWEST = 200


def score_picture(readings: Sequence[Reading], *, step: int | None = None) -> bytes:
    """Draws the readings of one instrument that have two axes as one PNG, with a panel for each.

    The first axis goes down, the second across. The title of a panel is its measure and probe.
    Below it is its colour bar, with the unit and the numbers at its ends. Panels of one unit and
    equal limits share a range: the limits, or, where these are missing or infinite, the values of
    this step, and the bar says so. A range with zero inside is symmetric around zero: its colours
    go from blue over near-white to red. Other ranges have the colours of viridis. Values that are
    not finite are grey. Numbers are written in cells that are wide enough for them.

    A measure `<other>_spread` beside `<other>` is left out, and so are ids that stand for texts
    (unit "index"): one could read them only by hovering.

    Args:
        step: written into the title.

    Raises:
        ValueError: where nothing is left to draw, or for readings of several instruments.
    """
    panels = score_panels(readings, with_ids=False)
    check_panels(panels, readings)
    drawn = [_panel(panel) for panel in panels]
    widest = max(panel.width for panel in drawn)
    columns = max(1, min(COLUMNS, len(drawn), (_WIDEST - _EDGE) // (widest + _GAP_X)))
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    total = max(2 * _EDGE + columns * (widest + _GAP_X) - _GAP_X, 420)
    page = Image.new("RGB", (total, 34 + sum(heights) + _GAP_Y * len(rows)), "white")
    first = panels[0].reading
    title = f"{first.instrument}: {first.axes[0]} down, {first.axes[1]} across"
    title = title if step is None else f"step {step} · {title}"
    face = font(15)
    ImageDraw.Draw(page).text((_EDGE, 8), shorten(title, total - 2 * _EDGE, face), "black", face)
    top = 34
    for row, height in zip(rows, heights, strict=True):
        for i, panel in enumerate(row):
            page.paste(panel, (_EDGE + i * (widest + _GAP_X), top))
        top += height + _GAP_Y
    out = io.BytesIO()
    page.save(out, "PNG", compress_level=1)
    return out.getvalue()


def _panel(panel: Panel) -> Image.Image:
    """Draws title, cells, names of rows and columns, and colour bar."""
    reading, ends = panel.reading, panel.scale.ends
    small = font(11)
    down, across = reading.values.shape
    wide = _CELL if across <= 8 or reading.axes[0] == "probe" else _PANEL // across
    wide = max(1, wide if across * wide <= _WIDEST - 160 else (_WIDEST - 160) // across)
    tall = max(_LOWEST if down <= 40 else 1, min(wide, 18, 240 // down))
    rows, columns = _names(reading, reading.axes[0]), _names(reading, reading.axes[1])
    numbered = all(name.isdecimal() for name in columns)
    left = 6 + math.ceil(max(small.getlength(name) for name in rows))
    room = 15 if numbered else 6 + math.ceil(max(small.getlength(name) for name in columns))
    top, bottom = 19, 19 + down * tall
    name = drawable(panel.name, " ")
    words = drawable(reading.unit + (", this step's range" if panel.scale.moves else ""), " ")
    # The number at the right end reaches beyond the bar.
    under = left + _BAR[0] + 12 + max(30, math.ceil(small.getlength(words)))
    width = max(left + across * wide, under, _NARROWEST)
    picture = Image.new("RGB", (width, bottom + room + 28), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, 2), shorten(name, width - left, font(12)), "black", font(12))
    colours = linear_colours(reading.values, ends)
    colours[~np.isfinite(reading.values)] = ImageColor.getrgb(BLANK)
    grid = Image.fromarray(colours.repeat(tall, 0).repeat(wide, 1))
    picture.paste(grid, (left, top))
    every = math.ceil(_LOWEST / tall)
    for i in range(0, down, every):
        draw.text((left - 4, top + i * tall + tall / 2), rows[i], "black", small, anchor="rm")
    widest = max(small.getlength(name) for name in columns) + 4 if numbered else _LOWEST
    for i in range(0, across, math.ceil(widest / wide)):
        middle = left + i * wide + wide / 2
        if numbered:
            draw.text((middle, bottom + 3), columns[i], "black", small, anchor="ma")
        else:
            upright = _upright(columns[i])
            picture.paste(upright, (round(middle - upright.width / 2), bottom + 4))
    if wide == _CELL and tall >= _LOWEST:
        _write_numbers(draw, reading.values, colours, (left, top), (wide, tall))
    y = bottom + room + 4
    low, high = ends
    bar = np.linspace(low, high, _BAR[0], dtype=np.float32)[None].repeat(_BAR[1], 0)
    picture.paste(Image.fromarray(linear_colours(bar, ends)), (left, y))
    draw.text((left, y + 10), f"{low:.3g}", "black", small)
    if is_diverging(ends):
        draw.text((left + _BAR[0] / 2, y + 10), "0", "black", small, anchor="ma")
    draw.text((left + _BAR[0], y + 10), f"{high:.3g}", "black", small, anchor="ra")
    draw.text((left + _BAR[0] + 6, y - 2), words, "black", small)
    return picture


def _write_numbers(
    draw: ImageDraw.ImageDraw,
    values: np.ndarray,
    colours: np.ndarray,
    corner: tuple[int, int],
    cell: tuple[int, int],
) -> None:
    tiny = font(10)
    for (i, j), value in np.ndenumerate(values):
        text = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.3g}"
        if len(text) > 5 or not np.isfinite(value):
            text = f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
        light = colours[i, j] @ (0.299, 0.587, 0.114) > 130
        x, y = corner[0] + (j + 0.5) * cell[0], corner[1] + (i + 0.5) * cell[1]
        draw.text((x, y), text, "black" if light else "white", tiny, anchor="mm")


@lru_cache(maxsize=1000)
def _upright(name: str) -> Image.Image:
    """Draws the name of a column, written upwards."""
    small = font(11)
    strip = Image.new("RGB", (math.ceil(small.getlength(name)) + 1, 14), "white")
    ImageDraw.Draw(strip).text((0, 0), name, "black", small)
    return strip.transpose(Image.Transpose.ROTATE_90)


def _names(reading: Reading, axis: str) -> list[str]:
    """Gives the labels of an axis, or its numbers where it has no labels."""
    names = reading.labels.get(axis)
    if names is None:
        return [str(i) for i in range(reading.values.shape[reading.axes.index(axis)])]
    # Names of probes may be sentences; a token's space counts.
    space = " " if axis == "probe" else "·"
    return [cut(drawable(name, space), 24 if axis == "probe" else LONGEST_NAME) for name in names]
