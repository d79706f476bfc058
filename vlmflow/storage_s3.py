"""``s3://``: the MinIO client, with errors mapped by meaning.

Servers other than MinIO answer errors with content types the client refuses (platform.md 6.3), so status and code
are looked for in the text as well as in the typed error.
"""

from __future__ import annotations

import io
import os
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from vlmflow.errors import AccessDenied, NoSpace, NotFound, StorageError, Unreachable
from vlmflow.storage import ObjectInfo
from vlmflow.storage_file import translated, write_atomically

_ENVIRONMENT = ("VLMFLOW_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_MEANINGS: list[tuple[type[StorageError], tuple[str, ...], str]] = [
    (NotFound, ("NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404"), "the store has no such object or bucket"),
    (
        AccessDenied,
        ("AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "Forbidden", "401", "403"),
        "the store refuses these credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    (
        NoSpace,
        ("XMinioStorageFull", "QuotaExceeded", "no space left", "InsufficientStorage", "507"),
        "the store is full; free some space and run the command again, finished work is kept",
    ),
]


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
    def _translated(self, uri: str):
        from minio.error import MinioException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except MinioException as error:
            text = f"{getattr(error, 'code', '')} {error}"
            for kind, signs, hint in _MEANINGS:
                if any(sign in text for sign in signs):
                    raise kind(f"{uri}: {hint} (store {self.endpoint})") from error
            raise StorageError(f"{uri}: the store at {self.endpoint} failed: {error}") from error
        except HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(
                f"{uri}: no S3 store answers at {self.endpoint} ({reason}). "
                "Check VLMFLOW_S3_ENDPOINT; on a laptop start it with `vlmflow up`."
            ) from error

    @staticmethod
    def _split(uri: str) -> tuple[str, str]:
        parts = urlsplit(uri, allow_fragments=False)
        return parts.netloc, parts.path.strip("/")

    def size(self, uri: str) -> int:
        bucket, key = self._split(uri)
        with self._translated(uri):
            return self.client.stat_object(bucket, key).size or 0

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        bucket, key = self._split(uri)
        if length == 0:
            return b""
        with self._translated(uri):
            answer = self.client.get_object(bucket, key, offset=offset, length=length or 0)
            try:
                return answer.read()
            finally:
                answer.close()
                answer.release_conn()

    def write(self, uri: str, data: bytes) -> None:
        bucket, key = self._split(uri)
        with self._translated(uri):
            self.client.put_object(bucket, key, io.BytesIO(data), len(data))

    def put(self, path: Path, uri: str) -> None:
        bucket, key = self._split(uri)
        with self._translated(uri), translated(str(path)):
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
