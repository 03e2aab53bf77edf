"""Writes numbers, text and pictures as HTML."""

import base64
import math

import numpy as np

from tlens_callback.reading import Reading
from tlens_callback.render.plain import cut, plain


def text(what: str) -> str:
    """Escapes text for HTML, also inside an attribute in double quotes. Characters that cannot be
    seen, or that change the direction of writing, become escapes such as `\\n`."""
    return plain(what).replace('"', "&quot;")


def decimal(value: np.floating | float, digits: int = 4) -> str:
    """Writes a number with this many digits, or NaN, inf or -inf."""
    return "NaN" if math.isnan(value) else f"{float(value):.{digits}g}"


def index_name(reading: Reading, axis: str, i: int, most: int = 16) -> str:
    """Gives the escaped label of an index, cut to `most` characters; its number without a label."""
    labels = reading.labels.get(axis)
    return str(i) if labels is None else text(cut(labels[i], most))


def more(n: int, what: str) -> str:
    """Writes the line that counts what is not shown; empty where everything is."""
    return f'<div style="opacity:.75">... {n:,} more {text(what)}</div>' if n > 0 else ""


def image(png: bytes, about: str) -> str:
    """Writes an image element that holds the PNG itself."""
    data = base64.b64encode(png).decode()
    return (
        f'<img alt="{text(about)}" src="data:image/png;base64,{data}" '
        f'style="max-width:100%;image-rendering:pixelated;display:block;margin:4px 0">'
    )
