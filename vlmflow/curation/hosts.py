"""What a fetcher learns about hosts, and how it spares them.

A host that says it is busy (429, 503) is left alone for as long as it asks, by all its URLs, and is asked with fewer
connections at a time afterwards; each run of good answers gives one back. A host that never answered at all gets no
retries after a number of failed connections, and a little later no attempts but a probe from time to time: ten thousand
URLs of a dead host must not cost ten thousand time-outs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from email.utils import parsedate_to_datetime

REGAIN = 8  # good answers in a row that give a connection back
PROBE_EVERY = 30.0  # seconds between attempts at a host that is given up
REMEMBERED = 20_000  # hosts at a time; the oldest idle ones are forgotten
GIVEN_UP = 4  # times `dead_after` failed connections before a host is no longer tried


class Slots:
    """A semaphore whose size may change: `async with slots`."""

    def __init__(self, limit: int) -> None:
        self.limit, self._open = limit, 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def idle(self) -> bool:
        """Whether nobody is inside or waits."""
        return not self._open and not self._waiting

    async def __aenter__(self) -> None:
        if self._open >= self.limit or self._waiting:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn  # whoever wakes us has counted us in
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave()
                raise
        else:
            self._open += 1

    async def __aexit__(self, *exc: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._open -= 1
        self.wake()

    def wake(self) -> None:
        """Let in as many as there is room for."""
        while self._waiting and self._open < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._open += 1
                turn.set_result(None)


class Host:
    """One host: its connection slots, when it wants to be left alone, whether it lives."""

    def __init__(self, per_host: int, dead_after: int) -> None:
        self.slots = Slots(per_host)
        self._most, self._dead_after = per_host, dead_after
        self._good = self._failed = self._turned_away = 0
        self._alive = False
        self._quiet_until = self._probe_at = 0.0

    async def quiet(self) -> None:
        """Wait until the host may be asked again."""
        while (left := self._quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def answered(self) -> None:
        """A good answer."""
        self._alive, self._turned_away = True, 0
        self._good += 1
        if self.slots.limit < self._most and self._good >= REGAIN:
            self._good, self.slots.limit = 0, self.slots.limit + 1
            self.slots.wake()

    def failed(self, connecting: bool) -> None:
        """An attempt failed; `connecting` when no server answered."""
        self._alive |= not connecting
        self._failed += connecting

    def busy(self, pause: float) -> None:
        """The host asked for `pause` seconds of rest."""
        self._quiet_until = max(self._quiet_until, time.monotonic() + pause)
        self._good, self._turned_away = 0, self._turned_away + 1
        self.slots.limit = max(1, self.slots.limit - 1)

    @property
    def dead(self) -> bool:
        """No connection ever succeeded."""
        return bool(self._failed) and not self._alive

    @property
    def hopeless(self) -> bool:
        """Whether retries have stopped to make sense."""
        return (self.dead and self._failed >= self._dead_after) or self._turned_away >= 4 * self._dead_after

    def given_up(self) -> str | None:
        """Why the host is not tried now, or None."""
        if not self.dead or self._failed < GIVEN_UP * self._dead_after:
            return None
        now = time.monotonic()
        if now >= self._probe_at:
            self._probe_at = now + PROBE_EVERY
            return None
        return f"not tried: {self._failed} connections to the host failed and none succeeded"


class Hosts(dict[str, Host]):
    """Hosts by `name:port`."""

    def __init__(self, per_host: int, dead_after: int) -> None:
        super().__init__()
        self._settings = (per_host, dead_after)

    def __missing__(self, name: str) -> Host:
        if len(self) >= REMEMBERED:  # a table of the open web names millions
            for old in [key for key, host in self.items() if host.slots.idle][: REMEMBERED // 4]:
                del self[old]
        host = self[name] = Host(*self._settings)
        return host

    def dead(self) -> list[str]:
        """Names of the hosts that never answered."""
        return sorted(name for name, host in self.items() if host.dead)


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number or an HTTP date; 0 when absent or unreadable."""
    if not value:
        return 0.0
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
