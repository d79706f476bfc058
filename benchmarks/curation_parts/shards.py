"""Reading shuffled raw bytes of shards: `ShardReader` (offset index, pread) against webdataset's own reader.

The shards have the layout that img2dataset writes (jpg, txt and json a sample), random bytes as pictures, and lie in the
page cache: the reader is measured, not the disk. Both readers must first give the same multiset of samples. `webdataset`
shuffles shards and then a buffer of 1,000 samples, its documented way; ours visits a true permutation of all samples.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from vlmflow.dataset.shard import INDEX_SUFFIX, ShardReader

PER_SHARD = 500
BUFFER = 1000  # of webdataset's shuffle
BATCH = 64  # samples that its workers send at a time: one by one is slower


class Measured(NamedTuple):
    """One pass: samples that came, seconds, CPU seconds."""

    samples: int
    wall: float
    cpu: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--samples", type=int, default=None, help="default 12000, with --quick 1000")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contender runs; the median counts")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the shards, check equality, measure, print the table."""
    samples = arguments.samples or (1000 if arguments.quick else 12_000)
    rounds = 1 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory(prefix="vlmflow-shards-") as folder:
        tars = write(Path(folder), samples)
        size = sum(Path(tar).stat().st_size for tar in tars)
        _equal(tars, samples)
        found: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
        for number in range(rounds):
            order = list(CONTENDERS) if number % 2 == 0 else list(reversed(CONTENDERS))
            for name in order:
                found[name].append(CONTENDERS[name](tars))
    if lost := {name: each for name, each in found.items() if any(m.samples != samples for m in each)}:
        raise SystemExit(f"a reader did not give {samples} samples: {lost}")
    rows = {
        name: {
            "samples_per_s": round(samples / statistics.median(m.wall for m in times)),
            "samples_per_cpu_s": round(samples / statistics.median(m.cpu for m in times)),
        }
        for name, times in found.items()
    }
    ratios = {
        "one process": _ratio(rows, "vlmflow, 1 process", "webdataset, 1 process"),
        "two processes": _ratio(rows, "vlmflow, 2 processes", "webdataset, 2 processes"),
        "webdataset's 2 DataLoader workers, ours 1 process": _ratio(
            rows, "vlmflow, 1 process", "webdataset, DataLoader with 2 workers"
        ),
    }
    print(
        f"{samples} samples (jpg + txt + json), {size / 1e9:.2f} GB in {len(tars)} tars, shuffled, raw bytes; the same samples"
    )
    print(f"{'reader':<40}{'samples/s':>12}{'samples/CPU-s':>16}")
    for name, row in rows.items():
        print(f"{name:<40}{row['samples_per_s']:>12,}{row['samples_per_cpu_s']:>16,}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['wall']} times by wall clock, {ratio['cpu']} times by CPU seconds")
    peers = {name: version(name) for name in ("webdataset", "torch")}
    return {"samples": samples, "bytes": size, "rounds": rounds, "readers": rows, "ratios": ratios, "versions": peers}


def _ratio(rows: dict[str, dict[str, int]], ours: str, theirs: str) -> dict[str, float]:
    keys = {"wall": "samples_per_s", "cpu": "samples_per_cpu_s"}
    return {name: round(rows[ours][key] / rows[theirs][key], 2) for name, key in keys.items()}


def write(folder: Path, samples: int) -> list[str]:
    """Tars of `PER_SHARD` samples with their indexes; pictures of log-normal size, 88 kB on average. Returns their paths."""
    chance, noise = random.Random(1), os.urandom(1 << 20)
    tars = []
    for first in range(0, samples, PER_SHARD):
        path = folder / f"{first // PER_SHARD:05d}.tar"
        index: dict[str, dict[str, list[int]]] = {}
        with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(first + PER_SHARD, samples)):
                key, length = f"{number:09d}", min(400_000, int(chance.lognormvariate(11.0, 0.85)))
                start, text = chance.randrange(len(noise) - length), f"a caption of picture {number} " * 3
                about = {"key": key, "caption": text, "url": f"http://example.org/{number}.jpg", "status": "success"}
                members = {
                    "jpg": noise[start : start + length],
                    "txt": text.encode(),
                    "json": json.dumps(about).encode(),
                }
                index[key] = {}
                for name, data in members.items():
                    entry = tarfile.TarInfo(f"{key}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                    index[key][name] = [file.tell() - -(-len(data) // 512) * 512, len(data)]
        path.with_name(path.name + INDEX_SUFFIX).write_text(json.dumps(index))
        tars.append(str(path))
    return tars


def _ours(tars: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    readers = [ShardReader(tar) for tar in tars]
    order = [(reader, key) for reader in readers for key in reader.keys()]
    random.Random(0).shuffle(order)
    return ((key, reader.raw(key)) for reader, key in order)


def _pipeline(tars: list[str]) -> Any:
    import webdataset

    return webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0, nodesplitter=None).shuffle(BUFFER)


def _workers(tars: list[str]) -> int:
    from torch.utils.data import DataLoader

    loader = DataLoader(
        _pipeline(tars).batched(BATCH, collation_fn=None), batch_size=None, num_workers=min(2, len(tars))
    )
    return sum(len(batch) for batch in loader)


def _count_ours(tars: list[str]) -> int:
    return sum(1 for _ in _ours(tars))


def _count_theirs(tars: list[str]) -> int:
    return sum(1 for _ in _pipeline(tars))


def _half(count: Callable[[list[str]], int], tars: list[str], out: Any) -> None:
    began, used = time.perf_counter(), time.process_time()
    out.put((count(tars), began, time.perf_counter(), time.process_time() - used))


def _alone(count: Callable[[list[str]], int], processes: int = 1) -> Callable[[list[str]], Measured]:
    """Fresh processes with a share of the tars each, as the ranks of a training read them; measured inside, without start-up."""

    def read(tars: list[str]) -> Measured:
        context = multiprocessing.get_context("fork")
        out = context.SimpleQueue()
        children = [context.Process(target=_half, args=(count, tars[i::processes], out)) for i in range(processes)]
        for child in children:
            child.start()
        told = [out.get() for _ in children]
        for child in children:
            child.join()
        wall = max(end for _, _, end, _ in told) - min(began for _, began, _, _ in told)
        return Measured(sum(count for count, *_ in told), wall, sum(cpu for *_, cpu in told))

    return read


def _with_children(count: Callable[[list[str]], int]) -> Callable[[list[str]], Measured]:
    """What a reader with worker processes of its own costs, those included."""

    def spent() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def read(tars: list[str]) -> Measured:
        began, used = time.perf_counter(), spent()
        found = count(tars)
        return Measured(found, time.perf_counter() - began, spent() - used)

    return read


CONTENDERS: dict[str, Callable[[list[str]], Measured]] = {
    "vlmflow, 1 process": _alone(_count_ours),
    "webdataset, 1 process": _alone(_count_theirs),
    "vlmflow, 2 processes": _alone(_count_ours, 2),
    "webdataset, 2 processes": _alone(_count_theirs, 2),
    "webdataset, DataLoader with 2 workers": _with_children(_workers),
}


def _equal(tars: list[str], samples: int) -> None:
    """Ends the run unless both readers give the same multiset of keys and bytes."""

    def digest(key: str, members: dict[str, bytes]) -> str:
        parts = [key, *(f"{name} {hashlib.sha256(members[name]).hexdigest()}" for name in sorted(members))]
        return "\n".join(parts)

    ours = sorted(digest(key, members) for key, members in _ours(tars))
    theirs = sorted(
        digest(sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in _pipeline(tars)
    )
    if len(ours) != samples or ours != theirs:
        raise SystemExit(f"the readers differ: {len(ours)} and {len(theirs)} of {samples} samples")
