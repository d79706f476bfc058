"""The files of an input table, wherever they lie.

A table is one file (Parquet, CSV, TSV, JSON lines, JSON; the text formats also with .gz) or many Parquet files: those of a
folder, or those that a pattern like ``data/train-*.parquet`` names, in the order of their names, as Hugging Face writes
datasets. Parquet in a store is read by ranges, never copied whole; no table is ever held in memory.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlmflow import storage
from vlmflow.digest import digest
from vlmflow.errors import DataError, ServiceError
from vlmflow.storage_file import write_atomically

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
MAX_TABLE_BYTES = 4 << 30  # of a table that is fetched over HTTP
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet$")  # Hugging Face's name of a part


@dataclass(frozen=True)
class Table:
    """A table that was found: its address as the user knows it, and its files (URIs or local paths), in order."""

    uri: str
    files: tuple[str, ...]

    @property
    def found(self) -> str:
        """What lies there, for people."""
        if len(self.files) == 1:
            return self.uri
        first, last = (name.rsplit("/", 1)[-1] for name in (self.files[0], self.files[-1]))
        return f"{self.uri} ({len(self.files)} Parquet files, {first} to {last})"

    @property
    def parquet(self) -> bool:
        """Whether its columns are known without reading records."""
        return format_of(self.files[0]) == ".parquet"


def localize(uri: str, scratch: Path, allow_hosts: frozenset[str] = frozenset()) -> Table:
    """A table at a path, file://, s3:// or http(s):// (of a host in `pull.allow_hosts`); text tables are copied to `scratch`.

    Raises:
        NotFound: no such object. DataError: a host that is not allowed, a fetch that failed, a folder without Parquet files or
        with several splits. ServiceError: no server answers.
    """
    if urlsplit(uri).scheme in ("http", "https"):
        return Table(uri, (_download(uri, scratch, allow_hosts),))
    name = uri.rsplit("/", 1)[-1]
    if not name or "*" in name:
        return Table(uri, _parts(uri.removesuffix(name), name))
    local = storage.local_path(uri)
    size = storage.size(uri)
    if local is not None:
        return Table(uri, (str(local),))
    if format_of(uri) == ".parquet":
        return Table(uri, (uri,))
    path = _copy_path(digest([uri, size, storage.stamp(uri)]), uri, scratch)
    if not path.exists():
        storage.get_file(uri, path)
    return Table(uri, (str(path),))


def _copy_path(name: str, uri: str, scratch: Path) -> Path:
    suffix = "".join(Path(urlsplit(uri).path).suffixes[-2:])
    path = Path(scratch) / "tables" / f"{name[:24]}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _parts(folder: str, pattern: str) -> tuple[str, ...]:
    """Parquet files right in a folder, by name; hidden ones left out. Raises DataError when it is unclear which are meant."""
    names = {item.uri[len(folder) :].lstrip("/"): item.uri for item in storage.list_uris(folder.rstrip("/"))}
    shown = {n: uri for n, uri in names.items() if not any(p.startswith((".", "_")) for p in n.split("/"))}
    here = {
        n: uri for n, uri in shown.items() if n.endswith(".parquet") and "/" not in n and fnmatchcase(n, pattern or "*")
    }
    if not here:
        below = sorted({n.rsplit("/", 1)[0] for n in shown if n.endswith(".parquet") and "/" in n})
        hint = f"; there are some in {', '.join(below[:8])}: name that folder" if below else ""
        raise DataError(
            f"table {folder}{pattern}: {len(shown)} files lie there, none right in it matches {pattern or '*.parquet'}{hint}"
        )
    splits: dict[str, dict[int, int]] = {}
    for name in here:
        if match := _PART.match(name):
            splits.setdefault(match[1], {})[int(match[2])] = int(match[3])
    if len(splits) > 1:
        counts = ", ".join(f"{split} ({len(numbers)} files)" for split, numbers in sorted(splits.items()))
        raise DataError(
            f"table {folder}{pattern} holds the splits {counts}; they would be mixed. Name one of them, for instance "
            f"{folder}{min(splits)}-*.parquet"
        )
    for split, numbers in splits.items():
        if missing := sorted(set(range(next(iter(numbers.values())))) - set(numbers)):
            raise DataError(
                f"table {folder}{pattern}: split '{split}' has {len(numbers)} of {next(iter(numbers.values()))} files; the "
                f"first that is missing is number {missing[0]:05d}. Copy the rest there, or name the files you mean by a pattern."
            )
    return tuple(str(storage.local_path(here[name]) or here[name]) for name in sorted(here))


def _download(uri: str, scratch: Path, allow_hosts: frozenset[str]) -> str:
    check_host(uri, allow_hosts)
    import asyncio

    from vlmflow.curation.fetch import Fetcher
    from vlmflow.curation.fetch_limits import Limits, is_transient

    async def fetch() -> Any:
        async with Fetcher(Limits(timeout=600.0, max_bytes=MAX_TABLE_BYTES, allow_hosts=allow_hosts)) as fetcher:
            return await fetcher.get(uri)

    found = asyncio.run(fetch())
    if found.file is None:
        if is_transient(found.reason or ""):
            raise ServiceError(
                f"table {uri} could not be fetched: {found.reason} ({found.detail}); no server answers there as it should. "
                "Start it, or mend the recipe's address, and run the same command again: finished work is kept."
            )
        raise DataError(
            f"table {uri} could not be fetched: {found.reason} ({found.detail}); mend the recipe's address, or put the table there"
        )
    path = _copy_path(digest(uri), uri, scratch)
    with found.file as body:  # a table of gigabytes waits on disk, never in memory
        body.seek(0)
        write_atomically(path, lambda file: shutil.copyfileobj(body, file))
    return str(path)


def check_host(uri: str, allow_hosts: frozenset[str]) -> None:
    """Refuse a table over HTTP from a host that the recipe does not name. Raises DataError."""
    host = (urlsplit(uri).hostname or "").lower()
    if host not in allow_hosts:
        raise DataError(
            f"table {uri}: host '{host}' is not in pull.allow_hosts ({sorted(allow_hosts)}); a table decides what is "
            "downloaded, so it must come from a named host. Add the host, or copy the table to the store."
        )


def format_of(name: str) -> str:
    """Suffix of a table's file, without .gz. Raises DataError for unknown ones."""
    short = name.rsplit("/", 1)[-1]
    suffix = Path(short.removesuffix(".gz")).suffix.lower()
    if suffix not in FORMATS:
        raise DataError(
            f"table {short}: format '{suffix}' is not known; use one of {', '.join(FORMATS)} (the text formats also with .gz), "
            "or a folder of Parquet files by an address that ends in /"
        )
    return suffix
