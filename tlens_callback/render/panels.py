"""What the figures have in common."""

import math
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

from tlens_callback.reading import TOKEN_AXES, Reading
from tlens_callback.render.plain import cut, plain

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def panel_title(name: str, left: float, top: float) -> dict[str, Any]:
    """The annotation above a panel whose upper left corner is there, in shares of the figure."""
    return {
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


def axis_names(reading: Reading, axis: str) -> list[str] | list[int]:
    """One name per index; none twice, since cells of one name would cover each other."""
    labels = reading.labels.get(axis)
    if labels is None:
        return list(range(reading.values.shape[reading.axes.index(axis)]))
    if axis in TOKEN_AXES or len(set(labels)) < len(labels):
        return [f"{i} {plain(label)}" for i, label in enumerate(labels)]
    return [plain(label) for label in labels]


def ticks(reading: Reading, axis: str, *, most: int, longest: int) -> dict[str, Any]:
    """At about eight numbers, or at `most` names, cut to a length at which they can stand."""
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
    """plotly.graph_objects, loaded without the warning filters that it adds.

    Best called on the main thread before another one draws: what keeps the filters as they were
    is of the whole process (until Python 3.14).
    """
    # The first figure loads modules of plotly that add filters (plotly 7.1).
    with warnings.catch_warnings():
        import plotly.graph_objects as go

        go.Figure({"data": [{"type": "heatmap"}, {"type": "scatter"}], "layout": {"title": ""}})
        return go


def figure(data: list[dict[str, Any]], layout: dict[str, Any]) -> "Figure":
    """The plotly figure."""
    return load_plotly().Figure({"data": data, "layout": layout})
