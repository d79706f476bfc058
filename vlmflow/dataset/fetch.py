"""One shard from a store into a file: large ranged reads, several at a time, each tried again when a store stumbles."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import TypeVar

from vlmflow import storage
from vlmflow.dataset.manifest import ShardRef
from vlmflow.dataset.workers import Workers
from vlmflow.errors import AccessDenied, DataError, NoSpace, NotFound, StorageError

PART = 16 * 2**20  # bytes of one ranged read
FLIGHTS = 4  # ranged reads of a process at a time
TRIES = 6  # of each read
BACK_OFF = 0.2  # seconds before the second try, doubled each time

T = TypeVar("T")


class Stopped(Exception):
    """The reader was closed while something waited for it."""


def fetch(shard: ShardRef, file: int, readers: Workers, part: int, stop: threading.Event) -> None:
    """Read a stored shard into an open file of its size.

    Args:
        file: descriptor; written at the places of the parts.
        readers: run the ranged reads of ``part`` bytes.

    Raises:
        NotFound, DataError: it was deleted or cut in the store since it was made.
        NoSpace: the disk is full.
        StorageError: the store failed `TRIES` times in a row.
        Stopped: ``stop`` was set meanwhile.
    """
    reads = [
        readers.submit(lambda at=start: _read_part(shard, file, at, part, stop))  # type: ignore[misc]
        for start in range(0, shard.bytes, part)
    ]
    failed: BaseException | None = None
    for read in reads:  # every one ends before the file is closed
        try:
            read.result()
        except (Exception, CancelledError) as error:
            failed = failed or error
            for other in reads:
                other.cancel()
    if isinstance(failed, CancelledError):
        raise Stopped
    if failed is not None:
        raise failed


def _read_part(shard: ShardRef, file: int, start: int, part: int, stop: threading.Event) -> None:
    length = min(part, shard.bytes - start)

    def read() -> bytes:
        if stop.is_set():
            raise Stopped
        try:
            data = storage.read_bytes(shard.uri, start, length)
        except NotFound as error:
            raise NotFound(
                f"{error}: the shard was deleted after its dataset was made. Put it back, or run the step that made it again "
                "(for pulled shards, pull)."
            ) from error
        if len(data) == length:
            return data
        if (size := storage.size(shard.uri)) != shard.bytes:
            raise DataError(
                f"{shard.uri} has {size} bytes but {shard.bytes} were recorded when it was made: it was cut or changed in the "
                "store. Run the step that made it again (for pulled shards, pull)."
            )
        raise StorageError(f"{shard.uri}: {len(data)} of {length} bytes came from offset {start}")

    data = retried(read, stop)
    os.pwrite(file, data, start)  # the blocks were reserved when the file was made


def retried(read: Callable[[], T], stop: threading.Event | None = None, tries: int = TRIES) -> T:
    """``read()``, tried again with growing pauses when a store fails in a way that may pass.

    Raises:
        NotFound, AccessDenied, NoSpace: at once; these do not pass.
        StorageError: the last one, with how often it was tried.
    """
    for number in range(tries):
        try:
            return read()
        except (NotFound, AccessDenied, NoSpace):
            raise
        except StorageError as error:
            if number + 1 == tries:
                raise type(error)(f"{error} (tried {tries} times)") from error
            pause = BACK_OFF * 2**number
            if stop is None:
                time.sleep(pause)
            elif stop.wait(pause):
                raise Stopped from error
    raise AssertionError("unreachable")
