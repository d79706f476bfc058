"""A million samples without images through `dedup`, `keep`, the wide table, `stats` and the gallery, on two cores.

Each step runs in a process of its own, so that its peak memory (VmHWM) is its own; the bar is 4 GiB. The dataset is real
shards of text alone with drawn layers: hashes, perplexities, texts and the findings of `clean`. Before a time counts, `dedup`
must have found every one of the copies that were planted, with up to `DISTANCE` bits flipped, and nothing that is further
apart; `keep` must hold exactly the samples that a plain sort chooses.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.step import Context

SEED = 17
DISTANCE = 6
COPIES = 0.05  # share of rows that are a copy of another
BORDERS = 0.3  # share of rows whose hash without border is another
PROBLEMS = 0.03  # share of rows with a problem of their own
SOURCES = ("web", "docs", "shop", "news")
BAR = 4 * 2**30
CORES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--rows", type=int, default=None, help="default 1000000, with --quick 20000")
    parser.add_argument("--work", type=Path, default=None, help="folder that keeps the dataset for another run (2 GB)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the dataset, run each step in a process of its own, print the table."""
    rows = arguments.rows or (20_000 if arguments.quick else 1_000_000)
    with tempfile.TemporaryDirectory(prefix="vlmflow-rows-") as temporary:
        folder = (arguments.work or Path(temporary)) / f"rows-{rows}"
        if not (folder / "made.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _step("make", folder, rows)
        shutil.rmtree(folder / "scratch" / "look", ignore_errors=True)
        measured = {name: _step(name, folder, rows) for name in STEPS if name != "make"}
    _print(rows, measured)
    return {
        "rows": rows, "cores": min(CORES, os.cpu_count() or 1), "copies": COPIES, "distance": DISTANCE,
        "bar_bytes": BAR, "steps": measured,
    }  # fmt: skip


def _step(name: str, folder: Path, rows: int) -> dict[str, Any]:
    command = [sys.executable, __file__, name, str(folder), str(rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "VLMFLOW_QUIET": "1"})
    if done.returncode:
        raise SystemExit(f"step {name} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _print(rows: int, measured: dict[str, dict[str, Any]]) -> None:
    print(f"\n{rows:,} rows, {min(CORES, os.cpu_count() or 1)} cores, a process a step; bar: 4 GiB")
    print(f"{'step':9}{'seconds':>9}{'CPU s':>9}{'peak MiB':>10}  result")
    for name, each in measured.items():
        peak = each["peak_bytes"] / 2**20
        print(f"{name:9}{each['seconds']:9.1f}{each['cpu_seconds']:9.1f}{peak:10.0f}  {each['found']}")
    worst = max(each["peak_bytes"] for each in measured.values())
    print(f"peak memory {worst / 2**30:.2f} GiB: {'within' if worst <= BAR else 'ABOVE'} the bar")


# steps, each in a process of its own --------------------------------------------------------------------------------


def make(folder: Path, rows: int) -> str:
    """Shards and drawn layers. Rows are drawn from SEED, so every run has the same ones."""
    import pyarrow as pa

    from vlmflow.dataset import manifest as manifests
    from vlmflow.dataset.layer import seal_columns
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.sample import Sample
    from vlmflow.dataset.shard import describe_shard, write_shard

    size = max(1, rows // 100)
    drawn, shards, keys = draw(rows), [], []
    for number, start in enumerate(range(0, rows, size)):
        source = SOURCES[number % len(SOURCES)]
        names = [f"{source}-{n:08d}" for n in range(start, min(start + size, rows))]
        path = folder / "d" / f"{number:05d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = drawn["text"][start : start + size]
        count = write_shard(
            path,
            (
                Sample(k, {"id": k, "source": source, "text": t, "images": []})
                for k, t in zip(names, texts, strict=True)
            ),
        )
        shards.append(describe_shard(path, str(path), count, source))
        keys.append(names)
    made = Manifest(name="rows", shards=shards)
    context = _context(folder)
    none = pa.nulls(rows, pa.string())
    for name, (schema, columns) in layers(drawn).items():

        def parts(columns: dict[str, Any] = columns) -> Iterator[Any]:
            start = 0
            for names in keys:
                part = slice(start, start + len(names))
                start += len(names)
                yield pa.table(
                    {"key": names, **{c: values[part] for c, values in columns.items()}, "error": none[part]}
                )

        made = seal_columns(context, made, name, params={}, version=1, schema=schema, parts=parts())
    (folder / "made.json").write_text(json.dumps(manifests.save(made, context.root)))
    return f"{len(shards)} shards"


def draw(rows: int) -> dict[str, Any]:
    """Columns of all rows; `of` is the row that each is a planted copy of, -1 for the others."""
    rng = np.random.default_rng(SEED)
    plain = rng.integers(1, 1 << 63, rows, dtype=np.uint64)
    chosen = rng.permutation(rows)
    copies = chosen[: int(rows * COPIES)]
    originals = rng.choice(chosen[len(copies) :], len(copies))
    of = np.full(rows, -1)
    of[copies] = originals
    flipped = plain[originals]
    flips = rng.integers(0, DISTANCE + 1, len(copies))
    for turn in range(DISTANCE):  # a bit that is drawn twice turns back: at most `flips` bits differ
        flipped = np.where(
            turn < flips, flipped ^ (np.uint64(1) << rng.integers(0, 63, len(copies)).astype(np.uint64)), flipped
        )
    plain[copies] = flipped
    trimmed = np.where(rng.random(rows) < BORDERS, rng.integers(1, 1 << 63, rows, dtype=np.uint64), plain)
    pixels = rng.integers(300_000, 2_000_000, rows)
    pixels[copies] = pixels[originals] // 2
    classes = np.array(["person", "text", "building", "food", "animal", "plant", "other"])
    subject = classes[rng.choice(len(classes), rows, p=(0.4, 0.15, 0.12, 0.1, 0.08, 0.07, 0.08))]
    text = [
        f"{word} number {n} in a drawn caption of no meaning"
        for word, n in zip(subject, rng.integers(0, rows, rows).tolist(), strict=True)
    ]
    return {
        "of": of, "plain": plain, "trimmed": trimmed, "pixels": pixels, "content": np.arange(1, rows + 1), "object": subject,
        "text": text,
        "ppl": np.round(np.exp(rng.normal(3, 1, rows)), 3), "bad": rng.random(rows) < PROBLEMS,
        "language": np.where(rng.random(rows) < 0.9, "en", "de"),
    }  # fmt: skip


def layers(drawn: dict[str, Any]) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """Schema and columns of each drawn layer."""
    import pyarrow as pa

    from vlmflow.curation import clean, fuse, perplexity, phash

    rows = len(drawn["plain"])
    one = pa.array(np.arange(rows + 1, dtype=np.int32))
    plain, trimmed = (
        pa.ListArray.from_arrays(one, pa.array(drawn[name].view(np.int64))) for name in ("plain", "trimmed")
    )
    offsets = np.concatenate([[0], np.cumsum(drawn["bad"])]).astype(np.int32)
    problems = pa.ListArray.from_arrays(pa.array(offsets), pa.array(["words 1 < 3"] * int(offsets[-1]), pa.string()))
    no_numbers = pa.nulls(rows, pa.int64())
    return {
        phash.LAYER: (phash.SCHEMA, {
            "plain": plain, "trimmed": trimmed, "mirrored": plain, "content": pa.array(drawn["content"]),
            "text": no_numbers, "turns": no_numbers, "pixels": pa.array(drawn["pixels"]),
        }),
        "fused": (fuse.SCHEMA, {"text": pa.array(drawn["text"]), "engine": pa.array(["rules"] * rows)}),
        clean.LAYER: (clean.SCHEMA, {
            "problems": problems, "language": pa.array(drawn["language"]), "words": pa.array(np.full(rows, 9)),
            "object": pa.array(drawn["object"]),
        }),
        perplexity.LAYER: (perplexity.SCHEMA, {"ppl": pa.array(drawn["ppl"]), "tokens": pa.array(np.full(rows, 12))}),
    }  # fmt: skip


def dedup(folder: Path, rows: int) -> tuple[str, Callable[[], str]]:
    """Near duplicates over all shards; every planted copy must be found."""
    from vlmflow.curation import dedup as step

    made = step.run(_context(folder), _load(folder, "made"))
    _save(folder, "dedup", made)
    summary = made.layer("dedup").summary

    def check() -> str:
        from vlmflow.curation.columns import stacked

        drawn = draw(rows)
        keys = stacked(made, "phash", folder / "scratch", ["key"])["key"].to_pylist()
        place = {key: n for n, key in enumerate(keys)}
        of = [place[k] if k else -1 for k in stacked(made, "dedup", folder / "scratch", ["of"])["of"].to_pylist()]
        found = np.array(of)
        copies = np.flatnonzero(drawn["of"] >= 0)
        if missed := int((found[copies] < 0).sum()):
            raise SystemExit(f"dedup missed {missed} of {len(copies)} planted copies")
        gone = np.flatnonzero(found >= 0)
        bits = np.minimum(
            *(np.bitwise_count(drawn[view][gone] ^ drawn[view][found[gone]]) for view in ("plain", "trimmed"))
        )
        if (bits > DISTANCE).any() or (found[found[gone]] >= 0).any():
            raise SystemExit("dedup dropped a sample that is too far from the one that stays")
        return f"recall {len(copies):,} of {len(copies):,} planted copies; {len(gone) - len(copies)} found by chance"

    return f"{summary['stay']:,} stay", check


def keep(folder: Path, rows: int) -> tuple[str, Callable[[], str]]:
    """A fifth of what is left, exactly."""
    from vlmflow.curation import keep as step

    made = step.run(_context(folder), _load(folder, "dedup"))
    _save(folder, "keep", made)

    def check() -> str:
        from vlmflow.curation.columns import stacked

        drawn = draw(rows)
        table = stacked(made, "keep", folder / "scratch", ["key", "keep"])
        of = stacked(made, "dedup", folder / "scratch", ["of"])["of"].is_null().to_numpy()
        keys = np.array(table["key"].to_pylist())
        live = np.flatnonzero(of & ~drawn["bad"])
        order = live[np.lexsort((keys[live], drawn["ppl"][live]))]
        expected = set(keys[order[: int(0.2 * len(order) + 0.5)]].tolist())
        if {k for k, stays in zip(keys.tolist(), table["keep"].to_pylist(), strict=True) if stays} != expected:
            raise SystemExit("keep differs from a plain sort")
        return f"the {len(expected):,} that a plain sort chooses"

    return f"{made.layer('keep').summary['kept']:,} kept", check


def table(folder: Path, rows: int) -> str:
    """The wide table that stats and gallery ask."""
    from vlmflow.look.table import open_table

    made = open_table(_load(folder, "keep"), folder / "scratch", samples=False)
    return f"{made.rows:,} rows, {len(made.columns)} columns"


def stats(folder: Path, rows: int) -> str:
    """Distribution of every column, by source too."""
    from vlmflow.look.stats import stats as measure
    from vlmflow.look.table import open_table

    manifest = _load(folder, "keep")
    made = measure(manifest, open_table(manifest, folder / "scratch", samples=False))
    if made["samples"] != rows:
        raise SystemExit(f"stats counted {made['samples']} of {rows} rows")
    return f"{len(made['columns'])} columns"


def gallery(folder: Path, rows: int) -> str:
    """Three pages: the first, the lowest perplexities among the dropped, and one far down."""
    from vlmflow.look import query
    from vlmflow.look.gallery import Gallery
    from vlmflow.look.samples import Samples
    from vlmflow.look.table import open_table

    manifest = _load(folder, "keep")
    opened = open_table(manifest, folder / "scratch", samples=False)
    shown = Gallery(manifest, opened, Samples(manifest, folder / "scratch"))
    asked: list[list[tuple[str, str]]] = [
        [], [("state", "dropped"), ("sort", "ppl.ppl")], [("sort", "ppl.ppl"), ("page", str(max(1, rows // 100)))],
    ]  # fmt: skip
    seconds = []
    for pairs in asked:
        started = time.perf_counter()
        page = shown.index(query.parse(pairs, opened))
        seconds.append(time.perf_counter() - started)
        if "<article" not in page and "card" not in page:
            raise SystemExit(f"the gallery's page for {pairs} shows no sample")
    shown.close()
    return "pages in " + ", ".join(f"{each:.2f}" for each in seconds) + " s"


STEPS: dict[str, Callable[[Path, int], Any]] = {
    "make": make, "dedup": dedup, "keep": keep, "table": table, "stats": stats, "gallery": gallery,
}  # fmt: skip


def _context(folder: Path) -> Context:
    from vlmflow.recipe.curation import CurationSpec
    from vlmflow.step import Context

    curation = CurationSpec.model_validate({"clean": {}, "dedup": {"images": DISTANCE}})
    recipe: Any = SimpleNamespace(seed=SEED, curation=curation)
    return Context(recipe, str(folder / "root"), folder / "scratch")


def _load(folder: Path, name: str) -> Manifest:
    from vlmflow.dataset.manifest import load

    return load(json.loads((folder / f"{name}.json").read_text()))


def _save(folder: Path, name: str, made: Manifest) -> None:
    from vlmflow.dataset.manifest import save

    (folder / f"{name}.json").write_text(json.dumps(save(made, str(folder / "root"))))


def _measure(name: str, folder: Path, rows: int) -> dict[str, Any]:
    """Run a step; its seconds and peak memory are taken before its result is checked."""
    import pyarrow as pa

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    pa.set_cpu_count(CORES)
    wall, cpu = time.perf_counter(), time.process_time()
    found = STEPS[name](folder, rows)
    measured = {
        "seconds": round(time.perf_counter() - wall, 2), "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_bytes": _peak(),
    }  # fmt: skip
    said = found if isinstance(found, str) else f"{found[0]}; {found[1]()}"
    return {**measured, "found": said}


def _peak() -> int:
    """Largest resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
