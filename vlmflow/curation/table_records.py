"""The files of an input table as a stream of records: batches of Parquet, lines and lists of text, nothing held whole."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmflow import storage
from vlmflow.curation.table_files import Table, format_of
from vlmflow.dataset.fetch import retried
from vlmflow.errors import DataError

RECORDS = 1000  # of one batch of Parquet without images
RECORDS_WITH_IMAGES = 32
_BLOCK = 1 << 20  # bytes or characters of one read


def count_rows(table: Table) -> int:
    """Number of rows; from the footers of Parquet files, else by reading the table once."""
    if table.parquet:
        return sum(int(_parquet(file).metadata.num_rows) for file in table.files)
    return sum(1 for _ in _text_records(table.files[0]))


def columns(table: Table) -> list[str]:
    """Columns of a Parquet table, in order. Raises DataError when its files do not have the same."""
    first = list(_parquet(table.files[0]).schema_arrow.names)
    for file in table.files[1:]:
        if sorted(other := _parquet(file).schema_arrow.names) != sorted(first):
            raise DataError(
                f"table {table.uri}: {file} has columns {list(other)}, {table.files[0]} has {first}; files of one table have "
                "the same columns. Name by a pattern those that belong together."
            )
    return first


def records(
    table: Table,
    start: int = 0,
    stop: int | None = None,
    images: Collection[str] = (),
    only: Collection[str] | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Rows `start` to `stop` of a table. Binary columns are left out, except those named in `images`; of `only` some columns
    no other is read where the format allows it."""
    if not table.parquet:
        for number, record in enumerate(_text_records(table.files[0])):
            if stop is not None and number >= stop:
                return
            if number >= start:
                yield record
        return
    first = 0  # row of the table with which the file begins
    for name in table.files:
        file = _parquet(name)
        end = first + file.metadata.num_rows
        if end > start and (stop is None or first < stop):
            yield from _parquet_records(
                file, name, max(start - first, 0), None if stop is None else stop - first, images, only
            )
        first = end


def _parquet_records(
    file: Any, name: str, start: int, stop: int | None, images: Collection[str], only: Collection[str] | None
) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa

    wanted = [f.name for f in file.schema_arrow if f.name in images or not _binary(f.type)]
    wanted = [name for name in wanted if only is None or name in only]
    groups, first = [], 0
    for group in range(file.metadata.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if first + length <= start:
            start, stop = start - length, None if stop is None else stop - length
        elif stop is None or first < stop:
            groups.append(group)
            first += length
    if not groups:
        return
    position = 0
    try:
        batch_size = RECORDS_WITH_IMAGES if images else RECORDS
        for batch in file.iter_batches(batch_size, row_groups=groups, columns=wanted):
            low, high = (
                max(start - position, 0),
                batch.num_rows if stop is None else min(stop - position, batch.num_rows),
            )
            if low < high:
                yield from batch.slice(low, high - low).to_pylist()
            position += batch.num_rows
            if stop is not None and position >= stop:
                return
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"table {name} is damaged near row {position}: {error}; write it again") from error


def _binary(kind: Any) -> bool:
    """Whether values of an Arrow type are, or hold, bytes."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(_binary(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _binary(kind.value_type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


class _Ranges(io.RawIOBase):
    """An object of a store as a file, read by ranges; a store that stumbles is asked again."""

    def __init__(self, uri: str) -> None:
        self._uri, self._at = uri, 0
        self._size = retried(lambda: storage.size(uri))

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        size = self._size - self._at if size is None or size < 0 else min(size, self._size - self._at)
        if size <= 0:
            return b""
        data = retried(lambda: storage.read_bytes(self._uri, self._at, size))
        self._at += len(data)
        return data


def _parquet(file: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source = file if storage.local_path(file) is not None else pa.PythonFile(_Ranges(file), mode="r")
        return pq.ParquetFile(source, pre_buffer=False, buffer_size=_BLOCK)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"table {file} is not Parquet: {error}") from error


def _text_records(file: str) -> Iterator[Mapping[str, Any]]:
    path = Path(file)
    kind = format_of(path.name)
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            if kind in (".csv", ".tsv"):
                yield from _separated(stream, path, "," if kind == ".csv" else "\t")
            elif kind == ".json":
                yield from _listed(stream, path)
            else:
                for number, line in enumerate(stream):
                    if line.strip():
                        yield _object(line, path, number)
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"table {path.name} cannot be read to its end as {kind} in UTF-8 ({type(error).__name__}: {error}); "
            "it was cut, or saved in another encoding"
        ) from error


def _separated(stream: Any, path: Path, separator: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(1 << 30)
    for number, record in enumerate(csv.DictReader(stream, delimiter=separator)):
        if None in record:
            raise DataError(
                f"table {path.name}: row {number} has more fields than the header; quote separators inside text"
            )
        yield record


def _object(text: str, path: Path, line: int) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"table {path.name}, line {line + 1}: not JSON ({error})") from error
    return _checked(value, path, line)


def _checked(value: Any, path: Path, number: int) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"table {path.name}: record {number + 1} is a JSON {type(value).__name__}; objects are needed")
    return value


def _listed(stream: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON list, one at a time; lists of gigabytes are common (LLaVA's)."""
    decoder, text, at, number = json.JSONDecoder(), stream.read(_BLOCK).lstrip(), 1, 0
    if not text.startswith("["):
        raise DataError(f"table {path.name} does not hold a JSON list; a list of objects is needed")
    block = _BLOCK
    while True:
        at = _skipped(text, at)
        if text.startswith("]", at):
            return
        try:
            if at == len(text):
                raise ValueError("it ends inside the list")
            value, end = decoder.raw_decode(text, at)
            if end == len(text):
                raise ValueError("it ends inside the list")  # a number could go on
        except RecursionError as error:
            raise DataError(f"table {path.name}, record {number + 1}: nested too deeply") from error
        except ValueError as error:
            more = stream.read(block)
            if not more:
                raise DataError(f"table {path.name}, record {number + 1}: not JSON ({error})") from error
            text, at, block = text[at:] + more, 0, block * 2  # an object may be longer than a block
            continue
        yield _checked(value, path, number)
        at, number, block = end, number + 1, _BLOCK


def _skipped(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at
