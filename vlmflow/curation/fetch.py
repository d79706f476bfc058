"""Many URLs, each under one deadline, each ending in a body or in a reason.

Link lists from the web contain everything: dead hosts, endless bodies, servers that drip one byte a second, pages that
claim to be JPEGs, redirects into the cluster. Measured on img2dataset (spec/data-eval-soup.md 1.2) each of these costs
gigabytes, hours or a hang. Here a URL has one total deadline over all its attempts, a limit for the first byte and one
for the rate, a byte cap that holds also for compressed bodies, a redirect limit with the address guard at every hop, and
a bounded number of retries; the answer is a value, never an exception, so that a caller can count reasons row by row.
Bodies that are not small wait on disk where many wait, so memory does not grow with what servers send.
"""

from __future__ import annotations

import asyncio
import io
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from vlmflow.curation.connect import connector
from vlmflow.curation.fetch_limits import Clock, Failure, Fetched, Limits
from vlmflow.curation.guards import ForbiddenAddress, is_public, literal_address, opted_out
from vlmflow.curation.hosts import Hosts, Slots, retry_after

REDIRECTS = frozenset({301, 302, 303, 307, 308})
RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})
BUSY = frozenset({"http_429", "http_503"})  # the host asks to be left alone for a while
IN_MEMORY = 16 << 20  # bytes of bodies in memory over all open requests; above it, a body beyond its share goes to disk
TICK = 0.2  # seconds between looks at the clocks
STEP = 64 << 10  # bytes of a compressed body that are unpacked at a time

Use = Callable[[IO[bytes]], Awaitable[Any]]


@dataclass
class Fetcher:
    """An asyncio HTTP client for many URLs: `async with Fetcher(limits) as f: result = await f.get(url)`.

    Args:
        folder: where large bodies may wait, as files without a name; None = the system's temp folder.
    """

    limits: Limits = field(default_factory=Limits)
    folder: Path | None = None

    async def __aenter__(self) -> Fetcher:
        import aiohttp

        from vlmflow.curation.robots import Robots

        limits = self.limits
        self.bytes = 0  # of bodies, so far
        self._folder = str(self.folder) if self.folder else None
        self._clocks: set[Clock] = set()
        self._watchman = asyncio.create_task(self._watch())
        self._hosts = Hosts(limits.per_host, limits.dead_after)
        self._slots = Slots(limits.concurrency)
        self._robots = Robots(self._plain, limits.agent) if limits.robots_txt else None
        self._waiting = 0  # bytes of bodies in memory
        self._share = max(16 << 10, min(256 << 10, IN_MEMORY // limits.concurrency))  # of them that any body may have
        self._session = aiohttp.ClientSession(
            connector=connector(limits.allow_hosts),
            headers={"User-Agent": limits.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_timeout),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            read_bufsize=self._share,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._watchman.cancel()
        await self._session.close()

    def dead_hosts(self) -> list[str]:
        """Hosts (name:port) that never answered and refused every connection."""
        return self._hosts.dead()

    async def get(self, url: str, use: Use | None = None) -> Fetched:
        """Fetch one URL. Never raises for what the network or the server does; see `Fetched.reason`.

        `use` is awaited with the body while the URL still counts as an open request, so bodies that wait for it are as
        many as the limits allow; what it returns is `Fetched.used`, and the body is closed.
        """
        limits, spent, tries = self.limits, 0.0, 0
        try:
            parsed = self._parse(url)
            host = self._hosts[place(parsed)]
            if self._robots:
                self._obey(await self._robots.verdict(parsed))
        except Failure as error:
            return Fetched(url, None, error.reason, error.detail)
        while True:
            async with host.slots:
                await host.quiet()
                if (given_up := host.given_up()) is not None:
                    return Fetched(url, None, "unreachable", given_up)
                async with self._slots:
                    start = time.monotonic()
                    try:
                        body = await self._attempt(parsed, limits.timeout - spent)
                    except Failure as error:
                        failure = error
                        spent += time.monotonic() - start
                    else:
                        host.answered()
                        held = _in_memory(body)
                        try:
                            if use is None:
                                return Fetched(url, body)
                            with body:
                                return Fetched(url, used=await use(body))
                        finally:
                            self._waiting -= held
            host.failed(failure.connecting)
            tries += 1
            wait = failure.wait
            if wait is None:
                return Fetched(url, None, failure.reason, failure.detail)
            if wait > limits.retry_after_cap:
                detail = f"{failure.detail}; Retry-After exceeds the cap of {limits.retry_after_cap:g} s"
                return Fetched(url, None, failure.reason, detail)
            pause = wait or limits.backoff * 2 ** (tries - 1)
            if failure.reason in BUSY:  # the whole host asked for it, so every URL of the host waits
                host.busy(pause)
            if tries > limits.retries or host.hopeless:
                return Fetched(url, None, failure.reason, failure.detail)
            if failure.reason not in BUSY:
                await asyncio.sleep(pause)

    async def _plain(self, url: Any) -> tuple[str | None, bytes]:
        """(reason or None, body) of one attempt that counts as no open request: for robots.txt."""
        try:
            with await self._attempt(url, self.limits.timeout, robots=False) as body:
                self._waiting -= _in_memory(body)
                body.seek(0)
                return None, body.read(STEP * 8)
        except Failure as error:
            return error.reason, b""

    async def _attempt(self, url: Any, seconds: float, robots: bool = True) -> IO[bytes]:
        """One attempt within `seconds`. Raises Failure."""
        clock = Clock(self.limits, seconds)
        self._clocks.add(clock)
        try:
            return await self._follow(url, clock, robots)
        except asyncio.CancelledError:
            if (failure := clock.passed()) is not None:
                raise failure from None
            raise
        finally:
            self._clocks.discard(clock)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for clock in list(self._clocks):
                clock.look(now)

    async def _follow(self, url: Any, clock: Clock, robots: bool) -> IO[bytes]:
        """Follow redirects by hand so that the guards see every hop."""
        import aiohttp

        for hop in range(self.limits.redirects + 1):
            if hop:
                url = self._parse(url)
                if self._robots and robots:
                    self._obey(await self._robots.verdict(url))
            try:
                clock.asked()
                async with self._session.get(url, allow_redirects=False) as response:
                    if response.status in REDIRECTS and "Location" in response.headers:
                        url = _joined(url, response.headers["Location"])
                        continue
                    return await self._body(response, clock)
            except aiohttp.ClientConnectorCertificateError as error:
                raise Failure("tls", "the certificate is not valid for the host") from error
            except aiohttp.ClientConnectorDNSError as error:
                if isinstance(error.os_error, ForbiddenAddress):
                    raise Failure("forbidden_address", str(error.os_error)) from error
                raise Failure("dns", f"{url.host} has no address", 0.0, connecting=True) from error
            except aiohttp.ClientSSLError as error:
                raise Failure("tls", "no TLS connection") from error
            except aiohttp.ConnectionTimeoutError as error:
                raise Failure("connect_timeout", place(url), 0.0, connecting=True) from error
            except aiohttp.ClientConnectorError as error:
                if isinstance(error.os_error, ForbiddenAddress):
                    raise Failure("forbidden_address", str(error.os_error)) from error
                code = "refused" if isinstance(error.os_error, ConnectionRefusedError) else "unreachable"
                raise Failure(code, place(url), 0.0, connecting=True) from error
            except (aiohttp.InvalidURL, ValueError) as error:
                raise Failure("bad_url", "not a URL that can be requested") from error
            except aiohttp.ClientPayloadError as error:
                raise Failure("truncated", "the body ended early", 0.0) from error
            except aiohttp.ClientResponseError as error:
                raise Failure("bad_response", f"not HTTP as the standard has it ({error.message[:100]})") from error
            except (aiohttp.ClientError, OSError) as error:
                raise Failure("disconnected", place(url), 0.0) from error
        raise Failure("too_many_redirects", f"more than {self.limits.redirects}")

    def _parse(self, url: Any) -> Any:
        """The URL as it will be requested; one parser for guard and request, so that they cannot disagree on the host.
        Raises Failure."""
        import yarl

        try:
            parsed = yarl.URL(url)
            scheme, host, _ = parsed.scheme, (parsed.raw_host or "").lower(), parsed.port
        except (ValueError, TypeError) as error:
            raise Failure("bad_url", "not a URL") from error
        if scheme not in ("http", "https"):
            raise Failure("bad_scheme", f"'{scheme}' is neither http nor https")
        if not host:
            raise Failure("bad_url", "no host")
        address = literal_address(host)
        if address is not None and host not in self.limits.allow_hosts and not is_public(address):
            raise Failure("forbidden_address", f"{host} is {address}")
        return parsed

    @staticmethod
    def _obey(verdict: tuple[str, str] | None) -> None:
        if verdict is not None:
            raise Failure(*verdict)

    async def _body(self, response: Any, clock: Clock) -> IO[bytes]:
        limits, status = self.limits, response.status
        if status != 200:
            wait = retry_after(response.headers.get("Retry-After")) if status in RETRIED_STATUS else None
            raise Failure(f"http_{status}", f"status {status}", wait)
        directive = opted_out(response.headers.getall("X-Robots-Tag", []), limits.agent)
        if directive:
            raise Failure("opted_out", f"X-Robots-Tag: {directive}")
        too_large = Failure("too_large", f"more than {limits.max_bytes} bytes")
        if (response.content_length or 0) > limits.max_bytes:
            raise too_large
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Failure("bad_encoding", f"Content-Encoding {encoding} was not asked for")
        packed = encoding not in ("", "identity")
        unzip = zlib.decompressobj(47 if "gzip" in encoding else 15) if packed else None
        pieces, size, file = [], 0, None
        try:
            clock.body()
            async for chunk in response.content.iter_any():
                for piece in (chunk,) if unzip is None else _unpacked(unzip, chunk, encoding):
                    if size + len(piece) > limits.max_bytes:
                        raise too_large
                    size += len(piece)
                    if file is not None:
                        file.write(piece)
                    else:
                        pieces.append(piece)
                        self._waiting += len(piece)
                        if size > self._share and self._waiting > IN_MEMORY:
                            file = TemporaryFile(dir=self._folder)  # noqa: SIM115
                            self._waiting -= size
                            file.writelines(pieces)
                            pieces.clear()
                clock.size = size
            if not size:
                raise Failure("empty", "the body has 0 bytes")
        except BaseException:
            if file is not None:
                file.close()
            else:
                self._waiting -= size
            raise
        self.bytes += size
        return file or io.BytesIO(b"".join(pieces))


def _in_memory(body: IO[bytes]) -> int:
    """Bytes that a body holds in memory."""
    return body.seek(0, io.SEEK_END) if isinstance(body, io.BytesIO) else 0


def _unpacked(unzip: Any, chunk: bytes, encoding: str) -> Iterator[bytes]:
    """A compressed chunk in small steps: 1 kB may hold a megabyte."""
    while chunk:
        try:
            yield unzip.decompress(chunk, STEP)
        except zlib.error as error:
            raise Failure("corrupt", f"the body is not {encoding}") from error
        chunk = unzip.unconsumed_tail


def _joined(url: Any, location: str) -> str:
    import yarl

    return str(url.join(yarl.URL(location)))


def place(url: Any) -> str:
    """The host of a parsed URL as a person reads it: `name:port`."""
    return f"{url.host}:{url.port}"
