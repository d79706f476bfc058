"""The members of somebody else's tar in one pass: what they are, where their bytes lie, and the hash of the whole.

`tarfile` stops without a word at a damaged header, which would lose the rest of a shard in silence, so headers are walked
here: every byte up to the end mark is accounted for, or it is an error that says where.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from vlmflow import storage
from vlmflow.dataset.fetch import PART, retried
from vlmflow.errors import DataError

BLOCK = tarfile.BLOCKSIZE
MAX_TARS = 1_000_000  # of one source
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LONGEST_NAME = 1 << 20  # bytes of a header that holds a name
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
_CALLED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
}


def expand(uris: list[str], field_name: str) -> list[str]:
    """URIs with ``{00000..00099}`` written out. Raises DataError for none, too many, or one that stands twice."""
    found: list[str] = []
    for uri in uris:
        pending = [uri]
        while pending and (match := _RANGE.search(pending[0])):
            first, last = int(match[1]), int(match[2])
            if last < first or len(pending) * (last - first + 1) > MAX_TARS:
                raise DataError(
                    f"{field_name}: '{match[0]}' of {uri} names no tars, or more than {MAX_TARS}; write {{first..last}}"
                )
            width = len(match[1])
            pending = [_RANGE.sub(f"{n:0{width}d}", p, count=1) for p in pending for n in range(first, last + 1)]
        found += pending
    repeated = [uri for uri, count in Counter(found).items() if count > 1]
    if repeated:
        raise DataError(f"{field_name} names {repeated[0]} twice; its samples would be trained on twice")
    return found


class Member(NamedTuple):
    """A plain file of a tar: `data` is None where it is larger than asked for; `problem` says why it is refused."""

    name: str
    offset: int
    size: int
    data: bytes | None
    problem: str | None = None


class TarStream:
    """A stored tar read from its beginning to its end; afterwards `sha256` and `size` are those of all its bytes. A context."""

    def __init__(self, uri: str) -> None:
        self.uri, self.at, self.size = uri, 0, storage.size(uri)
        self._hash = hashlib.sha256()
        self._held = memoryview(b"")
        self._next: Future[bytes] | None = None
        self._reader = ThreadPoolExecutor(
            1, thread_name_prefix="tar"
        )  # the store is waited for while pictures are judged

    @property
    def sha256(self) -> str:
        """Hash of what was read."""
        return self._hash.hexdigest()

    def read(self, length: int) -> bytes:
        """The next bytes; fewer at the end."""
        parts = []
        while length:
            if not self._held:
                self._fill()
            if not self._held:
                break
            part = self._held[:length]
            parts.append(part)
            self._held = self._held[len(part) :]
            length -= len(part)
            self.at += len(part)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def skip(self, length: int) -> int:
        """Read on without keeping; returns how many bytes there were."""
        left = length
        while left and (read := len(self.read(min(left, PART)))):
            left -= read
        return length - left

    def _fill(self) -> None:
        """The next part, and a request for the one after it."""
        if self.at >= self.size:
            return
        data = (self._next or self._ask(self.at)).result()
        after = self.at + len(data)
        self._next = self._ask(after) if after < self.size else None
        self._hash.update(data)
        self._held = memoryview(data)

    def _ask(self, start: int) -> Future[bytes]:
        return self._reader.submit(self._part, start)

    def _part(self, start: int) -> bytes:
        wanted = min(PART, self.size - start)
        data = retried(lambda: storage.read_bytes(self.uri, start, wanted))
        if len(data) != wanted:
            raise DataError(
                f"{self.uri}: {len(data)} of {wanted} bytes came from byte {start}; it was changed while it was read. Let whoever "
                "writes it finish, then run the command again."
            )
        return data

    def __enter__(self) -> TarStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.shutdown(cancel_futures=True)


def members(stream: TarStream, keep: Callable[[str, int], bool], whole: Callable[[], int]) -> Iterator[Member]:
    """Files of a tar in order; folders are passed over.

    Args:
        keep: (name, size) -> whether the bytes are wanted. whole: number of samples that are complete so far, for errors.

    Raises:
        DataError: it is compressed, cut, damaged or two tars in one file.
    """
    name: str | None = None  # of the next member, from a header of its own
    size: int | None = None
    while True:
        start = stream.at
        block = stream.read(BLOCK)
        if start == 0 and block[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
            raise DataError(
                f"{stream.uri} is compressed; samples of such a tar cannot be read one by one. Unpack it to a plain .tar."
            )
        if len(block) < BLOCK:
            raise _cut(stream, start, "before its end mark", whole())
        if not any(block):
            _check_end(stream, start)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(
                f"{stream.uri}: byte {start} of {stream.size} is not the header of a member ({error}); the {whole()} samples before "
                "it are whole. The tar is damaged or no tar: write or copy it again."
            ) from error
        if info.type in (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
        ):
            if info.size > _LONGEST_NAME:
                raise DataError(
                    f"{stream.uri}: byte {start} announces a name of {info.size} bytes; the tar is damaged or hostile"
                )
            data = _data(stream, info.size, info.name, whole)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                fields = _pax(data)
                name, size = fields.get("path", name), int(fields["size"]) if fields.get("size", "").isdigit() else size
                if "GNU.sparse.major" in fields or "GNU.sparse.size" in fields:
                    raise DataError(
                        f"{stream.uri}: '{name}' is stored as a sparse file; write the tar without --sparse"
                    )
            continue
        named, length = name or info.name, info.size if size is None else size
        name = size = None
        if info.type in _WITHOUT_DATA:
            if info.type != tarfile.DIRTYPE:
                yield Member(named, stream.at, 0, None, f"'{named}' is {_CALLED[info.type]}, not a file")
            continue
        if info.type not in _REGULAR:
            _data(stream, length, named, whole, keep=False)
            yield Member(named, stream.at, 0, None, f"'{named}' is a member of type {info.type!r}, not a file")
            continue
        offset = stream.at
        kept = keep(named, length)
        data = _data(stream, length, named, whole, keep=kept)
        yield Member(named, offset, length, data if kept else None, _bad_name(named))


def _data(stream: TarStream, length: int, name: str, whole: Callable[[], int], keep: bool = True) -> bytes:
    """A member's bytes and its padding."""
    start, padding = stream.at, -length % BLOCK
    data = stream.read(length) if keep else b""
    read = len(data) if keep else stream.skip(length)
    if read < length or stream.skip(padding) < padding:
        raise _cut(stream, start, f"inside '{name}', which has {length} bytes", whole())
    return data


def _cut(stream: TarStream, at: int, where: str, whole: int) -> DataError:
    return DataError(
        f"{stream.uri} ends at byte {stream.size}, {where} (begun at byte {at}): it was cut. The {whole} samples before are whole. "
        f"Copy it again from where it came; if there is no other, write these {whole} samples to a new tar and name that one."
    )


def _check_end(stream: TarStream, at: int) -> None:
    """After the end mark there is nothing but zeros."""
    while block := stream.read(1 << 20):
        if block.count(0) != len(block):
            raise DataError(
                f"{stream.uri}: the tar ends at byte {at} of {stream.size}, but more follows: tars that were put together with cat, "
                "whose later parts every reader passes over. Name them as tars of their own."
            )


def _pax(data: bytes) -> dict[str, str]:
    """Fields of an extended header: lines of ``LENGTH NAME=VALUE``."""
    fields, at = {}, 0
    while at < len(data):
        length, _, _ = data[at : at + 20].partition(b" ")
        if not length.isdigit() or int(length) <= len(length):
            break
        line = data[at : at + int(length)]
        field, _, value = line[len(length) + 1 :].rstrip(b"\n").partition(b"=")
        fields[field.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(length)
    return fields


def _bad_name(name: str) -> str | None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return f"'{name[:100]}' is absolute or leads upwards"
    return None
