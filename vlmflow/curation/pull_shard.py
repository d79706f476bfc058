"""One shard of a pull: find it finished, or fetch its rows and write it whole.

A shard is a tar, its offset index and a Parquet file with its failed rows; the tar is put last, so its presence says that
the other two are there. Shards that lost more rows than the recipe allows to causes that pass (a server that is down) are
held back until the verdict over the whole dataset: a later run must find them missing and fetch them again.
"""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlmflow import storage
from vlmflow.curation.accept import Accepted, Rejected, accept
from vlmflow.curation.fetch import Fetcher, is_transient
from vlmflow.curation.table import Row
from vlmflow.dataset.manifest import ShardRef
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import INDEX_SUFFIX, ShardReader, describe_shard, write_shard
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError, NotFound

COLUMNS = ("row", "key", "source", "url", "host", "reason", "detail")
SPOOL = 64 << 10  # accepted images above this many bytes wait on disk for their shard, not in memory


@dataclass(frozen=True)
class Plan:
    """A shard to be: its rows, and for each URL the row that fetches it (an earlier one when rows share a URL)."""

    source: str
    index: int
    size: int
    name: str
    rows: list[Row]
    owners: dict[str, int]
    duplicates: int

    def key(self, row: int) -> str:
        """The sample key of a row number of the source."""
        return f"{self.source}-{row:08d}"


@dataclass
class Result:
    """A finished shard: what a manifest says of it, and its failed rows."""

    ref: ShardRef
    rows: int
    failures: list[dict[str, Any]]
    converted: dict[str, int]
    duplicates: int
    local: list[tuple[Path, str]] = field(default_factory=list)  # files of a held shard: (path, uri), tar last
    held: bool = False
    doubted: bool = False  # a mark lies beside the shard

    def land(self) -> None:
        """Put a held shard in its place; nothing to do for others."""
        for path, uri in self.local:
            storage.put_file(path, uri)
        self.local = []
        if self.doubted:
            storage.delete(_mark(self.ref.uri))

    def doubt(self) -> None:
        """Mark a finished shard whose failures were part of a verdict against the dataset: the next run fetches its failed
        rows again (a picture may have been mended under the same URL), and takes the others from the shard."""
        if self.failures and not self.held:
            storage.write_json(_mark(self.ref.uri), {"failed": len(self.failures)})

    def reader(self) -> ShardReader:
        """The shard's samples, wherever it lies."""
        return ShardReader(str(self.local[-1][0]) if self.local else self.ref)


@dataclass
class ShardPuller:
    """Pulls the shards of one source. `limit` is the share of passing failures above which a shard is held."""

    root: str
    source: str
    licence: str | None
    max_pixels: int
    scratch: Path
    limit: float

    async def pull(
        self,
        plan: Plan,
        fetcher: Fetcher,
        pool: Executor,
        earlier: list[asyncio.Task[Result]],
        advance: Callable[[int], None],
    ) -> Result:
        """The finished shard of a plan. `earlier` holds the tasks of all shards before it, by index (for images that rows share)."""
        loop = asyncio.get_running_loop()
        uri = storage.join(self.root, "shards", f"{plan.name}.tar")
        found = await loop.run_in_executor(pool, _finished, uri, plan)
        if found and not found.doubted:
            advance(len(plan.rows))
            return found
        before = await loop.run_in_executor(pool, _readable, found) if found else None
        work = self.scratch / plan.name
        work.mkdir(parents=True, exist_ok=True)
        fetches: dict[str, asyncio.Task[Accepted | Rejected]] = {}

        async def image(url: str) -> Accepted | Rejected:
            owner = plan.owners[url] // plan.size
            if owner < plan.index:
                known = await loop.run_in_executor(pool, _known, await earlier[owner], plan.key(plan.owners[url]), url)
                if known is not None:
                    return known
            elif before:
                known = await loop.run_in_executor(pool, _known, before, plan.key(plan.owners[url]), url)
                if isinstance(known, Accepted):
                    return known
            fetched = await fetcher.get(url)
            if fetched.data is None:
                return Rejected(fetched.reason or "", fetched.detail)
            return await loop.run_in_executor(pool, _accept, fetched.data, self.max_pixels, work)

        async def row(row: Row) -> Sample | dict[str, Any]:
            images = []
            if row.problem is None:
                for url in row.urls:
                    if url not in fetches:
                        fetches[url] = asyncio.create_task(image(url))
                images = await asyncio.gather(*(fetches[url] for url in row.urls))
            advance(1)
            bad = next(((u, i) for u, i in zip(row.urls, images, strict=False) if isinstance(i, Rejected)), None)
            if row.problem or bad:
                reason, detail = row.problem or (bad[1].reason, bad[1].detail)  # type: ignore[index]
                failed = bad[0] if bad else (row.urls[0] if row.urls else None)
                cells = (row.index, plan.key(row.index), plan.source, failed, _host(failed), reason, detail)
                return dict(zip(COLUMNS, cells, strict=True))
            return self._sample(plan.key(row.index), row, images)

        try:
            done = await asyncio.gather(*(row(r) for r in plan.rows))
            return await loop.run_in_executor(pool, self._write, plan, uri, work, done, found is not None)
        finally:
            for task in fetches.values():
                task.cancel()

    def _sample(self, key: str, row: Row, images: list[Any]) -> Sample:
        described = []
        for url, image in zip(row.urls, images, strict=True):
            about = {"sha256": image.sha256, "width": image.width, "height": image.height, "format": image.format}
            if image.converted_from:
                about["converted_from"] = image.converted_from
            described.append({**about, "url": url} if len(images) > 1 else about)
        meta: dict[str, Any] = {"id": row.id or key, "url": row.urls[0] if row.urls else None, "source": self.source}
        meta["images"] = described
        if row.text is not None:
            meta["text"] = row.text
        if row.conversations is not None:
            meta["conversations"] = row.conversations
        if row.preferences is not None:
            meta["preferences"] = row.preferences
        if self.licence:
            meta["licence"] = self.licence
        if row.extra:
            meta["extra"] = row.extra
        return Sample(key, meta, tuple(image.data for image in images))

    def _write(self, plan: Plan, uri: str, work: Path, done: list[Sample | dict[str, Any]], doubted: bool) -> Result:
        failures = [d for d in done if isinstance(d, dict)]
        samples = [d for d in done if isinstance(d, Sample)]
        converted = Counter(i["converted_from"] for s in samples for i in s.meta["images"] if "converted_from" in i)
        tar = work / f"{plan.name}.tar"
        write_shard(tar, (Sample(s.key, s.meta, tuple(map(_load, s.images))) for s in samples))
        ref = describe_shard(tar, uri, len(samples), plan.source)
        about = {
            "rows": len(plan.rows),
            "converted": dict(converted),
            "duplicates": plan.duplicates,
            "ref": ref.model_dump(exclude={"uri"}),
        }
        sidecar = work / "failures.parquet"
        sidecar.write_bytes(_failures_parquet(failures, about))
        for spooled in work.glob("*.image"):
            spooled.unlink()
        result = Result(ref, len(plan.rows), failures, dict(converted), plan.duplicates, doubted=doubted)
        result.local = [(sidecar, _sidecar(uri)), (Path(f"{tar}{INDEX_SUFFIX}"), uri + INDEX_SUFFIX), (tar, uri)]
        passing = sum(is_transient(f["reason"]) for f in failures)
        result.held = passing > self.limit * len(plan.rows)
        if not result.held:
            result.land()
            shutil.rmtree(work)
        return result


@dataclass(frozen=True)
class _Stored(Accepted):
    """An accepted image with its hash; `data` is bytes or, spooled, a path."""

    sha256: str = ""


def _accept(data: bytes, max_pixels: int, work: Path) -> Accepted | Rejected:
    try:
        image = accept(data, max_pixels)
    except Rejected as error:
        return error
    sha256 = sha256_bytes(image.data)
    held: Any = image.data
    if len(held) > SPOOL:
        held = work / f"{sha256}.image"
        held.write_bytes(image.data)
    return _Stored(held, image.format, image.width, image.height, image.converted_from, sha256)


def _load(data: Any) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data


def _known(result: Result, key: str, url: str) -> Accepted | Rejected | None:
    """What an earlier shard knows of a URL: its image, its failure, or nothing (its row failed for another reason)."""
    reader = result.reader()
    if key in reader.index:
        sample = reader.read(key)
        for about, data in zip(sample.meta["images"], sample.images, strict=True):
            if about.get("url", sample.meta["url"]) == url:
                source = about.get("converted_from")
                return _Stored(data, about["format"], about["width"], about["height"], source, about["sha256"])
    for failure in result.failures:
        if (
            failure["key"] == key
            and failure["url"] == url
            and failure["reason"] not in ("bad_conversations", "bad_preferences", "image_marks")
        ):
            return Rejected(failure["reason"], failure["detail"])
    return None


def _sidecar(uri: str) -> str:
    return uri.removesuffix(".tar") + ".failures.parquet"


def _mark(uri: str) -> str:
    return uri.removesuffix(".tar") + ".retry.json"


def _readable(found: Result) -> Result | None:
    """A finished shard if it holds what its record says: a run may have died between two files of another attempt."""
    try:
        return found if ShardReader(found.ref).path else None
    except (DataError, NotFound):
        return None


def _host(url: str | None) -> str:
    try:
        return (urlsplit(url or "").hostname or "").lower()
    except ValueError:
        return ""


def _failures_parquet(failures: list[dict[str, Any]], about: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [(name, pa.int64() if name == "row" else pa.string()) for name in COLUMNS]
    schema = pa.schema(fields, metadata={"vlmflow.pull": json.dumps(about, sort_keys=True)})
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(failures, schema=schema), out, compression="zstd")
    return out.getvalue()


def read_failures(shard_uri: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Failed rows of a shard (row, key, source, url, host, reason, detail) and what was counted when it was written."""
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(storage.read_bytes(_sidecar(shard_uri))))
    return table.to_pylist(), json.loads(table.schema.metadata[b"vlmflow.pull"])


def _finished(uri: str, plan: Plan) -> Result | None:
    """The shard of an earlier run if all of it is there and no file of it was cut, else None."""
    import pyarrow as pa

    try:
        size = storage.size(uri)
        failures, about = read_failures(uri)
        ref = ShardRef.model_validate({**about["ref"], "uri": uri})
        if size != ref.bytes or len(storage.read_json(uri + INDEX_SUFFIX)) != ref.samples:
            return None
    except (NotFound, DataError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    doubted = bool(failures) and storage.exists(_mark(uri))
    return Result(ref, about["rows"], failures, about["converted"], about["duplicates"], doubted=doubted)
