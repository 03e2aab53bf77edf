"""Draws a line of values as an SVG without script."""

import math
from collections.abc import Sequence

import numpy as np

from tlens_callback.palette import LINE
from tlens_callback.reading import Reading
from tlens_callback.render.markup import decimal, index_name, text

_LEFT, _TOP, _WIDTH, _HEIGHT = 64, 6, 520, 110


def line(reading: Reading) -> str:
    """Draws the values of one axis as a line, with a grey line at zero.

    The height covers the limits, and the values where these are outside or a limit is infinite. A
    value that is not finite leaves a gap. Up to 64 values have a point each; hovering shows them.
    """
    (axis,) = reading.axes
    values = reading.values
    low, high = _range(reading)
    across = [_LEFT + i / max(1, len(values) - 1) * _WIDTH for i in range(len(values))]
    scale = _HEIGHT / (high - low)
    down = [_TOP + (high - float(value)) * scale for value in values]
    runs: list[list[str]] = [[]]
    for i in _extremes(values, 2 * _WIDTH):
        if math.isfinite(values[i]):
            runs[-1].append(f"{across[i]:.1f},{down[i]:.1f}")
        elif runs[-1]:
            runs.append([])
    parts = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" '
        f'stroke="currentColor" stroke-opacity=".25"/>'
    ]
    if low < 0 < high:
        parts.append(
            f'<path d="M{_LEFT} {_TOP + high * scale:.1f}h{_WIDTH}" stroke="currentColor" '
            f'stroke-opacity=".4"/>'
        )
    parts += [
        f'<polyline points="{" ".join(run)}" fill="none" stroke="{LINE}" stroke-width="1.6"/>'
        for run in runs
        if len(run) > 1
    ]
    if len(values) <= 64:
        parts += [
            f'<circle cx="{across[i]:.1f}" cy="{down[i]:.1f}" r="3" fill="{LINE}"><title>'
            f"{text(axis)} {index_name(reading, axis, i)}: {decimal(value, 7)}</title></circle>"
            for i, value in enumerate(values)
            if math.isfinite(value)
        ]
    bottom = _TOP + _HEIGHT
    parts += [
        _word(_LEFT - 6, _TOP + 9, "end", decimal(high)),
        _word(_LEFT - 6, bottom, "end", decimal(low)),
        _word(_LEFT + _WIDTH / 2, bottom + 29, "middle", text(axis)),
    ]
    parts += [
        _word(across[i], bottom + 14, "middle", index_name(reading, axis, i, 10))
        for i in range(0, len(values), math.ceil(len(values) / 8))
    ]
    wide = _LEFT + _WIDTH + 24
    return (
        f'<svg width="{wide}" height="{bottom + 36}" viewBox="0 0 {wide} {bottom + 36}" role="img" '
        f'style="display:block;max-width:100%;height:auto">{"".join(parts)}</svg>'
    )


def _range(reading: Reading) -> tuple[float, float]:
    low, high = reading.limits or (math.inf, -math.inf)
    finite = reading.values[np.isfinite(reading.values)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low = least if math.isinf(low) else min(low, least)
    high = most if math.isinf(high) else max(high, most)
    room = max(0.5, abs(low) * 1e-6)
    return (low, high) if low < high else (low - room, high + room)


def _extremes(values: np.ndarray, most: int) -> Sequence[int]:
    """Chooses at most `most` indices: of each stretch the smallest and the largest value, or one
    that is not a number."""
    if len(values) <= most:
        return range(len(values))
    chosen: set[int] = set()
    for stretch in np.array_split(np.arange(len(values)), most // 3):
        part = values[stretch]
        chosen |= {int(stretch[part.argmin()]), int(stretch[part.argmax()]), int(stretch[0])}
    return sorted(chosen)


def _word(x: float, y: float, anchor: str, shown: str) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="currentColor" '
        f'fill-opacity=".8" font-size="11">{shown}</text>'
    )
