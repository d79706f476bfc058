"""Images that lie in a store already, under one root: read there, checked like fetched ones.

The paths come from a table, so they are not believed: what leads out of the root (``..``, absolute paths, other buckets,
symbolic links) is refused row by row. A store that is down is no property of a row: it stops the step.
"""

from __future__ import annotations

import asyncio
import io
import os
import stat
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlmflow import storage
from vlmflow.curation.accept import Rejected
from vlmflow.curation.fetch_limits import Fetched
from vlmflow.dataset.fetch import retried
from vlmflow.errors import NotFound

THREADS = 16


class Bucket:
    """Images under a root; `async with Bucket(root, max_bytes) as b: await b.get(path, use)` answers as `Fetcher.get` does.

    Raises:
        StorageError: from `get`, when the store fails again and again.
    """

    def __init__(self, root: str, max_bytes: int) -> None:
        self.root, self._max_bytes = root, max_bytes
        self._slots = asyncio.Semaphore(THREADS)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="bucket")
        self.bytes = 0

    async def __aenter__(self) -> Bucket:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def get(self, url: str, use: Callable[[Any], Awaitable[Any]]) -> Fetched:
        """Read one image and hand it to `use`."""
        async with self._slots:
            try:
                data = await asyncio.get_running_loop().run_in_executor(self._threads, self._read, url)
            except Rejected as refusal:
                return Fetched(url, reason=refusal.reason, detail=refusal.detail)
            self.bytes += len(data)
            return Fetched(url, used=await use(io.BytesIO(data)))

    def _read(self, cell: str) -> bytes:
        uri = inside(self.root, cell)
        try:
            size = retried(lambda: storage.size(uri))
            if size > self._max_bytes:
                raise Rejected("too_large", f"{size} bytes, the limit is {self._max_bytes}")
            if not size:
                raise Rejected("empty", "the object has 0 bytes")
            return retried(lambda: storage.read_bytes(uri, 0, self._max_bytes))
        except NotFound:
            raise Rejected("not_found", f"nothing lies at {uri}") from None

    def dead_hosts(self) -> list[str]:
        """None: a store that does not answer stops the step."""
        return []


def inside(root: str, cell: str) -> str:
    """Where the image of a cell lies: a path relative to the root, or a URI under it.

    Raises:
        Rejected: outside_root, or not_found for what no file can be called.
    """
    base = root.rstrip("/")
    folder = storage.local_path(base)
    if "://" in cell:
        path = cell[len(base) + 1 :] if cell.startswith(f"{base}/") else None
        if folder is not None and (other := storage.local_path(cell)) is not None:
            path = str(other.relative_to(folder)) if other.is_relative_to(folder) else None
        if path is None:
            raise Rejected("outside_root", f"it does not lie under {root}")
    else:
        path = cell
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or "\\" in path:
        raise Rejected("outside_root", f"'{path}' is absolute or leads upwards; paths are relative to {root}")
    if not parts or "\0" in path or max(len(part.encode()) for part in parts) > 255:
        raise Rejected("not_found", "no file can have this name")
    if folder is None:
        return storage.join(base, *parts)
    return _inside_folder(folder, parts)


def _inside_folder(folder: Path, parts: list[str]) -> str:
    found = os.path.realpath(folder.joinpath(*parts))
    if not Path(found).is_relative_to(os.path.realpath(folder)):
        raise Rejected("outside_root", f"a symbolic link leads out of {folder}")
    try:
        if not stat.S_ISREG(os.stat(found).st_mode):
            raise Rejected("not_found", "not a plain file")
    except (FileNotFoundError, NotADirectoryError):
        raise Rejected("not_found", f"nothing lies at {found}") from None
    return found
