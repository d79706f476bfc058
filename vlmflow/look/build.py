"""Making the wide table: shard after shard, layers side by side, into one DuckDB file."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow.curation.inputs import UPSTREAM
from vlmflow.curation.pull_shard import COLUMNS as FAILED
from vlmflow.curation.pull_shard import read_failures
from vlmflow.dataset.layer import read_columns
from vlmflow.errors import DataError, NotFound
from vlmflow.look.samples import Samples
from vlmflow.look.sql import answering, kind_sql, limits, literal, quoted

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from vlmflow.dataset.manifest import Manifest

BATCH_ROWS = 50_000
BATCH_BYTES = 64 << 20
CATEGORIES = 40  # texts of at most so many different values are counted one by one
CATEGORY_CHARS = 60
NO_CATEGORY = ("key", "id", "url", "text", "talk", "sha256", "reason", "error")  # last words of names
SAMPLE = "sample"  # stands in for a layer's name in columns of the samples' own JSON
FIXED = ("n", "shard", "source", "key", "state", "reason", "reason_kind", "errors")
DIGESTS = ("phash.content", "phash.text", "phash.turns")  # numbers that only say what is equal
_SAMPLE_SCHEMA = {
    "id": "string", "url": "string", "text": "string", "talk": "string", "licence": "string", "images": "int64",
    "width": "int64", "height": "int64", "aspect": "float64", "format": "string", "sha256": "string",
}  # fmt: skip


def build(manifest: Manifest, scratch: Path, path: Path, samples: bool, say: Callable[[str], None]) -> None:
    """Write the file of a wide table, whole or not at all.

    Raises:
        DataError: the layers do not fit each other, or the dataset has no samples.
        NoSpace: memory and disk do not suffice.
    """
    import duckdb

    arriving = path.with_name(f".{secrets.token_hex(8)}.duckdb")
    try:
        with answering(path.parent), duckdb.connect(str(arriving), config=limits(path.parent)) as con:
            kinds: dict[str, str] = {}
            done = 0
            for batch in _batches(_shard_tables(manifest, scratch, samples, kinds)):
                _insert(con, batch, first=not done)
                done += batch.num_rows
                say(f"{done} of {manifest.samples} samples read into {path.name}")
            if not done:
                raise DataError(f"dataset '{manifest.name}' has no samples: there is nothing to look at")
            _describe(con, kinds)
            _failures(con, manifest)
        arriving.replace(path)
    finally:
        for left in (arriving, arriving.with_name(arriving.name + ".wal")):
            left.unlink(missing_ok=True)


def _shard_tables(manifest: Manifest, scratch: Path, samples: bool, kinds: dict[str, str]) -> Iterator[pa.Table]:
    """One table a shard: all layers side by side. `kinds` is filled with what layers say of their columns."""
    import pyarrow as pa

    reading = Samples(manifest, scratch, whole=True)
    start = 0
    for number, shard in enumerate(manifest.shards):
        keys: Any = None
        columns: dict[str, Any] = {}
        for name, layer in manifest.layers.items():
            part = read_columns(layer.parts[number], scratch)
            mine = part.column("key")
            if keys is None:
                keys = mine
            elif not mine.equals(keys):
                raise DataError(
                    f"layer '{name}', {layer.parts[number].uri}: its {len(mine)} keys are not the {len(keys)} of the other layers "
                    f"of shard {shard.uri} in their order. Delete it and run the step again."
                )
            for column in part.column_names:
                if (
                    column != "key"
                    and f"{name}.{column}" not in DIGESTS
                    and not _numbers(part.schema.field(column).type)
                ):
                    columns[f"{name}.{column}"] = part.column(column)
            for column in json.loads((part.schema.metadata or {}).get(b"vlmflow.kinds", b"{}")):
                kinds[f"{name}.{column}"] = "json"
        if keys is None:
            keys = pa.chunked_array([pa.array(reading.keys(number), pa.string())])
        if len(keys) != shard.samples:
            raise DataError(
                f"{shard.uri}: its layers have {len(keys)} rows but the manifest says {shard.samples} samples"
            )
        if samples:
            facts = [sample_facts(reading.meta(number, key)) for key in keys.to_pylist()]
            schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in _SAMPLE_SCHEMA.items()])
            own = pa.Table.from_pylist(facts, schema=schema)
            columns = {f"{SAMPLE}.{name}": own.column(name) for name in own.column_names} | columns
        count = len(keys)
        fixed = {
            "n": pa.array(range(start, start + count), pa.int64()),
            "shard": pa.array([number] * count, pa.int32()),
            "source": pa.array([shard.source] * count, pa.string()),
            "key": keys,
        }
        start += count
        yield pa.table(fixed | columns)


def _numbers(kind: Any) -> bool:
    """Lists of numbers (hashes, boxes): nothing that is filtered or sorted by; a sample's own page shows them."""
    import pyarrow as pa

    return pa.types.is_list(kind) and not pa.types.is_string(kind.value_type)


def sample_facts(meta: dict[str, Any]) -> dict[str, Any]:
    """What a sample's JSON says, flat; size and hash are those of its first image."""
    images = meta.get("images") or []
    first = images[0] if images else {}
    width, height = first.get("width"), first.get("height")
    talk = [str(turn.get("value", "")) for turn in meta.get("conversations") or []]
    for pair in meta.get("preferences") or []:
        talk += [
            *(str(turn["value"]) for turn in pair["conversations"]),
            f"+ {pair['chosen']}",
            f"- {pair['rejected']}",
        ]
    return {
        "id": _text(meta.get("id")), "url": _text(meta.get("url")), "text": _text(meta.get("text")), "talk": "\n".join(talk) or None,
        "licence": _text(meta.get("licence")), "images": len(images), "width": width, "height": height,
        "aspect": round(width / height, 4) if width and height else None, "format": first.get("format"),
        "sha256": first.get("sha256") or None,
    }  # fmt: skip


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _batches(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Neighbouring shards together: a transaction for each of ten thousand small shards would take minutes."""
    import pyarrow as pa

    held: list[pa.Table] = []
    for table in tables:
        if held and table.schema.names != held[0].schema.names:
            raise DataError(
                f"the layers' parts of one shard have columns {held[0].schema.names}, of another {table.schema.names}: they were "
                "written by different versions of a step. Run the step again."
            )
        held.append(table)
        if sum(t.num_rows for t in held) >= BATCH_ROWS or sum(t.nbytes for t in held) >= BATCH_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _insert(con: duckdb.DuckDBPyConnection, batch: pa.Table, first: bool) -> None:
    names = [name for name in batch.column_names if name not in FIXED]
    layers = [name.removesuffix(".error") for name in names if name.endswith(".error") and name != "keep.error"]
    errors = ", ".join(
        f"CASE WHEN starts_with({quoted(f'{layer}.error')}, '{UPSTREAM}') THEN NULL "
        f"ELSE {literal(f'{layer}: ')} || {kind_sql(quoted(f'{layer}.error'))} END"
        for layer in layers
    )
    decided = "keep.keep" in names
    state = "CASE WHEN \"keep.keep\" THEN 'kept' ELSE 'dropped' END" if decided else "'undecided'"
    reason = '"keep.reason"' if decided else "NULL::VARCHAR"
    query = (
        f"SELECT n, shard, source, key, {state} AS state, {reason} AS reason, {kind_sql(reason)} AS reason_kind, "
        f"list_filter([{errors}]::VARCHAR[], lambda x: x IS NOT NULL) AS errors"
        + "".join(f", {quoted(name)}" for name in names)
        + " FROM batch"
    )
    con.register("batch", batch)
    con.execute(f"CREATE TABLE rows AS {query}" if first else f"INSERT INTO rows {query}")
    con.unregister("batch")


def _failures(con: duckdb.DuckDBPyConnection, manifest: Manifest) -> None:
    """Rows of the tables that became no sample: they lie beside the shards that pull wrote, others have none."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.int64() if name == "row" else pa.string()) for name in FAILED])
    con.register("batch", schema.empty_table())
    con.execute("CREATE TABLE failures AS SELECT * FROM batch")
    if not any(entry.step == "pull" and entry.summary.get("failed") for entry in manifest.lineage):
        return
    for shard in manifest.shards:
        try:
            failed, _ = read_failures(shard)
        except NotFound:
            continue
        if failed:
            con.register("batch", pa.Table.from_pylist(failed, schema=schema))
            con.execute("INSERT INTO failures SELECT * FROM batch")


def _describe(con: duckdb.DuckDBPyConnection, kinds: dict[str, str]) -> None:
    """Write the table `columns`: what kind each is. A text of few different short values is a category."""
    types = [(name, kind) for name, kind, *_ in con.execute("DESCRIBE rows").fetchall()]
    texts = [name for name, kind in types if kind == "VARCHAR" and name not in kinds]
    measures = ", ".join(f"approx_count_distinct({quoted(n)}), max(length({quoted(n)}))" for n in texts)
    measured = con.execute(f"SELECT {measures} FROM rows").fetchall()[0]
    few = {
        name
        for i, name in enumerate(texts)
        if name.rpartition(".")[2] not in NO_CATEGORY
        and measured[2 * i] <= CATEGORIES
        and (measured[2 * i + 1] or 0) <= CATEGORY_CHARS
    }
    con.execute("CREATE TABLE columns (position INTEGER, name VARCHAR, kind VARCHAR)")
    for position, (name, stored) in enumerate(types):
        if name in kinds:
            kind = kinds[name]
        elif stored.endswith("[]"):
            kind = "list"
        elif stored == "BOOLEAN":
            kind = "flag"
        elif stored == "VARCHAR":
            kind = "category" if name in few else "text"
        else:
            kind = "number"
        con.execute("INSERT INTO columns VALUES (?, ?, ?)", [position, name, kind])
