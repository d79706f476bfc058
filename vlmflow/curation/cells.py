"""Images that a table holds itself, in a column of bytes: given to the puller like fetched ones.

A shard's rows are planned before its images are looked at, so the bytes of a thousand cells would lie in memory; they wait
in unnamed temporary files instead, each gone with the last row that points into it.
"""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

from vlmflow.curation.fetch_limits import Fetched
from vlmflow.digest import sha256_bytes

PREFIX = "cell:"
_FILE = 32 << 20  # bytes after which another temporary file is begun
_AT_A_TIME = 16  # images in memory


class Cell:
    """The bytes of one image of a table; `url` is PREFIX and their sha256."""

    __slots__ = ("__weakref__", "_file", "_length", "_offset", "url")

    def __init__(self, url: str, file: IO[bytes], offset: int, length: int) -> None:
        self.url, self._file, self._offset, self._length = url, file, offset, length

    def read(self) -> bytes:
        """The bytes."""
        return os.pread(self._file.fileno(), self._length, self._offset)


class Cells:
    """The images of the rows that are alive. `get` answers as `Fetcher.get` does.

    Args:
        folder: for the temporary files. max_bytes: larger images fail as they do over HTTP.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._alive: WeakValueDictionary[str, Cell] = WeakValueDictionary()
        self._file: IO[bytes] | None = None
        self._end = 0
        self._slots = asyncio.Semaphore(_AT_A_TIME)
        self.bytes = 0

    async def __aenter__(self) -> Cells:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._file = None

    def add(self, data: bytes) -> Cell:
        """Keep bytes for as long as the returned cell lives. Raises OSError when the disk is full."""
        url = address(data)
        if (known := self._alive.get(url)) is not None:
            return known
        if self._file is None or self._end >= _FILE:
            self._file, self._end = tempfile.TemporaryFile(dir=self._folder, buffering=0), 0  # noqa: SIM115
        self._file.write(data)
        cell = self._alive[url] = Cell(url, self._file, self._end, len(data))
        self._end += len(data)
        return cell

    async def get(self, url: str, use: Callable[[Any], Awaitable[Any]]) -> Fetched:
        """Hand a cell's bytes to `use`; the rows that hold it must be alive."""
        async with self._slots:
            data = self._alive[url].read()
            self.bytes += len(data)
            if not data:
                return Fetched(url, reason="empty", detail="the cell has 0 bytes")
            if len(data) > self._max_bytes:
                return Fetched(url, reason="too_large", detail=f"{len(data)} bytes, the limit is {self._max_bytes}")
            return Fetched(url, used=await use(io.BytesIO(data)))

    def dead_hosts(self) -> list[str]:
        """None: nothing is asked."""
        return []


def address(data: bytes) -> str:
    """What an image in a table is called in the place of a URL."""
    return PREFIX + sha256_bytes(data)


def images_of(value: Any) -> tuple[list[tuple[bytes, str | None]], str | None]:
    """(bytes, path) of each image of a cell, and what is wrong with it: bytes, {bytes, path}, or a list of these."""
    found: list[tuple[bytes, str | None]] = []
    for number, item in enumerate(value if isinstance(value, list | tuple) else [] if value is None else [value]):
        data, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (item, None)
        if not isinstance(data, bytes):
            if isinstance(path, str):
                return (
                    [],
                    f"image {number} is the path '{path}' without bytes; for files that lie in a store set image_root",
                )
            return [], f"image {number} is a {type(item).__name__}, not bytes or {{bytes, path}}"
        found.append((data, path if isinstance(path, str) and path else None))
    return found, None
