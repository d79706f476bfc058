"""Which samples stay: exactly the asked share of all scored samples, over all shards, as layer `keep`.

POINTS keeps the 20 % of lowest perplexity (points.md 5). The choice is a layer, never a copy; order of shards and of
samples does not enter it: rank by value, ties by key. A random choice of equal size is the control that users ask for
(spec data-eval-soup.md 5.1), and the guard against the known failure of lowest perplexity, repeated boilerplate, is a
count of duplicates among the kept texts, or their removal when the recipe asks for it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vlmflow.curation.checks import duplicates
from vlmflow.curation.inputs import UPSTREAM, text_of
from vlmflow.dataset.layer import read_part, seal_layer
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError, RecipeError

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.step import Context

LAYER = "keep"
VERSION = 1
SCHEMA = {"keep": "bool", "reason": "str", "rank": "int"}
EDGES = [round(10 ** (i / 12), 4) for i in range(61)]
"""Histogram bins of perplexity, fixed so that runs compare: 12 a decade from 1 to 100,000; the last takes what is above."""
Row = dict[str, Any]


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Add layer `keep`: keep, reason (for people), rank (0 = first to be kept; None when not scored).

    The layer's summary holds threshold (the last kept value), kept, scored, total, histogram, share kept by source, and
    duplicates among the kept texts.

    Raises:
        RecipeError: a threshold together with order random.
        DataError: no layer `ppl`, a key that two shards share, or nothing scored.
    """
    spec, which, seed = ctx.recipe.curation.keep, ctx.recipe.curation.perplexity.text, ctx.recipe.seed
    if spec.threshold is not None and spec.order == "random":
        raise RecipeError(
            "curation.keep: threshold and order 'random' contradict each other; remove threshold or use lowest or highest"
        )
    params: dict[str, Any] = {
        "order": spec.order, "threshold": spec.threshold, "fraction": None if spec.threshold else spec.fraction,
        "drop_duplicate_texts": spec.drop_duplicate_texts, "text": which,
    }  # fmt: skip
    if spec.order == "random":
        params["seed"] = seed
    keys, values, errors, sources = _scores(manifest, ctx.scratch)
    texts = _texts(manifest, which, ctx.scratch)
    order = ranking(keys, values, spec.order, seed)
    if not order:
        raise DataError(
            f"dataset '{manifest.name}': 0 of {manifest.samples} samples have a perplexity, so there is nothing to rank and the "
            f"stages that learn from kept samples would have no data. Steps perplexity, fuse and caption gave each sample "
            "its reason (`error` in their layers; most often a captioning model that writes nothing yet): mend that first."
        )
    repeated: set[int] = set()
    if spec.drop_duplicate_texts:
        repeated = _later_duplicates(order, keys, texts)
        order = [i for i in order if i not in repeated]
    count = keep_count(spec.fraction, len(order))
    if spec.threshold is not None:
        inside = (lambda v: v <= spec.threshold) if spec.order == "lowest" else (lambda v: v >= spec.threshold)
        count = sum(inside(values[i]) for i in order)
    chosen = set(order[:count])
    last = values[order[count - 1]] if count else None
    ranks = {i: rank for rank, i in enumerate(order)}
    rows: dict[str, Row] = {}
    for i, key in enumerate(keys):
        if values[i] is None:
            reason = f"not scored: {(errors[i] or '').removeprefix(UPSTREAM)}"
        elif i in repeated:
            reason = "repeats a kept text's wording"
        else:
            reason = _reason(spec, values[i], last, i in chosen)
        rows[key] = {"key": key, "keep": i in chosen, "reason": reason, "rank": ranks.get(i)}
    summary = {
        "threshold": last if spec.order != "random" else None, "kept": count, "scored": len(ranks) + len(repeated),
        "total": len(keys), "repeated_texts_dropped": len(repeated),
        "histogram": histogram([(values[i], i in chosen) for i in range(len(keys)) if values[i] is not None]),
        "sources": _shares(sources, values, chosen),
        "origins": _shares(_origins(manifest, which, ctx.scratch), values, chosen),
        "duplicates_among_kept": duplicates(texts.get(keys[i]) for i in sorted(chosen)),
    }  # fmt: skip
    reads = ["ppl"] if which == "alt" else ["ppl", which]
    return seal_layer(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, rows=rows, reads=reads, summary=summary
    )


def ranking(keys: Sequence[str], values: Sequence[float | None], order: str, seed: int = 0) -> list[int]:
    """Indices of the scored samples, first to be kept first.

    lowest and highest rank by value; random by a hash of seed and key. Ties, and so the whole ranking, are decided by key:
    it is a function of the set of (key, value), whatever the order in which they come.
    """
    scored = [i for i, value in enumerate(values) if value is not None]
    if order == "random":
        return sorted(scored, key=lambda i: hashlib.sha256(f"{seed}:{keys[i]}".encode()).digest())
    sign = {"lowest": 1.0, "highest": -1.0}[order]
    return sorted(scored, key=lambda i: (sign * values[i], keys[i]))  # type: ignore[operator]


def keep_count(fraction: float, scored: int) -> int:
    """fraction * scored rounded half up, computed exactly: 0.2 is one fifth, not the nearest binary number."""
    return min(scored, math.floor(Fraction(repr(float(fraction))) * scored + Fraction(1, 2)))


def histogram(values: Sequence[tuple[float | None, bool]]) -> dict[str, list]:
    """Counts over EDGES (bin i holds EDGES[i] <= value < EDGES[i+1], the last also all above), kept and dropped apart."""
    import bisect

    counts = {True: [0] * (len(EDGES) - 1), False: [0] * (len(EDGES) - 1)}
    for value, kept in values:
        position = bisect.bisect_right(EDGES, value) - 1  # type: ignore[type-var]
        counts[kept][min(max(position, 0), len(EDGES) - 2)] += 1
    return {"edges": EDGES, "kept": counts[True], "dropped": counts[False]}


def _scores(manifest: Manifest, scratch: Any) -> tuple[list[str], list[float | None], list[str | None], list[str]]:
    keys: list[str] = []
    values: list[float | None] = []
    errors: list[str | None] = []
    sources: list[str] = []
    for shard, part in zip(manifest.shards, manifest.layer("ppl").parts, strict=True):
        for key, r in read_part(part, scratch).items():
            keys.append(key)
            values.append(None if r["error"] else r["ppl"])
            errors.append(r["error"])
            sources.append(shard.source)
    if len(set(keys)) != len(keys):
        key, n = Counter(keys).most_common(1)[0]
        raise DataError(
            f"dataset '{manifest.name}': key '{key}' stands in {n} shards; keys decide ties and must be unique. Pull it again."
        )
    return keys, values, errors, sources


def _texts(manifest: Manifest, which: str, scratch: Any) -> dict[str, str]:
    texts: dict[str, str] = {}
    for position, shard in enumerate(manifest.shards):
        if which == "alt":
            reader = ShardReader(shard, scratch)
            texts |= {key: text_of("alt", key, reader.meta(key), {})[0] for key in reader.keys()}
        else:
            rows = read_part(manifest.layer(which).parts[position], scratch)
            texts |= {key: text_of(which, key, {}, {which: rows})[0] for key in rows}
    return texts


def _later_duplicates(order: list[int], keys: list[str], texts: dict[str, str]) -> set[int]:
    """Of samples with the same text (case, white space, end marks aside) all but the first in rank."""
    seen: set[str] = set()
    later: set[int] = set()
    for i in order:
        text = " ".join(texts[keys[i]].casefold().split()).rstrip(".!? ")
        if text in seen:
            later.add(i)
        seen.add(text)
    return later


def _reason(spec: Any, value: float | None, last: float | None, kept: bool) -> str:
    share = f"{spec.order} {spec.fraction * 100:g} %"
    if spec.order == "random":
        return f"in the {share} control" if kept else f"not in the {share} control"
    if spec.threshold is not None:
        return f"perplexity {value:.5g} {'within' if kept else 'beyond'} the threshold {spec.threshold:g}"
    if kept:
        return f"perplexity {value:.5g} is in the {share} (to {last:.5g})"
    if last is None:
        return f"the {share} of so few samples is none"
    if value == last:
        return f"perplexity {value:.5g} ties with the cut of the {share}; the key decides"
    return f"perplexity {value:.5g} is beyond the {share} (to {last:.5g})"


def _origins(manifest: Manifest, which: str, scratch: Any) -> list[str]:
    """Who wrote each text, in dataset order. A fused text whose alt text said nothing is the captioner's alone, and a
    captioner finds its own words likely: the report must show how much of what is kept is such."""
    if which != "fused":
        return [which] * manifest.samples
    parts = manifest.layer(which).parts
    return [row["engine"] or "none" for part in parts for row in read_part(part, scratch).values()]


def _shares(groups: list[str], values: list[float | None], chosen: set[int]) -> dict[str, dict[str, Any]]:
    """Per group: samples, scored, kept, and the share kept of the scored."""
    found: dict[str, dict[str, Any]] = {}
    for i, group in enumerate(groups):
        entry = found.setdefault(group, {"total": 0, "scored": 0, "kept": 0})
        entry["total"] += 1
        entry["scored"] += values[i] is not None
        entry["kept"] += i in chosen
    for entry in found.values():
        entry["share"] = round(entry["kept"] / entry["scored"], 6) if entry["scored"] else None
    return dict(sorted(found.items()))
