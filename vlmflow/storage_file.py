"""``file://``: objects are files; a write is a temporary file in the same folder, synced, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vlmflow.errors import AccessDenied, NoSpace, NotFound, StorageError
from vlmflow.storage import ObjectInfo, local_path

_KINDS: dict[int, type[StorageError]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.EISDIR: NotFound,
    errno.EACCES: AccessDenied,
    errno.EPERM: AccessDenied,
    errno.EROFS: AccessDenied,
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
}
_HINTS: dict[type[StorageError], str] = {
    NotFound: "nothing is stored there",
    AccessDenied: "this user may not read or write there",
    NoSpace: "the disk is full; free some space and run the command again, finished work is kept",
    StorageError: "the file system failed",
}


@contextmanager
def translated(uri: str):
    """Turn OSError into the StorageError of the same meaning."""
    try:
        yield
    except OSError as error:
        kind = _KINDS.get(error.errno or 0, StorageError)
        raise kind(f"{uri}: {_HINTS[kind]} ({error.strerror or error})") from error


def write_atomically(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write through ``fill`` to a temporary neighbour, sync, rename; leaves nothing behind when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # pids repeat between pods on one volume
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class FileStore:
    """Objects on a local or mounted file system."""

    def _path(self, uri: str) -> Path:
        path = local_path(uri)
        assert path is not None
        return path

    def size(self, uri: str) -> int:
        path = self._path(uri)
        with translated(uri):
            if path.is_dir():
                raise OSError(errno.EISDIR, "is a folder")
            return path.stat().st_size

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        with translated(uri), open(self._path(uri), "rb") as file:
            file.seek(offset)
            return file.read() if length is None else file.read(length)

    def write(self, uri: str, data: bytes) -> None:
        with translated(uri):
            write_atomically(self._path(uri), lambda file: file.write(data))

    def put(self, path: Path, uri: str) -> None:
        target = self._path(uri)
        if target == path:
            return
        with translated(uri), open(path, "rb") as source:
            write_atomically(target, lambda file: shutil.copyfileobj(source, file, 1 << 20))

    def get(self, uri: str, path: Path) -> None:
        with translated(uri):
            source = self._path(uri)
            if not source.is_file():
                raise OSError(errno.ENOENT, "no such file")
        self.put(source, str(path))

    def list(self, uri: str) -> list[ObjectInfo]:
        root = self._path(uri)
        prefix = "file://" if uri.startswith("file://") else ""
        with translated(uri):
            return [
                ObjectInfo(f"{prefix}{path}", path.stat().st_size)
                for path in (root.rglob("*") if root.is_dir() else [])
                if path.is_file() and not (path.name.startswith(".") and path.name.endswith(".tmp"))
            ]

    def delete(self, uri: str) -> None:
        with translated(uri):
            self._path(uri).unlink(missing_ok=True)
