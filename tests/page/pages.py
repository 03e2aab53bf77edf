"""Pages of readings that a test makes, and the browser's way to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.described import as_read
from tlens_callback.page import page
from tlens_callback.reading import Reading
from tlens_callback.sinks import LocalSink, read_store


def page_of(
    folder: Path, readings: Mapping[int, Sequence[Reading]], *, most_bytes: int | None = None
) -> str:
    """The address of a page with these readings, step -> readings."""
    sink = LocalSink(folder / "store", page=False)
    for step, some in readings.items():
        sink.write(as_read(*some), step=step)
    sink.close()
    file = folder / "page.html"
    file.write_text(page(read_store(folder / "store"), most_bytes=most_bytes), encoding="utf-8")
    return file.as_uri()
