"""What an S3 server or the way to it did, as a StorageError that says so: by code and status, whatever the server.

Servers other than MinIO answer errors with content types the client refuses (platform.md 6.3), so status and code
are looked for in the text as well as in the typed error.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from xml.etree.ElementTree import ParseError

from vlmflow.errors import AccessDenied, NoSpace, NotFound, StorageError, Unreachable

TRIES = 6  # of every request, and of every call
TIMEOUT_ENV = "VLMFLOW_S3_TIMEOUT"  # seconds that a store may send nothing
_PASSING = {  # codes of answers below 500 that another try may mend
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "IncompleteBody",
    "OperationAborted",
    "NoSuchUpload",
}
_SPARE_BYTES = 16 * 2**20  # a disk with less than this left cannot be told from a full one after a failed write
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


class CutError(Exception):
    """An upload that the store took, and that is not there as it was sent."""


def signs(error: Exception) -> list[str]:
    """Error code and HTTP status of a store's answer, the more telling first.

    Only these two are looked at: keys and request ids hold any digits, so "404" somewhere in a text means nothing.
    """
    text = str(error)
    code = getattr(error, "code", None) or next(iter(re.findall(r"<Code>(\w+)</Code>", text)), None)
    status = next(iter(re.findall(r"Response code: (\d+)", text)), None)
    return [sign for sign in (code, status) if isinstance(sign, str)]


def passes(cause: BaseException | None) -> bool:
    """Whether what a client raised may be gone at the next try."""
    from minio.error import MinioException
    from urllib3.exceptions import HTTPError, MaxRetryError

    if isinstance(cause, MaxRetryError):  # as often as it makes sense
        return False
    if isinstance(cause, MinioException):
        answer = getattr(cause, "response", None)
        status = getattr(answer, "status", None) or getattr(cause, "status_code", None) or 0
        status = status or next((int(sign) for sign in signs(cause) if sign.isdigit()), 0)
        return status >= 500 or status in (408, 429) or bool(_PASSING & set(signs(cause)))
    return isinstance(cause, (HTTPError, ParseError, CutError))


@contextmanager
def translated_s3(uri: str, endpoint: str, writing: int | None = None) -> Iterator[None]:
    """Turn errors of client and store into StorageErrors; `writing` is the size in bytes of an object being put."""
    from minio.error import MinioException
    from urllib3.exceptions import (
        ConnectTimeoutError,
        HTTPError,
        NameResolutionError,
        NewConnectionError,
        ResponseError,
    )

    try:
        yield
    except MinioException as error:
        given = signs(error)
        if writing is not None and ("NoSuchUpload" in given or given[-1:] == ["500"]):
            raise _broken_write(uri, endpoint, writing, error) from error
        for sign in given:
            for kind, meant, hint in _MEANINGS:
                if sign in meant:
                    raise kind(f"{uri}: {hint} (store {endpoint})") from error
        raise StorageError(f"{uri}: the store at {endpoint} failed: {error}") from error
    except HTTPError as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, (NewConnectionError, ConnectTimeoutError, NameResolutionError)):
            raise Unreachable(
                f"{uri}: no S3 store answers at {endpoint} ({reason}). "
                "Check VLMFLOW_S3_ENDPOINT; on a laptop start it with `vlmflow up`."
            ) from error
        if isinstance(reason, ResponseError):  # it answers, with 5xx
            if writing is not None:
                raise _broken_write(uri, endpoint, writing, reason) from error
            raise StorageError(
                f"{uri}: the store at {endpoint} failed {TRIES} times in a row ({reason}); look at its log"
            ) from error
        raise StorageError(
            f"{uri}: the store at {endpoint} broke off or stalled ({reason}); look at its log and at the network "
            f"between, or give it more than {TIMEOUT_ENV} seconds between bytes"
        ) from error
    except ParseError as error:
        raise StorageError(f"{uri}: what {endpoint} answers is not S3's XML ({error})") from error
    except CutError as error:
        raise StorageError(f"{uri}: {error} (store {endpoint}); look at its log") from error


def _broken_write(uri: str, endpoint: str, size: int, error: Exception) -> StorageError:
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
        f"{uri}: the store at {endpoint} broke off the write of {size} bytes ({error}). Most often its disk "
        "is full, or a key is also the folder of others; look at its log, then run the command again."
    )
