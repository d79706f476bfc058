"""Single samples out of shards, wherever these lie: a shard that is on this machine is read in place, of a remote one only
the bytes asked for travel. Showing fifty pictures must not fetch fifty shards.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow import storage
from vlmflow.dataset.shard import ShardReader
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest, ShardRef

OPEN_SHARDS = 16  # indexes held; that of 10,000 samples takes a few MiB


class _Ranged(ShardReader):
    """A shard reader that fetches ranges of a remote tar instead of the tar."""

    def _bytes(self, offset: int, length: int) -> bytes:
        return storage.read_bytes(self.uri, offset, length)


class Samples:
    """Metas and pictures of a dataset's samples by shard number and key. Threads may share it.

    `whole`: remote shards are fetched as a whole, for who reads all of their samples.
    """

    def __init__(self, manifest: Manifest, scratch: str | Path, whole: bool = False) -> None:
        self.manifest, self.scratch, self.whole = manifest, scratch, whole
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def _reader(self, shard: int) -> ShardReader:
        with self._lock:
            found = self._readers.get(shard)
            if found is not None:
                self._readers.move_to_end(shard)
                return found
        ref = self.manifest.shards[shard]
        made = (ShardReader if self.whole or _is_here(ref, self.scratch) else _Ranged)(ref, self.scratch)
        with self._lock:
            self._readers[shard] = made
            while len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)
        return made

    def keys(self, shard: int) -> list[str]:
        """Keys of a shard, in its order; only its index is read."""
        return self._reader(shard).keys()

    def meta(self, shard: int, key: str) -> dict[str, Any]:
        """The JSON of a sample. Raises DataError when the shard has no such sample."""
        return self._reader(shard).meta(key)

    def members(self, shard: int, key: str) -> dict[str, list[int]]:
        """Offset and length of every member of a sample in the tar, by name."""
        return dict(self._reader(shard).index[key])

    def images(self, shard: int, key: str) -> tuple[bytes, ...]:
        """The encoded pictures of a sample.

        Raises:
            DataError: a picture's bytes are not those that were pulled (a range of a tar has no other guard).
        """
        sample = self._reader(shard).read(key)
        for number, (data, about) in enumerate(zip(sample.images, sample.meta["images"], strict=True)):
            if about.get("sha256") and sha256_bytes(data) != about["sha256"]:
                raise DataError(
                    f"sample {key}, image {number}: its {len(data)} bytes in {self.manifest.shards[shard].uri} have another sha256 "
                    f"than {about['sha256'][:16]}… of its JSON: the shard was changed or cut. Delete it and run the step again."
                )
        return sample.images

    def bytes_to_fetch(self) -> int:
        """Bytes of the shards that must come to this machine before every sample's JSON can be read; that of adopted shards
        lies in a file of its own."""
        return sum(ref.bytes for ref in self.manifest.shards if not ref.meta and not _is_here(ref, self.scratch))


def _is_here(ref: ShardRef, scratch: str | Path) -> bool:
    return storage.local_path(ref.uri) is not None or storage.cache_path(ref.uri, ref.content, scratch).exists()
