"""Serves the live page of a store to a browser on the same machine.

The page shows each step as soon as the store has it. Only the page and its data can be requested,
by their names, and no other file of the disk.
"""

import errno
import hmac
import re
import secrets
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

    If the store has no live page, or its page lacks steps, one is made in a temporary directory,
    which `run` keeps up to date. The store itself is not written to.

    Only this machine can connect, and only who knows the address gets an answer: it has a token in
    its path that nobody can guess, since other users of the machine can connect too. A request
    under any host name but this machine's own is refused, so that no name of another site can lead
    here. Pages of other sites cannot load the data either.

    Args:
        port: the port to listen on; 0: any free port.

    Attributes:
        address: the address of the page, with the port and the token.

    Raises:
        OSError: on entering the block, if the port is taken or not allowed.
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
                    f"Port {self._port} of {HOST} is in use. Port 0 stands for any free port."
                ) from error
            self._ended.callback(server.server_close)
            server.folder, server.token = self._folder(), secrets.token_urlsafe(24)
            self.address = f"http://{HOST}:{server.server_port}/{server.token}/"
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
        """Updates a page in a temporary directory with the steps that the store has now."""
        if self._copy is None:
            return
        stamps = {step: stamp for step in steps_in(self._store.path / "scores")
                  if (stamp := _stamp(self._store, step)) is not None}  # fmt: skip
        for step in self._written.keys() - stamps.keys():
            del self._written[step]
        self._copy.keep(self._written)
        for step, stamp in stamps.items():
            if self._written.get(step) == stamp:
                continue
            readings = _readings(self._store, step)
            if readings is not None:
                self._copy.write(readings, step, at=stamp / 1e9)
                self._written[step] = stamp

    def _folder(self) -> Path:
        """The store's own page if it has all steps, or else a new one in a temporary directory."""
        path = self._store.path.resolve() / "page"
        whole = path.resolve() == path and (path / "index.html").is_file()
        if whole and PageFolder(path).steps == self._store.steps:
            return path
        temporary = self._ended.enter_context(TemporaryDirectory(prefix="tlens-page-"))
        self._copy = PageFolder(Path(temporary).resolve(), title=title_of(self._store.path))
        self._copy.begin()
        return self._copy.path


def _stamp(store: Store, step: int) -> int | None:
    """When the step was written, in nanoseconds; None if it has been removed meanwhile."""
    try:
        return scores_file(store.path, step).stat().st_mtime_ns
    except OSError:
        return None


def _readings(store: Store, step: int) -> list[Reading] | None:
    """Reads a step; None if it is incomplete, or is being removed by a run that begins again."""
    try:
        return store.readings(step)
    except (ValueError, OSError, SafetensorError):
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    folder: Path
    token: str

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser may close the connection in the middle of an answer; that is no error.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = 30
    server_version, sys_version = "tlens", ""

    def do_GET(self) -> None:
        content = self._send_head()
        if content is not None:
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self._send_head()

    def _send_head(self) -> bytes | None:
        """Sends the head of the answer and returns its body; None after an error."""
        assert isinstance(self.server, _Server)
        if not _HOSTS.fullmatch(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        token, slash, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        # In constant time, so that no answer tells how much of it was right.
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        name = name or "index.html"
        kind = "text/html" if name == "index.html" else "text/javascript"
        content = None
        if name == "index.html" or _NAMES.fullmatch(name):
            content = _read_inside(self.server.folder, name)
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        # Files are rewritten under the same names while a run goes on.
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        # Without this, a page of another site could load the data as a script of its own.
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        return content

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing, because the page makes a request every two seconds."""


def _read_inside(folder: Path, name: str) -> bytes | None:
    """Reads a file in the folder; None if there is no such file, or a link leads out of it."""
    path = folder / name
    try:
        # A pipe would be waited for without end.
        return path.read_bytes() if path.resolve(strict=True) == path and path.is_file() else None
    except OSError:
        return None
