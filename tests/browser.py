"""A real headless Chromium, and what a page must not do in it."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The last four keep the browser itself from looking for hosts of its own.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


NONE = "there is no Chromium on this machine"


class Faults(list[str]):
    """What went wrong on a page: errors, warnings, dialogs, and requests beyond its own files."""


@contextmanager
def opened(address: str, *, allowed: str = "", **options: Any) -> Iterator[tuple[Any, Faults]]:
    """A page at this address, and its faults so far.

    Args:
        allowed: what a request may begin with, besides the address itself and data: and blob:.
        options: of Playwright's `new_page`: viewport, color_scheme, ...
    """
    from playwright.sync_api import sync_playwright

    faults = Faults()

    def asked(request: Any) -> None:
        inside = request.url.startswith(("data:", "blob:")) or request.url == page.url
        ours = request.url.split("#")[0] == address.split("#")[0]
        if not (inside or ours or (allowed and request.url.startswith(allowed))):
            faults.append(f"request: {request.url}")

    def dialog(shown: Any) -> None:
        faults.append(f"dialog: {shown.message}")
        shown.dismiss()

    def said(message: Any) -> None:
        if message.type in ("error", "warning"):
            faults.append(f"{message.type}: {message.text}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PATH, args=FLAGS)
        try:
            page = browser.new_page(**{"viewport": {"width": 1400, "height": 1000}, **options})
            page.set_default_timeout(60_000)
            page.on("request", asked)
            page.on("dialog", dialog)
            page.on("console", said)
            page.on("pageerror", lambda error: faults.append(f"error: {error}"))
            page.goto(address)
            yield page, faults
        finally:
            browser.close()


def drawn(page: Any) -> None:
    """Waits until the page has drawn what it was told, and what that brought into sight.

    In the page's own time, in which what was asked for earlier comes earlier, however slow the
    machine is: a frame draws, the next one finds what is in sight now, the one after draws it.
    """
    page.evaluate("""async () => {
      for (let frame = 0; frame < 4; frame++) {
        await new Promise((done) => setTimeout(() => requestAnimationFrame(done), 10));
      }
    }""")


def until(page: Any, script: str, expected: Any, seconds: float = 60.0) -> None:
    """Waits until a script gives this.

    Playwright's `wait_for_function` evaluates its text in the page once more for each look, which
    the page's own policy forbids: it fails where the first look came too early.
    """
    end = time.monotonic() + seconds
    while (got := page.evaluate(script)) != expected and time.monotonic() < end:
        page.wait_for_timeout(30)
    assert got == expected, f"{script}: {got!r}, not {expected!r}"


def needs_browser() -> Any:
    """A mark: skipped without Chromium, unless TLENS_BROWSER says that there has to be one."""
    missing = PATH is None and not os.environ.get("TLENS_BROWSER")
    return pytest.mark.skipif(missing, reason=NONE)
