"""Draws all readings along the layers of one instrument as one interactive figure of lines."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlens_callback.palette import LINES, is_fixed
from tlens_callback.reading import Reading
from tlens_callback.render.panels import LOOK, Grid, figure
from tlens_callback.render.plain import cut, number, plain
from tlens_callback.render.slices import check_one_instrument, stands_for_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLUMNS = 3
_GAP_X, _GAP_Y, _ROW = 0.075, 62, 210
"""Between panels: a share of the width, pixels of height; height of a panel in a tall figure."""

_MOST_DECADES = 2


def line_figure(
    readings: Sequence[Reading], first: Sequence[Reading] = (), *, first_name: str = "first"
) -> "Figure":
    """Draws the ("layer",) readings of one instrument: a panel for each measure, with a line over
    the layers for each probe.

    Readings of other axes are left out, and so are ids that stand for texts (unit "index"). A probe
    has the same colour in all panels; a click on its name hides it everywhere. Hovering shows
    "L5 kl capital 0.93", and the text that the value stands for, if there is one.

    The y axis covers the reading's limits if these are finite, otherwise the values. In the second
    case it is logarithmic, and its title says so, if all values are positive and the largest is
    more than 100 times the smallest. Values that are not finite leave a gap.

    Args:
        first: the readings of an earlier observation, drawn dotted behind those of the same key.
        first_name: their name in the legend.

    Raises:
        ValueError: where no reading has this axis, or they are of several instruments.
    """
    curves = [r for r in readings if is_curve(r)]
    if not curves:
        raise ValueError(
            f"line_figure needs at least one reading of axes ('layer',), but got "
            f"{[(r.key, r.axes) for r in readings]}."
        )
    check_one_instrument(curves)
    earlier = {r.key: r for r in first if is_curve(r)}
    panels = list(dict.fromkeys(r.measure for r in curves))
    probes = list(dict.fromkeys(r.probe for r in curves))
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    inner = max(420, rows * _ROW)
    grid = Grid(len(panels), columns, _GAP_X, _GAP_Y / inner)
    layout: dict[str, Any] = {
        **LOOK,
        "margin": {"l": 56, "r": 24, "t": 40, "b": 44},
        "hovermode": "closest",
        "legend": {"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top", "tracegroupgap": 2},
    }
    if rows > 2:
        layout["height"] = inner + 84
    names = _layer_names(curves)
    data: list[dict[str, Any]] = []
    for i, measure in enumerate(panels):
        shown = [r for r in curves if r.measure == measure]
        behind = [earlier[r.key] for r in shown if r.key in earlier]
        x = {
            "title": {"text": "layer" if grid.is_lowest(i) else "", "standoff": 4},
            "gridcolor": "#eee",
            "zeroline": False,
            **_layer_axis(names),
        }
        y = {"gridcolor": "#ddd", "zerolinecolor": "#888", **_value_axis(shown, behind)}
        axes = grid.place(layout, i, measure, x, y)
        lines = [(r, True) for r in behind] + [(r, False) for r in shown]
        for reading, dotted in lines:
            trace = _trace(reading, names, LINES[probes.index(reading.probe) % len(LINES)])
            trace |= axes
            if dotted:
                trace |= {"mode": "lines", "line": {**trace["line"], "dash": "dot"}, "opacity": 0.5}
                trace["hovertemplate"] += f" ({plain(first_name)})"
            trace["hovertemplate"] += "<extra></extra>"
            data.append(trace)
    data += _legend(probes, first_name if any(r.key in earlier for r in curves) else None)
    return figure(data, layout)


def is_curve(reading: Reading) -> bool:
    """Whether `line_figure` shows this reading."""
    return reading.axes == ("layer",) and reading.values.size > 0 and not stands_for_text(reading)


def _trace(reading: Reading, names: list[str] | None, colour: str) -> dict[str, Any]:
    labels = reading.labels.get("layer") or [str(i) for i in range(len(reading.values))]
    about = " ".join(filter(None, (reading.measure, reading.probe)))
    values = [number(value) for value in reading.values]
    heights, shown, more = values, "%{y:.3g}", {}
    if reading.unit == "rank":
        heights = [None if value is None else value + 1 for value in values]
        shown, more["customdata"] = "%{customdata}", values
    if reading.texts is not None:
        shown += " %{text}"
        more["text"] = [plain(repr(text)) for text in reading.texts.tolist()]
    return {
        **more,
        "type": "scatter",
        "x": [plain(label) if names else int(label) for label in labels],
        "y": heights,
        "mode": "lines+markers",
        "line": {"color": colour, "width": 1.5},
        "marker": {"size": 4},
        "showlegend": False,
        "legendgroup": plain(reading.probe or ""),
        "hovertemplate": f"L%{{x}} {plain(about)} {shown}",
    }


def _legend(probes: Sequence[str | None], first_name: str | None) -> list[dict[str, Any]]:
    """Makes empty lines for the legend, since a probe may have no line in the first panel."""
    entries = [
        (plain(cut(probe, 28)), plain(probe), {"color": LINES[i % len(LINES)], "width": 1.5})
        for i, probe in enumerate(probes)
        if probe
    ]
    if first_name is not None:
        entries.append((plain(first_name), "", {"color": "#999", "width": 1.5, "dash": "dot"}))
    return [
        {
            "type": "scatter",
            "x": [None],
            "y": [None],
            "mode": "lines",
            "name": name,
            "legendgroup": group,
            "line": line,
            "showlegend": True,
        }
        for name, group, line in entries
    ]


def _layer_names(readings: Sequence[Reading]) -> list[str] | None:
    """Gives the names of the layers in order, or None where all of them are numbers."""
    names: list[str] = []
    for reading in sorted(readings, key=lambda r: -len(r.values)):
        labels = reading.labels.get("layer") or [str(i) for i in range(len(reading.values))]
        names += [name for name in labels if name not in names]
    return None if all(name.isascii() and name.isdecimal() for name in names) else names


def _layer_axis(names: list[str] | None) -> dict[str, Any]:
    """Gives the axis of layers at most about eight ticks, each at a whole layer."""
    if names is None:
        return {"type": "linear", "tickformat": "d", "nticks": 8, "minallowed": -1}
    shown = [plain(name) for name in names]
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": shown,
        "tickvals": shown[:: math.ceil(len(shown) / 8)],
    }


def _value_axis(shown: Sequence[Reading], behind: Sequence[Reading]) -> dict[str, Any]:
    unit = plain(", ".join(dict.fromkeys(r.unit for r in shown)))
    if all(r.unit == "rank" for r in shown):
        most = max(float(np.nanmax(r.values, initial=0)) for r in (*shown, *behind))
        ticks = [0, *(10**i for i in range(most > 1000, 7))]
        return {
            "title": {"text": unit, "standoff": 4},
            "type": "log",
            "tickvals": [1 + tick for tick in ticks],
            "ticktext": [str(tick) for tick in ticks],
        }
    first = shown[0].limits
    if is_fixed(first) and all(r.limits == first for r in shown):
        room = 0.03 * (first[1] - first[0])
        return {
            "title": {"text": unit, "standoff": 4},
            "type": "linear",
            "range": [first[0] - room, first[1] + room],
        }
    values = np.concatenate([r.values for r in (*shown, *behind)])
    values = values[np.isfinite(values)]
    least, most = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if 0 < least < most / 10**_MOST_DECADES:
        return {"title": {"text": f"{unit}, log", "standoff": 4}, "type": "log"}
    return {"title": {"text": unit, "standoff": 4}, "type": "linear"}
