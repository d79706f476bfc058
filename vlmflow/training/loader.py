"""Batches of one rank, fetched, decoded and laid out ahead of the loop.

Three stages run ahead of each other: shards of the coming packs come to local disk (`dataset.window`: large reads, a hard
limit in bytes), worker threads decode, tile and tokenise packs (Pillow, file reads and tokenizers release the interpreter
lock), and finished micro-batches wait in a bounded queue. Their order is the plan's, whichever thread finishes first; an
error comes up at the micro-batch that it belongs to and names the sample. The time that the loop nevertheless waits is
measured and reported.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmflow import storage
from vlmflow.dataset.fetch import retried
from vlmflow.dataset.layer import read_part
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.window import Lease, LeasedShard, Window
from vlmflow.dataset.workers import Workers
from vlmflow.errors import DataError, VlmflowError
from vlmflow.models.family import IGNORED, masked_labels
from vlmflow.training.batch import pack, pinned
from vlmflow.training.examples import Part
from vlmflow.training.mixture import WINDOW
from vlmflow.training.plan import Item, Plan

FETCH_AHEAD = 32  # packs whose shards are fetched before the packs are built
FETCHERS = 2  # shards on their way at a time; each is read in several parts
KEPT = 2 * WINDOW  # shards whose index and layer rows stay in memory when no coming pack reads them


class Micro(NamedTuple):
    """One micro-batch: the batch, its sample keys, real tokens and real images (dummy not counted)."""

    batch: dict[str, Any]
    keys: list[str]
    tokens: int
    images: int


class _Opened(NamedTuple):
    """A shard on local disk: its samples and keys, and the rows of its text layer by key."""

    reader: LeasedShard
    keys: list[str]
    rows: dict[str, Any] | None


class _Shards:
    """Shards that coming packs read, each opened once and leased until the last of those packs is built."""

    def __init__(self, plan: Plan, scratch: Path) -> None:
        self.plan, self.scratch = plan, scratch
        self.window = Window(scratch / "shards")
        sizes = [entry.shard.bytes for entry in plan.shards if storage.local_path(entry.shard.uri) is None]
        most = sorted(sizes)[-WINDOW:]
        self.window.check(sum(most), f"the {len(most)} shards whose samples are shuffled together")
        self._fetchers = Workers(FETCHERS, "fetcher")
        self._opened: dict[int, Future[_Opened]] = {}
        self._readers: dict[int, int] = {}
        self._known: OrderedDict[int, _Opened] = OrderedDict()

    def hold(self, shards: set[int]) -> None:
        """Begin to bring shards to local disk; they stay until as many calls of `drop`."""
        for shard in sorted(shards):
            self._readers[shard] = self._readers.get(shard, 0) + 1
            if shard not in self._opened:
                known = self._known.pop(shard, None)
                self._opened[shard] = self._fetchers.submit(lambda s=shard, k=known: self._open(s, k))  # type: ignore[misc]

    def drop(self, shards: set[int]) -> None:
        """These were read by one of their packs."""
        for shard in shards:
            self._readers[shard] -= 1
            if not self._readers[shard]:
                del self._readers[shard]
                opened = self._opened.pop(shard).result()
                opened.reader.lease.release()
                self._known[shard] = opened
                if len(self._known) > KEPT:
                    self._known.popitem(last=False)

    def get(self, shard: int) -> _Opened:
        """A shard that is held; waits for it."""
        return self._opened[shard].result()

    def _open(self, shard: int, known: _Opened | None) -> _Opened:
        entry = self.plan.shards[shard]
        lease: Lease = self.window.lease(entry.shard)
        if known is not None:
            known.reader.lease = lease
            return known
        reader = LeasedShard(entry.shard, lease, self.scratch)
        text = entry.text
        rows = None if text is None else retried(lambda: read_part(text, self.scratch))
        return _Opened(reader, reader.keys(), rows)

    def close(self) -> None:
        self.window.close()
        self._fetchers.close()


class Loader:
    """Micro-batches of one rank, step after step.

    Args:
        encoder: (item, sample, row of its text layer) -> parts (see `examples.Encoder`).
        tile: (stored image, tile limit) -> uint8 [t, S, S, 3].
        positions: (ids) -> position ids.
        dummy: ids of a segment with exactly one tile, added to packs without an image, so that every rank runs the
            vision tower in every micro-batch and no collective waits for ever (spec: training.md B.3).
        side: tile side S in pixels.
        scratch: local disk; its folder ``shards`` is shared by the ranks of a machine.
        ahead: micro-batches prepared ahead, for each of the ``workers`` threads.

    Raises:
        NoSpace: the shards that are shuffled together are larger than the shard cache may be.
    """

    def __init__(
        self,
        plan: Plan,
        encoder: Callable[[Item, Sample, dict[str, Any] | None], list[Part]],
        tile: Callable[[bytes, int], np.ndarray],
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
        self.dummy, self.side = np.asarray(dummy, dtype=np.int32), side
        self.rank, self.world = rank, world
        self.waited = 0.0
        self.ahead = ahead * workers
        self._shards = _Shards(plan, scratch)
        self._builders = Workers(workers, "loader")

    def steps(self, first: int = 0) -> Iterator[tuple[int, list[Micro]]]:
        """(step, its micro-batches on this rank) from step ``first`` on.

        Raises:
            DataError: a sample cannot be read, decoded or encoded; the message names it.
            StorageError: a shard does not come.
        """
        queue: deque[tuple[int, int, set[int], Future[Micro]]] = deque()
        coming: deque[tuple[int, int, list[Item]]] = deque()
        source = self._packs(first)
        collected: list[Micro] = []
        while True:
            for entry in islice(source, FETCH_AHEAD - len(coming)):
                coming.append(entry)
                self._shards.hold(_shards_of(entry[2]))
            while coming and len(queue) < self.ahead:
                step, count, items = coming.popleft()
                made = self._builders.submit(lambda items=items: self._micro(items))  # type: ignore[misc]
                queue.append((step, count, _shards_of(items), made))
            if not queue:
                return
            step, count, shards, future = queue.popleft()
            started = time.perf_counter()
            collected.append(future.result())
            self.waited += time.perf_counter() - started
            self._shards.drop(shards)
            if len(collected) == count:
                yield step, collected
                collected = []

    def _packs(self, first: int) -> Iterator[tuple[int, int, list[Item]]]:
        """(step, micro-batches of this rank in it, items); a rank with fewer packs has some without items."""
        for step in range(first, self.plan.steps):
            mine = self.plan.deal(step, self.world)[self.rank]
            for number in mine:
                yield step, len(mine), [] if number is None else self.plan.items_of(number)

    def micro(self, pack: int) -> Micro:
        """One pack of the plan, built here and now."""
        items = self.plan.items_of(pack)
        self._shards.hold(_shards_of(items))
        made = self._micro(items)
        self._shards.drop(_shards_of(items))
        return made

    def _micro(self, items: list[Item]) -> Micro:
        segments, tiles, keys, images, tokens = [], [], [], 0, 0
        shown: list[int] = []
        count = 0
        for item in items:
            opened = self._shards.get(item.shard)
            key = opened.keys[item.row]
            with _named(key, opened.reader.uri):
                sample = opened.reader.read(key)
                parts = self.encoder(item, sample, opened.rows and opened.rows[key])
                made = self._tiles(sample, parts[0].tiles, item.max_tiles)  # all parts show the same images
                places = range(count, count + sum(len(image) for image in made))
                count = places.stop
                tiles += made
                images += len(made)
                for part in parts:
                    segments.append((part.ids, self.positions(part.ids), masked_labels(part.ids, part.target)))
                    shown += places
                    tokens += len(part.ids)
            keys.append(key)
        if not tiles:
            ids = self.dummy
            segments.append((ids, self.positions(ids), np.full(len(ids), IGNORED, dtype=np.int64)))
            tiles.append(np.zeros((1, self.side, self.side, 3), dtype=np.uint8))
        return Micro(pinned(pack(segments, tiles, shown if len(shown) > count else None)), keys, tokens, images)

    def _tiles(self, sample: Sample, expected: list[int], max_tiles: int) -> list[np.ndarray]:
        """Tiles of the first images of a sample; as many of each as are expected."""
        made = []
        for number, (data, count) in enumerate(zip(sample.images, expected, strict=False)):
            found = self.tile(data, max_tiles)
            if len(found) != count:
                raise DataError(
                    f"image {number} gives {len(found)} tiles but {count} were expected from its recorded width and height; the "
                    "image was changed after it was described. Pull the shard again."
                )
            made.append(found)
        return made

    def close(self) -> None:
        """Stop the threads; pending work is dropped. Returns at once."""
        self._builders.close()
        self._shards.close()


def _shards_of(items: list[Item]) -> set[int]:
    return {item.shard for item in items}


@contextmanager
def _named(key: str, uri: str) -> Iterator[None]:
    """Errors inside name the sample and its shard."""
    try:
        yield
    except VlmflowError as error:
        raise type(error)(f"sample {key} of {uri}: {error}") from error
    except Exception as error:
        raise DataError(f"sample {key} of {uri} cannot be prepared: {type(error).__name__}: {error}") from error
