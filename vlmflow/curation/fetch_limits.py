"""What bounds a fetch: limits of time, rate and size, the reasons in which it may end, and the clock of an attempt."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import IO, Any

from vlmflow import __version__

USER_AGENT = f"vlmflow/{__version__} (+image dataset puller; honours X-Robots-Tag)"
# Reasons that another attempt on another day may cure; all others are properties of the URL or of its content.
TRANSIENT = frozenset(
    {"refused", "unreachable", "connect_timeout", "timeout", "first_byte_timeout", "too_slow", "dns", "disconnected"}
    | {"http_429", "robots_unknown"}
)
SLOW_GRACE = 5.0  # seconds of a body before its rate is judged


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
    first_byte_timeout: float = 10.0  # from a request to the head of its answer
    min_rate: int = 0  # bytes per second of a body, judged after SLOW_GRACE; 0 = no limit
    max_bytes: int = 20_000_000
    redirects: int = 5
    retries: int = 2
    backoff: float = 0.25  # doubles with each retry
    retry_after_cap: float = 30.0
    allow_hosts: frozenset[str] = frozenset()
    user_agent: str = USER_AGENT
    robots_txt: bool = False
    dead_after: int = 16  # failed connections in a row, and no answer ever, after which a host gets no more retries

    @property
    def agent(self) -> str:
        """The product name by which X-Robots-Tag and robots.txt may speak to us."""
        return self.user_agent.split("/")[0].lower()


@dataclass(frozen=True)
class Fetched:
    """What became of one URL: its body (`file`; `used` if a function took it), or `reason` (a code) and `detail` (for people)."""

    url: str
    file: IO[bytes] | None = None
    reason: str | None = None
    detail: str = ""
    used: Any = None

    @property
    def data(self) -> bytes | None:
        """The whole body in memory."""
        if self.file is None:
            return None
        self.file.seek(0)
        return self.file.read()


class Failure(Exception):
    """Ends an attempt; `wait` None means that no further attempt can help, else how long the server asks for."""

    def __init__(self, reason: str, detail: str = "", wait: float | None = None, connecting: bool = False):
        super().__init__(reason)
        self.reason, self.detail, self.wait, self.connecting = reason, detail, wait, connecting


class Clock:
    """The time limits of one attempt, and which of them ended it. The fetcher's watchman looks at all clocks every TICK:
    one timer for everybody, as most attempts last a few milliseconds."""

    def __init__(self, limits: Limits, seconds: float) -> None:
        self._limits = limits
        self._task = asyncio.current_task()
        self._end = self._limit = time.monotonic() + max(seconds, 0.001)
        self._start = 0.0  # of the body
        self.size = 0  # bytes of the body so far
        self.verdict: tuple[str, str] | None = None

    def asked(self) -> None:
        """A request is sent."""
        self._start = 0.0
        self._limit = time.monotonic() + self._limits.first_byte_timeout

    def body(self) -> None:
        """The head of the answer is here."""
        self._start = time.monotonic()

    def look(self, now: float) -> None:
        """End the attempt if a limit is passed."""
        limits, rate = self._limits, self._limits.min_rate
        if self.verdict is not None:
            return
        if now >= self._end:
            self.verdict = ("timeout", f"not finished within {limits.timeout:g} s")
        elif not self._start and now >= self._limit:
            self.verdict = ("first_byte_timeout", f"no answer within {limits.first_byte_timeout:g} s")
        elif self._start and rate and now >= self._start + max(SLOW_GRACE, self.size / rate):
            self.verdict = ("too_slow", f"below {rate} bytes per second after {SLOW_GRACE:g} s")
        if self.verdict is not None and self._task is not None:
            self._task.cancel()

    def passed(self) -> Failure | None:
        """The failure behind a cancellation, if it was ours."""
        if self.verdict is None or self._task is None or self._task.uncancel() > 0:
            return None
        return Failure(*self.verdict)
