"""Which samples repeat one of another dataset: what `curation.dedup.against` asks for.

Compared is what duplicates within a dataset are told by (see `dedup`), with one difference: a sample without conversations
or preferences is dropped for its pictures alone, whatever the other dataset asks about them. One that has them is dropped
only for a sample that says the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmflow.curation import phash
from vlmflow.curation.columns import column, numbers, stacked
from vlmflow.curation.likeness import BYTES, NEAR, TEXT, TRIMMED, Samples, all_near
from vlmflow.digest import digest
from vlmflow.errors import DataError
from vlmflow.vision.near import Index, blocks

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.recipe.curation import DedupSpec

COLUMNS = ["plain", "trimmed", "content", "text", "turns"]
FIRST = 256  # different samples of the others that are asked at first ...
GROWTH = 16  # ... and how many times as many after that


@dataclass(frozen=True)
class Found:
    """For each sample its row in `keys` or -1, (n,), the kind and the bits."""

    of: np.ndarray
    kind: np.ndarray
    bits: np.ndarray
    keys: Any  # DATASET/KEY of the other datasets' samples (keys hold no slashes), a pyarrow array

    def by_dataset(self, names: list[str]) -> dict[str, int]:
        """How many samples repeat one of each dataset."""
        met = Counter(key.split("/", 1)[0] for key in self.keys.take(self.of[self.of >= 0]).to_pylist())
        return {name: met[name] for name in names}


def digests(spec: DedupSpec, others: Mapping[str, Manifest], dataset: str) -> dict[str, str]:
    """What each dataset of `against` holds: the digest of its shards and its layer `phash`.

    Raises:
        DataError: a dataset that was not handed over or has no layer `phash`.
    """
    if missing := [name for name in spec.against if name not in others]:
        raise DataError(
            f"curation.dedup.against names {missing}, but this step was given {sorted(others) or 'no other datasets'}: without "
            f"them copies in '{dataset}' would stay unseen. Hand over their manifests, or take them off the list."
        )
    if bare := [name for name in spec.against if phash.LAYER not in others[name].layers]:
        raise DataError(
            f"curation.dedup.against: datasets {bare} have no layer '{phash.LAYER}', by which '{dataset}' is compared with them. "
            "The step `pull` adds it under a recipe that names them here: run it again with this recipe."
        )
    return {
        name: digest(
            {"layer": others[name].layer(phash.LAYER).digest, "shards": [s.sha256 for s in others[name].shards]}
        )
        for name in spec.against
    }


def find(spec: DedupSpec, table: Any, texts: np.ndarray, others: Mapping[str, Manifest], scratch: Any) -> Found:
    """A sample of the datasets of `against` that each sample repeats, if any; of equal ones the first by `against` and key.

    Args:
        table: layer `phash` of the samples that may go.
        texts: digests of their texts, (n,); the others' texts are their alt texts.
    """
    import pyarrow as pa

    keys, theirs = _stacked(spec.against, others, scratch)
    talking = np.flatnonzero(numbers(theirs["turns"]))
    silent = theirs.take(talking).set_column(COLUMNS.index("turns"), "turns", pa.nulls(len(talking), pa.int64()))
    owner = np.concatenate([np.arange(len(theirs)), talking])
    both = pa.concat_tables([theirs, silent, table.select(COLUMNS)]).combine_chunks()
    said = np.concatenate([numbers(theirs["text"]), numbers(silent["text"]), texts])
    samples = Samples.of(both, said, spec.same_text, spec.images is not None)
    they, mine = samples.take(np.arange(len(owner))), samples.take(np.arange(len(owner), len(both)))

    _, unit, unit_of = np.unique(mine.signature, return_index=True, return_inverse=True)
    place, bits, kind = (
        _same(they.signature, mine.signature)[unit],
        np.zeros(len(unit), np.int64),
        np.full(len(unit), NEAR),
    )
    if spec.images is not None:
        left = unit[(place < 0) & mine.hashed[unit]]
        for row, (other, code, apart) in _near(they, mine, left, spec.images).items():
            at = unit_of[row]
            place[at], kind[at], bits[at] = other, code, apart
    place, kind, bits = place[unit_of], kind[unit_of], bits[unit_of]
    equal = (place >= 0) & (kind == NEAR) & (bits == 0) & (mine.content != 0) & (they.content[place] == mine.content)
    kind = np.where(equal, BYTES, np.where((place >= 0) & (mine.count == 0), TEXT, kind))
    if spec.text:
        worded = (place < 0) & (mine.text != 0)
        place = np.where(worded, _same(they.text, mine.text), place)
        kind = np.where(worded, TEXT, kind)
    return Found(np.where(place < 0, -1, owner[place]), kind, bits, keys)


def _stacked(names: list[str], others: Mapping[str, Manifest], scratch: Any) -> tuple[Any, Any]:
    """(DATASET/KEY, hashes) of all samples of the datasets, in the order of `names` and of the keys."""
    import pyarrow as pa
    import pyarrow.compute as pc

    keys, tables = [], []
    for name in names:
        table = stacked(others[name], phash.LAYER, scratch, ["key", *COLUMNS]).sort_by("key")
        start, none = pa.scalar(f"{name}/", pa.large_string()), pa.scalar("", pa.large_string())
        keys.append(pc.binary_join_element_wise(start, column(table["key"]), none))
        tables.append(table.select(COLUMNS))
    return pa.concat_arrays(keys), pa.concat_tables(tables).combine_chunks()


def _same(theirs: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """For each value of `mine` its first place in `theirs`, or -1."""
    values, first = np.unique(theirs, return_index=True)
    at = np.minimum(np.searchsorted(values, mine), len(values) - 1)
    return np.where(values[at] == mine, first[at], -1)


def _near(they: Samples, mine: Samples, rows: np.ndarray, distance: int) -> dict[int, tuple[int, int, int]]:
    """(place in `they`, kind, bits) of a near one of each of `rows` that has one: the nearest of the first that are asked.

    Theirs are asked a few at first, then ever more, and only for rows that have met none: of tens of thousands of pages that
    all look alike on both sides, not every pair is compared.
    """
    _, first = np.unique(they.signature, return_index=True)
    spots = first[they.hashed[first]]  # one of those that are certainly the same, in an order without meaning
    best: dict[int, tuple[int, int, int]] = {}
    start, size = 0, FIRST
    while start < len(spots) and len(rows):
        best |= _nearest(they, mine, spots[start : start + size], rows, distance)
        rows = np.array([row for row in rows.tolist() if row not in best], dtype=np.int64)
        start, size = start + size, size * GROWTH
    return best


def _nearest(
    they: Samples, mine: Samples, spots: np.ndarray, rows: np.ndarray, distance: int
) -> dict[int, tuple[int, int, int]]:
    """(place in `they`, kind, bits) of the nearest at `spots` of each of `rows` that has one; ties by kind and place."""
    spots = np.sort(spots)
    best: dict[int, tuple[int, int, int]] = {}
    cut = any((some.trimmed != some.plain)[at].any() for some, at in ((they, spots), (mine, rows)))
    for code, view in ((NEAR, "plain"), (TRIMMED, "trimmed"))[: 1 + cut]:
        index = Index(getattr(they, view)[spots], distance, they.group[spots])
        values, groups = getattr(mine, view)[rows], mine.group[rows]
        for part in blocks(index.cost(values, groups)):
            query, found, apart = index.search(values[part], groups[part])
            nearest = np.lexsort((found, apart, query))
            query, found, apart = query[nearest], found[nearest], apart[nearest]
            several = mine.count[rows[part.start + query]] != 1  # the others need but the first
            asked = np.flatnonzero(several | (np.diff(query, prepend=-1) != 0))
            for q, f, d in zip(*(array[asked].tolist() for array in (query, found, apart)), strict=True):
                row, other = int(rows[part.start + q]), int(spots[f])
                known = best.get(row)
                if known and (known[2], known[1], known[0]) <= (d, code, other):
                    continue
                if mine.count[row] == 1 or all_near(mine, row, they, other, distance):
                    best[row] = (other, code, d)
    return best
