"""Layers: what a step computed, one Parquet file a shard, rows keyed by sample key.

A part's path holds the digest of step, version, parameters and the layers that were read, and the shard's hash. So a
step that is run again finds finished parts by name, a changed parameter makes new ones, and a kill at any instant
costs one shard at most.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vlmflow import storage
from vlmflow.dataset.manifest import LayerPart, LayerRef, Lineage, Manifest, ShardRef, save
from vlmflow.dataset.shard import ShardReader
from vlmflow.digest import digest, sha256_bytes
from vlmflow.errors import DataError, StepFailed

if TYPE_CHECKING:
    from vlmflow.step import Context

Row = dict[str, Any]
Compute = Callable[[ShardReader, dict[str, dict[str, Row]]], Iterable[Row]]
_ROWS_HASH = b"vlmflow.rows.sha256"
SCHEMA_TYPES = ("str", "int", "float", "bool", "list<str>", "list<int>", "list<float>", "json")


def _arrow_schema(schema: Mapping[str, str]) -> Any:
    import pyarrow as pa

    types = {
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "list<str>": pa.list_(pa.string()),
        "list<int>": pa.list_(pa.int32()),
        "list<float>": pa.list_(pa.float64()),
        "json": pa.string(),
    }
    if unknown := sorted(set(schema.values()) - set(types)):
        raise DataError(f"layer column types {unknown} are not known; use one of {list(types)}")
    columns = {"key": "str", **schema, "error": "str"}
    kinds = json.dumps({name: kind for name, kind in columns.items() if kind == "json"}, sort_keys=True)
    return pa.schema([(name, types[kind]) for name, kind in columns.items()], metadata={"vlmflow.kinds": kinds})


def write_part(uri: str, rows: list[Row], schema: Mapping[str, str]) -> LayerPart:
    """Write one part whole or not at all; equal rows give equal bytes.

    Raises:
        DataError: a row with a column that the schema lacks.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = _arrow_schema(schema)
    for row in rows:
        if extra := sorted(set(row) - set(arrow.names)):
            raise DataError(
                f"{uri}: row '{row.get('key')}' has columns {extra} that the layer's schema lacks: {arrow.names}"
            )
    json_columns = [name for name, kind in schema.items() if kind == "json"]

    def cell(row: Row, name: str) -> Any:
        value = row.get(name)
        return (
            json.dumps(value, sort_keys=True, ensure_ascii=False)
            if name in json_columns and value is not None
            else value
        )

    table = pa.table({name: [cell(row, name) for row in rows] for name in arrow.names}, schema=arrow)
    table = table.replace_schema_metadata({**arrow.metadata, _ROWS_HASH: _hash(table)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    storage.write_bytes(uri, data)
    return LayerPart(uri=uri, sha256=sha256_bytes(data), rows=len(rows), failed=sum(bool(r.get("error")) for r in rows))


def _hash(table: Any) -> bytes:
    """Hash of a part's rows as they are stored; it stands in the part, which may be found again before a manifest is."""
    return sha256_bytes(json.dumps(table.to_pylist(), sort_keys=True, ensure_ascii=False).encode()).encode()


def _rows(data: bytes, uri: str, verify: bool = False) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{uri}: {len(data)} bytes that are not whole Parquet ({error}); delete it and run the step again"
        ) from error
    if verify and (table.schema.metadata or {}).get(_ROWS_HASH) != _hash(table):
        raise DataError(f"{uri}: its rows are not those that were written; delete it and run the step again")
    kinds = json.loads((table.schema.metadata or {}).get(b"vlmflow.kinds", b"{}"))
    rows = table.to_pylist()
    for name in kinds:
        for row in rows:
            if row[name] is not None:
                row[name] = json.loads(row[name])
    return rows


def read_part(part: LayerPart, scratch: Any = None) -> dict[str, Row]:
    """Rows of one part by key; the part's hash is verified. Raises DataError when it was changed or cut."""
    path = storage.cached(part.uri, part.sha256, scratch)
    return {row["key"]: row for row in _rows(path.read_bytes(), part.uri)}


def read_columns(part: LayerPart, scratch: Any = None) -> Any:
    """One part as a pyarrow Table, rows in shard order, for readers that want columns; the part's hash is verified."""
    import pyarrow.parquet as pq

    return pq.read_table(storage.cached(part.uri, part.sha256, scratch))


def read_layer(manifest: Manifest, name: str, scratch: Any = None) -> dict[str, Row]:
    """All rows of a layer by key, in dataset order."""
    return {key: row for part in manifest.layer(name).parts for key, row in read_part(part, scratch).items()}


def _layer_digest(
    manifest: Manifest, name: str, params: dict, version: int, schema: Mapping[str, str], reads: Iterable[str]
) -> str:
    upstream = {read: manifest.layer(read).digest for read in sorted(reads)}
    return digest({"step": name, "version": version, "params": params, "schema": dict(schema), "reads": upstream})


def _part_uri(root: str, name: str, layer_digest: str, shard: ShardRef) -> str:
    return storage.join(root, "layers", name, layer_digest[:24], f"{shard.sha256[:24]}.parquet")


def _finished(uri: str, shard: ShardRef) -> LayerPart | None:
    """The part of an earlier run, or None; a damaged one is removed so that it is computed again."""
    if not storage.exists(uri):
        return None
    data = storage.read_bytes(uri)
    try:
        rows = _rows(data, uri, verify=True)
    except (DataError, ValueError, KeyError):
        rows = []
    if len(rows) != shard.samples:
        storage.delete(uri)
        return None
    return LayerPart(uri=uri, sha256=sha256_bytes(data), rows=len(rows), failed=sum(bool(r["error"]) for r in rows))


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
    layer_digest = _layer_digest(manifest, name, params, version, schema, reads)

    def one(position: int) -> LayerPart:
        shard = manifest.shards[position]
        uri = _part_uri(ctx.root, name, layer_digest, shard)
        part = _finished(uri, shard)
        if part is None:
            reader = ShardReader(shard, ctx.scratch)
            upstream = {read: read_part(manifest.layers[read].parts[position], ctx.scratch) for read in reads}
            part = write_part(uri, _in_order(compute(reader, upstream), reader, name), schema)
        progress.advance(shard.samples)
        return part

    with ctx.progress(name, manifest.samples, "samples") as progress, ThreadPoolExecutor(max(1, workers)) as pool:
        parts = list(pool.map(one, range(len(manifest.shards))))
    layer = LayerRef(step=name, digest=layer_digest, params=params, parts=parts)
    draft = _with_layer(manifest, name, layer)
    if ctx.parts_only:
        return draft
    check_failures(draft, name, failure_limit, ctx.scratch)
    if summary:
        layer = layer.model_copy(update={"summary": summary(draft)})
    return _seal(ctx, manifest, name, layer)


def seal_layer(
    ctx: Context,
    manifest: Manifest,
    name: str,
    *,
    params: dict[str, Any],
    version: int,
    schema: Mapping[str, str],
    rows: Mapping[str, Row],
    reads: Iterable[str] = (),
    summary: dict[str, Any] | None = None,
) -> Manifest:
    """Write a layer whose rows were computed over all shards at once (a global ranking); ``rows`` by sample key."""
    layer_digest = _layer_digest(
        manifest, name, {**params, "manifest": [s.sha256 for s in manifest.shards]}, version, schema, reads
    )
    parts = []
    for shard in manifest.shards:
        reader = ShardReader(shard, ctx.scratch)
        mine = [rows[key] for key in reader.keys() if key in rows]
        parts.append(write_part(_part_uri(ctx.root, name, layer_digest, shard), _in_order(mine, reader, name), schema))
    return _seal(
        ctx, manifest, name, LayerRef(step=name, digest=layer_digest, params=params, parts=parts, summary=summary or {})
    )


def _in_order(rows: Iterable[Row], reader: ShardReader, name: str) -> list[Row]:
    by_key = {row["key"]: row for row in rows}
    keys = reader.keys()
    if missing := [key for key in keys if key not in by_key]:
        raise DataError(
            f"step '{name}' on {reader.uri}: {len(missing)} of {len(keys)} samples have no row, the first is '{missing[0]}'. "
            "A step must give every sample a row, with an error where it failed; this is a defect of the step."
        )
    if extra := sorted(set(by_key) - set(keys)):
        raise DataError(
            f"step '{name}' on {reader.uri}: rows for samples that the shard does not hold, e.g. '{extra[0]}'"
        )
    return [by_key[key] for key in keys]


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
            yield from ((key, row["error"]) for key, row in read_part(part, scratch).items() if row["error"])


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
