"""Draws all matrices of one instrument, layer x head or the like, as one interactive figure."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlens_callback.palette import BLANK, colour_scale, is_diverging
from tlens_callback.reading import TOKEN_AXES, Reading
from tlens_callback.render.panels import LOOK, Grid, axis_names, figure, nth, ticks
from tlens_callback.render.plain import number, plain
from tlens_callback.render.score_panels import (
    COLUMNS,
    LONGEST_NAME,
    Panel,
    Scale,
    check_panels,
    is_matrix,
    score_panels,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_GAP_X, _GAP_Y, _ROW, _BAR = 0.05, 52, 230, 150
"""Between panels: a share of the width, pixels of height; height of a panel in a tall figure, and
of a colour bar with its title."""


def score_figure(readings: Sequence[Reading]) -> "Figure":
    """Draws a panel for each reading of one instrument that has two axes: "layer" or "feature", and
    any other than "rank".

    Readings of other axes are left out. Layer 0 is at the top and head 0 on the left. The title of
    a panel is its measure and probe; hovering shows "L5H1 induction 0.93". The ticks carry the
    labels of the axes, cut to 12 characters; where there are many, some ticks have none. Hovering
    shows the whole label. Tokens, and names that occur twice, begin with their position.

    A measure `<other>_spread` beside `<other>` has no panel of its own: hovering shows
    "L5H1 induction 0.93 ± 0.02". A reading of ids that stand for texts has none either: hovering
    over the other panels of its probe, axes and shape shows the text too.

    Panels of one unit and equal `limits` share a colour bar. If the limits are missing or infinite,
    the bar covers the values of this step, and its title says so. A range with zero inside is
    symmetric around zero, with a diverging scale that is white at zero. Values that are not finite
    are left blank.

    Raises:
        ValueError: where no reading has these axes, or they are of several instruments.
    """
    panels = score_panels([r for r in readings if is_matrix(r)], with_ids=True)
    check_panels(panels, readings)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    gap = _GAP_Y + max(_room(panel.reading, panel.reading.axes[1]) for panel in panels)
    scales = list(dict.fromkeys(panel.scale for panel in panels))
    inner = max(480, rows * (_ROW + gap - _GAP_Y), len(scales) * _BAR)
    grid = Grid(len(panels), columns, _GAP_X, gap / inner)
    layout: dict[str, Any] = {
        **LOOK,
        "margin": {"l": 48, "r": 96, "t": 40, "b": 44 + gap - _GAP_Y},
        "plot_bgcolor": BLANK,
    }
    if rows > 2 or len(scales) > 1 or (rows > 1 and gap > _GAP_Y):
        layout["height"] = inner + 84 + gap - _GAP_Y
    for i, scale in enumerate(scales):
        layout[f"coloraxis{nth(i)}"] = _colour_axis(scale, i, len(scales))
    data = []
    for i, panel in enumerate(panels):
        down, across = panel.reading.axes
        x = {
            "title": {"text": plain(across) if grid.is_lowest(i) else "", "standoff": 4},
            **_ticks(panel.reading, across),
        }
        y = {
            "autorange": "reversed",
            "title": {"text": plain(down) if i % columns == 0 else "", "standoff": 4},
            **_ticks(panel.reading, down),
        }
        axes = grid.place(layout, i, panel.name, x, y)
        data.append(
            {
                "type": "heatmap",
                "z": _numbers(panel.reading.values),
                "x": axis_names(panel.reading, across),
                "y": axis_names(panel.reading, down),
                **axes,
                "coloraxis": f"coloraxis{nth(scales.index(panel.scale))}",
                **_hovering(panel),
            }
        )
    return figure(data, layout)


def _hovering(panel: Panel) -> dict[str, Any]:
    """The text over a cell, and what it says beside the value."""
    down, across = panel.reading.axes
    place = "L%{y}" if down == "layer" else f"{plain(down)} %{{y}}"
    place += "H%{x}" if (down, across) == ("layer", "head") else f" {plain(across)} %{{x}}"
    value = "%{z:.3g}"
    more: dict[str, Any] = {}
    if panel.spread is not None:
        value += " ± %{customdata:.2g}"
        more["customdata"] = _numbers(panel.spread)
    if panel.texts is not None:
        value += " %{text}"
        more["text"] = [[plain(repr(text)) for text in row] for row in panel.texts.tolist()]
    return {**more, "hovertemplate": f"{place} {plain(panel.name)} {value}<extra></extra>"}


def _colour_axis(scale: Scale, index: int, total: int) -> dict[str, Any]:
    title = plain(scale.unit)
    if scale.moves:
        title += ",<br>this step's<br>range"
    low, high = scale.ends
    return {
        "cmin": low,
        "cmax": high,
        "colorscale": colour_scale(diverging=is_diverging(scale.ends), root=False),
        "colorbar": {
            "title": {"text": title},
            "thickness": 12,
            "x": 1.015,
            "xanchor": "left",
            "y": 1 - index / total,
            "yanchor": "top",
            "len": 1 / total - (0.04 if total > 1 else 0),
        },
    }


def _numbers(values: np.ndarray) -> list[list[float | None]]:
    return [[number(value) for value in row] for row in values]


def _ticks(reading: Reading, axis: str) -> dict[str, Any]:
    """Gives an axis ticks at whole layers and heads; the names of columns are written upwards."""
    room = _room(reading, axis)
    shown = ticks(reading, axis, most=16 if room else 8, longest=LONGEST_NAME)
    upright = {"tickangle": 90} if room and axis == reading.axes[1] else {}
    return {**shown, "showgrid": False, **upright}


def _room(reading: Reading, axis: str) -> int:
    """Gives the pixels that the names of an axis need when written upwards; 0 for numbers."""
    names = reading.labels.get(axis, ())
    if axis not in TOKEN_AXES and all(name.isdecimal() for name in names):
        return 0
    longest = max((min(len(name), LONGEST_NAME) for name in names), default=0)
    return 6 * (longest + (3 if axis in TOKEN_AXES else 0))
