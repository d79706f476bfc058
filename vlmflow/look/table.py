"""One wide table of a dataset: a row a sample, a column a layer column, in a DuckDB file that queries of every kind share.

Layers lie in one Parquet file a shard, which nobody can sort or count without reading them all. So they are read once,
shard after shard (each part fetched into the verified cache), into a file named by the manifest's digest under the scratch
folder; the gallery, the statistics and differences ask that file and never hold more than DuckDB's memory limit. Columns
are named `LAYER.COLUMN`; those of the samples' own JSON are `sample.url`, `sample.text`, `sample.width`, ...

The file is a cache: it is made whole or not at all, and may be deleted at any time.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow import storage_cache
from vlmflow.curation.inputs import UPSTREAM
from vlmflow.curation.pull_shard import COLUMNS as FAILED
from vlmflow.curation.pull_shard import read_failures
from vlmflow.dataset.layer import read_columns
from vlmflow.errors import DataError, NotFound
from vlmflow.look.samples import Samples
from vlmflow.look.sql import answering, attach, kind_sql, limits, literal, quoted

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from vlmflow.dataset.manifest import Manifest

VERSION = 3  # raise when the same manifest would give another file
DAY = 86400.0  # seconds
BATCH_ROWS = 50_000
BATCH_BYTES = 64 << 20
CATEGORIES = 40  # texts of at most so many different values are counted one by one
CATEGORY_CHARS = 60
NO_CATEGORY = ("key", "id", "url", "text", "talk", "sha256", "reason", "error")  # last words of names
FETCH_LIMIT = 1 << 30  # bytes of shards that are fetched unasked for what the samples themselves say
SAMPLE = "sample"  # stands in for a layer's name in columns of the samples' own JSON
FIXED = ("n", "shard", "source", "key", "state", "reason", "reason_kind", "errors")
DIGESTS = ("phash.content", "phash.text", "phash.turns")  # numbers that only say what is equal
_SAMPLE_SCHEMA = {
    "id": "string", "url": "string", "text": "string", "talk": "string", "licence": "string", "images": "int64",
    "width": "int64", "height": "int64", "aspect": "float64", "format": "string", "sha256": "string",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of the wide table: `kind` is number, flag, category (few short values), text, list (of texts) or json."""

    name: str
    kind: str

    @property
    def layer(self) -> str:
        return self.name.partition(".")[0]

    @property
    def quoted(self) -> str:
        return quoted(self.name)


@dataclass(frozen=True)
class Table:
    """The wide table of a manifest. `with_samples`: it has the `sample.*` columns."""

    path: Path
    columns: dict[str, Column]
    rows: int
    with_samples: bool

    @contextmanager
    def open(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """`connect` for a while. Raises DataError or NoSpace when DuckDB cannot answer."""
        with self.connect() as con, answering(self.path.parent):
            yield con

    def connect(self) -> duckdb.DuckDBPyConnection:
        """A read-only connection that reaches nothing but this file; close it."""
        con = attach({"rows": self.path})
        con.execute(f"CREATE VIEW failures AS SELECT * FROM {quoted(self.path.name)}.main.failures")
        return con

    @property
    def layers(self) -> list[str]:
        """Layers that columns come from, `sample` among them."""
        return list(dict.fromkeys(column.layer for column in self.columns.values() if column.name not in FIXED))

    def column(self, name: str) -> Column:
        """A column by name. Raises DataError listing those there are."""
        if name not in self.columns:
            raise DataError(f"there is no column '{name}'; the dataset has {', '.join(self.columns)}")
        return self.columns[name]


def open_table(
    manifest: Manifest, scratch: Path, samples: bool | None = None, say: Callable[[str], None] | None = None
) -> Table:
    """The table of a manifest, found or made.

    Args:
        samples: also what the samples' own JSON says (alt text, URL, image sizes), which lies in the shards; None = when
            at most FETCH_LIMIT bytes of shards have to be fetched for it.
        say: is told what is being done and what was left out.

    Raises:
        DataError: a layer's part was changed, or does not hold the samples of its shard in their order; DuckDB is missing.
    """
    if find_spec("duckdb") is None:
        raise DataError(
            "looking at datasets needs DuckDB, which is not installed; install vlmflow with its extra 'data'"
        )
    say = say or (lambda text: None)
    folder = Path(scratch) / "look"
    paths = {
        with_samples: folder / f"{manifest.digest[:32]}-{VERSION}{'s' * with_samples}.duckdb"
        for with_samples in (True, False)
    }
    if samples is None:
        absent = Samples(manifest, scratch).bytes_to_fetch()
        samples = paths[True].exists() or absent <= FETCH_LIMIT
        if not samples:
            say(
                f"alt texts, URLs and image sizes are left out: {absent / 2**30:.1f} GiB of shards would be fetched for them "
                "(--samples does so)"
            )
    path = paths[samples]
    if path.exists():
        storage_cache.touch(path)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        storage_cache.trim(folder)
        _build(manifest, Path(scratch), path, samples, say)
    return _opened(path, samples)


def _sweep(folder: Path) -> None:
    """Remove what killed commands left behind: nothing that is still written is a day old."""
    for left in folder.glob(".*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _opened(path: Path, samples: bool) -> Table:
    with attach({"rows": path}) as con:
        described = con.execute(f"SELECT name, kind FROM {quoted(path.name)}.main.columns ORDER BY position").fetchall()
        columns = [Column(*row) for row in described]
        rows = con.execute("SELECT count(*) FROM rows").fetchall()[0][0]
    return Table(path, {column.name: column for column in columns}, rows, samples)


def _build(manifest: Manifest, scratch: Path, path: Path, samples: bool, say: Callable[[str], None]) -> None:
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
