"""Which values of a table occur more than once, and in which row first: for millions of rows in a few megabytes.

A dict of 20 million URLs takes gigabytes. Here 8 bytes of each value's hash and its row go to disk, dealt to files by the
hash's first bits; each file is then looked at alone, and only values that repeat stay in memory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

PARTS = 64
BUFFER = 1 << 16  # values in memory before they are dealt


class FirstSeen:
    """`add` every value with its row, `seal`, then ask `first(value)`.

    Two values whose 64-bit hashes are equal would count as one: expected once in 10^5 tables of 20 million rows.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._parts = [SpooledTemporaryFile(1 << 18, dir=str(folder)) for _ in range(PARTS)]  # noqa: SIM115
        self._hashes: list[bytes] = []
        self._rows: list[int] = []
        self.repeats = 0  # values that an earlier row had, once sealed

    def add(self, value: bytes, row: int) -> None:
        """One value of a row; rows come in order."""
        self._hashes.append(hashlib.blake2b(value, digest_size=8).digest())
        self._rows.append(row)
        if len(self._rows) >= BUFFER:
            self._deal()

    def _deal(self) -> None:
        import numpy as np

        pairs = np.empty((len(self._rows), 2), np.uint64)
        pairs[:, 0] = np.frombuffer(b"".join(self._hashes), np.uint64)
        pairs[:, 1] = self._rows
        part = pairs[:, 0] % PARTS
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part.astype(np.int64), minlength=PARTS))
        for number, mine in enumerate(np.split(pairs[order], ends[:-1])):
            self._parts[number].write(mine.tobytes())
        self._hashes.clear()
        self._rows.clear()

    def seal(self) -> FirstSeen:
        """No more values come."""
        import numpy as np

        self._deal()
        found: list[Any] = []
        for part in self._parts:
            part.seek(0)
            pairs = np.frombuffer(part.read(), np.uint64).reshape(-1, 2)
            part.close()
            _, first, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
            self.repeats += len(pairs) - len(first)
            found.append(pairs[first[counts > 1]])
        repeated = np.concatenate(found)
        repeated = repeated[np.argsort(repeated[:, 0])]
        self._hash, self._first = np.ascontiguousarray(repeated[:, 0]), np.ascontiguousarray(repeated[:, 1])
        return self

    def first(self, value: bytes) -> int | None:
        """The first row of a value that occurs more than once, None for one that does not."""
        if not len(self._hash):
            return None
        import numpy as np

        wanted = np.frombuffer(hashlib.blake2b(value, digest_size=8).digest(), np.uint64)[0]
        place = int(np.searchsorted(self._hash, wanted))
        return int(self._first[place]) if place < len(self._hash) and self._hash[place] == wanted else None
