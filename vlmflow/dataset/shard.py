"""Shards: immutable WebDataset tars with an offset index beside them.

The tar stays readable by any WebDataset tool; the index makes a read one seek instead of a scan, which is about ten
times faster and allows a true shuffle (spec: data-eval-soup.md 2.1). Bytes depend on the samples alone: no times,
no owners, so equal content has equal hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import weakref
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vlmflow import storage, storage_cache
from vlmflow.dataset.manifest import ShardRef, adopted_identity
from vlmflow.dataset.sample import IMAGE_EXTENSIONS, Sample
from vlmflow.digest import canonical, sha256_bytes, sha256_file
from vlmflow.errors import DataError
from vlmflow.storage_file import write_atomically

INDEX_SUFFIX = ".idx.json"
BLOCK = 512 << 10  # bytes written at a time: each write and hash hands the interpreter's lock over


class Written(NamedTuple):
    """A tar just written: number of samples, size in bytes, hash."""

    samples: int
    bytes: int
    sha256: str


def write_shard(path: str | Path, samples: Iterable[Sample]) -> int:
    """Write a tar and its index as `write_tar` does; returns the number of samples."""
    return write_tar(path, samples).samples


def write_tar(path: str | Path, samples: Iterable[Sample]) -> Written:
    """Write a tar and its index, each whole or not at all (the tar last).

    Raises:
        DataError: a key that repeats or holds a dot or slash, or an image format WebDataset tools do not know.
    """
    path = Path(path)
    index: dict[str, dict[str, list[int]]] = {}
    sha256, size = hashlib.sha256(), 0

    def fill(file: Any) -> None:
        nonlocal size
        pending: list[bytes] = []
        flushed = 0

        def put(data: bytes) -> None:
            nonlocal size
            pending.append(data)
            size += len(data)
            if size - flushed >= BLOCK:
                flush()

        def flush() -> None:
            nonlocal flushed
            block = b"".join(pending)
            file.write(block)
            sha256.update(block)
            pending.clear()
            flushed = size

        for sample in samples:
            if sample.key in index or not sample.key or set("./") & set(sample.key):
                raise DataError(
                    f"sample key '{sample.key}' of {path.name} repeats or holds '.' or '/': WebDataset splits names "
                    "there; give every sample a unique plain key"
                )
            members = index[sample.key] = {}
            for name, data in _members(sample):
                put(_header(f"{sample.key}.{name}", len(data)))
                members[name] = [size, len(data)]
                put(data)
                put(bytes(-len(data) % tarfile.BLOCKSIZE))
        put(bytes(2 * tarfile.BLOCKSIZE))
        put(bytes(-size % tarfile.RECORDSIZE))
        flush()

    temporary_index = path.with_name(path.name + INDEX_SUFFIX)
    unsealed = path.with_name(path.name + ".unsealed")
    try:
        write_atomically(unsealed, fill)
        write_atomically(temporary_index, lambda file: file.write(canonical(index)))
        unsealed.replace(path)
    finally:
        unsealed.unlink(missing_ok=True)
    return Written(len(index), size, sha256.hexdigest())


def _header(name: str, size: int) -> bytes:
    """The tar header of a plain file; by hand for short names, which saves a tenth of a pull's time."""
    if len(name) >= tarfile.LENGTH_NAME or not name.isascii() or size >= 8**11:
        entry = tarfile.TarInfo(name)
        entry.size = size
        return entry.tobuf(tarfile.USTAR_FORMAT)
    header, others = _template()
    field, octal = name.encode(), b"%011o" % size
    return header % (field.ljust(tarfile.LENGTH_NAME, b"\0"), octal, sum(field) + sum(octal) + others)


@cache
def _template() -> tuple[bytes, int]:
    """Any header that `tarfile` writes here, with places for name, size and checksum, and the sum of its other bytes (the
    checksum's own field counts as spaces)."""
    plain = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
    parts = plain[100:124], plain[135:148], plain[155:]
    return b"%b" + parts[0] + b"%b" + parts[1] + b"%06o\0" + parts[2], sum(b"".join(parts)) + 7 * 32


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    described = sample.meta.get("images", [])
    if len(described) != len(sample.images):
        raise DataError(
            f"sample {sample.key}: {len(sample.images)} images but {len(described)} entries in meta['images']; "
            "one entry an image is needed"
        )
    for number, (data, about) in enumerate(zip(sample.images, described, strict=True)):
        extension = IMAGE_EXTENSIONS.get(about["format"])
        if extension is None:
            raise DataError(
                f"sample {sample.key}: image format '{about['format']}' is not one of {sorted(IMAGE_EXTENSIONS)}; "
                "convert it before writing the shard"
            )
        yield (extension if len(described) == 1 else f"{number}.{extension}"), data
    yield "json", canonical(sample.meta)


def describe_shard(path: str | Path, uri: str, samples: int, source: str) -> ShardRef:
    """The reference of a written shard as it will stand in a manifest."""
    path = Path(path)
    return ShardRef(uri=uri, sha256=sha256_file(path), bytes=path.stat().st_size, samples=samples, source=source)


class ShardReader:
    """Random access to one shard, local or stored.

    Args:
        shard: a reference from a manifest (its hash is verified on the first local copy), or a path.

    Raises:
        DataError: the tar is cut or changed, or its index names other bytes than the tar holds.
    """

    def __init__(self, shard: ShardRef | str | Path, scratch: str | Path | None = None) -> None:
        ref = shard if isinstance(shard, ShardRef) else None
        self.uri = ref.uri if ref else str(shard)
        self._ref, self._scratch = ref, scratch
        self.index_uri = (ref and ref.index) or self.uri + INDEX_SUFFIX
        index = storage.cached(self.index_uri, None, scratch, belongs_to=ref.sha256 if ref else None)
        try:
            self.index: dict[str, dict[str, list[int]]] = json.loads(index.read_bytes())
        except ValueError as error:
            raise DataError(
                f"{self.index_uri} holds {index.stat().st_size} bytes that are not JSON ({error}): it was cut or changed. "
                "Delete it and run the step that made the shard again (for pulled shards, pull)."
            ) from error
        if ref and len(self.index) != ref.samples:
            raise DataError(
                f"{self.index_uri} lists {len(self.index)} samples but the manifest says {ref.samples}; delete it"
                f"{'' if ref.meta else ' and its shard'} and run the step that made it again"
            )

    @cached_property
    def path(self) -> Path:
        """The tar on local disk, fetched and verified when first needed (keys come from the index alone), and there as long
        as the reader."""
        try:
            found = storage.cached(self.uri, self._ref.content if self._ref else None, self._scratch)
            self.__dict__.setdefault("_file", self._open(found))
            return found
        except DataError as error:
            if self._ref and self._ref.meta:  # somebody else's file: nothing of ours to delete
                raise DataError(
                    f"{self.uri} was changed or cut after it was adopted: its sha256 is no longer {self._ref.content[:16]}…, so "
                    "our index points at other bytes. Run pull again to adopt it as it is now, or put the old tar back."
                ) from error
            raise

    @cached_property
    def _metas(self) -> bytes:
        """The samples' JSON of an adopted tar, verified together with its index."""
        ref = self._ref
        assert ref is not None and ref.meta is not None and ref.index is not None
        data = storage.cached(ref.meta, None, self._scratch, belongs_to=ref.sha256).read_bytes()
        index = storage.cached(ref.index, None, self._scratch, belongs_to=ref.sha256).read_bytes()
        if adopted_identity(ref.content, sha256_bytes(data), sha256_bytes(index)) != ref.sha256:
            raise DataError(
                f"{self.uri}: {ref.meta} or {ref.index} are not what was written when the tar was adopted; delete both and "
                "run pull again"
            )
        return data

    def __len__(self) -> int:
        return len(self.index)

    def keys(self) -> list[str]:
        """Sample keys in shard order."""
        return list(self.index)

    @cached_property
    def _file(self) -> int:
        """The open tar: one descriptor for all reads, closed with the reader."""
        path = self.path
        return self.__dict__["_file"] if "_file" in self.__dict__ else self._open(path)

    def _open(self, path: Path) -> int:
        descriptor = storage_cache.hold(path)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _bytes(self, offset: int, length: int) -> bytes:
        return os.pread(self._file, length, offset)  # no shared position: safe from several threads

    def _member(self, key: str, name: str) -> bytes:
        offset, length = self.index[key][name]
        if name == "json" and self._ref and self._ref.meta:
            return self._metas[offset : offset + length]
        data = self._bytes(offset, length)
        if len(data) != length:
            raise DataError(
                f"{self.uri}: sample {key}, member {name}: {len(data)} bytes read, {length} indexed; the shard is cut. "
                "Delete it and run the step that made it again."
            )
        return data

    def raw(self, key: str) -> dict[str, bytes]:
        """Stored bytes of a sample by member name (``jpg``, ``0.png``, ``json``), in their order; nothing is parsed."""
        return {name: self._member(key, name) for name in self.index[key]}

    def meta(self, key: str) -> dict[str, Any]:
        """The sample's JSON, without touching its images."""
        try:
            return json.loads(self._member(key, "json"))
        except KeyError:
            raise DataError(f"{self.uri} has no sample '{key}'; it holds {len(self.index)} others") from None

    def read(self, key: str) -> Sample:
        """One whole sample."""
        meta = self.meta(key)
        images = tuple(self._member(key, name) for name in self.index[key] if name != "json")
        return Sample(key, meta, images)

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(key) for key in self.index)
