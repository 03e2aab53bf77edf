"""Decides what a picture or figure of scores shows: its panels, their names and colour ranges."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from tlens_callback.palette import colour_range, is_fixed
from tlens_callback.reading import Reading
from tlens_callback.render.slices import check_one_instrument, stands_for_text

COLUMNS = 4
"""Most panels side by side."""

LONGEST_NAME = 12
"""Characters of a layer's, a head's or a column's name; what is longer is cut."""


@dataclass(frozen=True)
class Scale:
    """The range of colours of panels that have one unit and equal limits.

    Attributes:
        unit: of the values.
        moves: whether the range is that of this step's values, so that the next step has another.
        ends: the values at the two ends of the colours.
    """

    unit: str
    moves: bool
    ends: tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One matrix as it is drawn.

    Attributes:
        reading: the matrix; its first axis goes down, its second across.
        name: its measure and probe.
        scale: its colours, the same object in all panels that share them.
        spread: the spread of each value, if it is known.
        texts: the text that each value stands for, if there is one.
    """

    reading: Reading
    name: str
    scale: Scale
    spread: np.ndarray | None
    texts: np.ndarray | None


def is_matrix(reading: Reading) -> bool:
    """Whether a reading has two axes: "layer" or "feature", and any other than "rank"."""
    first, *rest = reading.axes or ("",)
    two = first in ("layer", "feature") and len(rest) == 1 and rest != ["rank"]
    return two and reading.values.size > 0


def score_panels(readings: Sequence[Reading], *, with_ids: bool) -> list[Panel]:
    """Gives one panel for each matrix; readings of other axes are left out.

    A measure `<other>_spread` beside `<other>` has no panel: it is the `spread` of that one. Nor
    has a reading of ids that stand for texts, where there is another matrix of its probe, axes and
    shape: it is the `texts` of that one.

    Panels of one unit and equal limits share a scale, the `colour_range` of all of them.

    Args:
        with_ids: whether ids that stand for texts are shown at all. They need a pointer that hovers
            over the cells.
    """
    matrices = {r.key: r for r in readings if is_matrix(r) or r.axes[:1] == ("probe",)}
    if not with_ids:
        matrices = {key: r for key, r in matrices.items() if not stands_for_text(r)}
    spreads = {key: matrices.get(_spread_key(r)) for key, r in matrices.items()}
    ids = _ids_beside(matrices.values())
    beside = {id(other) for other in (*spreads.values(), *ids.values())}
    shown = [r for r in matrices.values() if id(r) not in beside]
    groups: dict[object, list[Reading]] = {}
    for r in shown:
        groups.setdefault((r.unit, r.limits), []).append(r)
    scales = {
        group: Scale(own[0].unit, not is_fixed(own[0].limits), colour_range(*own))
        for group, own in groups.items()
    }
    panels = []
    for r in shown:
        spread = spreads[r.key]
        texts = r if r.texts is not None else ids.get(r.key)
        panels.append(
            Panel(
                reading=r,
                name=" ".join(filter(None, (r.measure, r.probe))),
                scale=scales[r.unit, r.limits],
                spread=spread.values if spread and spread.values.shape == r.values.shape else None,
                texts=texts.texts if texts else None,
            )
        )
    return panels


def check_panels(panels: Sequence[Panel], readings: Sequence[Reading]) -> None:
    """Raises ValueError where these readings have no panels, or panels of several instruments."""
    if not panels:
        raise ValueError(
            f"There are no scores to draw. A reading of scores has two axes, ('layer', 'head') or "
            f"the like, but got {[(r.key, r.axes) for r in readings]}."
        )
    check_one_instrument([panel.reading for panel in panels])


def curves_as_rows(curves: Sequence[Reading]) -> list[Reading]:
    """Joins ("layer",) readings of one measure and unit to a ("probe", "layer") reading, which
    `score_panels` takes: a row for each probe."""
    groups: dict[tuple[object, ...], list[Reading]] = {}
    for r in curves:
        about = r.instrument, r.measure, r.unit, r.limits, r.values.shape, r.labels.get("layer")
        groups.setdefault(about, []).append(r)
    return [
        Reading(
            key=f"{first.instrument}/{first.measure}",
            values=np.stack([r.values for r in group]),
            axes=("probe", "layer"),
            unit=first.unit,
            labels={"probe": [r.probe or "" for r in group], **first.labels},
            limits=first.limits,
        )
        for group in groups.values()
        for first in group[:1]
    ]


def _spread_key(reading: Reading) -> str:
    names = [reading.instrument, f"{reading.measure}_spread", reading.probe]
    return "/".join(name for name in names if name is not None)


def _ids_beside(matrices: Collection[Reading]) -> dict[str, Reading]:
    """Key of a matrix -> the reading of ids whose texts say what its values stand for."""

    def place(reading: Reading) -> tuple[object, ...]:
        return reading.probe, reading.axes, reading.values.shape

    ids = [r for r in matrices if stands_for_text(r)]
    by_place = {place(r): r for r in reversed(ids)}
    return {
        r.key: by_place[place(r)]
        for r in matrices
        if not stands_for_text(r) and place(r) in by_place
    }
