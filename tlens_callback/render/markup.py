"""Numbers, text and pictures as HTML."""

import base64
import math

import numpy as np

from tlens_callback.reading import Reading
from tlens_callback.render.plain import cut, plain


def text(what: str) -> str:
    """Escaped, for an attribute in double quotes too; what has no shape, and what turns the
    direction of writing, as its escape."""
    return plain(what).replace('"', "&quot;")


def decimal(value: np.floating | float, digits: int = 4) -> str:
    """NaN, inf, -inf, or so many digits."""
    return "NaN" if math.isnan(value) else f"{float(value):.{digits}g}"


def index_name(reading: Reading, axis: str, i: int, most: int = 16) -> str:
    """The escaped label of an index, cut to so many characters, or its number."""
    labels = reading.labels.get(axis)
    return str(i) if labels is None else text(cut(labels[i], most))


def more(n: int, what: str) -> str:
    """The line that counts what is not shown; empty where all is."""
    return f'<div style="opacity:.75">... {n:,} more {text(what)}</div>' if n > 0 else ""


def image(png: bytes, about: str) -> str:
    """The picture itself, inside the page."""
    data = base64.b64encode(png).decode()
    return (
        f'<img alt="{text(about)}" src="data:image/png;base64,{data}" '
        f'style="max-width:100%;image-rendering:pixelated;display:block;margin:4px 0">'
    )
