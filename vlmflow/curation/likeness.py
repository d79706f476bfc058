"""What duplicates are told by: hashes and digests of all samples as columns, and which of them are certainly the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmflow.curation.columns import column, numbers

KINDS = ("bytes", "near", "trimmed", "text")
"""Identical images; near images; near when borders are cut; the same words (and no image, or recipe's `text`)."""
BYTES, NEAR, TRIMMED, TEXT = range(4)


@dataclass(frozen=True)
class Samples:
    """What samples are compared by, (n,) each: one image's hashes, digests (0 = none) and the lists of all hashes.

    `group` is what must agree beside the images: their number and, where it counts, the wording. `hashed` tells whose
    images can be compared by hash.
    """

    plain: np.ndarray
    trimmed: np.ndarray
    all_plain: Any  # pyarrow list arrays
    all_trimmed: Any
    count: np.ndarray
    content: np.ndarray
    text: np.ndarray
    group: np.ndarray
    signature: np.ndarray  # equal for samples that are certainly duplicates
    hashed: np.ndarray

    @staticmethod
    def of(table: Any, texts: np.ndarray, same_text: bool, by_hash: bool) -> Samples:
        plain, trimmed = column(table["plain"]), column(table["trimmed"])
        count = plain.value_lengths().to_numpy(zero_copy_only=False)
        content, said = numbers(table["content"]), numbers(table["turns"])
        wording = np.where((said != 0) | same_text, _mix(texts.view(np.uint64), said.view(np.uint64)), np.uint64(0))
        group = _mix(count.astype(np.uint64), wording)
        values = plain.values.to_numpy().view(np.uint64)
        owner = np.repeat(np.arange(len(count)), count)
        hashed = count > 0
        hashed[owner[values == 0]] = False
        hashed &= by_hash
        rows, place = np.arange(len(count), dtype=np.uint64), _telling(plain)
        words = _mix(texts.view(np.uint64), said.view(np.uint64))
        unsaid = (texts == 0) & (said == 0)
        signature = np.select(
            [hashed, content != 0, ~unsaid],
            [
                _mix(_digest(plain), _digest(trimmed), group, np.uint64(1)),
                _mix(content.view(np.uint64), group, np.uint64(2)),
                _mix(words, np.uint64(3)),
            ],
            _mix(rows, np.uint64(4)),
        )
        return Samples(
            _picked(plain, place),
            _picked(trimmed, place),
            plain,
            trimmed,
            count,
            content,
            texts,
            group,
            signature,
            hashed,
        )

    def take(self, rows: np.ndarray) -> Samples:
        """The samples at `rows`, in that order."""
        import pyarrow as pa

        fields = (getattr(self, name) for name in self.__dataclass_fields__)
        return Samples(*(f[rows] if isinstance(f, np.ndarray) else f.take(pa.array(rows)) for f in fields))


def all_near(some: Samples, one: int, others: Samples, other: int, distance: int) -> bool:
    """Whether the images of two samples with equally many are near one by one, as they are or without their borders."""
    views = ((some.all_plain, others.all_plain), (some.all_trimmed, others.all_trimmed))
    pairs = [zip(mine[one].as_py(), theirs[other].as_py(), strict=True) for mine, theirs in views]
    return all(any((a ^ b).bit_count() <= distance for a, b in image) for image in zip(*pairs, strict=True))


def _telling(plain: Any) -> np.ndarray:
    """Which image of each sample is looked up: of samples with as many images the place at which most pictures differ.
    Thousands of documents may share their first page, and all pairs of them would have to be compared."""
    starts, values = plain.offsets.to_numpy()[:-1], plain.values.to_numpy()
    counts = plain.value_lengths().to_numpy(zero_copy_only=False)
    place = np.zeros(len(starts), dtype=np.int64)
    for count in np.unique(counts[counts > 1]).tolist():
        alike = np.flatnonzero(counts == count)
        distinct = [len(np.unique(values[starts[alike] + i])) for i in range(count)]
        place[alike] = int(np.argmax(distinct))
    return place


def _picked(lists: Any, place: np.ndarray) -> np.ndarray:
    """The value at a place of each list; 0 of an empty one."""
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy().view(np.uint64)
    found = np.zeros(len(offsets) - 1, dtype=np.uint64)
    filled = offsets[1:] > offsets[:-1]
    found[filled] = values[(offsets[:-1] + place)[filled]]
    return found


def _digest(lists: Any) -> np.ndarray:
    """64 bits of each list of integers; order counts."""
    offsets, values = lists.offsets.to_numpy().astype(np.int64), lists.values.to_numpy().view(np.uint64)
    counts = np.diff(offsets)
    place = np.arange(len(values)) - np.repeat(offsets[:-1] - offsets[0], counts)
    mixed = np.concatenate([[np.uint64(0)], np.cumsum(_mix(values, place.astype(np.uint64)), dtype=np.uint64)])
    ends = offsets - offsets[0]
    return mixed[ends[1:]] - mixed[ends[:-1]]


def _mix(*parts: np.ndarray | np.uint64) -> np.ndarray:
    """64 bits of several columns of 64 bits (the finaliser of splitmix64 after each)."""
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ part) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state
