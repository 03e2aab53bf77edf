"""All matrices of one instrument, layer x head or the like, as one interactive figure."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlens_callback.palette import BLANK, colour_range, colour_scale, is_diverging, is_fixed
from tlens_callback.reading import TOKEN_AXES, Reading
from tlens_callback.render.panels import axis_names, figure, panel_title, ticks
from tlens_callback.render.plain import number, plain
from tlens_callback.render.slices import stands_for_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLUMNS = 4
_GAP_X, _GAP_Y, _ROW, _BAR = 0.05, 52, 230, 150
"""Between panels: a share of the width, pixels of height; height of a panel in a tall figure, and
of a colour bar with its title."""

_LONGEST = 12

_Scale = tuple[str, tuple[float, float] | None]
"""What panels must have in common to share a colour bar: unit and limits."""


def score_figure(readings: Sequence[Reading]) -> "Figure":
    """Small multiples of one instrument's readings of two axes: "layer" or "feature", and another
    but "rank".

    Readings of other axes are left out. Layer 0 is at the top, head 0 on the left, a panel is
    titled by measure and probe, hovering says "L5H1 induction 0.93". Labels of the axes are at the
    ticks, cut to 12 characters and, where there are many, not at each; hovering says them whole.
    Names that occur twice, and tokens, have their position before them. A measure
    `<other>_spread` beside `<other>` has no panel of its own: hovering says "L5H1 induction 0.93 ±
    0.02". Nor have token ids and the like, a reading of unit "index" with texts: hovering over its
    probe's other panels of the same axes and shape says the text too.

    Panels of one unit and equal `limits` share a colour bar. Without limits, or with infinite
    ones, they share the range of their own values, which the bar says, as it changes from step to
    step. A range with zero inside is symmetric around zero, with a diverging scale, white at zero.
    What is not finite is left blank.

    Raises:
        ValueError: where no reading has these axes, or they are of several instruments.
    """
    matrices = {r.key: r for r in readings if is_matrix(r)}
    said = _texts(list(matrices.values()))
    spreads = {key: matrices.get(spread_key(r)) for key, r in matrices.items()}
    beside = {id(spread) for spread in spreads.values()}
    beside |= {id(text) for text in said.values()}
    panels = [r for r in matrices.values() if id(r) not in beside]
    if not panels:
        raise ValueError(
            f"score_figure needs at least one reading of axes ('layer', 'head') or the like, got "
            f"{[(r.key, r.axes) for r in readings]}."
        )
    if len(instruments := {r.instrument for r in panels}) > 1:
        raise ValueError(f"One figure shows one instrument, got {sorted(instruments)}.")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    gap = _GAP_Y + max(_room(r, r.axes[1]) for r in panels)
    scales: list[_Scale] = list(dict.fromkeys((r.unit, r.limits) for r in panels))
    inner = max(480, rows * (_ROW + gap - _GAP_Y), len(scales) * _BAR)
    across = (1 - _GAP_X * (columns - 1)) / columns
    down = (1 - gap / inner * (rows - 1)) / rows
    layout: dict[str, Any] = {
        "margin": {"l": 48, "r": 96, "t": 40, "b": 44 + gap - _GAP_Y},
        "annotations": [],
        "plot_bgcolor": BLANK,
        "font": {"size": 11},
        "template": "none",
    }
    if rows > 2 or len(scales) > 1 or (rows > 1 and gap > _GAP_Y):
        layout["height"] = inner + 84 + gap - _GAP_Y
    for i, scale in enumerate(scales):
        layout[f"coloraxis{i + 1 if i else ''}"] = _colour_axis(scale, panels, i, len(scales))
    data = []
    for i, reading in enumerate(panels):
        row, column = divmod(i, columns)
        left, top = column * (across + _GAP_X), 1 - row * (down + gap / inner)
        axis = str(i + 1) if i else ""
        bottom_panel = i + columns >= len(panels)
        down_axis, across_axis = reading.axes
        down_name, across_name = map(plain, reading.axes)
        place = "L%{y}" if down_axis == "layer" else f"{down_name} %{{y}}"
        place += "H%{x}" if reading.axes == ("layer", "head") else f" {across_name} %{{x}}"
        layout[f"xaxis{axis}"] = {
            "domain": [left, min(1, left + across)],
            "anchor": f"y{axis}",
            "title": {"text": across_name if bottom_panel else "", "standoff": 4},
            **_ticks(reading, across_axis),
        }
        layout[f"yaxis{axis}"] = {
            "domain": [max(0, top - down), top],
            "anchor": f"x{axis}",
            "autorange": "reversed",
            "title": {"text": down_name if column == 0 else "", "standoff": 4},
            **_ticks(reading, down_axis),
        }
        name = " ".join(filter(None, (reading.measure, reading.probe)))
        layout["annotations"].append(panel_title(name, left, top))
        number_of_scale = scales.index((reading.unit, reading.limits))
        value = "%{z:.3g}"
        more: dict[str, Any] = {}
        spread = spreads[reading.key]
        if spread is not None and spread.values.shape == reading.values.shape:
            value += " ± %{customdata:.2g}"
            more["customdata"] = _numbers(spread.values)
        text = reading if reading.texts is not None else said.get(reading.key)
        if text is not None and text.texts is not None:
            value += " %{text}"
            more["text"] = [[plain(repr(each)) for each in row] for row in text.texts.tolist()]
        data.append(
            {
                **more,
                "type": "heatmap",
                "z": _numbers(reading.values),
                "x": axis_names(reading, across_axis),
                "y": axis_names(reading, down_axis),
                "xaxis": f"x{axis}",
                "yaxis": f"y{axis}",
                "coloraxis": f"coloraxis{number_of_scale + 1 if number_of_scale else ''}",
                "hovertemplate": f"{place} {plain(name)} {value}<extra></extra>",
            }
        )
    return figure(data, layout)


def is_matrix(reading: Reading) -> bool:
    """Whether `score_figure` shows this reading."""
    first, *rest = reading.axes or ("",)
    two = first in ("layer", "feature") and len(rest) == 1 and rest != ["rank"]
    return two and reading.values.size > 0


def spread_key(reading: Reading) -> str:
    names = [reading.instrument, f"{reading.measure}_spread", reading.probe]
    return "/".join(name for name in names if name is not None)


def _colour_axis(
    scale: _Scale, panels: Sequence[Reading], index: int, total: int
) -> dict[str, Any]:
    unit, limits = scale
    title = plain(unit)
    if not is_fixed(limits):
        title += ",<br>this step's<br>range"
    low, high = colour_range(*(r for r in panels if (r.unit, r.limits) == scale))
    return {
        "cmin": low,
        "cmax": high,
        "colorscale": colour_scale(diverging=is_diverging((low, high)), root=False),
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


def _texts(matrices: Sequence[Reading]) -> dict[str, Reading]:
    """Key -> the reading that says, with texts, what the cells of that one stand for."""
    words = [r for r in matrices if stands_for_text(r)]
    others = [r for r in matrices if all(r is not word for word in words)]

    def place(reading: Reading) -> tuple[object, ...]:
        return reading.probe, reading.axes, reading.values.shape

    by_place = {place(word): word for word in reversed(words)}
    return {r.key: by_place[place(r)] for r in others if place(r) in by_place}


def _ticks(reading: Reading, axis: str) -> dict[str, Any]:
    """On whole layers and heads; the names of columns read from below."""
    room = _room(reading, axis)
    shown = ticks(reading, axis, most=16 if room else 8, longest=_LONGEST)
    upright = {"tickangle": 90} if room and axis == reading.axes[1] else {}
    return {**shown, "showgrid": False, **upright}


def _room(reading: Reading, axis: str) -> int:
    """Pixels that the names of an axis need when they are written upwards; 0 for numbers."""
    names = reading.labels.get(axis, ())
    if axis not in TOKEN_AXES and all(name.isdecimal() for name in names):
        return 0
    longest = max((min(len(name), _LONGEST) for name in names), default=0)
    return 6 * (longest + (3 if axis in TOKEN_AXES else 0))
