"""``file://``: objects are files; a write is a temporary file in the same folder, synced, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
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
def translated(uri: str, writing: int | None = None):
    """Turn OSError into the StorageError of the same meaning. `writing` is the size in bytes of an object being put."""
    try:
        yield
    except OSError as error:
        kind = _KINDS.get(error.errno or 0, StorageError)
        hint = _HINTS[kind]
        if writing is not None and kind is NotFound:
            kind, hint = StorageError, "cannot be written: its folder cannot be made there; choose another place"
        if writing is not None and kind is NoSpace:
            hint = f"the object needs {writing} bytes, {_free(uri)}: {hint}"
        raise kind(f"{uri}: {hint} ({error.strerror or error})") from error


def _free(uri: str) -> str:
    """What the disk of a file has left, in words."""
    path = local_path(uri)
    try:
        while path is not None and not path.exists() and path != path.parent:
            path = path.parent
        return f"{shutil.disk_usage(path or '/').free} are free"
    except OSError:
        return "the disk does not say how many are free"


def _work_folders() -> str:
    """What is free where work files lie: a library's error seldom names its file."""
    folders = dict.fromkeys(filter(None, (os.environ.get("VLMFLOW_SCRATCH"), tempfile.gettempdir(), os.getcwd())))
    return ", ".join(f"{folder}: {_free(folder)}" for folder in folders)


def full_disk(error: BaseException) -> NoSpace | None:
    """The NoSpace behind an error of any library (safetensors and SQLite have their own classes), or None."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
            place = getattr(cause, "filename", None)
            return NoSpace(f"{place or 'a work file'}: {_HINTS[NoSpace]} ({cause}; {_work_folders()})")
        cause = cause.__cause__ or cause.__context__
    return None


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

    def stamp(self, uri: str) -> str:
        with translated(uri):
            about = self._path(uri).stat()
        return f"{about.st_size}-{about.st_mtime_ns}-{about.st_ctime_ns}-{about.st_ino}"

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        with translated(uri), open(self._path(uri), "rb") as file:
            file.seek(offset)
            return file.read() if length is None else file.read(length)

    def write(self, uri: str, data: bytes) -> None:
        with translated(uri, writing=len(data)):
            write_atomically(self._path(uri), lambda file: file.write(data))

    def put(self, path: Path, uri: str) -> None:
        target = self._path(uri)
        if target == path:
            return
        with translated(str(path)), open(path, "rb") as source, translated(uri, writing=path.stat().st_size):
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
