"""Many URLs, each under one deadline, each ending in bytes or in a reason.

Link lists from the web contain everything: dead hosts, endless bodies, servers that drip one byte a second, pages that
claim to be JPEGs, redirects into the cluster. Measured on img2dataset (spec/data-eval-soup.md 1.2) each of these costs
gigabytes, hours or a hang. Here a URL has one total deadline over all its attempts, a byte cap that holds also for
compressed bodies, a redirect limit with the address guard at every hop, and a bounded number of retries; the answer is
a value, never an exception, so that a caller can count reasons row by row.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from vlmflow import __version__
from vlmflow.curation.guards import ForbiddenAddress, is_public, literal_address, opted_out

USER_AGENT = f"vlmflow/{__version__} (+image dataset puller; honours X-Robots-Tag)"
REDIRECTS = frozenset({301, 302, 303, 307, 308})
RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})
# Reasons that another attempt on another day may cure; all others are properties of the URL or of its content.
TRANSIENT = frozenset({"refused", "unreachable", "connect_timeout", "timeout", "dns", "disconnected", "http_429"})


def is_transient(reason: str) -> bool:
    """Whether fetching the same URL again later may succeed (server down, overloaded or slow)."""
    return reason in TRANSIENT or reason.startswith("http_5")


@dataclass(frozen=True)
class Limits:
    """How far a fetch may go. Times in seconds, sizes in bytes."""

    concurrency: int = 64
    per_host: int = 16
    timeout: float = 10.0  # network time of one URL, all attempts together; waits between attempts not counted
    connect_timeout: float = 5.0
    max_bytes: int = 20_000_000
    redirects: int = 5
    retries: int = 2
    backoff: float = 0.25  # doubles with each retry
    retry_after_cap: float = 30.0
    allow_hosts: frozenset[str] = frozenset()
    user_agent: str = USER_AGENT
    dead_after: int = 16  # refused connections in a row, and no answer ever, after which a host gets no more retries


@dataclass(frozen=True)
class Fetched:
    """What became of one URL: `data`, or `reason` (a code) and `detail` (for people)."""

    url: str
    data: bytes | None = None
    reason: str | None = None
    detail: str = ""


class _Failure(Exception):
    """Ends an attempt; `retry_after` None means that no further attempt can help."""

    def __init__(self, reason: str, detail: str = "", retry_after: float | None = None, connecting: bool = False):
        super().__init__(reason)
        self.reason, self.detail, self.retry_after, self.connecting = reason, detail, retry_after, connecting


@dataclass
class _Host:
    """What is known about one host: its connection slots, when it wants to be left alone, whether it lives."""

    slots: asyncio.Semaphore
    quiet_until: float = 0.0
    answered: bool = False
    refused: int = 0


@dataclass
class Fetcher:
    """An asyncio HTTP client for many URLs: `async with Fetcher(limits) as f: result = await f.get(url)`."""

    limits: Limits = field(default_factory=Limits)

    async def __aenter__(self) -> Fetcher:
        import aiohttp

        limits = self.limits
        self._hosts: dict[str, _Host] = defaultdict(lambda: _Host(asyncio.Semaphore(limits.per_host)))
        self._slots = asyncio.Semaphore(limits.concurrency)
        connector = aiohttp.TCPConnector(limit=0, resolver=_guarded_resolver(limits.allow_hosts), ttl_dns_cache=300)
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": limits.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_timeout),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    def dead_hosts(self) -> list[str]:
        """Hosts (name:port) that never answered and refused every connection."""
        return sorted(name for name, host in self._hosts.items() if host.refused and not host.answered)

    async def get(self, url: str) -> Fetched:
        """Fetch one URL. Never raises for what the network or the server does; see `Fetched.reason`."""
        limits, spent, tries = self.limits, 0.0, 0
        try:
            self._check(url)
            host = self._hosts[_host_key(url)]
        except _Failure as error:
            return Fetched(url, None, error.reason, error.detail)
        except ValueError:
            return Fetched(url, None, "bad_url", "not a URL")
        while True:
            await asyncio.sleep(max(0.0, host.quiet_until - time.monotonic()))
            async with host.slots, self._slots:
                start = time.monotonic()
                try:
                    async with asyncio.timeout(max(limits.timeout - spent, 0.001)):
                        data = await self._attempt(url)
                    host.answered = True
                    return Fetched(url, data)
                except TimeoutError:
                    return Fetched(url, None, "timeout", f"not finished within {limits.timeout:g} s")
                except _Failure as error:
                    failure = error
                finally:
                    spent += time.monotonic() - start
            host.answered |= not failure.connecting
            host.refused += failure.connecting
            dead = not host.answered and host.refused >= limits.dead_after
            tries += 1
            if failure.retry_after is None or tries > limits.retries or dead:
                return Fetched(url, None, failure.reason, failure.detail)
            if failure.retry_after > limits.retry_after_cap:
                detail = f"{failure.detail}; Retry-After exceeds the cap of {limits.retry_after_cap:g} s"
                return Fetched(url, None, failure.reason, detail)
            if failure.retry_after > 0:  # the whole host asked for it, so every URL of the host waits
                host.quiet_until = max(host.quiet_until, time.monotonic() + failure.retry_after)
            else:
                await asyncio.sleep(limits.backoff * 2 ** (tries - 1))

    async def _attempt(self, url: str) -> bytes:
        """One attempt: follow redirects by hand so that the guards see every hop. Raises _Failure."""
        import aiohttp

        for _ in range(self.limits.redirects + 1):
            self._check(url)
            try:
                async with self._session.get(url, allow_redirects=False) as response:
                    if response.status in REDIRECTS and "Location" in response.headers:
                        url = urljoin(url, response.headers["Location"])
                        continue
                    return await self._body(response)
            except _Failure:
                raise
            except aiohttp.ClientConnectorCertificateError as error:
                raise _Failure("tls", "the certificate is not valid for the host") from error
            except aiohttp.ClientConnectorDNSError as error:
                if isinstance(error.os_error, ForbiddenAddress):
                    raise _Failure("forbidden_address", str(error.os_error)) from error
                raise _Failure("dns", f"{urlsplit(url).hostname} has no address", 0.0) from error
            except aiohttp.ClientSSLError as error:
                raise _Failure("tls", "no TLS connection") from error
            except aiohttp.ConnectionTimeoutError as error:
                raise _Failure("connect_timeout", _place(url), 0.0, connecting=True) from error
            except aiohttp.ClientConnectorError as error:
                code = "refused" if isinstance(error.os_error, ConnectionRefusedError) else "unreachable"
                raise _Failure(code, _place(url), 0.0, connecting=True) from error
            except (aiohttp.InvalidURL, ValueError) as error:
                raise _Failure("bad_url", "not a URL that can be requested") from error
            except aiohttp.ClientPayloadError as error:
                raise _Failure("truncated", "the body ended early", 0.0) from error
            except (aiohttp.ClientError, OSError) as error:
                if isinstance(error, TimeoutError):
                    raise
                raise _Failure("disconnected", _place(url), 0.0) from error
        raise _Failure("too_many_redirects", f"more than {self.limits.redirects}")

    def _check(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme.lower() not in ("http", "https"):
            raise _Failure("bad_scheme", f"'{parts.scheme}' is neither http nor https")
        host = (parts.hostname or "").lower()
        if not host:
            raise _Failure("bad_url", "no host")
        address = literal_address(host)
        if address is not None and host not in self.limits.allow_hosts and not is_public(address):
            raise _Failure("forbidden_address", f"{host} is {address}")

    async def _body(self, response: Any) -> bytes:
        limits, status = self.limits, response.status
        if status != 200:
            wait = _retry_after(response.headers.get("Retry-After")) if status in RETRIED_STATUS else None
            raise _Failure(f"http_{status}", f"status {status}", wait)
        directive = opted_out(response.headers.getall("X-Robots-Tag", []), limits.user_agent.split("/")[0].lower())
        if directive:
            raise _Failure("opted_out", f"X-Robots-Tag: {directive}")
        too_large = _Failure("too_large", f"more than {limits.max_bytes} bytes")
        if (response.content_length or 0) > limits.max_bytes:
            raise too_large
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise _Failure("bad_encoding", f"Content-Encoding {encoding} was not asked for")
        unzip = None if encoding in ("", "identity") else zlib.decompressobj(47 if "gzip" in encoding else 15)
        data = bytearray()
        async for chunk in response.content.iter_any():
            if unzip is not None:
                try:
                    chunk = unzip.decompress(chunk, limits.max_bytes + 1)
                except zlib.error as error:
                    raise _Failure("corrupt", f"the body is not {encoding}") from error
            data += chunk
            if len(data) > limits.max_bytes:
                raise too_large
        if not data:
            raise _Failure("empty", "the body has 0 bytes")
        return bytes(data)


def _guarded_resolver(allow_hosts: frozenset[str]) -> Any:
    """A resolver that refuses hosts with a non-public address, so the check and the connection see the same answer."""
    import aiohttp
    from aiohttp.abc import AbstractResolver

    class Guarded(AbstractResolver):
        def __init__(self) -> None:
            self._inner = aiohttp.ThreadedResolver()

        async def resolve(self, host: str, port: int = 0, family: Any = 0) -> Any:
            found = await self._inner.resolve(host, port, family)
            if host.lower() not in allow_hosts:
                for entry in sorted(found, key=lambda e: e["host"]):
                    if not is_public(entry["host"]):
                        raise ForbiddenAddress(host, entry["host"])
            return found

        async def close(self) -> None:
            await self._inner.close()

    return Guarded()


def _host_key(url: str) -> str:
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError(url)
    return f"{parts.hostname.lower()}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _place(url: str) -> str:
    """The host as a person reads it: `name:port`."""
    with suppress(ValueError):
        return _host_key(url)
    return "the host"


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number or an HTTP date; 0 when absent or unreadable."""
    if not value:
        return 0.0
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
