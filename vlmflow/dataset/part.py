"""One part of a layer: a Parquet file with the rows of one shard, which proves by itself that it is whole.

A part may be found by name before any manifest holds its hash, so it carries one: sha256 of all its bytes, with zeros
where the hash itself stands in the footer. Checking costs one pass over the bytes, no row is built.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmflow import storage
from vlmflow.dataset.manifest import LayerPart
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError

Row = dict[str, Any]
_FILE_HASH = b"vlmflow.file.sha256"
_ROWS_HASH = b"vlmflow.rows.sha256"  # of parts written before the file itself was hashed; they stay valid
_BLANK = b"0" * 64


def arrow_schema(schema: Mapping[str, str]) -> Any:
    """The pyarrow schema of a layer: ``key``, the step's columns, ``error``. Raises DataError for unknown types."""
    import pyarrow as pa

    types = {
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "list<str>": pa.list_(pa.string()),
        "list<int>": pa.list_(pa.int32()),
        "list<int64>": pa.list_(pa.int64()),
        "list<float>": pa.list_(pa.float64()),
        "json": pa.string(),
    }
    if unknown := sorted(set(schema.values()) - set(types)):
        raise DataError(f"layer column types {unknown} are not known; use one of {list(types)}")
    columns = {"key": "str", **schema, "error": "str"}
    kinds = json.dumps({name: kind for name, kind in columns.items() if kind == "json"}, sort_keys=True)
    return pa.schema([(name, types[kind]) for name, kind in columns.items()], metadata={"vlmflow.kinds": kinds})


def from_rows(rows: list[Row], schema: Mapping[str, str], where: str) -> Any:
    """Rows as a pyarrow Table of the layer's schema; what stands in ``json`` columns becomes text.

    Raises:
        DataError: a row with a column that the schema lacks, or a value of another type.
    """
    import pyarrow as pa

    arrow = arrow_schema(schema)
    known = set(arrow.names)
    for row in rows:
        if extra := sorted(row.keys() - known):
            raise DataError(
                f"{where}: row '{row.get('key')}' has columns {extra} that the layer's schema lacks: {arrow.names}"
            )
    columns = {name: [row.get(name) for row in rows] for name in arrow.names}
    for name in (name for name, kind in schema.items() if kind == "json"):
        columns[name] = [
            None if v is None else json.dumps(v, sort_keys=True, ensure_ascii=False) for v in columns[name]
        ]
    try:
        return pa.table(columns, schema=arrow)
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(
            f"{where}: a value does not have its column's type: {error}; the schema is {dict(schema)}"
        ) from error


def conform(table: Any, schema: Mapping[str, str], where: str) -> Any:
    """A Table in the layer's schema: columns in its order and types, absent ones null.

    Raises:
        DataError: a column that the schema lacks, or one whose values do not fit its type.
    """
    import pyarrow as pa

    arrow = arrow_schema(schema)
    if extra := sorted(set(table.column_names) - set(arrow.names)):
        raise DataError(f"{where}: columns {extra} that the layer's schema lacks: {arrow.names}")
    have = set(table.column_names)
    try:
        columns = [
            table[field.name].cast(field.type) if field.name in have else pa.nulls(len(table), field.type)
            for field in arrow
        ]
    except pa.ArrowException as error:
        raise DataError(f"{where}: a column does not fit the layer's schema {dict(schema)}: {error}") from error
    return pa.table(columns, schema=arrow).combine_chunks()


def write_table(uri: str, table: Any) -> LayerPart:
    """Write a Table of `arrow_schema` whole or not at all; equal rows give equal bytes."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_FILE_HASH: _BLANK})
    data = buffer.getvalue()
    place = data.index(_BLANK, data.rindex(_FILE_HASH))
    data = b"".join((data[:place], sha256_bytes(data).encode(), data[place + len(_BLANK) :]))
    storage.write_bytes(uri, data)
    return _described(uri, data, table)


def write_part(uri: str, rows: Iterable[Row], schema: Mapping[str, str]) -> LayerPart:
    """Write rows whole or not at all. Raises: as `from_rows`."""
    return write_table(uri, from_rows(list(rows), schema, uri))


def _described(uri: str, data: bytes, table: Any) -> LayerPart:
    import pyarrow.compute as pc

    failed = pc.sum(pc.greater(pc.binary_length(table["error"]), 0)).as_py() or 0
    return LayerPart(uri=uri, sha256=sha256_bytes(data), rows=len(table), failed=failed)


def find_part(uri: str, rows: int) -> LayerPart | None:
    """The part that an earlier run left at ``uri``; None when there is none. A damaged one is removed.

    Args:
        rows: how many it must have.
    """
    from vlmflow.errors import NotFound

    try:
        data = storage.read_bytes(uri)
    except NotFound:
        return None
    try:
        table = _table(data, uri, verify=True)
    except DataError:
        table = ()
    if len(table) == rows:
        return _described(uri, data, table)
    storage.delete(uri)
    return None


def _table(data: bytes, uri: str, verify: bool = False) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        table = file.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{uri}: {len(data)} bytes that are not whole Parquet ({error}); delete it and run the step again"
        ) from error
    if verify and not _whole(data, file.metadata.metadata or {}, table):
        raise DataError(f"{uri}: its rows are not those that were written; delete it and run the step again")
    return table


def _whole(data: bytes, metadata: Mapping[bytes, bytes], table: Any) -> bool:
    """Whether the bytes are those that were written, by the hash that stands in them."""
    if (recorded := metadata.get(_FILE_HASH)) is not None:
        place = data.find(recorded, data.rfind(_FILE_HASH))
        return sha256_bytes(b"".join((data[:place], _BLANK, data[place + len(_BLANK) :]))).encode() == recorded
    rows = json.dumps(table.to_pylist(), sort_keys=True, ensure_ascii=False)
    return metadata.get(_ROWS_HASH) == sha256_bytes(rows.encode()).encode()


def read_part(part: LayerPart, scratch: str | Path | None = None) -> dict[str, Row]:
    """Rows of one part by key; the part's hash is verified. Raises DataError when it was changed or cut."""
    data = storage.cached(part.uri, part.sha256, scratch).read_bytes()
    table = _table(data, part.uri)
    rows = table.to_pylist()
    for name in json.loads((table.schema.metadata or {}).get(b"vlmflow.kinds", b"{}")):
        for row in rows:
            if row[name] is not None:
                row[name] = json.loads(row[name])
    return {row["key"]: row for row in rows}


def read_columns(part: LayerPart, scratch: str | Path | None = None, columns: Iterable[str] | None = None) -> Any:
    """One part as a pyarrow Table, rows in shard order; the part's hash is verified.

    Args:
        columns: names of the wanted ones, the others are not decoded; None reads all. ``json`` columns are text.

    Raises:
        DataError: the part was changed or cut, or has no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = storage.cached(part.uri, part.sha256, scratch)
    names = None if columns is None else list(columns)
    try:
        with pq.ParquetFile(path) as file:
            if names is not None and (lacking := sorted(set(names) - set(file.schema_arrow.names))):
                raise DataError(f"{part.uri} has no columns {lacking}; it has {file.schema_arrow.names}")
            table = file.read(names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{part.uri} cannot be read as Parquet ({error}); delete it and run the step again") from error
    return table if names is None else table.select(names)
