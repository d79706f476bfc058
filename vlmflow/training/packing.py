"""Bins under two budgets, filled best-fit from a bounded buffer, and grouped into steps of equal cost.

The first bound is language-model tokens, the second vision tiles; the second keeps image-heavy packs from running out
of memory (spec: training.md B.2 item 4). Removing padding is the largest single gain of a VLM trainer (C.1).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from heapq import heappop, heapreplace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

BUFFER = 1024  # samples that wait for a bin: large enough that something nearly always fills the rest of one
SORT_BINS = 256  # bins (at least) among which those of similar cost make a step
SORT_STEPS = 16  # and steps (at least)
_SEQUENCE = 32  # bits of a key below its tokens


class Packer:
    """Streams items into bins. Memory is bounded by the buffer; an item waits for at most as many bins as it holds.

    A bin takes the oldest items as long as they fit, which keeps the order of the data whatever the lengths, and then the
    longest waiting items that fit what is left, until none does.

    Attributes:
        bins: finished bins, lists of item numbers; the caller may take them away.
        closed: number of bins finished so far.
    """

    def __init__(self, tokens: int, tiles: int, buffer: int = BUFFER) -> None:
        self.tokens, self.tiles, self.buffer = tokens, tiles, buffer
        self.bins: list[list[int]] = []
        self.closed = 0
        self._arrived = 0
        self._oldest: deque[tuple[int, int]] = deque()  # (key, tiles) in order of arrival
        self._gone: set[int] = set()  # taken before they were the oldest
        self._item: dict[int, int] = {}  # key -> item; in the buffer
        self._sorted: dict[int, list[int]] = {}  # tiles -> keys, ascending by tokens, the oldest last among equals

    def add(self, item: int, tokens: int, tiles: int) -> None:
        """One more item; it must fit an empty bin."""
        key = tokens << _SEQUENCE | ((1 << _SEQUENCE) - 1 - self._arrived)
        self._arrived += 1
        self._item[key] = item
        self._oldest.append((key, tiles))
        insort(self._sorted.setdefault(tiles, []), key)
        if len(self._item) >= self.buffer:
            self._close()

    def flush(self) -> None:
        """Finish the bins of everything that waits."""
        while self._item:
            self._close()

    def _close(self) -> None:
        """Finish one bin: the oldest items while they fit, then the longest of the buffer that fill what is left."""
        taken: list[int] = []
        room, room_tiles = self.tokens, self.tiles
        while self._oldest:
            key, tiles = self._oldest[0]
            if key not in self._gone:
                if key >> _SEQUENCE > room or tiles > room_tiles:
                    break
                taken.append(self._take(key, tiles))
                room -= key >> _SEQUENCE
                room_tiles -= tiles
            else:
                self._gone.remove(key)
            self._oldest.popleft()
        while room > 0:
            bound = (room + 1) << _SEQUENCE
            best, best_tiles = -1, 0
            for tiles, keys in self._sorted.items():
                if tiles <= room_tiles and (place := bisect_right(keys, bound)) and keys[place - 1] > best:
                    best, best_tiles = keys[place - 1], tiles
            if best < 0:
                break
            self._gone.add(best)
            taken.append(self._take(best, best_tiles))
            room -= best >> _SEQUENCE
            room_tiles -= best_tiles
        self.bins.append(taken)
        self.closed += 1

    def _take(self, key: int, tiles: int) -> int:
        keys = self._sorted[tiles]
        keys.pop(bisect_right(keys, key) - 1)
        if not keys:
            del self._sorted[tiles]
        return self._item.pop(key)


def group(
    cost: NDArray[np.float64], packs: int, random: np.random.Generator, steps_inside: int | None = None
) -> list[Ints]:
    """Bins of one stream as steps of ``packs`` bins (the last may have fewer), each of bins of similar cost.

    Any number of ranks then gets equal shares of a step. Bins move only within a window, and the steps of a window are
    shuffled, so that cost does not rise and fall over the training.

    Args:
        cost: of each bin, in the order of the stream.
        steps_inside: steps of a window; None = `SORT_STEPS`, or as many as have `SORT_BINS` bins.
    """
    window = packs * (steps_inside or max(SORT_STEPS, -(-SORT_BINS // packs)))
    steps: list[Ints] = []
    rest: Ints = np.zeros(0, dtype=np.int64)
    for start in range(0, len(cost), window):
        inside = np.arange(start, min(start + window, len(cost)))
        inside = inside[np.argsort(cost[inside], kind="stable")]
        rest, inside = inside[: len(inside) % packs], inside[len(inside) % packs :]
        rows = inside.reshape(-1, packs)
        steps += list(rows[np.argsort(random.random(len(rows)), kind="stable")])
    return [*steps, rest] if len(rest) else steps


def deal(cost: list[float], world: int) -> list[list[int]]:
    """Positions of bins for each rank, balanced by cost and at most ``ceil(bins / world)`` each.

    Longest first onto the least loaded rank that still has room.
    """
    room = -(-len(cost) // world)
    ranks: list[list[int]] = [[] for _ in range(world)]
    free = [(0.0, rank) for rank in range(world)]  # (load, rank) of ranks that have room, a heap
    for position in sorted(range(len(cost)), key=lambda p: (-cost[p], p)):
        load, rank = free[0]
        ranks[rank].append(position)
        if len(ranks[rank]) < room:
            heapreplace(free, (load + cost[position], rank))
        else:
            heappop(free)
    return [sorted(mine) for mine in ranks]
