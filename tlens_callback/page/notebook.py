"""The page of a run as the output of a notebook's cell."""

import html
from dataclasses import dataclass, field
from pathlib import Path

from tlens_callback.store.atomic import write_whole


@dataclass(frozen=True)
class PageView:
    """A page that Jupyter shows, as the last line of a cell, and that `save` writes to a file.

    In the notebook it has a frame of its own, where its scripts run, but reach neither the notebook
    nor any file or cookie. The notebook's file then holds the whole page.

    Attributes:
        text: the HTML of the page.
        height: of the frame, in pixels.
    """

    text: str = field(repr=False)
    height: int = 820

    def save(self, path: str | Path) -> Path:
        """Writes the page as one file, for a browser; folders on the way are made.

        Raises:
            OSError: where there can be no such file.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.text.encode())
        return path

    def _repr_html_(self) -> str:
        # Without "allow-same-origin": its origin is none, so that it shares nothing with Jupyter.
        return (
            f'<iframe srcdoc="{html.escape(self.text)}" sandbox="allow-scripts" '
            f'title="what was seen of a model in training" width="100%" '
            f'height="{self.height:d}" style="border:0"></iframe>'
        )

    def __repr__(self) -> str:
        size = len(self.text.encode()) / 1e6
        return f"PageView({size:.1f} MB: the last line of a cell shows it; save(path) writes it)"
