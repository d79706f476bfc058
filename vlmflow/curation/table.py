"""Input tables: rows of URLs, images and text, whatever files they lie in.

Tables come from other people's pipelines, so what is wrong with them is said precisely (the column that is missing, those
that are there, the recipe field to change), and a single bad row never stops a table: it becomes a `Row` with a `problem`,
which the puller counts like any other failure. Rows are streamed; a table of 20 million rows is never held in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from vlmflow.curation import table_records
from vlmflow.curation.cells import Cell, Cells, address, images_of
from vlmflow.curation.table_files import Table, check_host, localize
from vlmflow.curation.table_records import count_rows
from vlmflow.curation.turns import conversations, preferences, utf8
from vlmflow.digest import digest
from vlmflow.errors import DataError

__all__ = [
    "Columns",
    "Row",
    "Table",
    "check_columns",
    "check_host",
    "columns_of",
    "count_rows",
    "localize",
    "read_rows",
    "read_urls",
    "row_of",
]

DEFAULT_URL, DEFAULT_TEXT = "url", "text"
_PEEK = 1000  # records of a JSON table looked at to learn its columns
_KINDS = ("url", "image", "text", "conversations", "preferences", "id")


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds what; None where the table has no such thing.

    `preferences` is one column of pairs, or the three columns of prompt, chosen and rejected. Kinds in `optional` may be
    absent, because nobody named their columns.
    """

    url: str | None = "url"
    image: str | None = None
    text: str | None = None
    conversations: str | None = None
    preferences: str | tuple[str, str, str] | None = None
    id: str | None = None
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Row:
    """One row. `index` counts from 0 over the table; `problem` says why the row cannot become a sample.

    `urls` is how the puller asks for the images. Of images that the table holds itself these are names made of their bytes'
    hashes; `cells` then are the bytes (None where nobody wants them), and `shown` what a person may call them.
    """

    index: int
    urls: tuple[str, ...] = ()
    text: str | None = None
    conversations: list[dict[str, str]] | None = None
    preferences: list[dict[str, Any]] | None = None
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    problem: tuple[str, str] | None = None  # (reason code, detail)
    shown: tuple[str | None, ...] | None = None
    cells: tuple[Cell, ...] = field(default=(), compare=False, repr=False)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that goes into the sample, without the row's place."""
        later = [
            part for part in (self.preferences, self.shown) if part is not None
        ]  # rows without keep their older names
        return digest([self.urls, self.text, self.conversations, self.id, self.extra, self.problem, *later])

    @property
    def names(self) -> tuple[str | None, ...]:
        """What stands in a sample for the images' URLs."""
        return self.urls if self.shown is None else self.shown

    @property
    def addresses(self) -> tuple[str, ...]:
        """URLs, by which rows may share an image; none of images in the table."""
        return self.urls if self.shown is None else ()


def columns_of(source: Any) -> Columns:
    """Which columns a source of the recipe names. Columns of the default names may be absent where something else stands in:
    text beside conversations, preferences or images in the table, URLs beside images in the table.

    By their names, not by whether they were written: a resolved recipe spells out every default.
    """
    talk, pairs, image = source.conversations_column, source.preferences_column, source.image_column
    if pairs is not None and not isinstance(pairs, str):
        pairs = (pairs.prompt, pairs.chosen, pairs.rejected)
    optional = set()
    if source.text_column == DEFAULT_TEXT and (talk or pairs or image or source.shards):
        optional.add("text")
    if source.url_column == DEFAULT_URL and (image or source.shards):
        optional.add("url")
    return Columns(source.url_column, image, source.text_column, talk, pairs, source.id_column, frozenset(optional))


def read_rows(
    table: Table,
    columns: Columns,
    field_name: str,
    start: int = 0,
    stop: int | None = None,
    cells: Cells | None = None,
) -> Iterator[Row]:
    """Rows `start` to `stop` of a table, in order. `field_name` is where the recipe names the columns, e.g.
    `data.web.sources.web`; `cells` keeps the bytes of images in the table for as long as their rows live.

    Raises:
        DataError: a named column that the table lacks, an unknown format, a table that cannot be parsed.
    """
    columns = _present(table, columns, field_name)
    named = {name for kind in _KINDS for name in _names(columns, kind)}
    found = table_records.records(table, start, stop, [columns.image] if columns.image else [])
    for index, record in enumerate(found, start):
        yield row_of(index, record, columns, named, cells)


def read_urls(
    table: Table, columns: Columns, field_name: str, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Index and URLs of rows `start` to `stop`, without their other columns; raises what `read_rows` raises."""
    if (name := _present(table, columns, field_name).url) is not None:
        for index, record in enumerate(table_records.records(table, start, stop, only=[name]), start):
            yield index, _urls(record.get(name))


def check_columns(table: Table, columns: Columns, field_name: str) -> None:
    """Refuse a table that lacks a named column or has no row, from its first records; raises what `read_rows` raises."""
    _present(table, columns, field_name)
    if not (count_rows(table) if table.parquet else any(True for _ in table_records.records(table, 0, 1))):
        raise DataError(
            f"{field_name}.table: {table.uri} has 0 rows, so this source would add nothing; was it cut, or written to another "
            f"place? Correct the address, or take '{field_name.rsplit('.', 1)[-1]}' out of the recipe"
        )


def _present(table: Table, columns: Columns, field_name: str) -> Columns:
    """The columns that the table really has."""
    try:
        if table.parquet:
            present = table_records.columns(table)
        else:
            present = list(
                dict.fromkeys(name for record in islice(table_records.records(table), _PEEK) for name in record)
            )
    except DataError as error:
        raise DataError(f"{field_name}.table: {table.uri}: {error}") from error
    for kind in columns.optional:
        if getattr(columns, kind) not in present:
            columns = replace(columns, **{kind: None})  # type: ignore[arg-type]
    for kind in _KINDS:
        for name in _names(columns, kind):
            if name not in present and present:
                raise DataError(
                    f"table {table.uri} has no column '{name}'; it has {present}. Set {field_name}.{kind}_column to "
                    f"the one that holds the {kind}, or to null if there is none."
                )
    return columns


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


def row_of(
    index: int,
    record: Mapping[str, Any],
    columns: Columns,
    named: set[str],
    cells: Cells | None = None,
    images: int | None = None,
) -> Row:
    """A record as a row; `images` is the number of those that come from elsewhere than the record (of an adopted tar)."""
    urls = _urls(record.get(columns.url) if columns.url else None)
    shown: tuple[str | None, ...] | None = None
    kept: tuple[Cell, ...] = ()
    problem = None
    if columns.image:
        found, wrong = images_of(record.get(columns.image))
        problem = ("bad_image", wrong) if wrong else None
        shown = tuple(path or (urls[n] if n < len(urls) else None) for n, (_, path) in enumerate(found))
        kept = tuple(cells.add(data) for data, _ in found) if cells else ()
        urls = tuple(address(data) for data, _ in found) if not kept else tuple(cell.url for cell in kept)
    count = len(urls) if images is None else images
    text = _text(record.get(columns.text) if columns.text else None)
    raw = record.get(columns.conversations) if columns.conversations else None
    turns, wrong_turns = conversations(raw, count)
    pairs, wrong_pairs = preferences(_pairs(record, columns), count)
    problem = problem or wrong_turns or wrong_pairs
    if problem is None and not count and text is None and turns is None and pairs is None:
        problem = ("blank_row", "neither image nor text")
    return Row(
        index,
        urls,
        text,
        turns,
        pairs,
        _text(record.get(columns.id) if columns.id else None),
        {utf8(k): v for k, v in ((k, _plain(v)) for k, v in record.items() if k not in named) if v is not None},
        problem,
        shown or None,
        kept,
    )


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return utf8(str(value)).strip() or None


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
    if isinstance(value, str):
        return utf8(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return None
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {utf8(str(k)): _plain(v) for k, v in value.items()}
    return str(value)
