"""One wide table of a dataset: a row a sample, a column a layer column, in a DuckDB file that queries of every kind share.

Layers lie in one Parquet file a shard, which nobody can sort or count without reading them all. So they are read once,
shard after shard (each part fetched into the verified cache), into a file named by the manifest's digest under the scratch
folder; the gallery, the statistics and differences ask that file and never hold more than DuckDB's memory limit. Columns
are named `LAYER.COLUMN`; those of the samples' own JSON are `sample.url`, `sample.text`, `sample.width`, ...

The file is a cache: it is made whole or not at all, and may be deleted at any time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vlmflow import storage_cache
from vlmflow.errors import DataError
from vlmflow.look.build import FIXED, build
from vlmflow.look.samples import Samples
from vlmflow.look.sql import answering, attach, quoted

if TYPE_CHECKING:
    import duckdb

    from vlmflow.dataset.manifest import Manifest

VERSION = 3  # raise when the same manifest would give another file
DAY = 86400.0  # seconds
FETCH_LIMIT = 1 << 30  # bytes of shards that are fetched unasked for what the samples themselves say


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
        build(manifest, Path(scratch), path, samples, say)
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
