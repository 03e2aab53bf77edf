"""The live page of a store, served: what it follows, and what it does not give away."""

import http.client
import json
import os
import time
from urllib.parse import urlsplit

import pytest

from tests.browser import needs_browser, opened, until
from tests.sinks.samples import everything, small
from tests.sinks.test_local import fill
from tests.sinks.test_local_broken import tear
from tlens_callback.offline.serve import PageServer
from tlens_callback.sinks import LocalSink, read_store

STEP = "document.getElementById('stepname')?.textContent"


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "out" / "tlens", (0, 10, 20), page=False).path


def get(address, path, method="GET", **headers):
    """Status, headers and body; the path, below that of the address, is sent as it is."""
    place = urlsplit(address)
    path = place.path.rstrip("/") + path if path.startswith("/") else path
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def follows(tab, sink):
    """The page shows what is written meanwhile, without being loaded again."""
    until(tab, STEP, "step 10", 20)
    until(tab, "tlens.data.steps", [0, 10], 20)
    tab.evaluate("window.same = true")
    sink.write(everything(20), step=20)
    until(tab, STEP, "step 20", 20)
    assert tab.evaluate(f"tlens.data.ready('{everything()[-1].key}', 20).then(() => true)")
    assert tab.evaluate("tlens.data.number('cost/seconds', 20, 0)") == 20.25
    assert tab.evaluate("window.same")


def goes_back(tab, sink):
    """A run begins again from step 10: what comes again is shown anew, what is gone is gone."""
    sink.write(small(99), step=10)
    until(tab, "tlens.data.steps", [0, 10], 20)
    until(tab, "tlens.data.number('cost/seconds', 10, 0)", 99.25, 20)
    assert tab.evaluate("window.same")


@needs_browser()
def test_a_served_page_of_the_store_shows_a_new_step_by_itself(tmp_path):
    sink = fill(tmp_path / "run", (0, 10))
    with PageServer(read_store(sink.path)) as server:
        assert server._copy is None
        with opened(server.address, allowed=server.address) as (tab, faults):
            follows(tab, sink)
            assert faults == []
            tab.goto("about:blank")


def test_nothing_but_the_page_is_served(tmp_path):
    sink = fill(tmp_path / "run", (0, 10))
    secret = tmp_path / "secret.js"
    secret.write_text("outside")
    (sink.path / "page/secret.js").write_text("beside")
    data = sink.path / "page" / "data"
    (data / "secret.js").write_text("beside")
    (data / "00000077.js").symlink_to(secret)
    assert (data / "00000077.js").read_text() == "outside"  # whoever follows the link has it
    with PageServer(read_store(sink.path)) as server:
        address = server.address
        for path, kind in (
            ("/", "text/html"),
            ("/index.html", "text/html"),
            ("/data/index.js?17", "text/javascript"),
            ("/data/00000010.js?17", "text/javascript"),
        ):
            status, headers, body = get(address, path)
            file = sink.path / "page" / (path.split("?")[0].strip("/") or "index.html")
            assert (status, body) == (200, file.read_bytes())
            assert headers["Content-Type"] == f"{kind}; charset=utf-8"
            assert headers["Cache-Control"] == "no-store"
            assert headers["X-Content-Type-Options"] == "nosniff"
            status, headers, body = get(address, path, "HEAD")
            assert (status, body) == (200, b"")
            assert int(headers["Content-Length"]) == file.stat().st_size
        up = "/".join([".."] * 12)
        for path in (
            "/../manifest.json",
            "/data/../../manifest.json",
            "/data/../index.html",
            "/%2e%2e/manifest.json",
            "/data/..%2f..%2fmanifest.json",
            "/..\\manifest.json",
            f"/{up}/etc/passwd",
            f"/data/{up}{secret}",
            str(secret),
            f"/{secret}",
            "/data/",
            "/data",
            "/secret.js",
            "/data/secret.js",
            "/data/00000077.js",
            "/data/00000010.js%00.html",
            "http://127.0.0.1/../manifest.json",
            "/page/index.html",
        ):
            status, _, body = get(address, path)
            assert status == 404, path
            assert b"outside" not in body and b"root:" not in body and b"tlens_callback" not in body
        assert get(address, "http://[x", Host="localhost")[0] == 404  # no address at all
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert get(address, "/", method)[0] == 501
        # The folder of links is led away from as a whole.
        aside = tmp_path / "aside"
        data.rename(aside)
        data.symlink_to(aside)
        assert (data / "index.js").is_file() and get(address, "/data/index.js")[0] == 404


def test_who_does_not_know_the_token_gets_nothing(store):
    """Every user of the machine can connect, and ask for what anybody would ask for."""
    with PageServer(read_store(store)) as server, PageServer(read_store(store)) as other:
        bare = "http://" + urlsplit(server.address).netloc
        token, others = (urlsplit(one.address).path.strip("/") for one in (server, other))
        assert token != others and len(token) >= 32  # 24 bytes in base64
        assert get(bare, f"/{token}/")[0] == get(bare, f"/{token}/data/index.js")[0] == 200
        for start in ("", "/x", f"/{others}", f"/{token[:-1]}", f"/{token}x", f"/{token.lower()}",
                      f"/?{token}", f"/{token}%00"):  # fmt: skip
            for path in ("/", "/index.html", "/data/index.js", "/data/00000010.js", ""):
                if start + path:
                    assert get(bare, start + path)[0] in (404, 501), start + path
        assert get(bare, f"/{token}")[0] == 404
        _, headers, body = get(server.address, "/")
        assert headers["Referrer-Policy"] == "no-referrer" and token.encode() not in body


def test_another_name_for_this_machine_is_refused(store):
    with PageServer(read_store(store)) as server:
        port = urlsplit(server.address).port
        for host in (
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            "localhost:9000",
            "[::1]",
            "127.0.0.1",
        ):
            assert get(server.address, "/", Host=host)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "",
                     "localhost.evil.example", "0.0.0.0", f"localhost:{port}:1"):  # fmt: skip
            status, _, body = get(server.address, "/", Host=host)
            assert status == 403 and b"tlens" not in body, host


@needs_browser()
def test_another_site_cannot_load_the_data(store):
    with PageServer(read_store(store)) as ours, PageServer(read_store(store)) as others:
        ours.follow()
        load = """(address) => new Promise((done) => {
          const script = document.createElement("script");
          script.onload = script.onerror = (event) => done(event.type);
          script.src = address + "data/00000010.js";
          document.head.append(script);
        })"""
        with opened("about:blank", allowed="http://127.0.0.1:") as (tab, _):
            # The page's own policy would stop it before ours is asked.
            policy = {"Content-Type": "text/html"}
            tab.route(f"{others.address}bare", lambda route: route.fulfill(
                status=200, headers=policy, body="<!doctype html><title>x</title>"))  # fmt: skip
            tab.goto(f"{others.address}bare")
            assert tab.evaluate(load, ours.address) == "error"
            tab.route(f"{ours.address}bare", lambda route: route.fulfill(
                status=200, headers=policy, body="<!doctype html><title>x</title>"))  # fmt: skip
            tab.goto(f"{ours.address}bare")
            tab.evaluate("window.tlens = { chunk() {} }")
            assert tab.evaluate(load, ours.address) == "load"


def test_a_store_with_a_page_that_lacks_a_step_gets_a_whole_one(tmp_path):
    """As a full disk, or a run that went on without a page, leaves it."""
    fill(tmp_path / "run", (0, 10)).close()
    sink = fill(tmp_path / "run", (20,), page=False)
    old = time.time() - 9000
    for file in sorted((sink.path / "scores").iterdir()):
        os.utime(file, (old, old))
        old += 60
    with PageServer(read_store(sink.path)) as server:
        server.follow()
        _, _, text = get(server.address, "/data/index.js")
        index = json.loads(text.decode().removeprefix("tlens.index(").rstrip().removesuffix(")"))
        assert [step for step, _, _ in index["steps"]] == [0, 10, 20]
        stamps = [stamp / 1000 for _, stamp, _ in index["steps"]]
        assert abs(stamps[-1] - (old - 60)) < 1 and stamps == sorted(stamps)
        tear(sink.path / "arrays/step-00000010.safetensors")
        sink.write(small(30), step=30)
        server.follow()
        assert get(server.address, "/data/00000030.js")[0] == 200
        made = server._copy.path
        assert made.is_dir() and sink.path not in made.parents
    assert not made.exists()
    resumed = LocalSink(tmp_path / "run")
    resumed.write(small(40), step=40)
    with PageServer(read_store(sink.path)) as server:
        server.follow()
        assert get(server.address, "/data/00000040.js")[0] == 200
