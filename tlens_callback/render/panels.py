"""What the figures of several panels have in common."""

import warnings
from typing import TYPE_CHECKING, Any

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


def figure(data: list[dict[str, Any]], layout: dict[str, Any]) -> "Figure":
    """The plotly figure."""
    # The first figure loads modules of plotly that add warning filters (plotly 7.1).
    with warnings.catch_warnings():
        import plotly.graph_objects as go

        return go.Figure({"data": data, "layout": layout})
