"""The log of the first node, read in pieces.

Each piece is one short request for everything since the last line seen, so a connection that breaks costs nothing: the
piece is asked for again. Lines carry the kubelet's nanosecond time stamps; the API takes whole seconds, so lines of the
last second come again and are told apart by their stamp and their place among equal stamps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d) ?")


@dataclass
class LogCursor:
    """How far the log of one pod was read.

    Attributes:
        pod: uid of the pod; another pod has another log.
        second: the last line's time stamp up to the second, as the API wants it; empty before the first line.
        nanos: its nanoseconds.
        equal: lines seen that bear exactly this stamp.
        zone: time zone of the stamps, as the node writes it.
    """

    pod: str = ""
    second: str = ""
    nanos: int = 0
    equal: int = 0
    zone: str = "Z"

    def query(self) -> dict[str, str]:
        """Parameters of the next request for this pod's log."""
        since = {"sinceTime": self.second + self.zone} if self.second else {}
        return {"timestamps": "true", **since}

    def take(self, text: str) -> list[str]:
        """Lines of an answer that were not seen before, without their stamps; a line still being written waits."""
        fresh = []
        repeated = self.equal
        for line in text[: text.rfind("\n") + 1].split("\n")[:-1]:
            match = _STAMP.match(line)
            if match is None:
                continue  # not a line of a log: an error page, or the rest of a line that was cut
            second, nanos = match.group(1), int((match.group(2) or "").ljust(9, "0")[:9])
            if self.second and (second, nanos) < (self.second, self.nanos):
                continue
            if (second, nanos) == (self.second, self.nanos):
                if repeated:
                    repeated -= 1
                    continue
                self.equal += 1
            else:
                self.second, self.nanos, self.zone = second, nanos, match.group(3)
                self.equal, repeated = 1, 0
            fresh.append(line[match.end() :].rstrip("\r"))
        return fresh
