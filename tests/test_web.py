"""The guard of addresses that a recipe names: what is connected to, at every hop."""

from __future__ import annotations

import threading
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlmflow import web


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            where = self.path.partition("?to=")[2]
            self.send_response(302 if where else 200)
            if where:
                self.send_header("Location", where)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_a_named_host_is_reached_also_by_a_redirect(port: int) -> None:
    there = f"http://127.0.0.1:{port}/"
    assert web.opener(["127.0.0.1"]).open(there, timeout=5).read() == b"ok"
    assert web.opener(["127.0.0.1"]).open(f"{there}?to={there}", timeout=5).read() == b"ok"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.1", "2130706433"])
def test_a_private_address_is_refused_however_it_is_written(port: int, host: str) -> None:
    with pytest.raises(urllib.error.URLError) as error:
        web.opener(["elsewhere"]).open(f"http://{host}:{port}/", timeout=5)
    assert web.forbidden(error.value) is not None


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_redirect_into_the_network_is_refused(port: int, scheme: str) -> None:
    with pytest.raises(urllib.error.URLError) as error:
        web.opener(["127.0.0.1"]).open(f"http://127.0.0.1:{port}/?to={scheme}://localhost:{port}/", timeout=5)
    assert web.forbidden(error.value) is not None


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_other_schemes_and_proxies_are_not_used(port: int, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    with pytest.raises(urllib.error.URLError):
        web.opener(["127.0.0.1"]).open(f"http://127.0.0.1:{port}/?to={address}", timeout=5)
    with pytest.raises(urllib.error.URLError) as error:
        web.opener().open("http://169.254.169.254/", timeout=5)
    assert web.forbidden(error.value) is not None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:secret@host:5000/path?token=x#y", "http://host:5000/path"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://user:secret@host/db", "postgresql://host/db"),
        ("sqlite:////tmp/m.db", "sqlite:////tmp/m.db"),
    ],
)
def test_addresses_are_shown_without_credentials(url: str, shown: str) -> None:
    assert web.without_credentials(url) == shown
