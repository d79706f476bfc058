"""Choosing from ranked samples, exactly: share, threshold, shares of sources, quotas, thinned classes, each text once.

Pure functions of the set of (key, value): the order in which shards and samples come never matters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmflow.curation.words import wording

if TYPE_CHECKING:
    from vlmflow.recipe.curation import KeepSpec

OPEN, REPEATED, THINNED, QUOTA = range(4)
"""What was decided of a sample before or after the selection by value; OPEN = nothing else than its rank."""
UNNAMED = "other"  # the class of texts without a main object: it counts for the mean, but is never thinned


def ranking(keys: Any, values: Any, order: str, seed: int = 0) -> np.ndarray:
    """Indices of the scored samples (value neither None nor NaN), first to be kept first.

    lowest and highest rank by value; random by a hash of seed and key. Ties, and so the whole ranking, are decided by key.

    Args:
        keys: unique strings, a sequence or a pyarrow array.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = np.asarray(values, dtype=np.float64)
    scored = np.flatnonzero(~np.isnan(values))
    keys = (keys if isinstance(keys, pa.Array) else pa.array(keys, pa.large_string())).take(pa.array(scored))
    by: Any = values[scored]
    if order == "random":
        heads = (hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8] for key in keys.to_pylist())
        by = np.frombuffer(b"".join(heads), dtype=">u8").astype(np.uint64)
    table = pa.table({"by": by, "key": keys})
    way = "descending" if order == "highest" else "ascending"
    return scored[pc.sort_indices(table, [("by", way), ("key", "ascending")]).to_numpy().astype(np.int64)]


def keep_count(fraction: float, scored: int) -> int:
    """fraction * scored rounded half up, computed exactly: 0.2 is one fifth, not the nearest binary number."""
    return min(scored, math.floor(Fraction(repr(float(fraction))) * scored + Fraction(1, 2)))


class Selection:
    """What is still in the running, in the order of its ranks, and what became of each sample.

    Attributes:
        order: indices of samples that take part, first to be kept first.
        kept: (n,) whether a sample stays.
        code: (n,) one of OPEN, REPEATED, THINNED, QUOTA.
        cuts: the last kept value, by source when each has its share, else at 0; nothing where none is kept.
    """

    def __init__(self, order: np.ndarray, samples: int) -> None:
        self.order = order
        self.kept = np.zeros(samples, dtype=bool)
        self.code = np.zeros(samples, dtype=np.int8)
        self.cuts: dict[int, float] = {}

    @property
    def rank(self) -> np.ndarray:
        """(n,) place in the order, 0 first; -1 for samples that take no part."""
        found = np.full(len(self.kept), -1, dtype=np.int64)
        found[self.order] = np.arange(len(self.order))
        return found

    def count(self, code: int) -> int:
        """Samples with a code."""
        return int((self.code == code).sum())

    def _leave(self, gone: np.ndarray, code: int) -> None:
        self.code[self.order[gone]] = code
        self.order = self.order[~gone]

    def drop_repeated(self, texts: Any) -> None:
        """Of samples with the same text (case, white space, end marks aside) all but the first in rank leave.

        Args:
            texts: pyarrow strings, (n,).
        """
        import pyarrow as pa

        seen: set[str] = set()
        gone = np.zeros(len(self.order), dtype=bool)
        for place, text in enumerate(texts.take(pa.array(self.order)).to_pylist()):
            said = wording([text or ""])
            gone[place] = said in seen
            seen.add(said)
        self._leave(gone, REPEATED)

    def thin(self, names: Sequence[str], codes: np.ndarray, top: int, to: float) -> dict[str, list[int]]:
        """Of the `top` commonest classes each that exceeds the mean count goes down to the share `to`, the first in rank.

        Args:
            names: of the classes; codes: (n,) class of each sample.

        Returns:
            [samples before, after] of each class that was thinned.
        """
        mine = codes[self.order]
        counts = np.bincount(mine, minlength=len(names))
        mean = counts.sum() / max(1, (counts > 0).sum())
        named = [i for i in range(len(names)) if names[i] != UNNAMED]
        commonest = sorted(named, key=lambda i: (-counts[i], names[i]))[:top]
        gone, thinned = np.zeros(len(mine), dtype=bool), {}
        for i in commonest:
            if counts[i] > mean:
                stay = keep_count(to, int(counts[i]))
                gone[np.flatnonzero(mine == i)[stay:]] = True
                thinned[names[i]] = [int(counts[i]), stay]
        self._leave(gone, THINNED)
        return thinned

    def choose(self, spec: KeepSpec, values: np.ndarray, sources: np.ndarray, count: int) -> None:
        """Keep the share or what is within the threshold. `sources`: (n,) integers below `count`."""
        mine = sources[self.order] if spec.per_source else np.zeros(len(self.order), dtype=np.int64)
        for group in range(count if spec.per_source else 1):
            order = self.order[mine == group]
            if spec.threshold is None:
                taken = order[: keep_count(spec.fraction, len(order))]
            elif spec.order == "lowest":
                taken = order[values[order] <= spec.threshold]
            else:
                taken = order[values[order] >= spec.threshold]
            self.kept[taken] = True
            if len(taken):
                self.cuts[group] = float(values[taken[-1]])

    def cap(self, most: Mapping[int, int], sources: np.ndarray) -> None:
        """Of the kept samples of a source only so many stay, the first in rank."""
        for source, limit in most.items():
            mine = self.order[self.kept[self.order] & (sources[self.order] == source)]
            self.kept[mine[limit:]] = False
            self.code[mine[limit:]] = QUOTA
