"""Serves the demo's site over HTTP, with the faults that real web servers have.

A real server rather than a stub inside `pull`: the laptop run then exercises the same download code as a crawl.
Broken links are a matter of the path: /missing gives 404, /error 500 every time, /pages HTML where an image is
expected, /truncated the first half of a picture, /bomb a picture whose header claims 30000x30000 pixels. Links that
work though not at once: /moved redirects, /slow waits two seconds on its first request.
"""

from __future__ import annotations

import struct
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_TYPES = {".png": "image/png", ".csv": "text/csv", ".tsv": "text/tab-separated-values"}
_HTML = b"<!doctype html><title>Gone</title><p>This picture has been removed by its owner.</p>\n"
SLOW_SECONDS = 2.0


def bomb() -> bytes:
    """A small PNG whose header claims 30000x30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


class Site(ThreadingHTTPServer):
    """`roots` are looked through in order for a path."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, port: int) -> None:
        self.roots: list[Path] = []
        self._woken: set[str] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is everyday; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def first_time(self, path: str) -> bool:
        with self._lock:
            new = path not in self._woken
            self._woken.add(path)
            return new

    def find(self, path: str) -> Path | None:
        if ".." in path:
            return None
        return next((root / path for root in self.roots if (root / path).is_file()), None)


class _Handler(BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"
    server_version = "vlmflow-demo"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        folder, _, name = path.partition("/")
        if folder == "missing":
            self._send(404, b"not found\n", "text/plain")
        elif folder == "error":
            self._send(500, b"internal error\n", "text/plain")
        elif folder == "pages":
            self._send(200, _HTML, "text/html; charset=utf-8")
        elif folder == "bomb":
            self._send(200, bomb(), "image/png")
        elif folder == "moved":
            self._send(302, b"", "text/plain", {"Location": f"{self.server.base_url}/images/{name}"})
        elif folder in ("truncated", "slow"):
            if folder == "slow" and self.server.first_time(name):
                time.sleep(SLOW_SECONDS)
            self._file(f"images/{name}", half=folder == "truncated")
        else:
            self._file(path)

    do_HEAD = do_GET

    def _file(self, path: str, half: bool = False) -> None:
        found = self.server.find(path)
        if found is None:
            self._send(404, b"not found\n", "text/plain")
            return
        data = found.read_bytes()
        self._send(200, data[: len(data) // 2] if half else data, _TYPES.get(found.suffix, "application/octet-stream"))

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the caller shows progress, not an access log."""
