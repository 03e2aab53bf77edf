"""All matrices of one instrument, layer x head or the like, as one interactive figure."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlens_callback.reading import Reading
from tlens_callback.render.panels import figure, panel_title
from tlens_callback.render.plain import cut, number, plain

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLUMNS = 4
_GAP_X, _GAP_Y, _ROW, _BAR = 0.05, 52, 230, 150
"""Between panels: a share of the width, pixels of height; height of a panel in a tall figure, and
of a colour bar with its title."""

_LONGEST = 12
_TOKENS = ("pos", "token")

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
    step; values of both signs get a range that is symmetric around zero. A range that is so has a
    diverging scale, white at zero. What is not finite is left blank.

    Raises:
        ValueError: where no reading has these axes, or they are of several instruments.
    """
    matrices = {r.key: r for r in readings if is_matrix(r)}
    said = _texts(list(matrices.values()))
    spreads = {key: matrices.get(_spread_key(r)) for key, r in matrices.items()}
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
        "plot_bgcolor": "#ccc",
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
        place = "L%{y}" if down_axis == "layer" else f"{down_axis} %{{y}}"
        place += "H%{x}" if reading.axes == ("layer", "head") else f" {across_axis} %{{x}}"
        layout[f"xaxis{axis}"] = {
            "domain": [left, min(1, left + across)],
            "anchor": f"y{axis}",
            "title": {"text": across_axis if bottom_panel else "", "standoff": 4},
            **_ticks(reading, across_axis),
        }
        layout[f"yaxis{axis}"] = {
            "domain": [max(0, top - down), top],
            "anchor": f"x{axis}",
            "autorange": "reversed",
            "title": {"text": down_axis if column == 0 else "", "standoff": 4},
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
                "x": _names(reading, across_axis),
                "y": _names(reading, down_axis),
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


def _spread_key(reading: Reading) -> str:
    names = [reading.instrument, f"{reading.measure}_spread", reading.probe]
    return "/".join(name for name in names if name is not None)


def _colour_axis(
    scale: _Scale, panels: Sequence[Reading], index: int, total: int
) -> dict[str, Any]:
    unit, limits = scale
    title = plain(unit)
    low, high = limits or (-math.inf, math.inf)
    if math.isinf(low) or math.isinf(high):
        title += ",<br>this step's<br>range"
        shown = np.concatenate([r.values.ravel() for r in panels if (r.unit, r.limits) == scale])
        shown = shown[np.isfinite(shown)]
        least, most = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
        if limits is None and least < 0 < most:
            most = max(-least, most)
            least = -most
        low = least if math.isinf(low) else low
        high = most if math.isinf(high) else high
        high = high if high > low else low + 1
    return {
        "cmin": low,
        "cmax": high,
        "colorscale": "RdBu_r" if low == -high else "Viridis",
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
    words = [r for r in matrices if r.unit == "index" and r.texts is not None]
    others = [r for r in matrices if all(r is not word for word in words)]

    def place(reading: Reading) -> tuple[object, ...]:
        return reading.probe, reading.axes, reading.values.shape

    by_place = {place(word): word for word in reversed(words)}
    return {r.key: by_place[place(r)] for r in others if place(r) in by_place}


def _names(reading: Reading, axis: str) -> list[str] | list[int]:
    names = reading.labels.get(axis)
    if names is None:
        return list(range(reading.values.shape[reading.axes.index(axis)]))
    if axis in _TOKENS or len(set(names)) < len(names):
        # Cells of one name would be drawn on top of each other.
        return [f"{i} {plain(name)}" for i, name in enumerate(names)]
    return [plain(name) for name in names]


def _ticks(reading: Reading, axis: str) -> dict[str, Any]:
    """At most about eight ticks, twice as many names, on whole layers and heads."""
    names = _names(reading, axis)
    step = math.ceil(len(names) / (16 if _room(reading, axis) else 8))
    ticks: dict[str, Any] = {"type": "linear", "tickvals": names[::step], "showgrid": False}
    if axis in reading.labels:
        whole = reading.labels[axis]
        shown = [
            plain(cut(name, _LONGEST))
            if str(known) == plain(name)
            else f"{i} {plain(cut(name, _LONGEST))}"
            for i, (known, name) in enumerate(zip(names, whole, strict=True))
        ]
        ticks |= {"type": "category", "ticktext": shown[::step]}
        if axis == reading.axes[1] and _room(reading, axis):
            ticks["tickangle"] = 90
    return ticks


def _room(reading: Reading, axis: str) -> int:
    """Pixels that the names of an axis need when they are written upwards; 0 for numbers."""
    names = reading.labels.get(axis, ())
    if axis not in _TOKENS and all(name.isdecimal() for name in names):
        return 0
    longest = max((min(len(name), _LONGEST) for name in names), default=0)
    return 6 * (longest + (3 if axis in _TOKENS else 0))
