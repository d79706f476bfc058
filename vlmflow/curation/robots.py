"""robots.txt, asked once a host: an opt-in beside X-Robots-Tag, which is always honoured.

RFC 9309: a file that is missing or refused (4xx) allows everything, a server that fails or cannot be reached (5xx, no
connection) forbids everything until it answers. The file comes through the same guarded client as the images, redirects
included, and the group of our own agent name counts before `*`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.robotparser import RobotFileParser

Verdict = tuple[str, str]  # reason and detail
Get = Callable[[Any], Awaitable[tuple[str | None, bytes]]]
REMEMBERED = 16_000  # hosts whose rules are kept; the oldest is asked again
HELD = 4 << 20  # bytes of robots.txt files behind the rules that are kept


class Robots:
    """The rules of the hosts met so far. `get(url)` gives (reason of failure or None, body)."""

    def __init__(self, get: Get, agent: str) -> None:
        self._get, self._agent = get, agent
        self._rules: dict[str, asyncio.Task[RobotFileParser | Verdict | None]] = {}
        self._sizes: dict[str, int] = {}
        self._held = 0

    async def verdict(self, url: Any) -> Verdict | None:
        """None when the parsed URL may be fetched, else reason and detail."""
        origin = str(url.origin())
        task = self._rules.get(origin)
        if task is None:
            while len(self._rules) >= REMEMBERED or (self._held > HELD and self._rules):
                oldest = next(iter(self._rules))
                self._rules.pop(oldest)
                self._held -= self._sizes.pop(oldest, 0)
            task = self._rules[origin] = asyncio.create_task(self._read(url))
        rules = await asyncio.shield(task)
        if not isinstance(rules, RobotFileParser):
            return rules
        if rules.can_fetch(self._agent, str(url)):
            return None
        return "robots_txt", f"{origin}/robots.txt disallows it for {self._agent}"

    async def _read(self, url: Any) -> RobotFileParser | Verdict | None:
        where = url.origin().with_path("/robots.txt")
        reason, body = await self._get(where)
        if reason is None or reason == "empty":
            self._sizes[str(url.origin())] = len(body)
            self._held += len(body)
            rules = RobotFileParser()
            rules.parse(body.decode("utf-8", "replace").splitlines())
            return rules
        if reason == "forbidden_address":
            return reason, f"{where} is, or leads to, an address that is not public"
        if reason.startswith("http_4") and reason != "http_429":
            return None
        if reason in ("too_large", "too_many_redirects", "opted_out", "bad_encoding", "corrupt"):
            return None
        return "robots_unknown", f"{where} could not be read ({reason})"
