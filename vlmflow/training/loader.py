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

from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError
from vlmflow.models.family import IGNORED
from vlmflow.training.batch import pack
from vlmflow.training.examples import Examples
from vlmflow.training.plan import Plan

OPEN_SHARDS = 128
FETCH_AHEAD = 32  # packs whose shards are fetched before the packs are built


class Micro(NamedTuple):
    """One micro-batch: the batch, its sample keys, real tokens and real images (dummy not counted)."""

    batch: dict[str, Any]
    keys: list[str]
    tokens: int
    images: int


class Loader:
    """Micro-batches of one rank, step after step.

    Args:
        tile: (PIL image) -> uint8 [t, S, S, 3].
        positions: (ids) -> position ids.
        dummy: ids of a segment with exactly one tile, added to packs without an image, so that every rank runs the
            vision tower in every micro-batch and no collective waits for ever (spec: training.md B.3).
        side: tile side S in pixels.
        ahead: micro-batches prepared ahead, for each of the ``workers`` threads.
    """

    def __init__(
        self,
        examples: Examples,
        plan: Plan,
        tile: Callable[[Any], np.ndarray],
        positions: Callable[[Any], np.ndarray],
        dummy: list[int],
        side: int,
        scratch: Path,
        rank: int = 0,
        world: int = 1,
        tile_tokens: float = 16.0,
        workers: int = 1,
        ahead: int = 3,
    ) -> None:
        self.examples, self.plan = examples, plan
        self.tile, self.positions = tile, positions
        self.dummy, self.side, self.scratch = np.asarray(dummy, dtype=np.int32), side, scratch
        self.rank, self.world, self.tile_tokens = rank, world, tile_tokens
        self.waited = 0.0
        self.ahead = ahead * workers
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self.fetchers = ThreadPoolExecutor(2, thread_name_prefix="fetcher")
        self._readers: OrderedDict[int, Future[tuple[ShardReader, list[str]]]] = OrderedDict()
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
            mine = self.plan.deal(step, self.world, self.tile_tokens)[self.rank]
            for number in mine:
                yield step, len(mine), number

    def micro(self, number: int | None) -> Micro:
        """Build one micro-batch; ``None`` is a pack without samples, for ranks that have fewer."""
        segments, tiles, keys, images, tokens = [], [], [], 0, 0
        for sample in self._samples(number):
            ids = np.asarray(self.examples.ids(sample))
            key, made = self._tiles(sample)
            segments.append((ids, self.positions(ids), self.examples.labels(sample)))
            tiles += made
            keys.append(key)
            images += len(made)
            tokens += len(ids)
        if not tiles:
            ids = self.dummy
            segments.append((ids, self.positions(ids), np.full(len(ids), IGNORED, dtype=np.int64)))
            tiles.append(np.zeros((1, self.side, self.side, 3), dtype=np.uint8))
        return Micro(pack(segments, tiles), keys, tokens, images)

    def _tiles(self, sample: int) -> tuple[str, list[np.ndarray]]:
        from vlmflow.vision.image import decode

        reader, keys = self._opened(int(self.examples.arrays["shard"][sample])).result()
        key = keys[int(self.examples.arrays["row"][sample])]
        expected = self.examples.tiles(sample)
        if not expected:
            return key, []
        stored = reader.read(key).images
        made = []
        for number, (data, count) in enumerate(zip(stored, expected, strict=True)):
            found = self.tile(decode(data))
            if len(found) != count:
                raise DataError(
                    f"sample {key} of {reader.uri}: image {number} gives {len(found)} tiles but {count} were expected from its "
                    "recorded width and height; the image was changed after it was described. Pull the shard again."
                )
            made.append(found)
        return key, made

    def _fetch(self, number: int | None) -> None:
        """Begin to bring the shards of a pack to local disk."""
        for shard in {int(self.examples.arrays["shard"][i]) for i in self._samples(number)}:
            self._opened(shard)

    def _samples(self, number: int | None) -> list[int]:
        return [] if number is None else self.plan.samples_of(number)

    def _opened(self, shard: int) -> Future[tuple[ShardReader, list[str]]]:
        def read() -> tuple[ShardReader, list[str]]:
            reader = ShardReader(self.examples.shards[shard][0], self.scratch)
            return reader, reader.keys()

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
