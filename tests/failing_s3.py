"""A proxy in front of an S3 server that fails a share of the calls: 503, 500, resets, stalls, cut bodies, lost answers."""

from __future__ import annotations

import http.client
import http.server
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

FAULTS = ("slow down", "error", "reset", "cut", "lost", "stall", "false success")
MOST_STALLS = 3  # each costs the client its whole timeout
_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards to `upstream` (http://host:port); `share` of the calls fail, the kinds in turn. Counts both."""

    daemon_threads = True

    def __init__(self, upstream: str, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname, parts.port)
        self.share, self.chance, self.guard = share, random.Random(seed), threading.Lock()
        self.calls, self.faults = 0, Counter[str]()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self, method: str, path: str) -> str:
        """The fault of this call, or nothing."""
        with self.guard:
            self.calls += 1
            if self.chance.random() >= self.share:
                return ""
            possible = [kind for kind in FAULTS if self._fits(kind, method, path)]
            kind = min(possible, key=lambda kind: (self.faults[kind], FAULTS.index(kind)))
            self.faults[kind] += 1
            return kind

    def _fits(self, kind: str, method: str, path: str) -> bool:
        if kind == "stall":
            return self.faults[kind] < MOST_STALLS
        if kind == "false success":
            return method == "POST" and "uploadId=" in path
        return kind != "cut" or method == "GET"

    def handle_error(self, *_) -> None:
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw(self.command, self.path)
        if fault in ("slow down", "error"):
            status, code = (503, "SlowDown") if fault == "slow down" else (500, "InternalError")
            return self.answer(
                status, [("Content-Type", "application/xml")], f"<Error><Code>{code}</Code></Error>".encode()
            )
        if fault == "false success":
            return self.answer(200, [("Content-Type", "application/xml")], b"<Error><Code>InternalError</Code></Error>")
        if fault == "stall":
            self.server.over.wait(60)  # the client gives up long before
            return self.reset()
        if fault == "reset":
            return self.reset()
        status, headers, data = self.forward(body)
        if fault == "lost":  # done, but nobody hears of it
            return self.reset()
        if fault == "cut" and data:
            return self.answer(status, headers, data, send=len(data) // 2)
        if fault == "cut":
            return self.reset()
        self.answer(status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = respond

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host too: it is signed
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return answer.status, headers, data
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, send: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        elif all(name.lower() != "content-length" for name, _ in headers):
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:send])
        if send is not None:
            self.close_connection = True

    def reset(self) -> None:
        """Close so that the client meets ECONNRESET."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_) -> None:
        pass


@contextmanager
def failing(upstream: str, share: float = 0.05, seed: int = 0) -> Iterator[Proxy]:
    """A running proxy."""
    proxy = Proxy(upstream, share, seed)
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        proxy.shutdown()
        proxy.server_close()
