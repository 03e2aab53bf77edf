"""`PageView`: shows the page of a run as the output of a notebook cell."""

import html
from dataclasses import dataclass, field
from pathlib import Path

from tlens_callback.store.atomic import write_whole


@dataclass(frozen=True)
class PageView:
    """Holds a page that Jupyter shows as the last line of a cell, and that `save` writes to a file.

    In the notebook it has a frame of its own. Its scripts run there, but cannot reach the notebook,
    files or cookies. The notebook's file then contains the whole page.

    Attributes:
        text: the HTML of the page.
        height: height of the frame, in pixels.
    """

    text: str = field(repr=False)
    height: int = 820

    def save(self, path: str | Path) -> Path:
        """Writes the page as one file for a browser, and makes the folders on its path.

        Raises:
            OSError: if the file cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.text.encode())
        return path

    def _repr_html_(self) -> str:
        # Without "allow-same-origin" the frame has no origin, so that it shares nothing with
        # Jupyter.
        return (
            f'<iframe srcdoc="{html.escape(self.text)}" sandbox="allow-scripts" '
            f'title="observations of a model in training" width="100%" '
            f'height="{self.height:d}" style="border:0"></iframe>'
        )

    def __repr__(self) -> str:
        size = len(self.text.encode()) / 1e6
        return f"PageView({size:.1f} MB: the last line of a cell shows it; save(path) writes it)"
