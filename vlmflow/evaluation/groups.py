"""Which rows of a benchmark belong together because they show the same picture.

Rows of one group stay on one side of the split, so that no picture that helped to choose a model is met again in the
report. Rows share a picture by reference, as equal copies, or through a third row that shows both of theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

REFERENCE_CHARS = 64  # VLMEvalKit: an image value this short is another row's index


class ImageGroups:
    """Groups of rows, named by the first row in file order that stores one of the pictures."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._rank: dict[str, tuple[bool, int]] = {}
        self._holders: dict[bytes, str] = {}
        self._links: list[tuple[str, str]] = []

    def add(self, index: str, images: Sequence[str]) -> None:
        """The next row and its image values: base64, or indices of other rows (which may come later)."""
        self._parent[index] = index
        self._rank[index] = (all(len(value) <= REFERENCE_CHARS for value in images), len(self._rank))
        for value in images:
            if len(value) > REFERENCE_CHARS:
                self._join(index, self._holders.setdefault(hashlib.sha256(value.encode()).digest(), index))
            elif value:
                self._links.append((index, value))

    def of(self, index: str) -> str:
        """The name of a row's group, once every row was added."""
        while self._links:
            row, other = self._links.pop()
            if other in self._parent:  # a reference to nowhere is refused by whoever reads the row
                self._join(row, other)
        return self._root(index)

    def _root(self, index: str) -> str:
        while (above := self._parent[index]) != index:
            self._parent[index] = self._parent[above]
            index = above
        return index

    def _join(self, one: str, other: str) -> None:
        first, second = sorted((self._root(one), self._root(other)), key=lambda root: self._rank[root])
        self._parent[second] = first
