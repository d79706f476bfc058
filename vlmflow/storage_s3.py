"""``s3://``: the MinIO client, with errors mapped by meaning.

Servers other than MinIO answer errors with content types the client refuses (platform.md 6.3), so status and code
are looked for in the text as well as in the typed error.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from vlmflow.errors import AccessDenied, NoSpace, NotFound, StorageError, Unreachable
from vlmflow.storage import ObjectInfo
from vlmflow.storage_file import translated, write_atomically

_SPARE_BYTES = 16 * 2**20  # a disk with less than this left cannot be told from a full one after a failed write
_ENVIRONMENT = ("VLMFLOW_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_MEANINGS: list[tuple[type[StorageError], frozenset[str], str]] = [
    (
        NotFound,
        frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404"}),
        "the store has no such object or bucket",
    ),
    (
        AccessDenied,
        frozenset({"AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "Forbidden", "401", "403"}),
        "the store refuses these credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    (
        NoSpace,
        frozenset({"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "507"}),
        "the store is full; free some space and run the command again, finished work is kept",
    ),
]


def _signs(error: Exception) -> list[str]:
    """Error code and HTTP status of a store's answer, the more telling first.

    Only these two are looked at: keys and request ids hold any digits, so "404" somewhere in a text means nothing.
    """
    text = str(error)
    code = getattr(error, "code", None) or next(iter(re.findall(r"<Code>(\w+)</Code>", text)), None)
    status = next(iter(re.findall(r"Response code: (\d+)", text)), None)
    return [sign for sign in (code, status) if isinstance(sign, str)]


@lru_cache(maxsize=8)
def _connect(endpoint: str, access_key: str, secret_key: str, region: str) -> S3Store:
    return S3Store(endpoint, access_key, secret_key, region)


def s3_store() -> S3Store:
    """The store named by the environment. Raises StorageError naming the variables that are missing."""
    missing = [name for name in _ENVIRONMENT if not os.environ.get(name)]
    if missing:
        raise StorageError(
            f"s3:// needs the environment variables {', '.join(_ENVIRONMENT)}; missing: {', '.join(missing)}. "
            "On a laptop `vlmflow up` starts a store and `vlmflow run` sets them."
        )
    endpoint, access_key, secret_key = (os.environ[name] for name in _ENVIRONMENT)
    return _connect(endpoint, access_key, secret_key, os.environ.get("AWS_REGION", "us-east-1"))


class S3Store:
    """Objects in one S3-compatible store; safe to share between threads."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str, region: str) -> None:
        import urllib3
        from minio import Minio

        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        self.endpoint = endpoint
        pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=5, read=120),
            maxsize=32,
            retries=urllib3.Retry(total=4, backoff_factor=0.3, status_forcelist=[500, 502, 503, 504]),
        )
        self.client = Minio(
            parts.netloc, access_key, secret_key, secure=parts.scheme == "https", region=region, http_client=pool
        )

    @contextmanager
    def _translated(self, uri: str, writing: int | None = None):
        """Turn errors of client and store into StorageErrors; `writing` is the size in bytes of an object being put."""
        from minio.error import MinioException
        from urllib3.exceptions import HTTPError, MaxRetryError, ResponseError

        try:
            yield
        except MinioException as error:
            signs = _signs(error)
            if writing is not None and ("NoSuchUpload" in signs or signs[-1:] == ["500"]):
                raise self._broken_write(uri, writing, error) from error
            for sign in signs:
                for kind, meant, hint in _MEANINGS:
                    if sign in meant:
                        raise kind(f"{uri}: {hint} (store {self.endpoint})") from error
            raise StorageError(f"{uri}: the store at {self.endpoint} failed: {error}") from error
        except HTTPError as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(error, MaxRetryError) and isinstance(reason, ResponseError):  # it answers, with 5xx
                if writing is not None:
                    raise self._broken_write(uri, writing, reason) from error
                raise StorageError(
                    f"{uri}: the store at {self.endpoint} failed again and again ({reason}); look at its log"
                ) from error
            raise Unreachable(
                f"{uri}: no S3 store answers at {self.endpoint} ({reason}). "
                "Check VLMFLOW_S3_ENDPOINT; on a laptop start it with `vlmflow up`."
            ) from error

    def _broken_write(self, uri: str, size: int, error: Exception) -> StorageError:
        """A store that breaks off a write rarely says why (rclone answers 500 or NoSuchUpload for a full disk).

        Where its folder is on this machine (VLMFLOW_S3_FOLDER, set by the local stack) the disk is asked instead.
        """
        folder = os.environ.get("VLMFLOW_S3_FOLDER")
        with suppress(OSError):
            if folder and (free := shutil.disk_usage(folder).free) < size + _SPARE_BYTES:
                return NoSpace(
                    f"{uri}: the disk of the store ({folder}) has {free / 2**20:.1f} MiB free, the object needs "
                    f"{size / 2**20:.1f} MiB. Free some space and run the command again, finished work is kept."
                )
        return StorageError(
            f"{uri}: the store at {self.endpoint} broke off the write of {size} bytes ({error}). Most often its disk "
            "is full, or a key is also the folder of others; look at its log, then run the command again."
        )

    @staticmethod
    def _split(uri: str) -> tuple[str, str]:
        bucket, _, key = uri.partition("://")[2].partition("/")  # by hand: a key may hold ? and #
        return bucket, key.strip("/")

    def size(self, uri: str) -> int:
        bucket, key = self._split(uri)
        with self._translated(uri):
            return self.client.stat_object(bucket, key).size or 0

    def stamp(self, uri: str) -> str:
        bucket, key = self._split(uri)
        with self._translated(uri):
            about = self.client.stat_object(bucket, key)
        return f"{about.size}-{about.etag}-{about.last_modified.isoformat() if about.last_modified else ''}"

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        from minio.error import MinioException

        bucket, key = self._split(uri)
        if length == 0:
            return b""
        with self._translated(uri):
            try:
                answer = self.client.get_object(bucket, key, offset=offset, length=length or 0)
            except MinioException as error:
                if offset and "InvalidRange" in _signs(error):
                    return b""  # beyond the end, as a file answers
                raise
            try:
                return answer.read()
            finally:
                answer.close()
                answer.release_conn()

    def write(self, uri: str, data: bytes) -> None:
        bucket, key = self._split(uri)
        with self._translated(uri, writing=len(data)):
            self.client.put_object(bucket, key, io.BytesIO(data), len(data))

    def put(self, path: Path, uri: str) -> None:
        bucket, key = self._split(uri)
        with translated(str(path)):
            size = path.stat().st_size
            with self._translated(uri, writing=size):
                self.client.fput_object(bucket, key, str(path))

    def get(self, uri: str, path: Path) -> None:
        bucket, key = self._split(uri)
        with self._translated(uri):
            answer = self.client.get_object(bucket, key)
            try:
                with translated(str(path)):
                    write_atomically(path, lambda file: file.writelines(answer.stream(1 << 20)))
            finally:
                answer.close()
                answer.release_conn()

    def list(self, uri: str) -> list[ObjectInfo]:
        bucket, key = self._split(uri)
        prefix = f"{key}/" if key else ""
        with self._translated(uri):
            found = self.client.list_objects(bucket, prefix=prefix, recursive=True)
            return [
                ObjectInfo(f"s3://{bucket}/{item.object_name}", item.size or 0) for item in found if not item.is_dir
            ]

    def delete(self, uri: str) -> None:
        bucket, key = self._split(uri)
        with self._translated(uri):
            self.client.remove_object(bucket, key)

    def make_bucket(self, bucket: str) -> None:
        """Create a bucket unless it is there (``bucket_exists`` misreports on some servers, so ask by listing)."""
        try:
            with self._translated(f"s3://{bucket}"):
                next(iter(self.client.list_objects(bucket)), None)
        except NotFound:
            with self._translated(f"s3://{bucket}"):
                self.client.make_bucket(bucket)
