"""A server that means harm: no forbidden address is contacted, memory stays bounded, each row is counted with its reason.

Names and addresses are faked below `socket.getaddrinfo` and below the opening of connections: a "public" address leads to
the test's server on the loopback, and every address to which a connection is opened is on record.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import socket
import subprocess
import sys
import threading
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from curation_server import bomb, picture, serving
from test_curation_pull import context, failures, table

from vlmflow.curation import fetch, fetch_limits, pull
from vlmflow.curation.guards import is_public
from vlmflow.dataset.shard import ShardReader

PUBLIC = "93.184.216.34"  # stands for any host of the web; connections to it end at the test's server
TARGETS = {
    "loopback.example": ["127.0.0.1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "private.example": ["10.1.2.3"],
    "link-local.example": ["169.254.1.1"],
    "metadata.example": ["169.254.169.254"],
    "six.example": ["fd00::1"],
    "mixed.example": [PUBLIC, "192.168.1.1"],  # one good address does not make up for a bad one
    "metadata.google.internal": ["169.254.169.254"],
}
FORBIDDEN = [
    *[f"http://{name}/ok/1" for name in TARGETS],
    "http://①②⑦.0.0.1/ok/1",
    "http://１２７.0.0.1/ok/1",
    "http://127.1/ok/1",
    "http://0x7f000001/ok/1",
    "http://[::1]/ok/1",
    "http://[::ffff:169.254.169.254]/latest/meta-data/",
    "http://user:secret@169.254.169.254/latest/meta-data/",
    "http://web.example/to?http://169.254.169.254/latest/meta-data/",
    "http://web.example/to?http://metadata.example/latest/meta-data/",
    "http://web.example/to?http://127.0.0.1:22/",
    "http://web.example/to?//loopback.example/",
    "http://web.example/to?http://web.example/to?http://private.example/",
    "http://rebinding.example/ok/1?later",
]


class Net:
    """Fake names, recorded connections, and raw answers by path."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.contacted: list[str] = []
        self.hits: Counter[str] = Counter()
        self.port = 0

    def lookup(self, host, port, *args, **kwargs):
        self.asked[host] += 1
        addresses = TARGETS.get(host, [PUBLIC])
        if host == "rebinding.example":  # public when it is looked at, loopback when it is used
            addresses = [PUBLIC] if self.asked[host] == 1 else ["127.0.0.1"]
        found = []
        for address in addresses:
            six = ":" in address
            place = (address, port, 0, 0) if six else (address, port)
            found.append((socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM, 6, "", place))
        return found

    async def answer(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                self.hits[path] += 1
                name, _, rest = path.lstrip("/").partition("/")
                await ANSWERS[name.partition("?")[0]](writer, path.partition("?")[2] or rest)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@contextmanager
def world(monkeypatch):
    """The fake net with its server in a thread."""
    from aiohttp import connector as aiohttp_connector

    net, loop, ready = Net(), asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()

    async def serve():
        server = await asyncio.start_server(net.answer, "127.0.0.1", 0)
        net.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    real = aiohttp_connector.aiohappyeyeballs.start_connection

    async def start(addr_infos, **settings):
        for info in addr_infos:
            settings["socket_factory"](
                info
            ).close()  # the puller's own look at the address, as the library would call it
            net.contacted.append(info[4][0])
        near = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", net.port))]
        return await real(near, **{**settings, "socket_factory": None})

    monkeypatch.setattr(socket, "getaddrinfo", net.lookup)
    monkeypatch.setattr(aiohttp_connector.aiohappyeyeballs, "start_connection", start)
    try:
        yield net
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def whole(body: bytes, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    length = "" if "Content_Length" in headers else f"Content-Length: {len(body)}\r\n"
    return f"HTTP/1.1 200 OK\r\n{lines}{length}\r\n".encode() + body


def fixed(answer: bytes, close: bool = False):
    async def send(writer, rest):
        writer.write(answer)
        await writer.drain()
        if close:
            writer.close()

    return send


async def ok(writer, rest):
    writer.write(whole(picture(int(rest.partition("?")[0] or 1) if rest.isdigit() else 1)))


async def to(writer, rest):
    writer.write(f"HTTP/1.1 302 Found\r\nLocation: {rest}\r\nContent-Length: 0\r\n\r\n".encode())


async def chain(writer, rest):  # ten thousand hops
    number = int(rest)
    await to(writer, f"/chain/{number + 1}") if number < 10_000 else await ok(writer, "1")


async def endless(writer, rest):
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n\xff\xd8\xff")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def slow(writer, rest):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n")
    while True:
        writer.write(b"\xff")
        await writer.drain()
        await asyncio.sleep(0.05)


async def silent(writer, rest):
    await asyncio.sleep(60)


async def headers(writer, rest):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Flood: " + b"y" * 4000 + b"\r\n")
        await writer.drain()


async def hints(writer, rest):  # informational answers without end
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 50)
        await writer.drain()
        await asyncio.sleep(0.05)


def zlib_bomb(side: int) -> bytes:
    """A real PNG of `side` x `side` grey pixels, all of them there, a thousandth in size."""
    import struct

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, rows = zlib.compressobj(9), []
    for _ in range(side):
        rows.append(packer.compress(bytes(side + 1)))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


JPEG = picture(3, "JPEG", (64, 48))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
ANSWERS = {
    "ok": ok,
    "to": to,
    "chain": chain,
    "endless": endless,
    "slow": slow,
    "silent": silent,
    "headers": headers,
    "hints": hints,
    "short": fixed(whole(JPEG[:500], Content_Length="90000"), close=True),
    "long": fixed(whole(JPEG, Content_Length="100")),
    "negative": fixed(whole(JPEG, Content_Length="-5"), close=True),
    "huge": fixed(whole(JPEG, Content_Length="99999999999"), close=True),
    "empty": fixed(whole(b"")),
    "header-bomb": fixed(whole(bomb(100_000, 100_000))),
    "real-bomb": fixed(whole(zlib_bomb(9000))),
    "gzip-bomb": fixed(whole(gzip.compress(bytes(60_000_000)), Content_Encoding="gzip")),
    "gzip-lie": fixed(whole(JPEG, Content_Encoding="gzip")),
    "brotli": fixed(whole(JPEG, Content_Encoding="br")),
    "html": fixed(whole(b"<!doctype html><script>1</script>", Content_Type="image/jpeg")),
    "svg": fixed(whole(SVG, Content_Type="image/svg+xml")),
    "gif-js": fixed(whole(b"GIF89a/*" + b"\0" * 40 + b"*/=1;alert(1)", Content_Type="image/gif")),
    "jpeg-html": fixed(whole(JPEG + b"<html><script>alert(1)</script></html>")),
    "jpeg-zip": fixed(whole(JPEG + b"PK\x05\x06" + bytes(18))),
    "pdf": fixed(whole(b"%PDF-1.7 \xff\xd8\xff", Content_Type="image/jpeg")),
    "words": fixed(b"hello, I am no web server\r\n\r\n", close=True),
    "not-found": fixed(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"),
}
EXPECTED = {
    "chain/1": "too_many_redirects",
    "endless": "too_large",
    "slow": "too_slow",
    "silent": "first_byte_timeout",
    "headers": "bad_response",
    "hints": "first_byte_timeout",
    "short": "truncated",
    "long": "corrupt or bad_response",  # by how the surplus arrives
    "negative": "bad_response",
    "huge": "too_large",
    "empty": "empty",
    "header-bomb": "too_many_pixels",
    "real-bomb": "too_many_pixels",
    "gzip-bomb": "too_large",
    "gzip-lie": "corrupt",
    "brotli": "bad_encoding",
    "html": "not_an_image",
    "svg": "not_an_image",
    "gif-js": "corrupt",
    "jpeg-html": "polyglot",
    "jpeg-zip": "polyglot",
    "pdf": "not_an_image",
    "words": "bad_response",
    "not-found": "http_404",
}


def test_no_forbidden_address_is_contacted_and_each_row_has_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch_limits, "SLOW_GRACE", 0.5)
    urls = {f"http://web.example/{path}": reason for path, reason in EXPECTED.items()}
    urls |= dict.fromkeys(FORBIDDEN, "forbidden_address")
    good = [f"http://web.example/ok/{i}" for i in range(5)]
    good += ["http://web.example/to?/to?http://other.example/ok/7", f"http://{PUBLIC}/ok/9"]
    uri = table(tmp_path / "t.csv", [{"url": url, "text": "t"} for url in [*urls, *good]])
    settings = {"max_bytes": 3_000_000, "samples_per_shard": 100, "first_byte_timeout": 4, "timeout": 30, "retries": 1}
    with world(monkeypatch) as net:
        monkeypatch.setattr("vlmflow.curation.connect.DNS_SECONDS", 0)  # every hop resolves anew
        ctx = context(tmp_path, {"web": {"table": uri}}, allow_hosts=[], **settings)
        warm = fetch.Fetcher(fetch_limits.Limits())

        async def first_look():
            async with warm as fetcher:
                return await fetcher.get("http://rebinding.example/ok/1")

        assert asyncio.run(first_look()).data == picture(1), "the name was public at first"
        manifest = pull.run(ctx, "web")
    found = {url: reason for url, (reason, _) in failures(ctx).items()}
    assert found.keys() == urls.keys()
    assert {url: reason for url, reason in found.items() if reason not in urls[url].split(" or ")} == {}
    assert {s.meta["url"] for s in ShardReader(manifest.shards[0])} == set(good)
    assert set(net.contacted) == {PUBLIC} and net.asked["rebinding.example"] >= 2
    assert not [address for address in net.contacted if not is_public(address)]
    assert net.hits["/chain/6"] == 1 and not net.hits["/chain/7"], "five redirects, not ten thousand"
    summary = manifest.lineage[0].summary
    assert summary["failed_by_reason"]["forbidden_address"] == len(FORBIDDEN) and summary["failed"] == len(urls)
    assert summary["failed_by_host"]["web.example"] == len(EXPECTED) + 5


PROGRAM = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path; from vlmflow.curation import pull; from test_curation_pull import context
ctx = context(Path(sys.argv[2]), {"web": {"table": sys.argv[3]}}, samples_per_shard=100, max_bytes=4_000_000, timeout=120, per_host=64)
print(pull.run(ctx, "web").lineage[0].summary["failed_by_reason"])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def test_memory_does_not_follow_what_servers_send(tmp_path):
    """64 bodies at a time of 4 MB each would be 256 MB above the libraries."""
    with serving() as server:
        urls = [server.url(f"/endless/{i}") for i in range(64)] + [server.url("/img/1")]
        uri = table(tmp_path / "t.csv", [{"url": url, "text": "t"} for url in urls])
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": str(here.parent), "VLMFLOW_QUIET": "1"}
        program = [sys.executable, "-c", PROGRAM, str(here), str(tmp_path), uri]
        found = subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[0] == "{'too_large': 64}"
    assert int(found[1]) / 1024 < 300, "MiB at the peak, of which more than half are the libraries"


def test_the_address_is_judged_again_as_the_socket_is_opened(monkeypatch):
    """Whatever resolved the name, and however: the last look is at the address of the connection itself."""

    class Careless:
        async def resolve(self, host, port=0, family=0):
            return [
                {"hostname": host, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 6, "flags": 0}
            ]

        async def close(self):
            pass

    async def attempt():
        async with fetch.Fetcher(fetch_limits.Limits(retries=0)) as fetcher:
            fetcher._session.connector._resolver = Careless()
            return await fetcher.get("http://web.example/ok/1")

    with world(monkeypatch) as net:
        found = asyncio.run(attempt())
    assert found.reason == "forbidden_address" and not net.contacted and not net.hits
