"""Input tables: rows of URLs and text from Parquet, CSV, TSV, JSON or JSON lines, at any URI.

Tables come from other people's pipelines, so what is wrong with them is said precisely (the column that is missing, those
that are there, the recipe field to change), and a single bad row never stops a table: it becomes a `Row` with a `problem`,
which the puller counts like any other failure. Rows are streamed; a table of 20 million rows is never held in memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlmflow import storage
from vlmflow.curation.turns import conversations, preferences
from vlmflow.digest import digest
from vlmflow.errors import DataError, ServiceError

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
MAX_TABLE_BYTES = 4 << 30  # of a table that is fetched over HTTP
_PEEK = 1000  # records of a JSON table looked at to learn its columns
_KINDS = ("url", "text", "conversations", "preferences", "id")


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds what; None where the table has no such thing.

    `preferences` is one column of pairs, or the three columns of prompt, chosen and rejected.
    """

    url: str | None = "url"
    text: str | None = None
    conversations: str | None = None
    preferences: str | tuple[str, str, str] | None = None
    id: str | None = None
    text_optional: bool = False  # nobody named the text column, so a table without one is fine


@dataclass(frozen=True)
class Row:
    """One row. `index` counts from 0 over the table; `problem` says why the row cannot become a sample."""

    index: int
    urls: tuple[str, ...] = ()
    text: str | None = None
    conversations: list[dict[str, str]] | None = None
    preferences: list[dict[str, Any]] | None = None
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    problem: tuple[str, str] | None = None  # (reason code, detail)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that goes into the sample, without the row's place."""
        pairs = [] if self.preferences is None else [self.preferences]  # rows without keep the names of older shards
        return digest([self.urls, self.text, self.conversations, self.id, self.extra, self.problem, *pairs])


def localize(uri: str, scratch: Path, allow_hosts: frozenset[str] = frozenset()) -> Path:
    """A local path of a table at file://, s3:// or http(s):// (of a host in `pull.allow_hosts`).

    Raises:
        NotFound: no such object. DataError: a host that is not allowed, or a fetch that failed. ServiceError: no server
        answers.
    """
    local = storage.local_path(uri)
    if local is not None:
        storage.size(uri)
        return local
    suffix = "".join(Path(urlsplit(uri).path).suffixes[-2:])
    path = Path(scratch) / "tables" / f"{digest(uri)[:24]}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if urlsplit(uri).scheme not in ("http", "https"):
        storage.get_file(uri, path)
        return path
    check_host(uri, allow_hosts)
    import asyncio

    from vlmflow.curation.fetch import Fetcher, Limits, is_transient

    async def fetch() -> Any:
        async with Fetcher(Limits(timeout=600.0, max_bytes=MAX_TABLE_BYTES, allow_hosts=allow_hosts)) as fetcher:
            return await fetcher.get(uri)

    found = asyncio.run(fetch())
    if found.data is None:
        if is_transient(found.reason or ""):
            raise ServiceError(
                f"table {uri} could not be fetched: {found.reason} ({found.detail}); no server answers there as it should. "
                "Start it, or mend the recipe's address, and run the same command again: finished work is kept."
            )
        raise DataError(
            f"table {uri} could not be fetched: {found.reason} ({found.detail}); mend the recipe's address, or put the table there"
        )
    storage.write_bytes(str(path), found.data)
    return path


def check_host(uri: str, allow_hosts: frozenset[str]) -> None:
    """Refuse a table over HTTP from a host that the recipe does not name. Raises DataError."""
    host = (urlsplit(uri).hostname or "").lower()
    if host not in allow_hosts:
        raise DataError(
            f"table {uri}: host '{host}' is not in pull.allow_hosts ({sorted(allow_hosts)}); a table decides what is "
            "downloaded, so it must come from a named host. Add the host, or copy the table to the store."
        )


def count_rows(path: Path) -> int:
    """Number of rows of a table; from the footer of a Parquet file, else by reading it once."""
    if _format(path) == ".parquet":
        return int(_parquet(path).metadata.num_rows)
    return sum(1 for _ in _records(path))


def read_rows(path: Path, columns: Columns, field_name: str, shown: str = "") -> Iterator[Row]:
    """All rows of a table in order. `field_name` is where the recipe names the columns, e.g. `data.web.sources.web`;
    `shown` is the table's address as the user knows it.

    Raises:
        DataError: a named column that the table lacks, an unknown format, a table that cannot be parsed.
    """
    columns, head, records = _open(path, columns, field_name, shown)
    named = {name for kind in _KINDS for name in _names(columns, kind)}
    for index, record in enumerate(chain(head, records)):
        yield _row(index, record, columns, named)


def check_columns(path: Path, columns: Columns, field_name: str, shown: str = "") -> None:
    """Refuse a table that lacks a named column, from its first records; raises what `read_rows` raises."""
    _open(path, columns, field_name, shown)


def _open(path: Path, columns: Columns, field_name: str, shown: str) -> tuple[Columns, list[Any], Iterator[Any]]:
    """The columns that the table really has, its first records, and the records after them."""
    try:
        records = _records(path)
        head = list(islice(records, _PEEK))
        whole = _format(path) == ".parquet"
        present = _parquet(path).schema_arrow.names if whole else list(dict.fromkeys(chain(*head)))
    except DataError as error:
        raise DataError(f"{field_name}.table: {shown or path}: {error}") from error
    if columns.text_optional and columns.text not in present:
        columns = replace(columns, text=None)
    for kind in _KINDS:
        for name in _names(columns, kind):
            if name not in present and (head or whole):
                raise DataError(
                    f"table {shown or path.name} has no column '{name}'; it has {present}. Set {field_name}.{kind}_column to "
                    f"the one that holds the {kind}, or to null if there is none."
                )
    return columns, head, records


def _names(columns: Columns, kind: str) -> tuple[str, ...]:
    """The columns that hold a kind of content."""
    name = getattr(columns, kind)
    return () if name is None else (name,) if isinstance(name, str) else name


def _pairs(record: Mapping[str, Any], columns: Columns) -> Any:
    """The cell of pairs, or the pair that three cells make; None where they are empty."""
    names = columns.preferences
    if names is None or isinstance(names, str):
        return record.get(names) if names else None
    cells = [record.get(name) for name in names]
    return dict(zip(("prompt", "chosen", "rejected"), cells, strict=True)) if any(cells) else None


def _row(index: int, record: Mapping[str, Any], columns: Columns, named: set[str]) -> Row:
    urls = _urls(record.get(columns.url) if columns.url else None)
    text = _text(record.get(columns.text) if columns.text else None)
    raw = record.get(columns.conversations) if columns.conversations else None
    turns, problem = conversations(raw, len(urls))
    pairs, wrong = preferences(_pairs(record, columns), len(urls))
    problem = problem or wrong
    if problem is None and not urls and text is None and turns is None and pairs is None:
        problem = ("blank_row", "neither URL nor text")
    return Row(
        index,
        urls,
        text,
        turns,
        pairs,
        _text(record.get(columns.id) if columns.id else None),
        {k: v for k, v in ((k, _plain(v)) for k, v in record.items() if k not in named) if v is not None},
        problem,
    )


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value).strip() or None


def _urls(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text for text in map(_text, values) if text)


def _plain(value: Any) -> Any:
    """A value that JSON can hold; bytes and NaN become None (left out), dates and decimals text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return None
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value)


def _format(path: Path) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in FORMATS:
        raise DataError(
            f"table {path.name}: format '{suffix}' is not known; use one of {', '.join(FORMATS)} (or those with .gz)"
        )
    return suffix


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"table {path.name} is not Parquet: {error}") from error


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    kind = _format(path)
    if kind == ".parquet":
        for batch in _parquet(path).iter_batches(batch_size=_PEEK):
            yield from batch.to_pylist()
        return
    try:
        yield from _text_records(path, kind)
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"table {path.name} cannot be read to its end as {kind} in UTF-8 ({type(error).__name__}: {error}); "
            "it was cut, or saved in another encoding"
        ) from error


def _text_records(path: Path, kind: str) -> Iterator[Mapping[str, Any]]:
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind in (".csv", ".tsv"):
            csv.field_size_limit(1 << 30)
            for number, record in enumerate(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t")):
                if None in record:
                    raise DataError(
                        f"table {path.name}: row {number} has more fields than the header; quote separators inside text"
                    )
                yield record
        elif kind == ".json":
            content = _parse(file.read(), path, 0)
            if not isinstance(content, list):
                raise DataError(f"table {path.name} holds a JSON {type(content).__name__}; a list of objects is needed")
            yield from content
        else:
            for number, line in enumerate(file):
                if line.strip():
                    yield _parse(line, path, number)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"table {path.name}, line {line + 1}: not JSON ({error})") from error
