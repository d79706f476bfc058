"""A web server on 127.0.0.1 that misbehaves on demand, for tests of the puller. It counts what is asked of it."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web
from PIL import Image


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    """A small picture whose pixels depend on `number`."""
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 53 % 256))
    image.putpixel((0, 0), (number % 256, number // 256 % 256, 7))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises `width` x `height` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


class Server:
    """What the handlers share: the port, the request counts, and a gate that holds requests back."""

    def __init__(self) -> None:
        self.port = 0
        self.hits: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.down = False  # images answer with 503
        self.mended = False  # /bomb and /cut answer with good pictures
        self.gate_after: int | None = None  # images served before further requests wait
        self.waiting = threading.Event()
        self.released = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path.lstrip('/')}"

    @property
    def images(self) -> int:
        return sum(n for path, n in self.hits.items() if path.startswith("/img/"))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.hits[path] += 1
        self.agents.add(request.headers.get("User-Agent", ""))
        kind, _, rest = path.lstrip("/").partition("/")
        if kind == "img" and self.down:
            return web.Response(status=503, text="down")
        if kind == "img":
            if self.gate_after is not None and self.images > self.gate_after:
                self.waiting.set()
                while not self.released.is_set():
                    await asyncio.sleep(0.01)
            return web.Response(body=picture(int(rest)), content_type="image/png")
        if kind == "table":
            rows = "".join(f"{self.url(f'/img/{i}')},text {i}\n" for i in range(int(rest.removesuffix(".csv"))))
            return web.Response(text="url,text\n" + rows)
        if kind == "gone":
            return web.Response(status=410, text="no")
        if kind == "status":
            return web.Response(status=int(rest), text="no")
        if kind == "redirect":
            return web.Response(status=302, headers={"Location": request.query["to"]})
        if kind == "loop":
            return web.Response(status=302, headers={"Location": "/loop"})
        if kind == "html":
            return web.Response(body=b"<!doctype html><html>sorry</html>", content_type="image/jpeg")
        if kind == "lie":
            return web.Response(body=picture(5, "JPEG"), content_type="text/html")
        if self.mended and kind in ("bomb", "cut"):
            return web.Response(body=picture(len(rest)), content_type="image/png")
        if kind == "bomb":
            return web.Response(body=bomb(40_000, 40_000), content_type="image/png")
        if kind == "cut":
            return web.Response(body=picture(9, "JPEG", (400, 300))[:900], content_type="image/jpeg")
        if kind == "robots":
            return web.Response(body=picture(1), headers={"X-Robots-Tag": request.query["tag"]})
        if kind == "format":
            return web.Response(body=picture(3, rest), content_type="image/x-any")
        if kind == "busy":  # 429 once or more, then the image
            if self.hits[path] <= int(request.query.get("times", 1)):
                return web.Response(status=429, headers={"Retry-After": request.query.get("after", "0.05")})
            return web.Response(body=picture(6), content_type="image/png")
        if kind == "gzip":
            body = zlib.compressobj(9, wbits=31)
            return web.Response(
                body=body.compress(picture(8) + b"\0" * int(rest)) + body.flush(), headers={"Content-Encoding": "gzip"}
            )
        stream = web.StreamResponse()
        if kind == "endless":
            await stream.prepare(request)
            while True:
                await stream.write(b"\xff\xd8\xff" + b"x" * 65536)
        if kind == "drip":
            await stream.prepare(request)
            while True:
                await stream.write(b"\xff")
                await asyncio.sleep(0.02)
        if kind == "drop":
            assert request.transport is not None
            request.transport.close()
            return stream
        return web.Response(status=404)


@contextmanager
def serving() -> Iterator[Server]:
    """The server, in a thread of its own, on a free port."""
    server, started, loop = Server(), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", server.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.port = runner.addresses[0][1]
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        server.released.set()
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
