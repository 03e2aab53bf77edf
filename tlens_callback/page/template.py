"""The page around the data: one HTML text with its style and scripts inside."""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tlens_callback.palette import page_colours

# In this order: a later one uses what an earlier one declares.
_SCRIPTS = [
    f"{name}.js"
    for name in (
        "codes data names colour state draw time curves scores matrix heatmap pattern tokens lens "
        "charts tables panels live main"
    ).split()
]


def html(about: Mapping[str, Any], steps: Iterable[str] = ()) -> str:
    """The page. `about` is what it says of itself; `steps` are `step_element`s, or nothing for a
    page that loads its data."""
    before, after = _frame()
    # No letter of the data can end the element or begin another.
    text = json.dumps(about, allow_nan=False).replace("<", "\\u003c")
    return "".join(
        [
            before,
            f'<script type="application/json" id="about">{text}</script>\n',
            *steps,
            after,
        ]
    )


def title_of(store: Path) -> str:
    """What a page of this store is called: its folder and the one around it, which is the run's."""
    return "/".join(store.absolute().parts[-2:])


def step_element(step: int, blobs: Iterable[str]) -> str:
    """The element that holds a step's blobs, in base64."""
    return (
        f'<script type="text/plain" class="step" data-step="{step}">' + "\n".join(blobs)
    ) + "</script>\n"


def colour_script() -> str:
    """The line of script that hands the page its colours."""
    return f"const PALETTE = {json.dumps(page_colours())};"


@lru_cache
def _frame() -> tuple[str, str]:
    """The template with style and scripts in it, cut where the data belong."""
    assets = files("tlens_callback.page") / "assets"
    there = {file.name for file in assets.iterdir()}
    scripts = [(assets / name).read_text("utf-8") for name in _SCRIPTS if name in there]
    script = "\n".join([colour_script(), *scripts])
    style = (assets / "style.css").read_text("utf-8")
    assert "</script" not in script.lower() and "<!--" not in script, "it would end the element"
    assert "</style" not in style.lower(), "it would end the element"
    template = (assets / "index.html").read_text("utf-8")
    # Cut at all marks first, since what is put in may hold them.
    head, rest = template.split("/*CSS*/")
    middle, rest = rest.split("<!--DATA-->")
    between, tail = rest.split("/*JS*/")
    return head + style + middle, between + script + tail
