"""A window of shards on local disk: large parallel reads from the store, a hard limit in bytes, one copy a machine.

A training run reads its shards in windows (`training.mixture`), so the disk needs to hold a window, not the dataset. The
processes of a machine share the folder and agree through the file system alone:

- Who downloads: the holder of an exclusive ``flock`` on the shard's ``.lock`` file. Others wait and find the file. The
  kernel frees the lock of a dead process, so a kill leaves nothing to repair but an unfinished ``.part`` file.
- Who needs: everyone with a shared ``flock`` on the shard's own file, a lease. Only a file that can be locked exclusively
  is evicted, least recently used first, so no process loses a shard that its coming packs read.
- How much there is: the sizes of the files in the folder. A ``.part`` file has its full size from the start.

A shard gets its name only after its sha256 was verified. Objects at ``file://`` are read in place and never count.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from vlmflow import storage, storage_cache
from vlmflow.dataset.fetch import FLIGHTS, PART, Stopped, fetch, retried
from vlmflow.dataset.manifest import ShardRef
from vlmflow.dataset.shard import ShardReader
from vlmflow.dataset.workers import Workers
from vlmflow.digest import sha256_file
from vlmflow.errors import DataError, NoSpace, StorageError
from vlmflow.storage_file import translated

LIMIT_ENV = "VLMFLOW_CACHE_BYTES"
FREE_SHARE = 0.5  # of the disk's free bytes that the cache may take by default
POLL = 0.02
PATIENCE = 120.0  # seconds without any room before waiting is called a dead end


class Lease:
    """A shard on local disk that stays there until `release`; safe to read from several threads."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self._file = path, file

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the shard; fewer at its end."""
        return os.pread(self._file.fileno(), length, offset)

    def release(self) -> None:
        """Allow the shard to be evicted; nobody may be reading. Safe to call again."""
        if not self._file.closed:
            with suppress(OSError):
                os.utime(self._file.fileno())
            self._file.close()


class LeasedShard(ShardReader):
    """A shard's samples, read through a lease.

    Raises: as `ShardReader`; a store that fails for a moment is asked again for the index and an adopted tar's metas.
    """

    def __init__(self, shard: ShardRef, lease: Lease, scratch: str | Path | None = None) -> None:
        retried(lambda: ShardReader.__init__(self, shard, scratch))
        if shard.meta:
            retried(lambda: self._metas)
        self.lease = lease

    def _bytes(self, offset: int, length: int) -> bytes:
        return self.lease.read(offset, length)


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, path) of shards here and on their way, the longest unused first."""
    found = []
    for path in folder.iterdir():
        if path.suffix in (".tar", ".part"):
            with suppress(FileNotFoundError):
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
    return sorted(found)


def default_limit(folder: Path) -> int:
    """Bytes the cache may hold: ``VLMFLOW_CACHE_BYTES``, else half of what is free (its own files count as free).

    Raises:
        StorageError: the variable is not a positive number of bytes.
    """
    text = os.environ.get(LIMIT_ENV)
    if text is None:
        held = sum(size for _, size, _ in _files(folder))
        return int(FREE_SHARE * (shutil.disk_usage(folder.parent).free + held))
    if not text.isdigit() or not int(text):
        raise StorageError(f"{LIMIT_ENV} is '{text}'; it must be a number of bytes, for instance {64 * 2**30}")
    return int(text)


class Window:
    """Leases of shards on local disk.

    Args:
        folder: shared by the processes of this machine; on a local file system.
        limit: most bytes of shards in it; None = `default_limit`.

    Raises:
        StorageError: the folder cannot be written, or its file system has no locks.
    """

    def __init__(self, folder: Path, limit: int | None = None, part: int = PART, flights: int = FLIGHTS) -> None:
        self.folder = folder
        with translated(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        self._locks_work()
        self.limit = default_limit(folder) if limit is None else limit
        self.part = part
        self._readers = Workers(flights, "shard-part")
        self._verified: set[str] = set()
        self._stop = threading.Event()

    def check(self, needed: int, what: str) -> None:
        """Raise NoSpace when the limit is below what has to lie on disk together.

        Args:
            needed: bytes of shards; ``what`` says of which.
        """
        if needed > self.limit:
            raise NoSpace(
                f"{what} are {needed} bytes, but the shard cache in {self.folder} may hold {self.limit}: every shard would be "
                f"downloaded again and again. Raise {LIMIT_ENV} (unset: half of the free disk), or make smaller shards "
                "(pull.samples_per_shard)."
            )

    def lease(self, shard: ShardRef) -> Lease:
        """The shard on local disk, downloaded if it is not there. Blocks.

        Raises:
            NoSpace: it is larger than the limit, the disk is full, or other leases leave no room for it.
            NotFound, DataError: it was deleted, cut or changed in the store since it was made.
            StorageError: the store failed again and again.
            Stopped: the window was closed meanwhile.
        """
        local = storage.local_path(shard.uri)
        if local is not None:
            if shard.content not in self._verified:
                storage.cached(shard.uri, shard.content)
                self._verified.add(shard.content)
            with translated(shard.uri):
                return Lease(local, FileIO(local))
        path = self.folder / f"{shard.content}.tar"
        while True:
            if (found := self._open(path)) is not None:
                return found
            with self._turn(shard):
                if not path.exists():
                    self._download(shard, path)

    def _open(self, path: Path) -> Lease | None:
        """A lease of a file that is there and stays there."""
        try:
            file = FileIO(path)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)  # an evictor holds it for the moment of an unlink
        if os.fstat(file.fileno()).st_nlink:
            return Lease(path, file)
        file.close()
        return None

    @contextmanager
    def _turn(self, shard: ShardRef) -> Iterator[None]:
        """One at a time downloads a shard; for the others it is there when their turn comes."""
        name = self.folder / f"{shard.content}.lock"
        with translated(str(name)):
            file = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while True:
                self._alive()
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._stop.wait(POLL)
            yield
        finally:
            os.close(file)

    def _download(self, shard: ShardRef, path: Path) -> None:
        """Fetch, verify and name a shard; nothing is left when that fails."""
        arriving = path.with_suffix(".part")
        try:
            for attempt in range(2):  # an object that was replaced while it was read is read once more
                arriving.unlink(missing_ok=True)
                self._fill(shard, arriving)
                if (found := sha256_file(arriving)) == shard.content:
                    break
                if attempt:
                    raise DataError(
                        f"{shard.uri} has sha256 {found[:16]}… but {shard.content[:16]}… was recorded when it was made: it was "
                        "changed in the store. Run the step that made it again (for pulled shards, pull)."
                    )
            os.replace(arriving, path)
        finally:
            arriving.unlink(missing_ok=True)

    def _fill(self, shard: ShardRef, arriving: Path) -> None:
        with self._room(shard, arriving) as file:
            fetch(shard, file, self._readers, self.part, self._stop)

    @contextmanager
    def _room(self, shard: ShardRef, arriving: Path) -> Iterator[int]:
        """A file of the shard's size, within the limit and with its blocks reserved on disk."""
        self.check(shard.bytes, f"one shard alone, {shard.uri},")
        deadline = time.monotonic() + PATIENCE
        held = -1
        while True:
            self._alive()
            with self._accounts():
                self._evict(shard.bytes)
                used = self._used()
                if used + shard.bytes <= self.limit:
                    file = os.open(arriving, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                    try:
                        with _disk(shard.bytes, self.folder):
                            if shard.bytes:
                                os.posix_fallocate(file, 0, shard.bytes)
                    except BaseException:
                        os.close(file)
                        raise
                    break
            if used != held:  # somebody moves: keep waiting
                held, deadline = used, time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise NoSpace(
                    f"no room for {shard.uri}: it has {shard.bytes} bytes, and {used} of the {self.limit} bytes that the shard "
                    f"cache in {self.folder} may hold are in use by the processes of this machine for {PATIENCE:.0f} s. Raise "
                    f"{LIMIT_ENV}, or make smaller shards (pull.samples_per_shard)."
                )
            self._stop.wait(POLL)
        try:
            yield file
        finally:
            os.close(file)

    @contextmanager
    def _accounts(self) -> Iterator[None]:
        """One process at a time counts, evicts and reserves."""
        file = os.open(self.folder / ".accounts", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _used(self) -> int:
        return sum(size for _, size, _ in _files(self.folder))

    def _evict(self, needed: int) -> None:
        """Delete shards nobody leases, least recently used first, until ``needed`` bytes fit; and what the dead left."""
        files = _files(self.folder)
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if path.suffix == ".part":
                if self._abandoned(path.with_suffix(".lock")):
                    path.unlink(missing_ok=True)
                    used -= size
            elif used + needed > self.limit and storage_cache.remove_unheld(path):
                used -= size

    @staticmethod
    def _abandoned(lock: Path) -> bool:
        """Whether nobody holds this lock."""
        try:
            file = os.open(lock, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(file)

    def _locks_work(self) -> None:
        try:
            with self._accounts():
                pass
        except OSError as error:
            raise StorageError(
                f"{self.folder}: the shard cache needs a file system with locks and one that may be written ({error}); set "
                "VLMFLOW_SCRATCH to a folder on a local disk"
            ) from error

    def _alive(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def close(self) -> None:
        """Whatever waits raises Stopped soon; leases stay valid until they are released."""
        self._stop.set()
        self._readers.close()


@contextmanager
def _disk(needed: int, folder: Path) -> Iterator[None]:
    """ENOSPC as NoSpace with both numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpace(
            f"{folder}: the disk is full: a shard needs {needed} bytes, {shutil.disk_usage(folder).free} are free. Free some "
            f"space, or set {LIMIT_ENV} below what the disk can give, and run the command again."
        ) from error
