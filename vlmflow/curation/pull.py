"""Tables of URLs become shards: the only step that talks to the web, and the only one that writes images.

Rows are cut into shards by their order alone, so a shard's name (a digest of its rows and of the limits) is known before
anything is fetched: a finished shard is found again by name, an unfinished one goes on from its spool, and a killed pull
that is started again ends in the same bytes. For the same reason shards may be pulled in groups, by any number of tasks.
Original bytes are kept, which costs a twentieth of re-encoding them (spec/data-eval-soup.md 0). Rows that fail are written
beside their shard with a reason each, never dropped in silence.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow.curation.adopt import Adopter
from vlmflow.curation.allocator import few_collections, keep_buffers
from vlmflow.curation.bucket import Bucket
from vlmflow.curation.cells import Cells
from vlmflow.curation.fetch import Fetcher
from vlmflow.curation.fetch_limits import Limits
from vlmflow.curation.first_seen import FirstSeen
from vlmflow.curation.judges import Judges
from vlmflow.curation.loop import run_loop
from vlmflow.curation.pull_shard import Plan, Result, ShardPuller
from vlmflow.curation.pull_tally import Tally
from vlmflow.curation.spool import SPARE
from vlmflow.curation.table import (
    Columns,
    Row,
    Table,
    check_columns,
    columns_of,
    count_rows,
    localize,
    read_rows,
    read_urls,
)
from vlmflow.curation.tar_stream import expand
from vlmflow.dataset.manifest import Lineage, Manifest, save
from vlmflow.digest import canonical, digest
from vlmflow.errors import DataError, RecipeError, StepFailed

if TYPE_CHECKING:
    from vlmflow.step import Context, Progress

VERSION = 1  # raise when the same rows and limits would give other shards
AHEAD = 3  # shards in flight, so that a slow row of one does not idle the connections
JUDGES = 4  # threads that check images; Pillow releases the interpreter lock while it decodes
PATIENCE = 8  # images that wait before a second thread starts, where most are checked by their structure alone


@dataclass(frozen=True)
class Source:
    """One source of the recipe with its table at hand; `first` is the number of its first shard in the dataset."""

    name: str
    spec: Any
    table: Table | None  # None of adopted tars, whose rows nobody has counted
    tars: list[str]
    rows: int
    first: int
    shards: int


def run(ctx: Context, dataset: str, group: Mapping[str, Any] | None = None) -> Manifest:
    """Pull all sources of one dataset of the recipe and seal its manifest.

    With a `group` (of `plan_groups`) only its shards are pulled and no manifest is written; the call without a group finds
    them and pulls what is missing: shards that a group held back because too many of their rows failed for a cause that
    passes. An image that rows of two groups share is fetched by both.

    Returns:
        A manifest whose lineage entry `pull` sums up rows, samples and failures by reason and by host; of a group, its
        shards alone.

    Raises:
        RecipeError: the recipe has no such dataset. DataError: a table lacks a column or cannot be read, or is not the one
            that the groups were made of.
        StepFailed: more rows failed than `pull.failure_limit`; finished shards stay, so a rerun fetches only the rest and
            what failed.
    """
    sources = _sources(ctx, dataset)
    pull = ctx.recipe.pull
    total = sum(source.rows for source in sources)
    begin, end = 0, sum(source.shards for source in sources)
    if group:
        if int(group["rows"]) != total:
            raise DataError(
                f"data.{dataset}: its tables have {total} rows, but group {group['name']} was made of {group['rows']}: they "
                "changed since. Run the pipeline again; finished shards are found."
            )
        begin, end = int(group["first"]), int(group["first"]) + int(group["shards"])
    mine = [(source, max(begin - source.first, 0), min(end - source.first, source.shards)) for source in sources]
    work = Path(ctx.scratch) / "pull" / digest(ctx.root)[:16]
    work.mkdir(parents=True, exist_ok=True)
    label = f"pull {dataset}" + (f" {group['name']}" if group else "")
    rows = sum(_rows_of(source, pull.samples_per_shard, *span) for source, *span in mine)
    with ctx.progress(label, rows, "rows") as progress:
        pulling = _Pulling(ctx, dataset, Tally(pull.failure_limit, total), progress, work)
        pulling.all([(source, first, last) for source, first, last in mine if first < last], final=not group)
    results, tally = pulling.results, pulling.tally
    if group:
        return Manifest(name=dataset, shards=[r.ref for r in results if r.ref.samples and not r.held])
    lineage = Lineage(
        step="pull",
        params={
            **_params(pull),
            "dataset": dataset,
            "version": VERSION,
            "tables": {source.name: source.spec.table or source.spec.shards for source in sources},
        },
        summary={**tally.summary(), "duplicate_rows": pulling.duplicates, **pulling.adopted()},
    )
    manifest = Manifest(name=dataset, shards=[r.ref for r in results if r.ref.samples], lineage=[lineage])
    save(manifest, ctx.root)
    return manifest


def plan_groups(ctx: Context, dataset: str, count: int) -> list[dict[str, Any]]:
    """At most `count` groups that hold every shard of a dataset once, in order, for `run`; nothing is pulled.

    Returns:
        `name` ("1", "2", ...), `first` (number of its first shard), `shards` (how many) and `rows` (of the whole dataset,
        by which a changed table is noticed). Never empty.

    Raises:
        what `run` raises before it fetches anything.
    """
    sources = _sources(ctx, dataset)
    rows, shards = sum(source.rows for source in sources), sum(source.shards for source in sources)
    count = max(1, min(int(count), shards))
    firsts = [index * shards // count for index in range(count + 1)]
    return [
        {"name": str(number + 1), "first": first, "shards": firsts[number + 1] - first, "rows": rows}
        for number, first in enumerate(firsts[:-1])
    ]


def _sources(ctx: Context, dataset: str) -> list[Source]:
    """The dataset's sources with their tables at hand, all of them checked before anything is fetched."""
    if dataset not in ctx.recipe.data:
        raise RecipeError(f"data.{dataset}: no such dataset; the recipe has {sorted(ctx.recipe.data)}")
    pull, specs = ctx.recipe.pull, ctx.recipe.data[dataset].sources
    tables: dict[str, Table] = {}
    tars: dict[str, list[str]] = {}
    for name in sorted(specs):
        field = f"data.{dataset}.sources.{name}"
        if (uri := specs[name].table) is None:
            tars[name] = expand(specs[name].shards or [], f"{field}.shards")
        else:
            tables[name] = localize(uri, ctx.scratch, _allow(pull))
            check_columns(tables[name], columns_of(specs[name]), field)
    sources: list[Source] = []
    for name in sorted(specs):
        rows = count_rows(tables[name]) if name in tables else 0
        shards = len(tars[name]) if name in tars else -(-rows // pull.samples_per_shard)
        first = sources[-1].first + sources[-1].shards if sources else 0
        sources.append(Source(name, specs[name], tables.get(name), tars.get(name, []), rows, first, shards))
    return sources


def _rows_of(source: Source, size: int, first: int, last: int) -> int:
    return max(0, min(last * size, source.rows) - first * size)


def _allow(pull: Any) -> frozenset[str]:
    return frozenset(host.lower() for host in pull.allow_hosts)


class _Pulling:
    """The pull of some shards of a dataset, under way."""

    def __init__(self, ctx: Context, dataset: str, tally: Tally, progress: Progress, work: Path) -> None:
        self.ctx, self.dataset, self.tally, self.progress, self.work = ctx, dataset, tally, progress, work
        self.results: list[Result] = []
        self.duplicates = 0  # rows that repeat an earlier one of their source
        self._ignored: Counter[str] | None = None  # members of adopted tars that are no part of a sample
        self._repeated = 0
        self._pullers: list[ShardPuller] = []
        self._started, self._noted = time.monotonic(), 0

    def all(self, spans: list[tuple[Source, int, int]], final: bool) -> None:
        """Pull shards `first` to `last` of each source. `final`: the verdict over the dataset falls here."""
        keep_buffers()
        try:
            for source, first, last in spans:
                if source.tars:
                    self._adopt(source, first, last)
                else:
                    with few_collections():
                        run_loop(self._source(source, first, last))
            if final:
                self.tally.check(final=True)
                for result in self.results:
                    result.land()
        except StepFailed:
            for result in self.results:
                result.doubt()
            for spool in chain.from_iterable(puller.spools.values() for puller in self._pullers):
                spool.forget_refusals()
            raise
        finally:
            for result in self.results:
                result.withdraw()
            for spool in chain.from_iterable(puller.spools.values() for puller in self._pullers):
                spool.close(done=False)
            shutil.rmtree(self.work / SPARE, ignore_errors=True)

    def _adopt(self, source: Source, first: int, last: int) -> None:
        """Adopt tars `first` to `last` of a source; how many samples they hold is known only then."""
        pull, spec = self.ctx.recipe.pull, source.spec
        adopter = Adopter(self.ctx.root, source.name, columns_of(spec), spec.licence, pull)
        for position in range(first, last):
            result = adopter.adopt(source.tars[position], position)
            self.results.append(result)
            self._ignored = (self._ignored or Counter()) + Counter(result.ignored)
            self._repeated += result.repeated
            self.tally.total += result.rows
            self.tally.add(result, [])
            self.progress.total += result.rows
            self.progress.advance(result.rows)

    def adopted(self) -> dict[str, Any]:
        """What a manifest says of adopted tars besides rows and failures; nothing where there are none."""
        if self._ignored is None:
            return {}
        return {"ignored_members": dict(sorted(self._ignored.items())), "repeated_keys": self._repeated}

    async def _source(self, source: Source, first: int, last: int) -> None:
        """Fetch the shards of one source, a few at a time; results are counted in order, and a lost cause is left early."""
        pull = self.ctx.recipe.pull
        params = {**_params(pull), "licence": source.spec.licence}
        if source.spec.image_root:
            params["image_root"] = source.spec.image_root
        urls, seen = self._look(source, first, last), FirstSeen(self.work)
        tasks: dict[int, asyncio.Task[Result]] = {}  # by shard; a finished one serves rows that share images
        waiting: list[asyncio.Task[Result]] = []
        threads = min(JUDGES, (os.cpu_count() or 1) + 1)
        patience = PATIENCE if pull.proof == "structure" and pull.resize is None else 0
        with ThreadPoolExecutor(threads, "pull") as pool, ThreadPoolExecutor(AHEAD, "pull-shard") as shard_pool:
            async with _images(source, pull, self.work) as fetcher:
                rows = read_rows(*self._part(source, first, last), fetcher if isinstance(fetcher, Cells) else None)
                plans = _plans(_counted(rows, seen), source.name, pull.samples_per_shard, params, urls)
                judges, clerks = Judges(pool, threads, patience), Judges(shard_pool, AHEAD)
                puller = ShardPuller(
                    self.ctx.root,
                    source.name,
                    source.spec.licence,
                    pull,
                    self.work,
                    fetcher.get,
                    judges,
                    clerks,
                    self._advance(fetcher),
                )
                self._pullers.append(puller)
                try:
                    for plan in chain(plans, [None] * AHEAD):
                        if plan is not None:
                            tasks[plan.index] = asyncio.create_task(puller.pull(plan, tasks))
                            waiting.append(tasks[plan.index])
                        if waiting and (plan is None or len(waiting) >= AHEAD):
                            result = await waiting[0]
                            self.results.append(waiting.pop(0).result())
                            self.tally.add(result, fetcher.dead_hosts())
                            self.tally.check()
                finally:
                    for task in waiting:
                        task.cancel()
                    left = await asyncio.gather(*waiting, return_exceptions=True)
                    self.results += [result for result in left if isinstance(result, Result)]
        self.duplicates += seen.seal().repeats

    def _part(self, source: Source, first: int, last: int) -> tuple[Table, Columns, str, int, int]:
        """What reads the rows of shards `first` to `last`."""
        size, field = self.ctx.recipe.pull.samples_per_shard, f"data.{self.dataset}.sources.{source.name}"
        assert source.table is not None
        return source.table, columns_of(source.spec), field, first * size, last * size

    def _look(self, source: Source, first: int, last: int) -> FirstSeen:
        """URLs that repeat: a first pass over the table, unless its images lie in it."""
        urls = FirstSeen(self.work)
        for row, found in read_urls(*self._part(source, first, last)) if not source.spec.image_column else ():
            for url in found:
                urls.add(url.encode("utf-8", "surrogatepass"), row)
        return urls.seal()

    def _advance(self, fetcher: Fetcher | Bucket | Cells) -> Any:
        def advance(rows: int) -> None:
            if rows + self.progress.done >= self._noted:
                seconds = max(time.monotonic() - self._started, 1e-3)
                done = self.progress.done + rows
                self.progress.note(f"{done / seconds:.0f} rows/s, {fetcher.bytes / 2**20 / seconds:.1f} MiB/s")
                self._noted = done + 32
            self.progress.advance(rows)

        return advance


def _params(pull: Any) -> dict[str, Any]:
    """The settings that decide which rows end as samples; speed settings (concurrency) are not among them."""
    names = (
        "max_bytes", "max_pixels", "timeout", "connect_timeout", "first_byte_timeout", "min_rate", "robots_txt", "retries",
        "max_redirects", "samples_per_shard", "proof",
    )  # fmt: skip
    agent = pull.user_agent.split("/")[0].lower()  # X-Robots-Tag and robots.txt may speak to it by name
    resize = pull.resize.model_dump() if pull.resize else None
    settings = {name: getattr(pull, name) for name in names}
    return {**settings, "resize": resize, "allow_hosts": sorted(_allow(pull)), "agent": agent}


def _limits(pull: Any) -> Limits:
    return Limits(
        concurrency=pull.concurrency,
        per_host=pull.per_host,
        timeout=pull.timeout,
        connect_timeout=pull.connect_timeout,
        first_byte_timeout=pull.first_byte_timeout,
        min_rate=pull.min_rate,
        max_bytes=pull.max_bytes,
        redirects=pull.max_redirects,
        retries=pull.retries,
        allow_hosts=_allow(pull),
        user_agent=pull.user_agent,
        robots_txt=pull.robots_txt,
    )


def _images(source: Source, pull: Any, work: Path) -> Fetcher | Bucket | Cells:
    """Where the images of a source come from; all answer alike."""
    if source.spec.image_column:
        return Cells(work / "cells", pull.max_bytes)
    if source.spec.image_root:
        return Bucket(source.spec.image_root, pull.max_bytes)
    return Fetcher(_limits(pull), work)


def _counted(rows: Iterator[Row], seen: FirstSeen) -> Iterator[Row]:
    """Rows as they pass, for those that repeat an earlier one."""
    for row in rows:
        seen.add(canonical([row.urls, row.text, row.conversations, row.preferences]), row.index)
        yield row


def _plans(rows: Iterator[Row], source: str, size: int, params: dict[str, Any], urls: FirstSeen) -> Iterator[Plan]:
    """Cut rows into shards in order; `urls` tells which shard fetches a URL that rows share."""
    while chunk := list(islice(rows, size)):
        index, owners = chunk[0].index // size, {}
        for row in chunk:
            for url in row.addresses:
                first = urls.first(url.encode("utf-8", "surrogatepass"))
                if first is not None and first // size < index:
                    owners[url] = first
        name = digest({"rows": [r.fingerprint for r in chunk], "start": chunk[0].index, "version": VERSION, **params})
        yield Plan(source, index, size, f"{source}-{name[:24]}-{index:05d}", chunk, owners)
