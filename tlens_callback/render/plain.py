"""Writes numbers and text as plotly takes them: finite, short, and without markup."""

import html
import math

import numpy as np


def number(value: np.float32) -> float | None:
    """Gives the shortest decimal that reads back as the same float32; None for NaN and infinity,
    which JSON cannot hold.

    Figures hold lists of these numbers, since a viewer's plotly.js may be too old for plotly's
    base64 arrays. They are short, since every step keeps them.
    """
    return float(str(value)) if math.isfinite(value) else None


def plain(text: str) -> str:
    """Escapes text so that plotly shows it letter by letter: no tag, entity or %{variable} is left,
    and a character that cannot be seen (a line end, a tab) becomes its escape."""
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return html.escape(seen, quote=False).replace("%", "&#37;")


def cut(text: str, most: int) -> str:
    """Cuts off the end of a text that is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."
