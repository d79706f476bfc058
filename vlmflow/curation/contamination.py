"""Samples that stand in a benchmark, by picture or by words, as layer `contamination`.

A score on questions that were trained on says nothing. Compared are all benchmarks that the recipe evaluates: pictures by
perceptual hash, as they are, without their borders and mirrored, on both sides; questions by runs of words. A border or a
mirror image alone defeats a plain hash, a crop of 15 % defeats all (spec/data-eval-soup.md 7.6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlmflow.curation import phash
from vlmflow.curation.benchmark_pool import Match, Pool
from vlmflow.curation.columns import stacked
from vlmflow.curation.inputs import text_of
from vlmflow.curation.words import turns
from vlmflow.dataset.layer import add_layer
from vlmflow.errors import RecipeError

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.step import Context

LAYER = "contamination"
VERSION = 1
SCHEMA = {"benchmark": "str", "item": "str", "how": "str", "distance": "int", "found": "list<str>"}
Row = dict[str, Any]


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Add layer `contamination`: the nearest benchmark, item (its index), how (see `benchmark_pool.HOW`), distance (bits; null
    for words) and found ("BENCHMARK/INDEX" of every item that the sample meets).

    The summary holds by benchmark: items, samples that meet it, found (its items that are met) and share (of them); and how
    often each way of meeting came first. The share that stands in what is kept is in the summary of `keep`.

    Raises:
        RecipeError: the recipe has no benchmark to compare with.
        DataError: no layer `phash`, or of the text that the recipe names; a broken benchmark table.
    """
    spec = ctx.recipe.curation.contamination
    if spec is None:
        return manifest
    if not ctx.recipe.evaluation.benchmarks:
        raise RecipeError(
            "curation.contamination compares with the recipe's benchmarks, but evaluation.benchmarks is empty; name some or "
            "remove curation.contamination"
        )
    reads = [phash.LAYER, *([spec.text] if spec.text not in (None, "alt") else [])]
    for name in reads:
        manifest.layer(name)
    pool = Pool.read(ctx, spec.images, spec.ngram)

    def compute(reader: ShardReader, upstream: dict[str, dict[str, Row]]) -> Iterator[Row]:
        keys = reader.keys()
        hashes = [upstream[phash.LAYER][key] for key in keys]
        pictures = pool.pictures([(row["plain"], row["trimmed"], row["mirrored"]) for row in hashes])
        for place, key in enumerate(keys):
            said = _texts(spec.text, key, reader.meta(key), upstream)
            yield _row(key, [*pictures.get(place, ()), *pool.words(said)], pool)

    return add_layer(
        ctx, manifest, LAYER, params={**spec.model_dump(mode="json", exclude={"drop"}), "benchmarks": pool.tables},
        version=VERSION, schema=SCHEMA, compute=compute, reads=reads, summary=lambda made: _summary(made, pool, ctx.scratch),
    )  # fmt: skip


def _texts(which: str | None, key: str, meta: Mapping[str, Any], upstream: dict[str, dict[str, Row]]) -> list[str]:
    if which not in (None, "alt"):
        return [text_of(which, key, meta, upstream)[0]]
    said = turns(meta) if which is None else []
    return [str(meta.get("text") or ""), *said]


def _row(key: str, matches: list[Match], pool: Pool) -> Row:
    if not matches:
        return {"key": key, "found": []}
    best = min(matches, key=lambda m: (m.how == "words", m.distance or 0, m.how, m.item))
    names = sorted({m.item for m in matches})
    benchmark, item = pool.items[best.item]
    return {
        "key": key, "benchmark": benchmark, "item": item, "how": best.how, "distance": best.distance,
        "found": ["/".join(pool.items[n]) for n in names],
    }  # fmt: skip


def _summary(made: Manifest, pool: Pool, scratch: Any) -> dict[str, Any]:
    counts = Counter(name for name, _ in pool.items)
    met: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    how: Counter[str] = Counter()
    if made.shards:
        table = stacked(made, LAYER, scratch, ["how", "found"])
        found = [row for row in table["found"].to_pylist() if row]
        met = Counter(name.split("/", 1)[0] for name in {name for row in found for name in row})
        samples = Counter(name for row in found for name in {each.split("/", 1)[0] for each in row})
        how = Counter(way for way in table["how"].to_pylist() if way)
    return {
        "items": dict(sorted(counts.items())),
        "samples": {name: samples[name] for name in sorted(counts)},
        "found": {name: met[name] for name in sorted(counts)},
        "share": {name: round(met[name] / n, 6) for name, n in sorted(counts.items())},
        "how": dict(sorted(how.items())),
    }
