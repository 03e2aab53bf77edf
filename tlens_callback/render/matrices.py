"""All matrices of one instrument, layer x head or the like, as one interactive figure."""

import html
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlens_callback.reading import Reading

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLUMNS = 4
_GAP_X, _GAP_Y, _ROW = 0.05, 52, 230
"""Between panels: a share of the width, pixels of height; height of a panel in a tall figure."""

_Scale = tuple[str, tuple[float, float] | None]
"""What panels must have in common to share a colour bar: unit and limits."""


def score_figure(readings: Sequence[Reading]) -> "Figure":
    """Small multiples of one instrument's ("layer", "head") or ("layer", "expert") readings.

    Readings of other axes are left out. Layer 0 is at the top, head 0 on the left, a panel is
    titled by measure and probe, hovering says "L5H1 induction 0.93". A measure `<other>_spread`
    beside `<other>` has no panel of its own: hovering says "L5H1 induction 0.93 ± 0.02". Panels
    of one unit and equal `limits` share a colour bar; limits that are symmetric around zero get a
    diverging scale. Without limits, or with infinite ones, they share the range of their own
    values, which the bar says, as it changes from step to step. What is not finite is left blank.

    Raises:
        ValueError: where no reading has these axes, or they are of several instruments.
    """
    matrices = {r.key: r for r in readings if is_matrix(r)}
    spreads = {key: matrices.get(_spread_key(r)) for key, r in matrices.items()}
    beside = {id(spread) for spread in spreads.values()}
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
    inner = max(480, rows * _ROW)
    across = (1 - _GAP_X * (columns - 1)) / columns
    down = (1 - _GAP_Y / inner * (rows - 1)) / rows
    layout: dict[str, Any] = {
        "margin": {"l": 48, "r": 96, "t": 40, "b": 44},
        "annotations": [],
        "plot_bgcolor": "#ccc",
        "font": {"size": 11},
        "template": "none",
    }
    if rows > 2:
        layout["height"] = inner + 84
    scales: list[_Scale] = list(dict.fromkeys((r.unit, r.limits) for r in panels))
    for i, scale in enumerate(scales):
        layout[f"coloraxis{i + 1 if i else ''}"] = _colour_axis(scale, panels, i, len(scales))
    data = []
    for i, reading in enumerate(panels):
        row, column = divmod(i, columns)
        left, top = column * (across + _GAP_X), 1 - row * (down + _GAP_Y / inner)
        number = str(i + 1) if i else ""
        bottom_panel = i + columns >= len(panels)
        across_axis = reading.axes[1]
        place = "L%{y}H%{x}" if across_axis == "head" else f"L%{{y}} {across_axis} %{{x}}"
        layout[f"xaxis{number}"] = {
            "domain": [left, min(1, left + across)],
            "anchor": f"y{number}",
            "title": {"text": across_axis if bottom_panel else "", "standoff": 4},
            **_ticks(reading, across_axis),
        }
        layout[f"yaxis{number}"] = {
            "domain": [max(0, top - down), top],
            "anchor": f"x{number}",
            "autorange": "reversed",
            "title": {"text": "layer" if column == 0 else "", "standoff": 4},
            **_ticks(reading, "layer"),
        }
        name = " ".join(filter(None, (reading.measure, reading.probe)))
        layout["annotations"].append(
            {
                "text": _plain(name if len(name) <= 34 else name[:32] + "..."),
                "x": left,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 12},
            }
        )
        number_of_scale = scales.index((reading.unit, reading.limits))
        value = "%{z:.3g}"
        more = {}
        spread = spreads[reading.key]
        if spread is not None and spread.values.shape == reading.values.shape:
            value += " ± %{customdata:.2g}"
            more["customdata"] = _numbers(spread.values)
        data.append(
            {
                **more,
                "type": "heatmap",
                "z": _numbers(reading.values),
                "x": _names(reading, across_axis),
                "y": _names(reading, "layer"),
                "xaxis": f"x{number}",
                "yaxis": f"y{number}",
                "coloraxis": f"coloraxis{number_of_scale + 1 if number_of_scale else ''}",
                "hovertemplate": f"{place} {_plain(name)} {value}<extra></extra>",
            }
        )
    # The first figure loads modules of plotly that add warning filters (plotly 7.1).
    with warnings.catch_warnings():
        import plotly.graph_objects as go

        return go.Figure({"data": data, "layout": layout})


def is_matrix(reading: Reading) -> bool:
    """Whether `score_figure` shows this reading."""
    first, *rest = reading.axes or ("",)
    return first == "layer" and len(rest) == 1 and rest != ["rank"] and reading.values.size > 0


def _spread_key(reading: Reading) -> str:
    names = [reading.instrument, f"{reading.measure}_spread", reading.probe]
    return "/".join(name for name in names if name is not None)


def _colour_axis(
    scale: _Scale, panels: Sequence[Reading], index: int, total: int
) -> dict[str, Any]:
    unit, limits = scale
    title = _plain(unit)
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
    """Nested lists of the shortest decimals that give the same float32 back.

    Lists, since a viewer's plotly.js may be older than plotly's base64 arrays; short ones, since
    they are kept at every step; None for what JSON has no number for.
    """
    return [
        [float(str(value)) if math.isfinite(value) else None for value in row] for row in values
    ]


def _names(reading: Reading, axis: str) -> list[str] | list[int]:
    names = reading.labels.get(axis)
    if names is None:
        return list(range(reading.values.shape[reading.axes.index(axis)]))
    return [_plain(name) for name in names]


def _ticks(reading: Reading, axis: str) -> dict[str, Any]:
    """At most about eight ticks, on whole layers and heads."""
    names = _names(reading, axis)
    kind = "category" if axis in reading.labels else "linear"
    return {"type": kind, "tickvals": names[:: math.ceil(len(names) / 8)], "showgrid": False}


def _plain(text: str) -> str:
    """The text as plotly shows it letter by letter: no tag, no entity, no %{variable}."""
    return html.escape(text, quote=False).replace("%", "&#37;")
