"""Holds what the interactive figures share: panels, ticks, and how plotly is loaded."""

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from tlens_callback.reading import TOKEN_AXES, Reading
from tlens_callback.render.plain import cut, plain

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


LOOK: dict[str, Any] = {"font": {"size": 11}, "template": "none"}
"""Layout of every figure."""


@dataclass(frozen=True)
class Grid:
    """Places of panels in a figure, row by row.

    Attributes:
        panels: how many there are.
        columns: how many stand side by side.
        gap_x: between two columns, a share of the figure's width.
        gap_y: between two rows, a share of its height.
    """

    panels: int
    columns: int
    gap_x: float
    gap_y: float

    def is_lowest(self, i: int) -> bool:
        """Whether no panel stands below this one."""
        return i + self.columns >= self.panels

    def place(
        self, layout: dict[str, Any], i: int, name: str, x: dict[str, Any], y: dict[str, Any]
    ) -> dict[str, str]:
        """Puts the title and the two axes of a panel into a figure's layout.

        Returns:
            the two entries by which a trace is drawn in this panel.
        """
        rows = math.ceil(self.panels / self.columns)
        across = (1 - self.gap_x * (self.columns - 1)) / self.columns
        down = (1 - self.gap_y * (rows - 1)) / rows
        row, column = divmod(i, self.columns)
        left, top = column * (across + self.gap_x), 1 - row * (down + self.gap_y)
        title = {
            "text": plain(cut(name, 34)),
            "x": left,
            "y": top,
            "xref": "paper",
            "yref": "paper",
            "xanchor": "left",
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 12},
        }
        layout.setdefault("annotations", []).append(title)
        n = nth(i)
        layout[f"xaxis{n}"] = {"domain": [left, min(1, left + across)], "anchor": f"y{n}", **x}
        layout[f"yaxis{n}"] = {"domain": [max(0, top - down), top], "anchor": f"x{n}", **y}
        return {"xaxis": f"x{n}", "yaxis": f"y{n}"}


def nth(i: int) -> str:
    """Gives the end of the name of plotly's axis `i`: nothing for the first, then 2, 3, ..."""
    return str(i + 1) if i else ""


def axis_names(reading: Reading, axis: str) -> list[str] | list[int]:
    """Gives each index a name of its own: cells of the same name would cover each other."""
    labels = reading.labels.get(axis)
    if labels is None:
        return list(range(reading.values.shape[reading.axes.index(axis)]))
    if axis in TOKEN_AXES or len(set(labels)) < len(labels):
        return [f"{i} {plain(label)}" for i, label in enumerate(labels)]
    return [plain(label) for label in labels]


def ticks(reading: Reading, axis: str, *, most: int, longest: int) -> dict[str, Any]:
    """Gives an axis about eight ticks with numbers, or up to `most` with names cut to `longest`."""
    names = axis_names(reading, axis)
    labels = reading.labels.get(axis)
    if labels is None:
        return {"type": "linear", "tickvals": names[:: math.ceil(len(names) / 8)]}
    brief = [
        plain(cut(label, longest)) if name == plain(label) else f"{i} {plain(cut(label, longest))}"
        for i, (name, label) in enumerate(zip(names, labels, strict=True))
    ]
    each = math.ceil(len(names) / most)
    return {"type": "category", "tickvals": names[::each], "ticktext": brief[::each]}


@cache
def load_plotly() -> Any:
    """Loads plotly.graph_objects without the warning filters that it adds.

    Best called on the main thread before another thread draws: warning filters belong to the whole
    process (until Python 3.14).
    """
    # The first figure loads modules of plotly that add filters (plotly 7.1).
    with warnings.catch_warnings():
        import plotly.graph_objects as go

        go.Figure({"data": [{"type": "heatmap"}, {"type": "scatter"}], "layout": {"title": ""}})
        return go


def figure(data: list[dict[str, Any]], layout: dict[str, Any]) -> "Figure":
    """Makes the plotly figure."""
    return load_plotly().Figure({"data": data, "layout": layout})
