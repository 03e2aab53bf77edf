"""Writes one reading, of any axes, as a small piece of HTML without script, style sheet or network.

Only values have colours of their own; the rest has those of the page, dark or light.
"""

import math
from collections.abc import Callable
from itertools import islice, product

import numpy as np

from tlens_callback.palette import (
    LINE,
    bar_slots,
    colour_range,
    colour_table,
    colours,
    is_diverging,
    on_root_scale,
)
from tlens_callback.reading import TOKEN_AXES, Reading, legible
from tlens_callback.render.bitmap import attention, picture
from tlens_callback.render.markup import decimal, index_name, more, text
from tlens_callback.render.plain import cut
from tlens_callback.render.slices import place, stands_for_text, take
from tlens_callback.render.svg import line

_ROWS, _COLUMNS, _NUMBERS = 40, 64, 16
"""Most rows and columns of a table; most columns of one with numbers in its cells."""

_LISTED, _SLICES, _TOKENS = 20, 4, 400

_FONT = "font:13px/1.45 system-ui,sans-serif"
_EDGE = "1px solid rgba(128,128,128,.35)"
_CELL = f"padding:1px 5px;border:{_EDGE};text-align:right;white-space:pre"
_WRAPPED = f"{_CELL};text-align:left;white-space:pre-wrap;max-width:520px"
_NAME = f"{_CELL};font-weight:normal;opacity:.75"
_TABLE = "border-collapse:collapse;margin:4px 0;font-size:12px;width:auto;text-align:right"


def snippet(reading: Reading) -> str:
    """Writes what a notebook shows for a reading.

    At the top are key, unit, axes, shape and limits; at the bottom are statistics, with the number
    of values that are not finite. Between them is what suits the axes: the number; a line over the
    layers; bars; tokens with their colours; a table of coloured cells, or of the texts that the
    values stand for; a picture of a matrix that is too large for a table; the mosaic of attention
    patterns; of anything else the first slices. A line counts what is cut off. All text is escaped.
    """
    sizes = zip(reading.axes, reading.values.shape, strict=True)
    about = [reading.unit, " x ".join(f"{axis} {size}" for axis, size in sizes)]
    if reading.limits is not None:
        about.append("limits {:g}..{:g}".format(*reading.limits))
    head = " · ".join(text(part) for part in about if part)
    # A scroll bar of its own: a wide table does not widen the notebook.
    return (
        f'<div style="{_FONT};color:inherit;overflow-x:auto;max-width:100%;text-align:left">'
        f'<div><b style="font-family:monospace">{text(reading.key)}</b> '
        f'<span style="opacity:.75">{head}</span></div>'
        f'{_body(reading)}<div style="opacity:.75">{_statistics(reading)}</div></div>'
    )


def _body(reading: Reading) -> str:
    if reading.values.size == 0:
        return "<div>no values</div>"
    if not reading.axes:
        said = "" if reading.texts is None else f" {text(repr(reading.texts.item()))}"
        return f'<div style="font-size:26px">{_decimal(reading, reading.values.item())}{said}</div>'
    if mosaic := attention(reading):
        return mosaic
    if len(reading.axes) == 1:
        return _along(reading)
    if len(reading.axes) == 2:
        return _matrix(reading, colour_range(reading))
    return _first_slices(reading)


def _along(reading: Reading) -> str:
    """Writes a reading of one axis."""
    (axis,) = reading.axes
    if reading.texts is None and reading.values.size > 1 and np.isfinite(reading.values).any():
        if axis in TOKEN_AXES and axis in reading.labels:
            return _tokens(reading)
        if axis in ("layer", "update") or (axis not in reading.labels and axis != "rank"):
            return line(reading)
    return _list(reading)


def _matrix(reading: Reading, ends: tuple[float, float]) -> str:
    rows, columns = reading.values.shape
    if reading.unit == "index" or reading.texts is not None:
        return _table(reading, None, min(rows, _ROWS), min(columns, _NUMBERS))
    if rows <= _ROWS and columns <= _COLUMNS:
        return _table(reading, ends, rows, columns) + _legend(reading, ends)
    return picture(reading, ends) + _legend(reading, ends)


def _table(reading: Reading, ends: tuple[float, float] | None, rows: int, columns: int) -> str:
    """Writes a table with a row for each index of the first axis; without `ends`, no colours."""
    down, across = reading.axes
    bare = columns > _NUMBERS
    upright = ";writing-mode:vertical-rl" if bare and across in reading.labels else ""
    names = [index_name(reading, across, i) for i in range(columns)]
    if bare and across not in reading.labels:
        names = [name if i % 4 == 0 else "" for i, name in enumerate(names)]
    corner = f'<th style="{_NAME}">{text(down)} \\ {text(across)}</th>'
    names = [f'<th style="{_NAME};min-width:10px{upright}">{name}</th>' for name in names]
    lines = [f"<tr>{corner}{''.join(names)}</tr>"]
    rgb = None if ends is None else colours(reading, ends)
    for i in range(rows):
        cells = [f'<th style="{_NAME}">{index_name(reading, down, i)}</th>']
        for j in range(columns):
            value = reading.values[i, j]
            if rgb is None:
                cells.append(f'<td style="{_CELL}">{_said(reading, i, j)}</td>')
                continue
            where = text(place(reading, {down: i, across: j}))
            shown = "" if bare and math.isfinite(value) else decimal(value, 3)
            style = f"{_ink(rgb[i, j])};padding:3px"
            cells.append(f'<td style="{style}" title="{where}: {decimal(value, 7)}">{shown}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    all_rows, all_columns = reading.values.shape
    return (
        f'<table style="{_TABLE}">{"".join(lines)}</table>'
        + more(all_rows - rows, down)
        + more(all_columns - columns, across)
    )


def _said(reading: Reading, i: int, j: int) -> str:
    """Writes the number of a cell and its text; only the text where the number is an id for it."""
    number = _decimal(reading, reading.values[i, j])
    if reading.texts is None:
        return number
    said = text(repr(cut(str(reading.texts[i, j]), 40)))
    return said if reading.unit == "index" else f"{number} {said}"


def _first_slices(reading: Reading) -> str:
    """Writes the first matrices of the last two axes, side by side, on one scale."""
    leading, sizes = reading.axes[:-2], reading.values.shape[:-2]
    ends = colour_range(reading)
    shown = []
    for indices in islice(product(*map(range, sizes)), _SLICES):
        at = dict(zip(leading, indices, strict=True))
        title = f'<div style="opacity:.75">{text(place(reading, at))}</div>'
        shown.append(f"<div>{title}{_matrix(take(reading, at), ends)}</div>")
    return f'<div style="display:flex;flex-wrap:wrap;gap:4px 20px">{"".join(shown)}</div>' + more(
        math.prod(sizes) - len(shown), f"of {' x '.join(leading)}"
    )


def _tokens(reading: Reading) -> str:
    """Writes the tokens in order, each on the colour of its value."""
    (axis,) = reading.axes
    ends = colour_range(reading)
    labels = reading.labels[axis][:_TOKENS]
    words = [text(word) for word in legible(labels)]
    rgb = colours(reading, ends)
    shown = [
        f'<bdi style="{_ink(rgb[i])};padding:1px 2px;margin:1px;display:inline-block;'
        f'white-space:pre" title="{i}: {_about(label, words[i])}{decimal(reading.values[i], 7)}">'
        f"{words[i] or ('' if label else '&nbsp;')}</bdi>"
        for i, label in enumerate(labels)
    ]
    left = more(reading.values.size - len(shown), axis)
    return f'<div style="max-width:760px">{"".join(shown)}</div>{left}{_legend(reading, ends)}'


def _about(label: str, word: str) -> str:
    """Writes the bytes of a token that is a part of a character."""
    return "" if text(label) == word else f"{text(label)}: "


def _list(reading: Reading) -> str:
    """Writes a row for each index: its name, the number, a bar, and the text of the number."""
    (axis,) = reading.axes
    low, high = colour_range(reading)
    low, high = min(low, 0), max(high, 0)
    lines = []
    for i, value in enumerate(reading.values[:_LISTED]):
        cells = [f'<td style="{_WRAPPED}">{index_name(reading, axis, i, 400)}</td>']
        if not stands_for_text(reading):
            cells.append(f'<td style="{_CELL}">{_decimal(reading, value)}</td>')
        if reading.unit not in ("index", "event"):
            bar = _bar(float(value), low, high) if math.isfinite(value) else ""
            cells.append(f'<td style="{_CELL}">{bar}</td>')
        if reading.texts is not None:
            said = text(repr(cut(str(reading.texts[i]), 400)))
            cells.append(f'<td style="{_WRAPPED}">{said}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    left = more(reading.values.size - len(lines), axis)
    return f'<table style="{_TABLE}">{"".join(lines)}</table>{left}'


def _bar(value: float, low: float, high: float) -> str:
    scale = 120 / (high - low or 1)
    value = min(max(value, low), high)
    start, width = (min(value, 0) - low) * scale, abs(value) * scale
    return (
        f'<div style="width:120px"><div style="height:9px;margin-left:{start:.1f}px;'
        f'width:{width:.1f}px;background:{LINE}"></div></div>'
    )


def _statistics(reading: Reading) -> str:
    values = reading.values
    finite = values[np.isfinite(values)]
    parts: list[str] = []
    if values.size > 1 and finite.size and reading.unit not in ("index", "event"):
        parts = [f"mean {decimal(finite.mean(dtype=np.float64))}"]
        # The extremes of attention are a masked key and the first token.
        if reading.axes[-2:] != ("query", "key"):
            smallest = _extreme(reading, np.argmin, math.inf)
            parts = [f"smallest {smallest}", *parts]
            parts.append(f"largest {_extreme(reading, np.argmax, -math.inf)}")
    counts = {"NaN": np.isnan(values), "inf": np.isposinf(values), "-inf": np.isneginf(values)}
    parts += [
        f"<b>{int(where.sum())} of {values.size} {name}</b>"
        for name, where in counts.items()
        if where.any()
    ]
    return " · ".join(parts)


def _extreme(reading: Reading, find: Callable[[np.ndarray], np.intp], other: float) -> str:
    """Writes the smallest or largest finite value, and where it is."""
    values = reading.values
    i = int(find(np.where(np.isfinite(values), values, other)))
    indices = map(int, np.unravel_index(i, values.shape))
    at = place(reading, dict(zip(reading.axes, indices, strict=True)))
    return f"{decimal(values.flat[i])} at {text(cut(at, 60))}"


def _decimal(reading: Reading, value: np.floating | float) -> str:
    """Writes a number; a whole one where it is an id."""
    whole = reading.unit == "index" and math.isfinite(value)
    return f"{value:.0f}" if whole else decimal(value)


def _ink(colour: np.ndarray) -> str:
    """Writes the style of a cell: its background, with black or white text."""
    red, green, blue = (int(part) for part in colour)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    return f"background:#{red:02x}{green:02x}{blue:02x};color:{'#fff' if dark else '#000'}"


def _legend(reading: Reading, ends: tuple[float, float]) -> str:
    low, high = ends
    diverging = is_diverging(ends)
    colours_of_bar = colour_table(diverging=diverging)[bar_slots(9, diverging=diverging)]
    stops = ",".join("rgb({},{},{})".format(*colour) for colour in colours_of_bar)
    note = ", square-root scale" if on_root_scale(reading, ends) else ""
    return (
        f'<div style="opacity:.85;font-size:12px">{decimal(low)} <span style="display:inline-block;'
        f'width:120px;height:9px;background:linear-gradient(to right,{stops})"></span> '
        f"{decimal(high)} {text(reading.unit)}{note}</div>"
    )
