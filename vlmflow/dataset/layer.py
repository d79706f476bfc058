"""Layers: what a step computed, one Parquet file a shard, rows keyed by sample key.

A part's path holds the digest of step, version, parameters and the layers that were read, and the shard's hash. So a
step that is run again finds finished parts by name, a changed parameter makes new ones, and a kill at any instant
costs one shard at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vlmflow import storage
from vlmflow.dataset.manifest import LayerPart, LayerRef, Lineage, Manifest, ShardRef, save
from vlmflow.dataset.part import (
    Row,
    conform,
    find_part,
    read_columns,
    read_part,
    write_part,
    write_table,
)
from vlmflow.dataset.shard import ShardReader
from vlmflow.digest import digest
from vlmflow.errors import DataError, StepFailed

if TYPE_CHECKING:
    from vlmflow.step import Context

__all__ = ["add_layer", "read_columns", "read_layer", "read_part", "seal_columns", "write_part"]

Compute = Callable[[ShardReader, dict[str, dict[str, Row]]], Iterable[Row]]


def read_layer(manifest: Manifest, name: str, scratch: Any = None) -> dict[str, Row]:
    """All rows of a layer by key, in dataset order."""
    return {key: row for part in manifest.layer(name).parts for key, row in read_part(part, scratch).items()}


def digest_for(
    manifest: Manifest, name: str, params: dict, version: int, schema: Mapping[str, str], reads: Iterable[str]
) -> str:
    """The digest of a layer computed with these parameters: its folder in the store, and the name of what belongs to it."""
    upstream = {read: manifest.layer(read).digest for read in sorted(reads)}
    return digest({"step": name, "version": version, "params": params, "schema": dict(schema), "reads": upstream})


def _part_uri(root: str, name: str, layer_digest: str, shard: ShardRef) -> str:
    return storage.join(root, "layers", name, layer_digest[:24], f"{shard.sha256[:24]}.parquet")


def add_layer(
    ctx: Context,
    manifest: Manifest,
    name: str,
    *,
    params: dict[str, Any],
    version: int,
    schema: Mapping[str, str],
    compute: Compute,
    reads: Iterable[str] = (),
    failure_limit: float = 0.0,
    workers: int = 1,
    summary: Callable[[Manifest], dict[str, Any]] | None = None,
) -> Manifest:
    """Run a step over every shard and return the manifest with its layer.

    With `ctx.parts_only` (a group of shards) the parts are written and nothing else: failures are judged, the layer summed
    up and the manifest sealed by the call over all shards, which finds the parts.

    Args:
        params: everything that decides the result: settings, model hash, prompt. Digested into the path.
        version: raised by hand when the step's code changes what it computes.
        compute: ``(shard, {layer: {key: row}}) -> rows``; each row has ``key`` and, where it failed, ``error``.
        reads: layers handed to ``compute``; their digests are part of this layer's.
        failure_limit: largest share of failed rows, 0 to 1.
        workers: threads over shards (a compute that wants processes starts its own).

    Raises:
        StepFailed: more rows failed than the limit allows; the parts stay, so a rerun is quick.
        DataError: a compute that skipped a sample or invented one.
    """
    reads = tuple(reads)
    layer_digest = digest_for(manifest, name, params, version, schema, reads)

    def one(position: int) -> LayerPart:
        shard = manifest.shards[position]
        uri = _part_uri(ctx.root, name, layer_digest, shard)
        part = find_part(uri, shard.samples)
        if part is None:
            reader = ShardReader(shard, ctx.scratch)
            upstream = {read: read_part(manifest.layers[read].parts[position], ctx.scratch) for read in reads}
            part = write_part(uri, _in_order(compute(reader, upstream), reader, name), schema)
        progress.advance(shard.samples)
        return part

    with ctx.progress(name, manifest.samples, "samples") as progress, ThreadPoolExecutor(max(1, workers)) as pool:
        parts = list(pool.map(one, range(len(manifest.shards))))
    layer = LayerRef(step=name, digest=layer_digest, params=params, version=version, parts=parts)
    draft = _with_layer(manifest, name, layer)
    if ctx.parts_only:
        return draft
    check_failures(draft, name, failure_limit, ctx.scratch)
    if summary:
        layer = layer.model_copy(update={"summary": summary(draft)})
    return _seal(ctx, manifest, name, layer)


def seal_columns(
    ctx: Context,
    manifest: Manifest,
    name: str,
    *,
    params: dict[str, Any],
    version: int,
    schema: Mapping[str, str],
    parts: Iterable[Any],
    reads: Iterable[str] = (),
    summary: dict[str, Any] | Callable[[Manifest], dict[str, Any]] | None = None,
) -> Manifest:
    """Write a layer that was computed over all shards at once, from one pyarrow Table a shard; one is held at a time.

    Args:
        parts: Tables in the order of the shards, rows in the order of their samples, with ``key`` and the columns of
            ``schema``; an absent column (``error``) is null. ``json`` columns hold text (keys sorted).
        summary: or a function of the manifest with the layer, called after the last part was written.

    Raises:
        DataError: Tables or keys that are not those of the shards, or columns that do not fit the schema.
    """
    tables = iter(parts)

    def written() -> Iterator[LayerPart]:
        for number, shard in enumerate(manifest.shards):
            table = next(tables, None)
            if table is None:
                raise DataError(
                    f"step '{name}': {number} Tables for {len(manifest.shards)} shards; one a shard is needed. This is a "
                    "defect of the step."
                )
            _check_keys(table["key"].to_pylist(), ShardReader(shard, ctx.scratch), name)
            uri = _part_uri(ctx.root, name, layer_digest, shard)
            yield write_table(uri, conform(table, schema, f"step '{name}' on {shard.uri}"))
        if next(tables, None) is not None:
            raise DataError(f"step '{name}': more Tables than the {len(manifest.shards)} shards; a defect of the step")

    over = {**params, "manifest": [shard.sha256 for shard in manifest.shards]}
    layer_digest = digest_for(manifest, name, over, version, schema, reads)
    layer = LayerRef(step=name, digest=layer_digest, params=params, version=version, parts=list(written()))
    about = summary(_with_layer(manifest, name, layer)) if callable(summary) else summary or {}
    return _seal(ctx, manifest, name, layer.model_copy(update={"summary": about}))


def _in_order(rows: Iterable[Row], reader: ShardReader, name: str) -> list[Row]:
    by_key = {row["key"]: row for row in rows}
    keys = reader.keys()
    if by_key.keys() != set(keys):
        _check_keys(list(by_key), reader, name)
    return [by_key[key] for key in keys]


def _check_keys(found: list[str], reader: ShardReader, name: str) -> None:
    """Raise DataError unless a step's keys are those of the shard, in its order."""
    keys = reader.keys()
    if found == keys:
        return
    known, wanted = set(found), set(keys)
    if missing := [key for key in keys if key not in known]:
        raise DataError(
            f"step '{name}' on {reader.uri}: {len(missing)} of {len(keys)} samples have no row, the first is '{missing[0]}'. "
            "A step must give every sample a row, with an error where it failed; this is a defect of the step."
        )
    if extra := sorted(known - wanted):
        raise DataError(
            f"step '{name}' on {reader.uri}: rows for samples that the shard does not hold, e.g. '{extra[0]}'"
        )
    raise DataError(f"step '{name}' on {reader.uri}: keys repeat or stand in another order than in the shard")


def _seal(ctx: Context, manifest: Manifest, name: str, layer: LayerRef) -> Manifest:
    sealed = _with_layer(manifest, name, layer)
    save(sealed, ctx.root)
    return sealed


def _with_layer(manifest: Manifest, name: str, layer: LayerRef) -> Manifest:
    lineage = Lineage(step=name, params=layer.params, parents=[manifest.digest], summary=layer.summary)
    kept = [entry for entry in manifest.lineage if entry.step != name]
    return manifest.model_copy(update={"layers": {**manifest.layers, name: layer}, "lineage": [*kept, lineage]})


def failures(manifest: Manifest, name: str, scratch: Any = None) -> Iterator[tuple[str, str]]:
    """(key, reason) of every failed row of a layer; parts without failures are not read."""
    for part in manifest.layer(name).parts:
        if part.failed:
            table = read_columns(part, scratch, ["key", "error"])
            pairs = zip(table["key"].to_pylist(), table["error"].to_pylist(), strict=True)
            yield from ((key, reason) for key, reason in pairs if reason)


def check_failures(manifest: Manifest, name: str, limit: float, scratch: Any = None) -> None:
    """Raise StepFailed when the share of failed rows is above ``limit``, naming the commonest reasons."""
    if sum(part.failed for part in manifest.layer(name).parts) > limit * manifest.samples:
        judge_failures(name, list(failures(manifest, name, scratch)), manifest.samples, limit)


def judge_failures(name: str, failed: list[tuple[str, str]], samples: int, limit: float, section: str = "") -> None:
    """Raise StepFailed when the (key, reason) pairs are more than the share `limit` of `samples`.

    `section` is where the recipe sets that limit, e.g. `curation.fuse`.
    """
    if not failed or len(failed) <= limit * samples:
        return
    reasons = Counter(reason for _, reason in failed).most_common(3)
    raise StepFailed(
        f"step '{name}': {len(failed)} of {samples} samples failed ({len(failed) / samples:.1%}), the recipe allows "
        f"{limit:.1%} ({section + '.' if section else ''}failure_limit). Commonest: {'; '.join(f'{n} x {reason}' for reason, n in reasons)}. "
        f"First: sample {failed[0][0]}. Mend the cause, or raise the limit if this loss is acceptable."
    )
