"""One shard of a pull: find it finished, or fetch its rows and write it whole.

A shard is a tar, its offset index and a Parquet file with its failed rows; the tar is put last, so its presence says that
the other two are there. Until then its images and verdicts lie in a spool, from which a killed pull goes on. Shards that
lost more rows than the recipe allows to causes that pass (a server that is down) are held back until the verdict over the
whole dataset: a later run must find them missing and ask again for what failed.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlmflow import storage
from vlmflow.curation.accept import Rejected, accept
from vlmflow.curation.fetch import Use
from vlmflow.curation.fetch_limits import Fetched, is_transient
from vlmflow.curation.judges import Judges
from vlmflow.curation.spool import SPARE, Images, Spool, Spooled, discard
from vlmflow.curation.table import Row
from vlmflow.dataset.manifest import ShardRef
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import INDEX_SUFFIX, ShardReader, write_tar
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError, NotFound

COLUMNS = ("row", "key", "source", "url", "host", "reason", "detail")
ROW_REASONS = ("bad_conversations", "bad_preferences", "image_marks")  # the table's fault, not that of the URL
READERS = 32  # earlier shards kept open for images that rows share

Get = Callable[[str, Use], Awaitable[Fetched]]  # of a source: over HTTP, from a bucket, out of the table
Verdict = Spooled | tuple[str, str]  # an accepted image, or reason and detail


@dataclass(frozen=True)
class Plan:
    """A shard to be: its rows, and the row that fetches a URL which an earlier shard has too (`owners`, those only)."""

    source: str
    index: int
    size: int
    name: str
    rows: list[Row]
    owners: dict[str, int]

    def key(self, row: int) -> str:
        """The sample key of a row number of the source."""
        return f"{self.source}-{row:08d}"


@dataclass
class Result:
    """A finished shard: what a manifest says of it, and its failed rows."""

    ref: ShardRef
    rows: int
    failed: int
    failures: list[dict[str, Any]]  # emptied once they are counted
    converted: dict[str, int]
    spool: Spool | None = None  # of a held shard
    local: list[tuple[Path, str]] = field(default_factory=list)  # files of a held shard: (path, uri), tar last
    doubted: bool = False  # a mark lies beside the shard

    @property
    def held(self) -> bool:
        """Not in its place yet: a later run must find it missing unless the dataset's verdict is good."""
        return bool(self.local)

    def land(self) -> None:
        """Put a held shard in its place; nothing to do for others."""
        for path, uri in self.local:
            _put(path, uri)
        self.local = []
        if self.spool:
            self.spool.close(done=True)
            self.spool = None
        if self.doubted:
            storage.delete(_mark(self.ref.uri))

    def doubt(self) -> None:
        """Part of a verdict against the dataset: the next run fetches the failed rows again (a picture may have been mended
        under the same URL), and takes the others from the shard, or of a held one from its spool."""
        if self.spool:
            self.spool.forget_refusals()
        elif self.failed:
            storage.write_json(_mark(self.ref.uri), {"failed": self.failed})

    def withdraw(self) -> None:
        """Leave a held shard to a later run, which goes on from its spool."""
        if self.spool:
            for path, _ in self.local:
                path.unlink(missing_ok=True)
            self.spool.close(done=False)
            self.spool = None

    def reader(self) -> ShardReader:
        """The shard's samples, wherever it lies."""
        return ShardReader(str(self.local[-1][0]) if self.local else self.ref)


@dataclass
class ShardPuller:
    """Pulls the shards of one source, images by `get`."""

    root: str
    source: str
    licence: str | None
    settings: Any  # recipe.pull
    scratch: Path
    get: Get
    judges: Judges  # of images
    clerks: Judges  # of whole shards, which may wait for a store
    advance: Callable[[int], None]
    spools: dict[str, Spool] = field(default_factory=dict)  # of the shards in progress
    readers: dict[str, tuple[ShardReader, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    async def pull(self, plan: Plan, earlier: dict[int, asyncio.Task[Result]]) -> Result:
        """The finished shard of a plan. `earlier` holds the tasks of the shards before it, by index (for images that rows
        share)."""
        uri = storage.join(self.root, "shards", f"{plan.name}.tar")
        found = await self.clerks(_finished, uri)
        if found and not found.doubted:
            await self.clerks(discard, self.scratch / plan.name)
            self.advance(len(plan.rows))
            return found
        before = await self.clerks(_readable, found) if found else None
        spool = self.spools[plan.name] = await self.clerks(Spool, self.scratch / plan.name, self.scratch / SPARE)
        wanted: dict[str, int] = {}  # URL -> rows of which it is the last one
        keys: dict[str, str] = {}  # URL -> first row that has it
        for row in plan.rows:
            if row.problem is None and row.urls:
                for url in row.urls:
                    wanted.setdefault(url, 0)
                    keys.setdefault(url, plan.key(row.index))
                wanted[row.urls[-1]] += 1
        self.advance(len(plan.rows) - sum(wanted.values()))

        async def one(url: str, rows: int) -> Verdict:
            verdict = spool.found.get(url)
            if verdict is None and url in plan.owners:
                owner = plan.owners[url] // plan.size
                result = await asyncio.shield(earlier[owner])
                verdict = await self.judges(self._known, result, plan.key(plan.owners[url]), url, spool)
            if verdict is None and before:
                known = await self.judges(self._known, before, keys[url], url, spool)
                verdict = known if isinstance(known, Spooled) else None
            if verdict is None:
                verdict = await self._fetch(url, spool)
            self.advance(rows)
            return verdict

        tasks = {url: asyncio.create_task(one(url, rows)) for url, rows in wanted.items()}
        try:
            await asyncio.gather(*tasks.values())
            verdicts = {url: task.result() for url, task in tasks.items()}
            result: Result = await self.clerks(self._write, plan, uri, spool, verdicts, found is not None)
        finally:
            for task in tasks.values():
                task.cancel()
        del self.spools[plan.name]
        return result

    async def _fetch(self, url: str, spool: Spool) -> Verdict:
        async def use(body: Any) -> Verdict:
            return await self.judges(self._judge, url, body, spool)

        fetched = await self.get(url, use)
        if fetched.reason is None:
            return fetched.used
        if not is_transient(fetched.reason):
            spool.refuse(url, fetched.reason, fetched.detail)
        return fetched.reason, fetched.detail

    def _judge(self, url: str, body: Any, spool: Spool) -> Verdict:
        """Accept a body into the spool, or refuse it; runs in a thread."""
        body.seek(0)
        data = body.read()
        body.close()
        try:
            image = accept(data, self.settings.max_pixels, self.settings.resize, self.settings.proof)
        except Rejected as error:
            spool.refuse(url, error.reason, error.detail)
            return error.reason, error.detail
        return spool.keep(url, image.data, image.about(sha256_bytes(image.data)))

    def _known(self, result: Result, key: str, url: str, spool: Spool) -> Verdict | None:
        """What a finished shard knows of a URL of its row `key`: its image, its failure, or nothing (the row failed for
        another reason)."""
        with self._lock:
            if result.ref.uri not in self.readers:
                while len(self.readers) >= READERS:
                    self.readers.pop(next(iter(self.readers)))
                failed = {row["key"]: row for row in _failures_of(result)}
                self.readers[result.ref.uri] = (result.reader(), failed)
            reader, failed = self.readers[result.ref.uri]
        if key in reader.index:
            sample = reader.read(key)
            for about, data in zip(sample.meta["images"], sample.images, strict=True):
                if about.get("url", sample.meta["url"]) == url:
                    return spool.keep(url, data, {name: value for name, value in about.items() if name != "url"})
        failure = failed.get(key, {})
        if failure.get("url") == url and failure["reason"] not in ROW_REASONS:
            return failure["reason"], failure["detail"]
        return None

    def _sample(self, key: str, row: Row, images: list[Spooled], spool: Spool) -> Sample:
        urls = row.names
        described = [
            {**i.about, "url": url} if len(images) > 1 else i.about for i, url in zip(images, urls, strict=True)
        ]
        meta = meta_of(row, row.id or key, urls[0] if urls else None, self.source, self.licence, described)
        return Sample(key, meta, Images(spool, images))  # type: ignore[arg-type]

    def _write(self, plan: Plan, uri: str, spool: Spool, verdicts: dict[str, Verdict], doubted: bool) -> Result:
        """The tar, its index and its failures, from the spool; landed unless held."""
        failures: list[dict[str, Any]] = []
        converted: Counter[str] = Counter()

        def samples() -> Iterator[Sample]:
            for row in plan.rows:
                found = [] if row.problem else [(url, verdicts[url]) for url in row.urls]
                bad = next(((url, verdict) for url, verdict in found if isinstance(verdict, tuple)), None)
                if row.problem or bad:
                    url, (reason, detail) = bad or (row.urls[0] if row.urls else None, row.problem or ("", ""))
                    cells = (row.index, plan.key(row.index), plan.source, url, _host(url), reason, detail)
                    failures.append(dict(zip(COLUMNS, cells, strict=True)))
                    continue
                images = [verdict for _, verdict in found if isinstance(verdict, Spooled)]
                converted.update(i.about["converted_from"] for i in images if "converted_from" in i.about)
                yield self._sample(plan.key(row.index), row, images, spool)

        tar = spool.folder / f"{plan.name}.tar"
        written = write_tar(tar, samples())
        ref = ShardRef(uri=uri, source=plan.source, **written._asdict())
        about = {"rows": len(plan.rows), "converted": dict(converted), "ref": ref.model_dump(exclude={"uri"})}
        sidecar = spool.folder / "failures.parquet"
        sidecar.write_bytes(failures_parquet(failures, about))
        local = [(sidecar, _sidecar(uri)), (Path(f"{tar}{INDEX_SUFFIX}"), uri + INDEX_SUFFIX), (tar, uri)]
        result = Result(ref, len(plan.rows), len(failures), failures, dict(converted), spool, local, doubted)
        if sum(is_transient(f["reason"]) for f in failures) <= self.settings.failure_limit * len(plan.rows):
            result.land()
        return result


def meta_of(
    row: Row, name: str, url: str | None, source: str, licence: str | None, images: list[dict[str, Any]]
) -> dict[str, Any]:
    """A sample's JSON: what its row says, and its images as described."""
    meta: dict[str, Any] = {"id": name, "url": url, "source": source, "images": images}
    said = {"text": row.text, "conversations": row.conversations, "preferences": row.preferences}
    meta |= {field: value for field, value in said.items() if value is not None}
    if licence:
        meta["licence"] = licence
    if row.extra:
        meta["extra"] = row.extra
    return meta


def _failures_of(result: Result) -> list[dict[str, Any]]:
    """Failed rows of a finished shard, counted or not, held or not."""
    if result.failures or not result.failed:
        return result.failures
    return parse_failures(
        result.local[0][0].read_bytes() if result.local else storage.read_bytes(_sidecar(result.ref.uri))
    )[0]


def _put(path: Path, uri: str) -> None:
    """Move a written file to its place: by name on the same disk, by a copy elsewhere."""
    target = storage.local_path(uri)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            os.replace(path, target)
            return
    storage.put_file(path, uri)


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


def failures_parquet(failures: list[dict[str, Any]], about: dict[str, Any]) -> bytes:
    """Failed rows and what was counted as one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [(name, pa.int64() if name == "row" else pa.string()) for name in COLUMNS]
    schema = pa.schema(fields, metadata={"vlmflow.pull": json.dumps(about, sort_keys=True)})
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(failures, schema=schema), out, compression="zstd")
    return out.getvalue()


def read_failures(shard: ShardRef | str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Failed rows of a shard (row, key, source, url, host, reason, detail) and what was counted when it was written."""
    if isinstance(shard, ShardRef) and shard.index:
        return parse_failures(storage.read_bytes(shard.index.removesuffix(INDEX_SUFFIX) + ".failures.parquet"))
    return parse_failures(storage.read_bytes(_sidecar(shard.uri if isinstance(shard, ShardRef) else shard)))


def parse_failures(data: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What `failures_parquet` wrote."""
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    return table.to_pylist(), json.loads(table.schema.metadata[b"vlmflow.pull"])


def _finished(uri: str) -> Result | None:
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
    return Result(ref, about["rows"], len(failures), failures, about["converted"], doubted=doubted)
