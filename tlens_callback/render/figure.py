"""Draws one reading, of any axes, as an interactive figure."""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from tlens_callback.palette import (
    BLANK,
    UNCOLOURED,
    colour_range,
    colour_scale,
    is_diverging,
    is_fixed,
    on_root_scale,
)
from tlens_callback.reading import Reading
from tlens_callback.render.markup import decimal
from tlens_callback.render.panels import LOOK, axis_names, figure, ticks
from tlens_callback.render.plain import number, plain
from tlens_callback.render.slices import place, take

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_VALUES, MOST_SLICES = 1_000_000, 2_000
"""The most that a figure takes: about ten bytes a value; each slice is a place of its slider."""

_LINES = ("layer", "update")
_MANY, _WRITTEN = 200, 24
"""With more values than the first, bars become a line. Up to as many bars, or cells in a row, as
the second have their text written on them."""


def to_plotly(reading: Reading, at: Mapping[str, int] | None = None) -> "Figure":
    """Draws the figure of one reading: a number, a line or bars, or a heat map with its first axis
    down.

    A reading of more than two axes is a heat map of the last two, with a slider over the others.
    Colours run over `palette.colour_range`. Attention patterns (query down, key across) have a
    square-root scale; hovering shows the values themselves. Values of unit "index" stand for
    something else: they are written in their cells, without a colour. Values that are not finite
    are left blank and counted in the title.

    Args:
        at: axis -> index, to show only the part at this index: `{"layer": 5}`.

    Raises:
        ValueError: for an axis or index that the reading lacks, or more than `MOST_VALUES` values
            or `MOST_SLICES` places of the slider.
    """
    reading, where = _chosen(reading, at or {})
    slices = math.prod(reading.values.shape[:-2])
    if reading.values.size > MOST_VALUES or slices > MOST_SLICES:
        sizes = dict(zip(reading.axes, reading.values.shape, strict=True))
        raise ValueError(
            f"{reading.key!r} is too large for one figure: it has {reading.values.size:,} values "
            f"in {slices:,} slices, {sizes}; a figure takes {MOST_VALUES:,} values in "
            f"{MOST_SLICES:,} slices. Choose an index of an axis: to_plotly({reading.axes[0]}=0)."
        )
    layout: dict[str, Any] = {
        **LOOK,
        "title": {"text": _title(reading, where), "font": {"size": 14}},
        "margin": {"l": 64, "r": 24, "t": 56, "b": 56},
        "hovermode": "closest",
    }
    if reading.values.size == 0:
        note = f"no values: shape {reading.values.shape}"
        hidden = {"visible": False}
        layout |= {"annotations": [{"text": note, "showarrow": False}]}
        return figure([], layout | {"xaxis": hidden, "yaxis": hidden})
    if not reading.axes:
        return figure([_number(reading)], layout)
    if len(reading.axes) == 1 and reading.unit == "index":
        return _heat(_as_column(reading), layout)
    if len(reading.axes) == 1:
        return figure([_line(reading)], layout | _line_axes(reading))
    return _heat(reading, layout)


def _chosen(reading: Reading, at: Mapping[str, int]) -> tuple[Reading, str]:
    """Gives the part of the reading at these indices, and the name of that place."""
    for axis, i in at.items():
        if axis not in reading.axes:
            raise ValueError(f"{reading.key!r} has no axis {axis!r}; it has {reading.axes}.")
        size = reading.values.shape[reading.axes.index(axis)]
        if i not in range(size):
            raise ValueError(
                f"{reading.key!r}: {axis}={i!r} is not one of the {size} indices from 0."
            )
    return take(reading, at), place(reading, at)


def _title(reading: Reading, where: str) -> str:
    missing = int((~np.isfinite(reading.values)).sum())
    note = f"{missing} of {reading.values.size} values not finite" if missing else ""
    return " · ".join(plain(part) for part in (reading.key, where, note) if part)


def _number(reading: Reading) -> dict[str, Any]:
    text = "" if reading.texts is None else f" {reading.texts.item()!r}"
    if not np.isfinite(reading.values):
        text += f": {decimal(reading.values.item())}"
    return {
        "type": "indicator",
        "mode": "number",
        "value": _numbers(reading.values.reshape(1))[0],
        "number": {"valueformat": ".6~g"},
        "title": {"text": plain(reading.unit + text)},
    }


def _line(reading: Reading) -> dict[str, Any]:
    (axis,) = reading.axes
    trace: dict[str, Any] = {
        "x": _numbers_of(reading, axis) or axis_names(reading, axis),
        "y": _numbers(reading.values),
        "hovertemplate": f"{plain(axis)} %{{x}} %{{y:.6~g}}",
    }
    if axis in _LINES or reading.values.size > _MANY:
        trace |= {"type": "scatter", "mode": "lines+markers", "marker": {"size": 4}}
    else:
        trace |= {"type": "bar"}
    if reading.texts is not None:
        trace["text"] = _texts(reading.texts)
        trace["hovertemplate"] += " %{text}"
        if trace["type"] == "bar":
            trace["textposition"] = "auto" if reading.values.size <= _WRITTEN else "none"
    trace["hovertemplate"] += "<extra></extra>"
    return trace


def _line_axes(reading: Reading) -> dict[str, Any]:
    (axis,) = reading.axes
    unit: dict[str, Any] = {"title": {"text": plain(reading.unit)}, "gridcolor": "#ddd"}
    if is_fixed(reading.limits):
        low, high = reading.limits
        room = 0.03 * (high - low)
        unit["range"] = [low - room, high + room]
    if _numbers_of(reading, axis):
        along = {"title": {"text": plain(axis)}, "type": "linear", "tickformat": "d"}
        along |= {"gridcolor": "#eee", "zeroline": False}
    else:
        along = _axis(reading, axis)
    return {"xaxis": along, "yaxis": unit | {"zerolinecolor": "#888"}}


def _numbers_of(reading: Reading, axis: str) -> list[int] | None:
    """Gives layers and steps as numbers, where their labels are numbers; a line may have gaps."""
    labels = reading.labels.get(axis, ("",))
    whole = axis in _LINES and all(label.isascii() and label.isdecimal() for label in labels)
    return [int(label) for label in labels] if whole else None


def _as_column(reading: Reading) -> Reading:
    """Turns a list of names into a column of cells."""
    return replace(
        reading,
        values=reading.values[:, None],
        axes=(*reading.axes, ""),
        labels={**reading.labels, "": [""]},
        texts=None if reading.texts is None else reading.texts[:, None],
    )


def _heat(reading: Reading, layout: dict[str, Any]) -> "Figure":
    down, across = reading.axes[-2:]
    leading = dict(zip(reading.axes[:-2], reading.values.shape[:-2], strict=True))
    low, high = colour_range(reading)
    first: dict[str, Any] = {
        "type": "heatmap",
        "x": axis_names(reading, across),
        "y": axis_names(reading, down),
        "zmin": low,
        "zmax": high,
        "colorbar": {"title": {"text": plain(reading.unit)}, "thickness": 14},
        "colorscale": colour_scale(
            diverging=is_diverging((low, high)), root=on_root_scale(reading, (low, high))
        ),
        "hovertemplate": f"{plain(down)} %{{y}}, {plain(across)} %{{x}}: %{{z:.6~g}}",
    }
    if reading.texts is not None:
        first["hovertemplate"] += " %{text}"
    first["hovertemplate"] += "<extra></extra>"
    if reading.unit == "index":
        first |= {"colorscale": [[0, UNCOLOURED], [1, UNCOLOURED]], "showscale": False}
        first |= {"xgap": 1, "ygap": 1}
        if reading.values.shape[-1] <= _WRITTEN:
            first["texttemplate"] = "%{z}" if reading.texts is None else "%{text}"
    layout |= {
        "plot_bgcolor": BLANK,
        "xaxis": {**_axis(reading, across), "showgrid": False},
        "yaxis": {**_axis(reading, down), "showgrid": False, "autorange": "reversed"},
        "height": min(900, max(480, 15 * reading.values.shape[-2] + 160)),
    }
    if (down, across) == ("query", "key"):
        layout["yaxis"] |= {"scaleanchor": "x", "constrain": "domain"}
        layout["xaxis"] |= {"constrain": "domain"}
    wheres = [
        dict(zip(leading, indices, strict=True))
        for indices in product(*(range(size) for size in leading.values()))
    ]
    cells = [_cells(take(reading, where)) for where in wheres]
    if not leading:
        return figure([first | cells[0]], layout)
    places = [place(reading, where) for where in wheres]
    layout["sliders"] = [_slider(" x ".join(leading), places, cells)]
    return figure([first | cells[0]], layout)


def _cells(matrix: Reading) -> dict[str, Any]:
    values: dict[str, Any] = {"z": [_numbers(row) for row in matrix.values]}
    if matrix.texts is not None:
        values["text"] = [_texts(row) for row in matrix.texts]
    return values


def _slider(axes: str, places: list[str], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes the slider, of which each place puts its cells into the heat map. Frames would not do:
    plotly plays them by itself."""
    steps = [
        {
            "label": plain(name),
            "method": "restyle",
            "args": [{attribute: [rows] for attribute, rows in each.items()}],
        }
        for name, each in zip(places, cells, strict=True)
    ]
    shown = {"prefix": f"{plain(axes)}: ", "font": {"size": 13}}
    return {"active": 0, "currentvalue": shown, "pad": {"t": 56}, "steps": steps}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [number(value) for value in values]


def _texts(texts: np.ndarray) -> list[str]:
    return [plain(repr(text)) for text in texts.tolist()]


def _axis(reading: Reading, axis: str) -> dict[str, Any]:
    title = {"text": plain(axis), "standoff": 6}
    return {"title": title, "automargin": True, **ticks(reading, axis, most=48, longest=14)}
