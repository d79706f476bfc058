"""Objects at ``file://`` and ``s3://`` behind one small set of functions.

The contract is S3 as MinIO speaks it, without tags, ACLs, conditional puts or multi-part copies, so that it holds
on every server a user may have (spec: platform.md 6). Whole objects appear or do not: no reader ever sees half a
write. S3 settings come only from the environment, never from a recipe or a pipeline parameter:
``VLMFLOW_S3_ENDPOINT``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from vlmflow import storage_cache
from vlmflow.digest import digest, sha256_file
from vlmflow.errors import DataError, StorageError

T = TypeVar("T")


class ObjectInfo(NamedTuple):
    """One stored object: its URI and size in bytes."""

    uri: str
    size: int


class Store(Protocol):
    """What a scheme must offer; paths are the part of the URI after the scheme."""

    def size(self, uri: str) -> int: ...
    def stamp(self, uri: str) -> str: ...
    def read(self, uri: str, offset: int, length: int | None) -> bytes: ...
    def write(self, uri: str, data: bytes) -> None: ...
    def put(self, path: Path, uri: str) -> None: ...
    def get(self, uri: str, path: Path) -> None: ...
    def list(self, uri: str) -> list[ObjectInfo]: ...
    def delete(self, uri: str) -> None: ...


def _store(uri: str) -> Store:
    scheme = urlsplit(uri).scheme if "://" in uri else "file"
    if scheme == "file":
        from vlmflow.storage_file import FileStore

        return FileStore()
    if scheme in ("s3", "minio"):
        from vlmflow.storage_s3 import s3_store

        return s3_store()
    raise StorageError(f"'{uri}': scheme '{scheme}' is not supported; use file:// or s3://")


def local_path(uri: str | Path) -> Path | None:
    """The path of a ``file://`` URI or plain path; None for any other scheme."""
    text = str(uri)
    if "://" not in text:
        return Path(text)
    parts = urlsplit(text)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def join(uri: str | Path, *parts: str) -> str:
    """``uri/part/part`` with single slashes."""
    return "/".join([str(uri).rstrip("/"), *(p.strip("/") for p in parts)])


def size(uri: str) -> int:
    """Bytes of an object. Raises NotFound when there is none."""
    return _store(uri).size(uri)


def stamp(uri: str) -> str:
    """What changes whenever an object does, as its store knows it (ETag, times), without reading it. Raises NotFound."""
    return _store(uri).stamp(uri)


def exists(uri: str) -> bool:
    """True when the object is there; raises StorageError when the store cannot tell."""
    from vlmflow.errors import NotFound

    try:
        _store(uri).size(uri)
    except NotFound:
        return False
    return True


def read_bytes(uri: str, offset: int = 0, length: int | None = None) -> bytes:
    """Bytes of an object, or ``length`` of them from ``offset``."""
    return _store(uri).read(uri, offset, length)


def write_bytes(uri: str, data: bytes) -> None:
    """Put an object whole or not at all."""
    _store(uri).write(uri, data)


def put_file(path: str | Path, uri: str) -> None:
    """Upload a local file whole or not at all."""
    _store(uri).put(Path(path), uri)


def get_file(uri: str, path: str | Path) -> None:
    """Download an object to ``path``; the file appears only when complete."""
    _store(uri).get(uri, Path(path))


def list_uris(prefix: str) -> list[ObjectInfo]:
    """All objects under a prefix, recursively, sorted by URI; empty when there are none."""
    return sorted(_store(prefix).list(prefix))


def delete(uri: str) -> None:
    """Remove an object; a missing one is fine."""
    _store(uri).delete(uri)


def read_json(uri: str) -> Any:
    """Parse a JSON object. Raises DataError naming the URI when it is not JSON."""
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(
            f"{uri} holds {len(data)} bytes that are not JSON ({error}); delete it and run the step again"
        ) from error


def read_finished(uri: str, kind: type[T]) -> T | None:
    """The result (a pydantic model) that an earlier run left at `uri`; None when there is none, or when it was cut or
    changed, so that it is made again."""
    if not exists(uri):
        return None
    try:
        return kind.model_validate(read_json(uri))  # type: ignore[attr-defined]
    except (DataError, ValueError):
        return None


def write_json(uri: str, obj: Any) -> None:
    """Write JSON with sorted keys, so equal content is equal bytes."""
    write_bytes(uri, (json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode())


def default_scratch() -> Path:
    """Local disk for caches (``VLMFLOW_SCRATCH``, else under the temp folder); may be deleted at any time."""
    path = Path(os.environ.get("VLMFLOW_SCRATCH") or Path(tempfile.gettempdir()) / "vlmflow-scratch")
    path.mkdir(parents=True, exist_ok=True)
    return path


def cached(
    uri: str, sha256: str | None = None, scratch: str | Path | None = None, belongs_to: str | None = None
) -> Path:
    """A local path of an object: in place for ``file://``, else downloaded once into the scratch cache.

    The cache is bounded (`storage_cache`): who reads the file later than at once holds it by `storage_cache.hold`.

    Args:
        sha256: expected content; a stored copy that differs is refused.
        belongs_to: for objects without a recorded hash, the hash of what they describe: the same address may hold
            another object in another store, or after its shard was pulled anew.

    Raises:
        DataError: the content does not have the expected hash (both are named).
    """
    path = local_path(uri)
    if path is not None:
        if not path.exists():
            size(uri)  # raises the store's own NotFound
        _verify(uri, path, sha256)
        return path
    path = cache_path(uri, sha256 or digest([uri, belongs_to]), scratch)
    if path.exists():
        storage_cache.touch(path)
    else:
        if path.parent.exists():
            storage_cache.trim(path.parent)
        # verified before it gets its name: a kill in between leaves nothing that would be trusted later
        arriving = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            get_file(uri, arriving)
            _verify(uri, arriving, sha256)
            arriving.replace(path)
        finally:
            arriving.unlink(missing_ok=True)
    return path


def cache_path(uri: str, name: str, scratch: str | Path | None = None) -> Path:
    """Where `cached` keeps an object, by its sha256 (or what stands for it); the file is there once it was fetched."""
    return Path(scratch or default_scratch()) / "objects" / f"{name}-{uri.rsplit('/', 1)[-1]}"


def _verify(uri: str, path: Path, sha256: str | None) -> None:
    if sha256 and (found := sha256_file(path)) != sha256:
        raise DataError(
            f"{uri} has sha256 {found[:16]}… but {sha256[:16]}… was recorded: the object was changed or cut after it "
            "was written. Delete it and run the step that made it again."
        )


def check(uri: str) -> None:
    """Write, read and delete a probe under ``uri``; raises the StorageError a real step would meet."""
    probe = join(uri, f".vlmflow-probe-{secrets.token_hex(8)}")  # its own: another run may be checking too
    write_bytes(probe, b"probe")
    if read_bytes(probe) != b"probe":
        raise StorageError(f"{uri}: a probe object came back with other content than was written; the store is broken")
    with suppress(StorageError):
        delete(probe)
