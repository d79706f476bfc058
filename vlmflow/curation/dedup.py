"""Which samples say again what another one says: over all sources and shards of a dataset, as layer `dedup`.

Samples are ranked by pixels (most first), then by key. Going down the ranks, a sample that is still there stays and drops
all later ones that are its duplicates. So every dropped sample is within the distance of the one that stays, whatever
chains of likeness there are, and no two that stay are duplicates of each other.

Duplicates are samples whose images are the same bytes, or all near by perceptual hash, in order, as they are or without
their borders. Conversations and preferences are content: samples with them are duplicates only when these agree too (many
questions are asked about one picture). Flat pictures have no hash and are compared by their bytes; samples without images
by their texts.

A sample that repeats one of another dataset (`curation.dedup.against`, see `elsewhere`) goes first and drops nothing itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmflow.curation import elsewhere, phash
from vlmflow.curation.columns import numbers, one_of_each, stacked, text_numbers
from vlmflow.curation.likeness import BYTES, KINDS, NEAR, TEXT, TRIMMED, Samples, all_near
from vlmflow.dataset.layer import seal_columns
from vlmflow.vision.near import Index, blocks

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.step import Context

LAYER = "dedup"
VERSION = 1
SCHEMA = {"of": "str", "kind": "str", "distance": "int"}
LARGEST = 10


def run(ctx: Context, manifest: Manifest, others: Mapping[str, Manifest] | None = None) -> Manifest:
    """Add layer `dedup`: of (key of the sample that stays, or DATASET/KEY where that is one of another dataset; null for those
    that stay), kind, distance in bits.

    The summary holds samples, stay, dropped by kind, counts of [source dropped, source that stays, samples], the largest
    clusters as [key that stays, samples dropped], how many samples with images were compared by their bytes alone and, with
    `against`, how many repeat a sample of each dataset.

    Args:
        others: the datasets that the recipe's `against` names, with layer `phash`.

    Raises:
        DataError: no layer `phash`, no layer of the text that the recipe names, or a key that two shards share; a dataset of
            `against` that is not there or lacks its layer.
    """
    import pyarrow as pa

    spec = ctx.recipe.curation.dedup
    if spec is None:
        return manifest
    compared = elsewhere.digests(spec, others or {}, manifest.name)
    table = stacked(
        manifest, phash.LAYER, ctx.scratch, ["key", "plain", "trimmed", "content", "text", "turns", "pixels"]
    )
    keys = one_of_each(table["key"], manifest.name)
    texts = text_numbers(manifest, spec.text, table, ctx.scratch) if spec.text else numbers(table["text"])
    order = _order(table)
    samples = Samples.of(table, texts, spec.same_text, spec.images is not None)
    of, kind, bits = (np.full(len(order), value, dtype=np.int64) for value in (-1, NEAR, 0))
    names, away = keys, None
    if compared:
        away = elsewhere.find(spec, table, texts, others or {}, ctx.scratch)
        order = order[away.of[order] < 0]
        of, kind, bits = np.where(away.of < 0, -1, away.of + len(keys)), away.kind, away.bits
        names = pa.concat_arrays([keys, away.keys])
    found, kind[order], bits[order] = duplicates(samples.take(order), spec.images, by_text=spec.text is not None)
    of[order] = np.where(found < 0, -1, order[found])

    def parts() -> Iterator[Any]:
        start = 0
        for shard in manifest.shards:
            rows = slice(start, start + shard.samples)
            start += shard.samples
            gone = of[rows] >= 0
            yield pa.table(
                {
                    "key": keys.slice(rows.start, shard.samples),
                    "of": names.take(pa.array(of[rows], mask=~gone)),
                    "kind": pa.array(KINDS, pa.string()).take(pa.array(kind[rows], mask=~gone)),
                    "distance": pa.array(bits[rows], mask=~gone),
                }
            )

    reads = [phash.LAYER, *([spec.text] if spec.text and spec.text != "alt" else [])]
    params: dict[str, Any] = {"images": spec.images, "text": spec.text, "same_text": spec.same_text}
    summary = _summary(manifest, keys, of, kind, samples)
    if away:
        params["against"] = compared
        summary["against"] = away.by_dataset(spec.against)
    return seal_columns(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, parts=parts(), reads=reads,
        summary=summary,
    )  # fmt: skip


def _order(table: Any) -> np.ndarray:
    """Rows from first to last in rank."""
    import pyarrow.compute as pc

    return pc.sort_indices(table, [("pixels", "descending"), ("key", "ascending")]).to_numpy().astype(np.int64)


def duplicates(samples: Samples, distance: int | None, by_text: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of samples in the order of their ranks: which earlier one each repeats (-1 = none, it stays), how, and by how many bits."""
    _, first, unit_of = np.unique(samples.signature, return_index=True, return_inverse=True)
    by_rank = np.argsort(first)
    unit_of, first = (
        np.argsort(by_rank)[unit_of],
        first[by_rank],
    )  # units are numbered in the order of their first samples
    units = samples.take(first)
    leader, kind, bits = _leaders(units, distance, by_text)

    stays = leader[unit_of] < 0
    of = first[np.where(stays, unit_of, leader[unit_of])]
    same = samples.content == samples.content[of]
    within = np.where(samples.count == 0, TEXT, np.where(same & (samples.content != 0), BYTES, NEAR))
    of[stays & (of == np.arange(len(of)))] = -1
    return of, np.where(stays, within, kind[unit_of]), np.where(stays, 0, bits[unit_of])


def _leaders(units: Samples, distance: int | None, by_text: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each unit (in rank order) the one that drops it, or -1, the kind and the bits."""
    n = len(units.signature)
    leader, kind, bits = (np.full(n, value, dtype=np.int64) for value in (-1, NEAR, 0))
    wordings = _cliques(units.text) if by_text else {}

    def drop_by_text(unit: int) -> None:
        for other in wordings.pop(int(units.text[unit]), ()):
            if other > unit and leader[other] < 0:
                leader[other], kind[other] = unit, TEXT

    spots = np.flatnonzero(units.hashed) if distance is not None else np.zeros(0, dtype=np.int64)
    views = [(NEAR, Index(units.plain[spots], distance or 0, units.group[spots]))]
    if (units.trimmed != units.plain)[spots].any():
        views.append((TRIMMED, Index(units.trimmed[spots], distance or 0, units.group[spots])))
    cost = sum(index.cost(index.values, index.groups) for _, index in views)
    done = 0
    for block in blocks(np.asarray(cost)):
        inside = np.arange(block.start, block.stop)
        inside = inside[leader[spots[inside]] < 0]
        met: dict[int, list[tuple[int, int, int]]] = {}
        for code, index in views if len(inside) else ():
            query, found, apart = index.later(inside)
            for q, f, d in zip(spots[inside[query]].tolist(), spots[found].tolist(), apart.tolist(), strict=True):
                met.setdefault(q, []).append((f, code, d))
        active = set(met)
        end = int(spots[block.stop - 1]) + 1
        if wordings:
            active.update(range(done, end))
        for unit in sorted(active):
            if leader[unit] >= 0:
                continue
            for other, code, apart_by in met.get(unit, ()):
                if leader[other] < 0 and (units.count[unit] == 1 or all_near(units, unit, units, other, distance or 0)):
                    leader[other], kind[other], bits[other] = unit, code, apart_by
            drop_by_text(unit)
        done = end
    if wordings:
        for unit in range(done, n):
            if leader[unit] < 0:
                drop_by_text(unit)
    return leader, kind, bits


def _cliques(ids: np.ndarray) -> dict[int, list[int]]:
    """Positions by id, of the ids other than 0 that occur more than once."""
    values, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    several = np.flatnonzero((counts[inverse] > 1) & (ids != 0))
    found: dict[int, list[int]] = {}
    for position, value in zip(several.tolist(), values[inverse[several]].tolist(), strict=True):
        found.setdefault(value, []).append(position)
    return found


def _summary(manifest: Manifest, keys: Any, of: np.ndarray, kind: np.ndarray, samples: Samples) -> dict[str, Any]:
    gone = np.flatnonzero((of >= 0) & (of < len(of)))  # from there on the samples of other datasets
    names = manifest.sources
    source = np.repeat(
        [names.index(shard.source) for shard in manifest.shards], [shard.samples for shard in manifest.shards]
    )
    pairs = Counter(zip(source[gone].tolist(), source[of[gone]].tolist(), strict=True))
    leaders, sizes = np.unique(of[gone], return_counts=True)
    clusters = sorted(
        ((int(n), keys[int(i)].as_py()) for i, n in _top(leaders, sizes)), key=lambda pair: (-pair[0], pair[1])
    )
    dropped = Counter(KINDS[code] for code in kind[of >= 0].tolist())
    return {
        "samples": len(of), "stay": int((of < 0).sum()), "dropped": {name: dropped[name] for name in KINDS if dropped[name]},
        "sources": sorted([names[a], names[b], n] for (a, b), n in pairs.items()),
        "clusters": [[key, n] for n, key in clusters[:LARGEST]],
        "by_bytes_only": int(((samples.content != 0) & ~samples.hashed).sum()),
    }  # fmt: skip


def _top(leaders: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int]]:
    """All clusters at least as large as the LARGEST-th."""
    if len(sizes) > LARGEST:
        enough = sizes >= np.partition(sizes, -LARGEST)[-LARGEST]
        leaders, sizes = leaders[enough], sizes[enough]
    return list(zip(leaders.tolist(), sizes.tolist(), strict=True))
