"""The live page of a store on this machine's own address, for a browser.

It shows each step as soon as the store has it. What can be asked for is the page and its data, by
the names that they have, and nothing else of the disk.
"""

import errno
import re
import sys
import time
from contextlib import ExitStack
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Self

from safetensors import SafetensorError

from tlens_callback.page import PageFolder
from tlens_callback.page.template import title_of
from tlens_callback.reading import Reading
from tlens_callback.store.format import scores_file, steps_in
from tlens_callback.store.store import Store

HOST = "127.0.0.1"
_NAMES = re.compile(r"data/(index|\d{8,}(-\d+)?)\.js", re.ASCII)
_HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.ASCII)
_EVERY = 1.0


class PageServer:
    """Serves the live page of a store, within a `with` block.

        with PageServer(read_store("out/tlens")) as server:
            print(server.address)
            server.run()  # until Ctrl-C

    Where the store has no live page, or not all steps are in it, one is made in a temporary
    directory, which `run` keeps up to date. The store itself is not written to.

    Only this machine can connect. A request by another name than this machine's is refused, so that
    no other site's name can lead here; other sites' pages may not load the data either.

    Args:
        port: to listen at; 0: any that is free.

    Attributes:
        address: where the page is, with the port.

    Raises:
        OSError: on entering, where the port is taken or not allowed.
    """

    def __init__(self, store: Store, *, port: int = 0) -> None:
        self._store, self._port = store, port
        self._ended = ExitStack()
        self._copy: PageFolder | None = None
        self._written: dict[int, int] = {}
        self.address = ""

    def __enter__(self) -> Self:
        with self._ended:
            try:
                server = _Server((HOST, self._port), _Handler)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise OSError(
                    f"Port {self._port} of {HOST} is taken; port 0 is any that is free."
                ) from error
            self._ended.callback(server.server_close)
            server.folder = self._folder()
            self.address = f"http://{HOST}:{server.server_port}/"
            thread = Thread(target=server.serve_forever, name="tlens-page", daemon=True)
            thread.start()
            self._ended.callback(server.shutdown)
            self._ended = self._ended.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.close()

    def run(self) -> None:
        """Keeps the page up to date until Ctrl-C, which ends it."""
        try:
            while True:
                self.follow()
                time.sleep(_EVERY)
        except KeyboardInterrupt:
            return

    def follow(self) -> None:
        """Brings a page in a temporary directory to what the store has by now."""
        if self._copy is None:
            return
        there = {step: stamp for step in steps_in(self._store.path / "scores")
                 if (stamp := _stamp(self._store, step)) is not None}  # fmt: skip
        for step in self._written.keys() - there.keys():
            del self._written[step]
        self._copy.keep(self._written)
        for step, stamp in there.items():
            if self._written.get(step) == stamp:
                continue
            readings = _readings(self._store, step)
            if readings is not None:
                self._copy.write(readings, step, at=stamp / 1e9)
                self._written[step] = stamp

    def _folder(self) -> Path:
        """That of the store if all of it is there, or a temporary one."""
        path = self._store.path.resolve() / "page"
        whole = path.resolve() == path and (path / "index.html").is_file()
        if whole and PageFolder(path).steps == self._store.steps:
            return path
        made = self._ended.enter_context(TemporaryDirectory(prefix="tlens-page-"))
        self._copy = PageFolder(Path(made).resolve(), title=title_of(self._store.path))
        self._copy.begin()
        return self._copy.path


def _stamp(store: Store, step: int) -> int | None:
    """When the step was written, in nanoseconds; None where it is gone meanwhile."""
    try:
        return scores_file(store.path, step).stat().st_mtime_ns
    except OSError:
        return None


def _readings(store: Store, step: int) -> list[Reading] | None:
    """None where the step is torn, or is just being removed by a run that begins again."""
    try:
        return store.readings(step)
    except (ValueError, OSError, SafetensorError):
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    folder: Path

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that goes away in the middle of an answer is no error.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = 30
    server_version, sys_version = "tlens", ""

    def do_GET(self) -> None:
        content = self._found()
        if content is not None:
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self._found()

    def _found(self) -> bytes | None:
        """Sends the head of the answer, and gives its body."""
        assert isinstance(self.server, _Server)
        if not _HOSTS.fullmatch(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        name = self.path.partition("?")[0].removeprefix("/") or "index.html"
        kind = "text/html" if name == "index.html" else "text/javascript"
        content = None
        if name == "index.html" or _NAMES.fullmatch(name):
            content = _content(self.server.folder, name)
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        # Files are renewed under their names while a run goes on.
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        # A script of another site would otherwise get the data by loading them as its own.
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        return content

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what is asked for every two seconds is no news."""


def _content(folder: Path, name: str) -> bytes | None:
    """Of a file in the folder; None where there is none, or a link leads away."""
    path = folder / name
    try:
        return path.read_bytes() if path.resolve(strict=True) == path else None
    except OSError:
        return None
