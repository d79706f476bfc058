"""Batches of one rank, decoded ahead of the loop.

A small pool of threads reads, decodes and tiles the packs of the coming micro-batches (Pillow and file reads release
the interpreter lock), so that the loop finds them ready; the time it nevertheless waits is measured and reported.
Order never depends on which thread finishes first. Shards are copied to local disk some packs before the plan touches
them; under windowed shuffling that is a window of shards at a time.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmflow.dataset.layer import read_part
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError
from vlmflow.models.family import IGNORED, masked_labels
from vlmflow.training.batch import pack
from vlmflow.training.examples import Part
from vlmflow.training.plan import Item, Plan

OPEN_SHARDS = 128
FETCH_AHEAD = 32  # packs whose shards are fetched before the packs are built


class Micro(NamedTuple):
    """One micro-batch: the batch, its sample keys, real tokens and real images (dummy not counted)."""

    batch: dict[str, Any]
    keys: list[str]
    tokens: int
    images: int


class _Opened(NamedTuple):
    """A shard on local disk: its keys, and the rows of its text layer by key."""

    reader: ShardReader
    keys: list[str]
    rows: dict[str, Any] | None


class Loader:
    """Micro-batches of one rank, step after step.

    Args:
        encoder: (item, sample, row of its text layer) -> parts (see `examples.Encoder`).
        tile: (PIL image, tile limit) -> uint8 [t, S, S, 3].
        positions: (ids) -> position ids.
        dummy: ids of a segment with exactly one tile, added to packs without an image, so that every rank runs the
            vision tower in every micro-batch and no collective waits for ever (spec: training.md B.3).
        side: tile side S in pixels.
        ahead: micro-batches prepared ahead, for each of the ``workers`` threads.
    """

    def __init__(
        self,
        plan: Plan,
        encoder: Callable[[Item, Sample, dict[str, Any] | None], list[Part]],
        tile: Callable[[Any, int], np.ndarray],
        positions: Callable[[Any], np.ndarray],
        dummy: list[int],
        side: int,
        scratch: Path,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
        ahead: int = 3,
    ) -> None:
        self.plan, self.encoder = plan, encoder
        self.tile, self.positions = tile, positions
        self.dummy, self.side, self.scratch = np.asarray(dummy, dtype=np.int32), side, scratch
        self.rank, self.world = rank, world
        self.waited = 0.0
        self.ahead = ahead * workers
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self.fetchers = ThreadPoolExecutor(2, thread_name_prefix="fetcher")
        self._readers: OrderedDict[int, Future[_Opened]] = OrderedDict()
        self._lock = threading.Lock()

    def steps(self, first: int = 0) -> Iterator[tuple[int, list[Micro]]]:
        """(step, its micro-batches on this rank) from step ``first`` on."""
        queue: deque[tuple[int, int, Future[Micro]]] = deque()
        coming: deque[tuple[int, int, int | None]] = deque()
        source = self._packs(first)
        collected: list[Micro] = []
        while True:
            for item in islice(source, FETCH_AHEAD - len(coming)):
                coming.append(item)
                self._fetch(item[2])
            while coming and len(queue) < self.ahead:
                step, count, number = coming.popleft()
                queue.append((step, count, self.pool.submit(self.micro, number)))
            if not queue:
                return
            step, count, future = queue.popleft()
            started = time.perf_counter()
            collected.append(future.result())
            self.waited += time.perf_counter() - started
            if len(collected) == count:
                yield step, collected
                collected = []

    def _packs(self, first: int) -> Iterator[tuple[int, int, int | None]]:
        for step in range(first, self.plan.steps):
            mine = self.plan.deal(step, self.world)[self.rank]
            for number in mine:
                yield step, len(mine), number

    def micro(self, number: int | None) -> Micro:
        """Build one micro-batch; ``None`` is a pack without samples, for ranks that have fewer."""
        segments, tiles, keys, images, tokens = [], [], [], 0, 0
        for item in self._items(number):
            opened = self._opened(item.shard).result()
            key = opened.keys[item.row]
            sample = opened.reader.read(key)
            made: list[np.ndarray] = []
            for part in self.encoder(item, sample, opened.rows and opened.rows[key]):
                made = made or self._tiles(sample, part.tiles, item.max_tiles, opened.reader.uri)
                segments.append((part.ids, self.positions(part.ids), masked_labels(part.ids, part.target)))
                tiles += made
                images += len(made)
                tokens += len(part.ids)
            keys.append(key)
        if not tiles:
            ids = self.dummy
            segments.append((ids, self.positions(ids), np.full(len(ids), IGNORED, dtype=np.int64)))
            tiles.append(np.zeros((1, self.side, self.side, 3), dtype=np.uint8))
        return Micro(pack(segments, tiles), keys, tokens, images)

    def _tiles(self, sample: Sample, expected: list[int], max_tiles: int, uri: str) -> list[np.ndarray]:
        """Tiles of the first images of a sample; as many of each as are expected."""
        from vlmflow.vision.image import decode

        made = []
        for number, (data, count) in enumerate(zip(sample.images, expected, strict=False)):
            found = self.tile(decode(data), max_tiles)
            if len(found) != count:
                raise DataError(
                    f"sample {sample.key} of {uri}: image {number} gives {len(found)} tiles but {count} were expected from its "
                    "recorded width and height; the image was changed after it was described. Pull the shard again."
                )
            made.append(found)
        return made

    def _fetch(self, number: int | None) -> None:
        """Begin to bring the shards of a pack to local disk."""
        for shard in {item.shard for item in self._items(number)}:
            self._opened(shard)

    def _items(self, number: int | None) -> list[Item]:
        return [] if number is None else self.plan.items_of(number)

    def _opened(self, shard: int) -> Future[_Opened]:
        def read() -> _Opened:
            entry = self.plan.shards[shard]
            reader = ShardReader(entry.shard, self.scratch)
            return _Opened(reader, reader.keys(), None if entry.text is None else read_part(entry.text, self.scratch))

        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = self.fetchers.submit(read)
                if len(self._readers) > OPEN_SHARDS:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard)
            return self._readers[shard]

    def close(self) -> None:
        """Stop the threads; pending work is dropped."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.fetchers.shutdown(wait=False, cancel_futures=True)
