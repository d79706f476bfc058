"""The gallery as a server for the browser of one machine: pages of fifty samples out of millions.

It listens on the loopback address, answers GET and HEAD, and writes nothing. A page of another site must not read it: the
Host header has to name this machine (DNS rebinding), the content security policy allows nothing from elsewhere, and answers
are marked same-origin.
"""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import duckdb

from vlmflow.errors import DataError, ServiceError, VlmflowError
from vlmflow.look.gallery import Gallery

LOOPBACK = "127.0.0.1"
TIMEOUT = 20.0  # seconds that a connection may be silent
CONNECTIONS = 32
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)


class _Handler(BaseHTTPRequestHandler):
    server: GalleryServer
    timeout = TIMEOUT

    def do_GET(self) -> None:
        allowed = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
        if (self.headers.get("Host") or "").lower() not in allowed:
            return self._send(
                HTTPStatus.MISDIRECTED_REQUEST, "text/plain; charset=utf-8",
                f"this gallery answers as {LOOPBACK}:{self.server.server_port} and localhost only\n".encode(),
            )  # fmt: skip
        try:
            parts = urlsplit(self.path)
            pairs = parse_qsl(parts.query, keep_blank_values=True, max_num_fields=200)
            answer = self.server.gallery.answer(parts.path, pairs)
        except (DataError, ValueError) as error:
            answer = HTTPStatus.BAD_REQUEST, "text/plain; charset=utf-8", f"{error}\n".encode()
        except VlmflowError as error:
            answer = HTTPStatus.BAD_GATEWAY, "text/plain; charset=utf-8", f"{error}\n".encode()
        except duckdb.Error as error:  # memory or disk ran out
            answer = HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", f"{error}\n".encode()
        self._send(*answer)

    do_HEAD = do_GET

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        cached = status == HTTPStatus.OK and kind == "image/jpeg"
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "private, max-age=3600" if cached else "no-store",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "vlmflow"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses hold what a person searches for."""


class GalleryServer(ThreadingHTTPServer):
    """Serves a gallery on the loopback address; `port` 0 takes a free one. Raises ServiceError when the port is taken."""

    daemon_threads = True

    def __init__(self, gallery: Gallery, port: int = 0) -> None:
        self.gallery = gallery
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ServiceError(
                f"cannot serve at {LOOPBACK}:{port}: {error.strerror or error}; choose another --port, or 0 for a free one"
            ) from error

    @property
    def url(self) -> str:
        """The address to open."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        self._places.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away while it is answered is no error."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
