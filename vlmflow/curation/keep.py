"""Which samples stay: exactly the asked share of all scored samples, over all shards, as layer `keep`.

POINTS keeps the 20 % of lowest perplexity (points.md 5). The choice is a layer, never a copy; order of shards and of
samples does not enter it: rank by value, ties by key. A random choice of equal size is the control that users ask for
(spec data-eval-soup.md 5.1), and the guard against the known failure of lowest perplexity, repeated boilerplate, is a
count of duplicates among the kept texts, or their removal when the recipe asks for it.

What earlier steps drop goes first (see `drops`), then repeated texts, then what is too much of the commonest main objects
(POINTS app. E); of the rest the selection is made, and cut to the quotas of sources.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmflow.curation import drops, selection
from vlmflow.curation.checks import duplicates
from vlmflow.curation.columns import column, one_of_each, stacked
from vlmflow.curation.inputs import UPSTREAM, text_of
from vlmflow.curation.selection import Selection
from vlmflow.dataset.layer import seal_columns
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError, RecipeError

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.recipe.curation import CurationSpec, KeepSpec
    from vlmflow.step import Context

LAYER = "keep"
VERSION = 2  # 2: reasons of cleaning, duplicates and contamination; balance, sources
SCHEMA = {"keep": "bool", "reason": "str", "rank": "int"}
EDGES = [round(10 ** (i / 12), 4) for i in range(61)]
"""Histogram bins of perplexity, fixed so that runs compare: 12 a decade from 1 to 100,000; the last takes what is above."""


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Add layer `keep`: keep, reason (for people), rank (0 = first to be kept; None when not ranked).

    The layer's summary holds threshold (the last kept value; None when random or per source), kept, scored, total, dropped
    (by layer), histogram, share kept by source and by origin of the text, duplicates among the kept texts, how the classes
    were thinned, and the share of each benchmark's items that stands in what is kept.

    Raises:
        RecipeError: settings of `curation.keep` that contradict each other, or name a source that is not there.
        DataError: no layer `ppl`, a key that two shards share, or nothing to rank.
    """
    curation, which = ctx.recipe.curation, ctx.recipe.curation.perplexity.text
    spec = curation.keep
    _check(curation, manifest)
    table = stacked(manifest, "ppl", ctx.scratch, ["key", "ppl", "error"])
    keys = one_of_each(table["key"], manifest.name)
    failed = column(table["error"].is_valid()).to_numpy(zero_copy_only=False)
    values = column(table["ppl"]).to_numpy(zero_copy_only=False).astype(np.float64)
    values = np.where(failed, np.nan, values)
    found = drops.read(manifest, curation, ctx.scratch)
    dropped = found.reasons.is_valid().to_numpy(zero_copy_only=False)
    scored = ~np.isnan(values)
    if not (scored & ~dropped).any():
        raise DataError(_nothing(manifest, int(scored.sum()), found.counts))

    texts = _texts(manifest, which, ctx.scratch)
    sources = _Groups.of_shards(manifest)
    chosen = Selection(
        selection.ranking(keys, np.where(dropped, np.nan, values), spec.order, ctx.recipe.seed), len(keys)
    )
    if spec.drop_duplicate_texts:
        chosen.drop_repeated(texts)
    thinned = {}
    if spec.balance:
        classes = _Groups.of_column(stacked(manifest, "clean", ctx.scratch, ["object"])["object"])
        thinned = chosen.thin(classes.names, classes.codes, spec.balance.top, spec.balance.to)
    chosen.choose(spec, values, sources.codes, len(sources.names))
    chosen.cap({sources.names.index(name): most for name, most in spec.quota.items()}, sources.codes)

    kept = chosen.kept
    summary = {
        "threshold": None if spec.order == "random" or spec.per_source else chosen.cuts.get(0),
        "kept": int(kept.sum()), "scored": int(scored.sum()), "total": len(keys), "dropped": found.counts,
        "repeated_texts_dropped": chosen.count(selection.REPEATED), "thinned": thinned,
        "over_quota": chosen.count(selection.QUOTA), "histogram": histogram(values[scored], kept[scored]),
        "sources": _shares(sources, scored, kept), "origins": _shares(_origins(manifest, which, ctx.scratch), scored, kept),
        "duplicates_among_kept": duplicates(texts.take(np.flatnonzero(kept)).to_pylist()),
    }  # fmt: skip
    if curation.contamination:
        summary["benchmarks"] = _benchmarks(manifest, kept, ctx.scratch)
    reads = ["ppl", *([] if which == "alt" else [which]), *found.layers]
    params = {**spec.model_dump(mode="json"), "fraction": None if spec.threshold else spec.fraction, "text": which}
    if spec.order == "random":
        params["seed"] = ctx.recipe.seed
    said = _Reasons(spec, sources, values, column(table["error"]), found.reasons, chosen)
    return seal_columns(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, parts=said.tables(manifest, keys),
        reads=dict.fromkeys(reads), summary=summary,
    )  # fmt: skip


def _check(curation: CurationSpec, manifest: Manifest) -> None:
    spec = curation.keep
    if spec.threshold is not None and spec.order == "random":
        raise RecipeError(
            "curation.keep: threshold and order 'random' contradict each other; remove threshold or use lowest or highest"
        )
    if unknown := sorted(set(spec.quota) - set(manifest.sources)):
        raise RecipeError(
            f"curation.keep.quota names {unknown}, but dataset '{manifest.name}' has the sources {manifest.sources}"
        )


def _nothing(manifest: Manifest, scored: int, dropped: dict[str, int]) -> str:
    if scored:
        return (
            f"dataset '{manifest.name}': {manifest.samples} samples, {scored} of them scored, and earlier steps drop every one that "
            f"is scored ({', '.join(f'{name} {n}' for name, n in dropped.items())}), so there is nothing to keep. Their layers "
            "hold the reasons; loosen the commonest in the recipe."
        )
    return (
        f"dataset '{manifest.name}': 0 of {manifest.samples} samples have a perplexity, so there is nothing to rank and the "
        f"stages that learn from kept samples would have no data. Steps perplexity, fuse and caption gave each sample "
        "its reason (`error` in their layers; most often a captioning model that writes nothing yet): mend that first."
    )


def histogram(values: np.ndarray, kept: np.ndarray) -> dict[str, list]:
    """Counts over EDGES (bin i holds EDGES[i] <= value < EDGES[i+1], the last also all above), kept and dropped apart."""
    bins = np.clip(np.searchsorted(EDGES, values, side="right") - 1, 0, len(EDGES) - 2)
    counts = [np.bincount(bins[mask], minlength=len(EDGES) - 1).tolist() for mask in (kept, ~kept)]
    return {"edges": EDGES, "kept": counts[0], "dropped": counts[1]}


@dataclass(frozen=True)
class _Groups:
    """Which of `names` each sample belongs to, (n,) integers."""

    names: list[str]
    codes: np.ndarray

    @staticmethod
    def of_shards(manifest: Manifest) -> _Groups:
        names = manifest.sources
        codes = [names.index(shard.source) for shard in manifest.shards]
        return _Groups(names, np.repeat(codes, [shard.samples for shard in manifest.shards]))

    @staticmethod
    def of_column(values: Any) -> _Groups:
        import pyarrow.compute as pc

        coded = column(pc.fill_null(values, "none")).dictionary_encode()
        names = coded.dictionary.to_pylist()
        order = sorted(range(len(names)), key=names.__getitem__)
        return _Groups([names[i] for i in order], np.argsort(order)[coded.indices.to_numpy()])


def _texts(manifest: Manifest, which: str, scratch: Any) -> Any:
    """The scored text of each sample, a pyarrow array, null where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if which != "alt":
        table = stacked(manifest, which, scratch, ["text", "error"])
        return column(pc.if_else(pc.is_null(table["error"]), table["text"], None)).cast(pa.large_string())
    found: list[Any] = []
    for shard in manifest.shards:
        reader = ShardReader(shard, scratch)
        found.append(
            pa.array([text_of("alt", k, reader.meta(k), {})[0] or None for k in reader.keys()], pa.large_string())
        )
    return pa.concat_arrays(found)


def _origins(manifest: Manifest, which: str, scratch: Any) -> _Groups:
    """Who wrote each text. A fused text whose alt text said nothing is the captioner's alone, and a captioner finds its own
    words likely: the report must show how much of what is kept is such."""
    if which != "fused":
        return _Groups([which], np.zeros(manifest.samples, dtype=np.int64))
    return _Groups.of_column(stacked(manifest, which, scratch, ["engine"])["engine"])


def _shares(groups: _Groups, scored: np.ndarray, kept: np.ndarray) -> dict[str, dict[str, Any]]:
    """Per group: samples, scored, kept, and the share kept of the scored."""
    counts = [
        np.bincount(codes, minlength=len(groups.names)).tolist()
        for codes in (groups.codes, groups.codes[scored], groups.codes[kept])
    ]
    return {
        name: {"total": total, "scored": n, "kept": stay, "share": round(stay / n, 6) if n else None}
        for name, total, n, stay in sorted(zip(groups.names, *counts, strict=True))
    }


def _benchmarks(manifest: Manifest, kept: np.ndarray, scratch: Any) -> dict[str, dict[str, Any]]:
    """Per benchmark: items, how many of them stand in kept samples, and that share: what a registry gate reads."""
    found = stacked(manifest, "contamination", scratch, ["found"])["found"].filter(kept)
    met = Counter(name.split("/", 1)[0] for name in found.combine_chunks().flatten().unique().to_pylist())
    items = manifest.layer("contamination").summary["items"]
    return {
        name: {"items": n, "found": met[name], "share": round(met[name] / n, 6)} for name, n in sorted(items.items())
    }


@dataclass(frozen=True)
class _Reasons:
    """The layer's rows, with a sentence for people each."""

    spec: KeepSpec
    sources: _Groups
    values: np.ndarray
    errors: Any
    dropped: Any
    chosen: Selection

    def tables(self, manifest: Manifest, keys: Any) -> Iterator[Any]:
        """One Table a shard."""
        import pyarrow as pa

        start = 0
        for shard in manifest.shards:
            rows = range(start, start + shard.samples)
            start += shard.samples
            part = slice(rows.start, rows.stop)
            errors, dropped = (array[part].to_pylist() for array in (self.errors, self.dropped))
            rank = self.chosen.rank[part]
            yield pa.table(
                {
                    "key": keys[part],
                    "keep": self.chosen.kept[part],
                    "reason": [self._reason(i, e, d) for i, e, d in zip(rows, errors, dropped, strict=True)],
                    "rank": pa.array(rank, mask=rank < 0),
                }
            )

    def _reason(self, i: int, error: str | None, dropped: str | None) -> str:
        spec, code, value, kept = self.spec, self.chosen.code[i], float(self.values[i]), bool(self.chosen.kept[i])
        source = self.sources.names[self.sources.codes[i]]
        if dropped is not None:
            return dropped
        if math.isnan(value):
            return f"not scored: {(error or '').removeprefix(UPSTREAM)}"
        if code == selection.REPEATED:
            return "repeats a kept text's wording"
        if code == selection.THINNED and spec.balance:
            return f"its main object is too common: the first {spec.balance.to * 100:g} % of such samples go on"
        if code == selection.QUOTA:
            return f"source '{source}' is full: its quota is {spec.quota[source]}"
        share = f"{spec.order} {spec.fraction * 100:g} %" + (f" of source '{source}'" if spec.per_source else "")
        if spec.order == "random":
            return f"in the {share} control" if kept else f"not in the {share} control"
        if spec.threshold is not None:
            return f"perplexity {value:.5g} {'within' if kept else 'beyond'} the threshold {spec.threshold:g}"
        last = self.chosen.cuts.get(int(self.sources.codes[i]) if spec.per_source else 0)
        if last is None:
            return f"the {share} of so few samples is none"
        if kept:
            return f"perplexity {value:.5g} is in the {share} (to {last:.5g})"
        if value == last:
            return f"perplexity {value:.5g} ties with the cut of the {share}; the key decides"
        return f"perplexity {value:.5g} is beyond the {share} (to {last:.5g})"
