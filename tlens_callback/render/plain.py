"""Numbers and text as plotly takes them: finite, short, and no markup."""

import html
import math

import numpy as np


def number(value: np.float32) -> float | None:
    """The shortest decimal that gives the same float32 back; None for what JSON has no number for.

    Figures hold lists of these, since a viewer's plotly.js may be older than plotly's base64
    arrays; short ones, since they are kept at every step.
    """
    return float(str(value)) if math.isfinite(value) else None


def plain(text: str) -> str:
    """The text as plotly shows it letter by letter: no tag, no entity, no %{variable}, and what
    has no shape (a line end, a tab) as its escape."""
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return html.escape(seen, quote=False).replace("%", "&#37;")


def cut(text: str, most: int) -> str:
    """The text, its end cut off where it is longer than this many characters."""
    return text if len(text) <= most else text[: most - 3] + "..."
