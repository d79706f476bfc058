"""``s3://``: the MinIO client, with errors mapped by meaning, and patience with a store that fails for a moment.

Every call is idempotent here. urllib3 makes a request again that meets 5xx, 429, a reset or a stall before its answer, so
each part of an upload is on its own; what breaks later (a body that is cut or stalls, an upload in parts that the store
forgot) makes the whole call again. A body is held against its Content-Length; an upload in parts is looked at afterwards,
because S3 may answer its completion with status 200 and an error inside, which the client does not read.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from vlmflow.errors import AccessDenied, NoSpace, NotFound, StorageError
from vlmflow.storage import ObjectInfo
from vlmflow.storage_file import translated, write_atomically
from vlmflow.storage_s3_errors import TIMEOUT_ENV, TRIES, CutError, passes, signs, translated_s3

T = TypeVar("T")
BACK_OFF = 0.1  # seconds before another try, doubled each time
TIMEOUT = 60.0  # seconds
_ONE_PART = 5 * 2**20  # larger objects are uploaded in parts (the client's MIN_PART_SIZE)
_ENVIRONMENT = ("VLMFLOW_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@lru_cache(maxsize=8)
def _connect(endpoint: str, access_key: str, secret_key: str, region: str, timeout: float) -> S3Store:
    return S3Store(endpoint, access_key, secret_key, region, timeout)


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_ENV) or str(TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise StorageError(f"{TIMEOUT_ENV} is '{text}'; it must be a positive number of seconds, for instance 60")
    return seconds


def s3_store() -> S3Store:
    """The store named by the environment. Raises StorageError naming the variables that are missing."""
    missing = [name for name in _ENVIRONMENT if not os.environ.get(name)]
    if missing:
        raise StorageError(
            f"s3:// needs the environment variables {', '.join(_ENVIRONMENT)}; missing: {', '.join(missing)}. "
            "On a laptop `vlmflow up` starts a store and `vlmflow run` sets them."
        )
    endpoint, access_key, secret_key = (os.environ[name] for name in _ENVIRONMENT)
    return _connect(endpoint, access_key, secret_key, os.environ.get("AWS_REGION", "us-east-1"), _timeout())


class S3Store:
    """Objects in one S3-compatible store; safe to share between threads."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str, region: str, timeout: float = TIMEOUT) -> None:
        import urllib3
        from minio import Minio

        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        self.endpoint = endpoint
        pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=min(5.0, timeout), read=timeout),
            maxsize=32,
            retries=urllib3.Retry(
                total=TRIES - 1,
                backoff_factor=BACK_OFF,
                backoff_jitter=BACK_OFF,  # by chance, so that many processes do not come back together
                status_forcelist=[429, 500, 502, 503, 504],
                allowed_methods=None,  # POST too: a second upload in parts is begun, or completing it is made again
            ),
        )
        self.client = Minio(
            parts.netloc, access_key, secret_key, secure=parts.scheme == "https", region=region, http_client=pool
        )

    def _patiently(self, uri: str, call: Callable[[], T], writing: int | None = None) -> T:
        """``call()``, made again when the store fails in a way that may pass. Raises the last StorageError."""
        for number in range(1, TRIES + 1):
            try:
                with translated_s3(uri, self.endpoint, writing):
                    return call()
            except (NotFound, AccessDenied, NoSpace):
                raise
            except StorageError as error:
                if not passes(error.__cause__):
                    raise
                if number == TRIES:
                    raise type(error)(f"{error} (tried {TRIES} times)") from error.__cause__
            time.sleep(BACK_OFF * 2 ** (number - 1))
        raise AssertionError("unreachable")

    @staticmethod
    def _split(uri: str) -> tuple[str, str]:
        bucket, _, key = uri.partition("://")[2].partition("/")  # by hand: a key may hold ? and #
        return bucket, key.strip("/")

    def size(self, uri: str) -> int:
        bucket, key = self._split(uri)
        return self._patiently(uri, lambda: self.client.stat_object(bucket, key).size or 0)

    def stamp(self, uri: str) -> str:
        bucket, key = self._split(uri)
        about = self._patiently(uri, lambda: self.client.stat_object(bucket, key))
        return f"{about.size}-{about.etag}-{about.last_modified.isoformat() if about.last_modified else ''}"

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        from minio.error import MinioException

        bucket, key = self._split(uri)
        if length == 0:
            return b""

        def once() -> bytes:
            try:
                answer = self.client.get_object(bucket, key, offset=offset, length=length or 0)
            except MinioException as error:
                if offset and "InvalidRange" in signs(error):
                    return b""  # beyond the end, as a file answers
                raise
            try:
                return answer.read()
            finally:
                answer.close()
                answer.release_conn()

        return self._patiently(uri, once)

    def write(self, uri: str, data: bytes) -> None:
        bucket, key = self._split(uri)

        def once() -> None:
            self.client.put_object(bucket, key, io.BytesIO(data), len(data))
            self._check_upload(bucket, key, len(data))

        self._patiently(uri, once, writing=len(data))

    def put(self, path: Path, uri: str) -> None:
        bucket, key = self._split(uri)

        def once() -> None:
            with translated(str(path)):
                self.client.fput_object(bucket, key, str(path))
            self._check_upload(bucket, key, size)

        with translated(str(path)):
            size = path.stat().st_size
        self._patiently(uri, once, writing=size)

    def _check_upload(self, bucket: str, key: str, size: int) -> None:
        """Raise CutError when an object that was sent in parts is not there in its full size."""
        from minio.error import S3Error

        if size <= _ONE_PART:
            return  # one PUT: the store compared length and hash before it said yes
        try:
            found = self.client.stat_object(bucket, key).size or 0
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise
            found = 0
        if found != size:
            raise CutError(f"{size} bytes were sent in parts and accepted, but {found} bytes are there")

    def get(self, uri: str, path: Path) -> None:
        bucket, key = self._split(uri)

        def once() -> None:
            answer = self.client.get_object(bucket, key)
            try:
                with translated(str(path)):
                    write_atomically(path, lambda file: file.writelines(answer.stream(1 << 20)))
            finally:
                answer.close()
                answer.release_conn()

        self._patiently(uri, once)

    def list(self, uri: str) -> list[ObjectInfo]:
        bucket, key = self._split(uri)
        prefix = f"{key}/" if key else ""

        def once() -> list[ObjectInfo]:
            found = self.client.list_objects(bucket, prefix=prefix, recursive=True)
            return [
                ObjectInfo(f"s3://{bucket}/{item.object_name}", item.size or 0) for item in found if not item.is_dir
            ]

        return self._patiently(uri, once)

    def delete(self, uri: str) -> None:
        bucket, key = self._split(uri)
        self._patiently(uri, lambda: self.client.remove_object(bucket, key))

    def make_bucket(self, bucket: str) -> None:
        """Create a bucket unless it is there (``bucket_exists`` misreports on some servers, so ask by listing)."""
        uri = f"s3://{bucket}"
        try:
            self._patiently(uri, lambda: next(iter(self.client.list_objects(bucket)), None))
        except NotFound:
            self._patiently(uri, lambda: self.client.make_bucket(bucket))
