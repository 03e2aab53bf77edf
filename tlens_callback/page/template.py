"""Makes the HTML around the data: one text with the page's style and scripts inside."""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tlens_callback.palette import page_colours

# The order matters: a script uses what earlier ones declare.
_SCRIPTS = [
    f"{name}.js"
    for name in (
        "codes data names colour state draw time curves scores matrix heatmap pattern words tokens "
        "lens charts rewards rollouts ranked tints tokentext cards contrast tables panels live main"
    ).split()
]


def html(about: Mapping[str, Any], steps: Iterable[str] = ()) -> str:
    """Makes the page from `about`, its title, notes and descriptions, and `steps`, its
    `step_element`s; a page that loads its data has none."""
    before, after = _frame()
    # So nothing in the data can end the element or begin another one.
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
    """Returns the title of a store's page: the folder of the run and the folder of the store."""
    return "/".join(store.absolute().parts[-2:])


def step_element(step: int, blobs: Iterable[str]) -> str:
    """Makes the element that holds a step's blobs, in base64."""
    return (
        f'<script type="text/plain" class="step" data-step="{step}">' + "\n".join(blobs)
    ) + "</script>\n"


def colour_script() -> str:
    """Makes the line of script that defines the page's colours."""
    return f"const PALETTE = {json.dumps(page_colours())};"


@lru_cache
def _frame() -> tuple[str, str]:
    """Returns the template with style and scripts, cut in two where the data go."""
    assets = files("tlens_callback.page") / "assets"
    found = {file.name for file in assets.iterdir()}
    scripts = [(assets / name).read_text("utf-8") for name in _SCRIPTS if name in found]
    script = "\n".join([colour_script(), *scripts])
    style = (assets / "style.css").read_text("utf-8")
    assert "</script" not in script.lower() and "<!--" not in script, "it would end the element"
    assert "</style" not in style.lower(), "it would end the element"
    template = (assets / "index.html").read_text("utf-8")
    # All marks are cut first, since the style and the scripts may contain one.
    head, rest = template.split("/*CSS*/")
    middle, rest = rest.split("<!--DATA-->")
    between, tail = rest.split("/*JS*/")
    return head + style + middle, between + script + tail
