"""Draws a reading as a PNG inside HTML: attention patterns, and matrices too large for a table."""

import io
import math
from dataclasses import replace

from PIL import Image

from tlens_callback.palette import colours
from tlens_callback.reading import Reading
from tlens_callback.render.markup import image, text
from tlens_callback.render.mosaic import is_mosaic, mosaic
from tlens_callback.render.slices import farthest_from_zero

_MOST = 2_000_000
_WIDE, _TALL = 640, 320
_LARGEST_CELL = 12


def attention(reading: Reading) -> str | None:
    """Draws the mosaic of attention patterns, also of a single head or layer; None for any other
    reading.

    Of more than two million values it shows the first layers; of a layer with more, its first
    heads.
    """
    leading = reading.axes[:-2]
    known = leading in ((), ("layer",), ("head",), ("layer", "head"))
    if reading.axes[-2:] != ("query", "key") or not known:
        return None
    sizes = dict(zip(reading.axes, reading.values.shape, strict=True))
    layers, heads = sizes.get("layer", 1), sizes.get("head", 1)
    unnamed = {axis: [""] for axis in ("layer", "head") if axis not in leading}
    cell = sizes["query"] * sizes["key"]
    shown = {
        "layer": min(layers, max(1, _MOST // max(1, heads * cell))),
        "head": min(heads, max(1, _MOST // max(1, cell))),
    }
    values = reading.values.reshape(layers, heads, sizes["query"], sizes["key"])
    part = replace(
        reading,
        values=values[: shown["layer"], : shown["head"]],
        axes=("layer", "head", "query", "key"),
        labels={
            axis: names[: shown.get(axis)] for axis, names in {**reading.labels, **unnamed}.items()
        },
        texts=None,
    )
    if not is_mosaic(part):
        return None
    left = "" if part.values.size == reading.values.size else _left_out(shown, layers, heads)
    return image(mosaic(part), "attention") + left


def _left_out(shown: dict[str, int], layers: int, heads: int) -> str:
    return (
        f"<div>the first {shown['layer']} of {layers} layers, {shown['head']} of {heads} heads"
        f"</div>"
    )


def picture(matrix: Reading, ends: tuple[float, float]) -> str:
    """Draws each value as a square of pixels. Of too many values each pixel shows a square of them:
    the value farthest from zero."""
    rows, columns = matrix.values.shape
    pooled = math.ceil(rows / _TALL), math.ceil(columns / _WIDE)
    values = farthest_from_zero(matrix.values, 0, pooled[0])
    values = farthest_from_zero(values, 1, pooled[1])
    rgb = colours(replace(matrix, values=values, labels={}, texts=None), ends)
    sides = [room // size for room, size in zip((_TALL, _WIDE), values.shape, strict=True)]
    if matrix.axes == ("query", "key"):
        sides = [min(sides)] * 2
    for axis, side in enumerate(sides):
        rgb = rgb.repeat(max(1, min(_LARGEST_CELL, side)), axis)
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    down, across = matrix.axes
    guide = f"{down} 0..{rows - 1} down, {across} 0..{columns - 1} across"
    if pooled != (1, 1):
        guide += f"; a pixel: farthest from 0 of {pooled[0]} x {pooled[1]} values"
    return f"<div>{text(guide)}</div>" + image(out.getvalue(), matrix.key)
