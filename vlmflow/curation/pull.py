"""Tables of URLs become shards: the only step that talks to the web, and the only one that writes images.

Rows are cut into shards by their order alone, so a shard's name (a digest of its rows and of the limits) is known before
anything is fetched: a finished shard is found again by name, an unfinished one is fetched anew, and a killed pull that is
started again ends in the same bytes. Original bytes are kept, which costs a twentieth of re-encoding them
(spec/data-eval-soup.md 0). Rows that fail are written beside their shard with a reason each, never dropped in silence.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow.curation.fetch import Fetcher, Limits, is_transient
from vlmflow.curation.pull_shard import Plan, Result, ShardPuller
from vlmflow.curation.table import Row, check_columns, columns_of, count_rows, localize, read_rows
from vlmflow.dataset.manifest import Lineage, Manifest, save
from vlmflow.digest import digest
from vlmflow.errors import DataError, RecipeError, StepFailed

if TYPE_CHECKING:
    from vlmflow.step import Context, Progress

VERSION = 1  # raise when the same rows and limits would give other shards
AHEAD = 3  # shards in flight, so that a slow row of one does not idle the connections
DECODERS = 4  # threads that check images; Pillow releases the interpreter lock while it decodes


def run(ctx: Context, dataset: str) -> Manifest:
    """Pull all sources of one dataset of the recipe and seal its manifest.

    Returns:
        A manifest whose lineage entry `pull` sums up rows, samples and failures by reason and by host.

    Raises:
        RecipeError: the recipe has no such dataset. DataError: a table lacks a column or cannot be read.
        StepFailed: more rows failed than `pull.failure_limit`; finished shards stay, so a rerun fetches only the rest and
            what failed.
    """
    if dataset not in ctx.recipe.data:
        raise RecipeError(f"data.{dataset}: no such dataset; the recipe has {sorted(ctx.recipe.data)}")
    pull = ctx.recipe.pull
    sources = {name: ctx.recipe.data[dataset].sources[name] for name in sorted(ctx.recipe.data[dataset].sources)}
    allow = frozenset(host.lower() for host in pull.allow_hosts)
    paths = {name: localize(source.table or "", ctx.scratch, allow) for name, source in sources.items()}
    for name, source in sources.items():  # all of them before anything is fetched
        check_columns(paths[name], columns_of(source), f"data.{dataset}.sources.{name}")
    total = sum(count_rows(path) for path in paths.values())
    if not total:
        raise DataError(
            f"data.{dataset}: its tables have 0 rows ({', '.join(s.table or '' for s in sources.values())}); nothing to pull"
        )
    params = _params(pull, allow)
    tally = _Tally(pull.failure_limit, total)
    results: list[Result] = []
    held = Path(ctx.scratch) / "pull-held" / digest([ctx.root, dataset, params])[:24]
    shutil.rmtree(held, ignore_errors=True)
    try:
        with ctx.progress(f"pull {dataset}", total, "rows") as progress:
            for name, source in sources.items():
                rows = read_rows(paths[name], columns_of(source), f"data.{dataset}.sources.{name}")
                puller = ShardPuller(ctx.root, name, source.licence, pull.max_pixels, held, pull.failure_limit)
                plans = _plans(rows, name, pull.samples_per_shard, {**params, "licence": source.licence})
                asyncio.run(_pull(puller, plans, _limits(pull, allow), tally, progress, results))
        tally.check(final=True)
        for result in results:
            result.land()
    except StepFailed:
        for result in results:
            result.doubt()
        raise
    finally:
        shutil.rmtree(held, ignore_errors=True)
    lineage = Lineage(
        step="pull",
        params={**params, "dataset": dataset, "version": VERSION, "tables": {n: s.table for n, s in sources.items()}},
        summary=tally.summary(),
    )
    manifest = Manifest(name=dataset, shards=[r.ref for r in results if r.ref.samples], lineage=[lineage])
    save(manifest, ctx.root)
    return manifest


def _params(pull: Any, allow: frozenset[str]) -> dict[str, Any]:
    """The settings that decide which rows end as samples; speed settings (concurrency) are not among them."""
    names = ("max_bytes", "max_pixels", "timeout", "connect_timeout", "retries", "max_redirects", "samples_per_shard")
    agent = pull.user_agent.split("/")[0].lower()  # X-Robots-Tag may speak to it by name
    return {**{name: getattr(pull, name) for name in names}, "allow_hosts": sorted(allow), "agent": agent}


def _limits(pull: Any, allow: frozenset[str]) -> Limits:
    return Limits(
        concurrency=pull.concurrency,
        timeout=pull.timeout,
        connect_timeout=pull.connect_timeout,
        max_bytes=pull.max_bytes,
        redirects=pull.max_redirects,
        retries=pull.retries,
        allow_hosts=allow,
        user_agent=pull.user_agent,
    )


def _plans(rows: Iterator[Row], source: str, size: int, params: dict[str, Any]) -> Iterator[Plan]:
    """Cut rows into shards in order. `owners` names the row that fetches a URL which several rows share."""
    owner: dict[int, int] = {}  # 8 bytes of the URL's digest -> first row, so that millions of URLs fit in memory
    seen: set[int] = set()
    while chunk := list(islice(rows, size)):
        index, owners, duplicates = chunk[0].index // size, {}, 0
        for row in chunk:
            for url in row.urls:
                owners[url] = owner.setdefault(int(digest(url)[:16], 16), row.index)
            mark = int(digest([row.urls, row.text, row.conversations, row.preferences])[:16], 16)
            duplicates += mark in seen
            seen.add(mark)
        name = digest({"rows": [r.fingerprint for r in chunk], "start": chunk[0].index, "version": VERSION, **params})
        yield Plan(source, index, size, f"{source}-{name[:24]}-{index:05d}", chunk, owners, duplicates)


async def _pull(
    puller: ShardPuller, plans: Iterator[Plan], limits: Limits, tally: _Tally, progress: Progress, results: list[Result]
) -> None:
    """Fetch the shards of one source, a few at a time; results are counted in order, and a lost cause is left early."""
    tasks: list[
        asyncio.Task[Result]
    ] = []  # by shard index; a finished task keeps its result for rows that share images
    counted = 0
    async with Fetcher(limits) as fetcher:
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="pull") as pool:
            try:
                for plan in chain(plans, [None] * AHEAD):
                    if plan is not None:
                        tasks.append(asyncio.create_task(puller.pull(plan, fetcher, pool, tasks, progress.advance)))
                    if counted < len(tasks) - (AHEAD if plan is not None else 0):
                        results.append(await tasks[counted])
                        counted += 1
                        tally.add(results[-1], fetcher.dead_hosts())
                        tally.check()
            finally:
                for task in tasks[counted:]:
                    task.cancel()
                left = await asyncio.gather(*tasks[counted:], return_exceptions=True)
                results += [result for result in left if isinstance(result, Result)]


class _Tally:
    """Rows, samples and failures so far, and the verdict over them. Holds nothing that depends on time or order."""

    def __init__(self, limit: float, total: int):
        self.limit, self.total = limit, total
        self.rows = self.samples = self.failed = 0
        self.counts: dict[str, Counter[str]] = {k: Counter() for k in ("reason", "host", "converted", "source")}
        self.duplicates = self.held = 0
        self.dead: set[str] = set()
        self.first: dict[str, str] = {}

    def add(self, result: Result, dead: list[str]) -> None:
        self.rows += result.rows
        self.samples += result.ref.samples
        self.failed += len(result.failures)
        self.duplicates += result.duplicates
        self.held += result.held
        self.dead |= set(dead)
        self.counts["converted"].update(result.converted)
        for failure in result.failures:
            self.counts["reason"][failure["reason"]] += 1
            self.counts["host"][failure["host"]] += 1
            self.counts["source"][failure["source"]] += 1
            self.first.setdefault(failure["reason"], f"{failure['key']} {failure['url'] or ''} ({failure['detail']})")

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "samples": self.samples,
            "failed": self.failed,
            "duplicate_rows": self.duplicates,
            "failed_by_reason": dict(sorted(self.counts["reason"].items())),
            "failed_by_host": dict(sorted(self.counts["host"].items())),
            "failed_by_source": dict(sorted(self.counts["source"].items())),
            "converted_to_png": dict(sorted(self.counts["converted"].items())),
        }

    def check(self, final: bool = False) -> None:
        """Raise StepFailed once more rows failed than the whole table may lose."""
        if self.failed <= self.limit * self.total and (not final or self.samples):
            return
        histogram = ", ".join(f"{n} x {reason}" for reason, n in self.counts["reason"].most_common())
        examples = "; ".join(f"{reason}: {self.first[reason]}" for reason, _ in self.counts["reason"].most_common(3))
        text = (
            f"pull: {self.failed} of {self.rows} rows failed ({self.failed / max(self.rows, 1):.1%}; {self.total} rows in all), "
            f"pull.failure_limit allows {self.limit:.1%}. By reason: {histogram}. First of each: {examples}."
        )
        if self.dead:
            text += f" No server answers at {', '.join(sorted(self.dead))}: every connection was refused or timed out. Start it or mend the URLs."
        if any(is_transient(reason) for reason in self.counts["reason"]):
            text += f" {self.held} shards with such passing failures were not kept: run the step again to fetch them."
        else:
            text += (
                " Mend the pictures or the table, or raise the limit if this loss is acceptable; the next run fetches the failed "
                "rows again and keeps the others."
            )
        raise StepFailed(text)
