"""All pairs of 64-bit hashes within a Hamming distance: exactly, without comparing all with all.

Hashes are cut into bands. If two differ in at most d bits, then of d + 2 bands two at least are equal: so only hashes that
share two bands, any two, need comparing. For d above 6 such bands grow too short, and each of four bands of 16 bits is
looked up with up to r bits of it flipped instead: where the four r + 1 add up to more than d, one band differs in no more
than its r (multi-index hashing, Norouzi et al. 2012). A million random hashes meet 280 others each for d = 6, 1270 for 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

BITS = 64
CANDIDATES = 1 << 21  # pairs compared at a time, about 100 MB
_DEEPEST = 6  # largest distance for which two equal bands are looked for


@dataclass(frozen=True)
class _Table:
    """Where the hashes with each key lie: `order[starts[key] : starts[key + 1]]`, ascending."""

    cuts: tuple[tuple[int, int], ...]  # bits of the hash that make the key: first, how many
    flips: np.ndarray  # what is XORed to a key to find its neighbours
    starts: np.ndarray
    order: np.ndarray
    place: np.ndarray  # position of each hash in `order`


class Index:
    """Hashes that can be asked for those near others.

    Args:
        values: hashes, (n,) unsigned 64-bit.
        distance: largest number of differing bits, 0 to 16.
        groups: (n,) integers; only hashes of one group are compared, for example those with the same text.
    """

    def __init__(self, values: np.ndarray, distance: int, groups: np.ndarray | None = None) -> None:
        self.values, self.distance = np.asarray(values, dtype=np.uint64), distance
        self.groups = None if groups is None else np.asarray(groups)
        self._tables = [self._table(cuts, radius) for cuts, radius in _plan(distance)]

    def __len__(self) -> int:
        return len(self.values)

    def _table(self, cuts: tuple[tuple[int, int], ...], radius: int) -> _Table:
        keys, size = _keys(self.values, self.groups, cuts), 1 << sum(bits for _, bits in cuts)
        short = keys.astype(np.uint16) if size <= 1 << 16 else keys  # 16 bits are sorted by radix, ten times as fast
        order = np.argsort(short, kind="stable").astype(np.int32)
        starts = np.zeros(size + 1, dtype=np.int64)
        np.cumsum(np.bincount(keys, minlength=size), out=starts[1:])
        place = np.empty(len(order), dtype=np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        return _Table(cuts, _flips(sum(bits for _, bits in cuts), radius), starts, order, place)

    def cost(self, values: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """How many hashes each of `values` would be compared with."""
        total = np.zeros(len(values), dtype=np.int64)
        for table in self._tables:
            keys = _keys(values, groups, table.cuts)
            for flip in table.flips:
                total += table.starts[(keys ^ flip) + 1] - table.starts[keys ^ flip]
        return total

    def search(self, values: np.ndarray, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(query, found, distance) of all near pairs, sorted; as many at once as `values` asks for (see `blocks`)."""
        return self._search(np.asarray(values, dtype=np.uint64), groups, None)

    def later(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(place in `positions`, found, distance) of the near pairs of own hashes of which the found one comes later."""
        groups = None if self.groups is None else self.groups[positions]
        return self._search(self.values[positions], groups, np.asarray(positions))

    def _search(
        self, values: np.ndarray, groups: np.ndarray | None, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found: list[np.ndarray] = []
        for table in self._tables:
            keys = _keys(values, groups, table.cuts)
            for flip in table.flips:
                starts, ends = table.starts[keys ^ flip], table.starts[(keys ^ flip) + 1]
                if own is not None and not flip:
                    starts = table.place[own] + 1  # those before it in its own bucket have met it
                for part in blocks(ends - starts):
                    found.append(self._near(values, groups, own, table.order, starts[part], ends[part], part.start))
        pairs = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)  # tables find some twice
        query, other = pairs // len(self), pairs % len(self)
        return query, other, np.bitwise_count(values[query] ^ self.values[other]).astype(np.int64)

    def _near(
        self, values: np.ndarray, groups: np.ndarray | None, own: np.ndarray | None,
        order: np.ndarray, starts: np.ndarray, ends: np.ndarray, first: int,
    ) -> np.ndarray:  # fmt: skip
        counts = ends - starts
        ends = np.cumsum(counts)
        place = np.repeat(starts - (ends - counts), counts)
        place += np.arange(len(place))
        other = order[place]
        mine = np.repeat(values[first : first + len(counts)], counts)
        close = np.flatnonzero(
            np.bitwise_count(mine ^ self.values[other]) <= self.distance
        )  # few: the rest looks at these
        query, other = first + np.searchsorted(ends, close, side="right"), other[close].astype(np.int64)
        good = np.ones(len(close), dtype=bool)
        if own is not None:
            good &= other > own[query]
        if groups is not None and self.groups is not None:
            good &= groups[query] == self.groups[other]
        return query[good] * len(self) + other[good]


def near(a: np.ndarray, b: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(i, j, bits) of all pairs with a[i] and b[j] at most `distance` bits apart, sorted.

    The result holds every pair: of many equal hashes give one (np.unique), else n of them alone make n^2 pairs.
    """
    index, a = Index(b, distance), np.asarray(a, dtype=np.uint64)
    found = [(part.start, index.search(a[part])) for part in blocks(index.cost(a))]
    if not found:
        return (np.zeros(0, dtype=np.int64),) * 3
    i, j, bits = (np.concatenate([pairs[n] + (start if n == 0 else 0) for start, pairs in found]) for n in range(3))
    return i, j, bits


def blocks(costs: np.ndarray, budget: int = CANDIDATES) -> Iterator[slice]:
    """Successive slices that cost at most `budget` each, or hold one element."""
    total, start = np.cumsum(costs), 0
    while start < len(costs):
        done = total[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(total, done + budget, side="right")))
        yield slice(start, end)
        start = end


def _plan(distance: int) -> list[tuple[tuple[tuple[int, int], ...], int]]:
    """Tables: which bits of the hash are the key (first, how many), and how many of them may be flipped."""
    if not 0 <= distance <= 16:
        raise ValueError(f"distance {distance}: hashes are compared within 0 to 16 bits")
    if distance <= _DEEPEST:
        edges = [BITS * i // (distance + 2) for i in range(distance + 3)]
        bands = [(start, min(end - start, 10)) for start, end in pairwise(edges)]
        return [(pair, 0) for pair in combinations(bands, 2)]
    plan: list[tuple[tuple[tuple[int, int], ...], int]] = []
    spare = distance + 1
    for left in (4, 3, 2, 1):
        share = -(-spare // left)
        plan.append((((16 * (4 - left), 16),), share - 1))
        spare -= share
    return plan


def _flips(bits: int, radius: int) -> np.ndarray:
    """All numbers of `bits` bits of which at most `radius` are set, 0 first."""
    chosen = (c for r in range(radius + 1) for c in combinations(range(bits), r))
    return np.array([sum(1 << bit for bit in c) for c in chosen], dtype=np.int64)


def _keys(values: np.ndarray, groups: np.ndarray | None, cuts: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The key of each hash; each group's keys are XORed with a number of its own, so that they lie apart."""
    key, width = np.zeros(len(values), dtype=np.int64), 0
    for first, bits in cuts:
        cut = (np.asarray(values, dtype=np.uint64) >> np.uint64(first)) & np.uint64((1 << bits) - 1)
        key, width = (key << bits) | cut.astype(np.int64), width + bits
    if groups is not None:
        mixed = (groups.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(BITS - width)
        key ^= mixed.astype(np.int64)
    return key
