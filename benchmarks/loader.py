"""How fast the loader makes batches when nothing trains, from files and from an S3 store.

    python benchmarks/loader.py                  # JPEGs up to 1300 px a side, tiles of 336 px, 1, 2 and 4 threads
    python benchmarks/loader.py --quick

Shards are read, decoded, tiled and tokenised along a real plan, and the batches are thrown away. The store is one that
this program starts (rclone, as `vlmflow up` does); its cache of shards begins empty in every run, so the download counts.
Prints one table and writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def uploaded(manifest: Any, prefix: str) -> Any:
    """The manifest with its shards put under ``prefix``."""
    from vlmflow import storage
    from vlmflow.dataset.shard import INDEX_SUFFIX

    shards = []
    for shard in manifest.shards:
        path = shard.uri.removeprefix("file://")
        uri = storage.join(prefix, Path(path).name)
        for suffix in (INDEX_SUFFIX, ""):
            storage.put_file(path + suffix, uri + suffix)
        shards.append(shard.model_copy(update={"uri": uri}))
    return manifest.model_copy(update={"shards": shards})


def measure(folder: Path, size: Any, manifest: Any, name: str, steps: int, workers: int) -> dict[str, Any]:
    """One run over the plan with an empty shard cache."""
    from training_peers import ours

    job = ours.job(folder, size, name, steps, 1, manifest)
    made = ours.loader(job, workers=workers)
    held = sum(entry.shard.bytes for entry in made.plan.shards)
    began, busy = time.perf_counter(), time.process_time()
    samples = images = tiles = tokens = 0
    for _, micros in made.steps():
        for micro in micros:
            samples, images, tokens = samples + len(micro.keys), images + micro.images, tokens + micro.tokens
            tiles += len(micro.batch["pixel_values"]) if micro.images else 0
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    made.close()
    return {
        "from": name,
        "threads": workers,
        "samples_per_second": samples / seconds,
        "images_per_second": images / seconds,
        "tiles_per_second": tiles / seconds,
        "tokens_per_second": tokens / seconds,
        "megabytes_per_second": held / 2**20 / seconds,
        "cpu_ms_per_image": busy * 1e3 / max(1, images),
    }


def main() -> int:
    """Build the shards, start the store, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--quick", action="store_true", help="few small images, one thread")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "loader_cpu.json")
    arguments = parser.parse_args()
    from training_peers import report
    from training_peers.world import QUICK, TINY, build

    from vlmflow import local_stack
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.storage_s3 import s3_store

    size = replace(TINY, name="loader", samples=arguments.samples, tile=336, max_tiles=4, mean=820, longest=4096,
                   tokens=8192, tiles=64, pictures=1300)  # fmt: skip
    threads = arguments.threads
    if arguments.quick:
        size, threads = replace(QUICK, name="loader"), [1]
    rows = []
    with tempfile.TemporaryDirectory(prefix="vlmflow-loader-") as place:
        folder = Path(place)
        build(folder, size)
        manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
        steps = max(1, round(size.samples * size.mean / size.tokens))
        info = local_stack.up(folder / "state", services=["s3"])
        try:
            os.environ.update(local_stack.environment(info))
            s3_store().make_bucket("loader")
            stored = uploaded(manifest, "s3://loader/shards")
            for workers in threads:
                for name, which in (("file", manifest), ("s3", stored)):
                    rows.append(measure(folder, size, which, f"{name}-{workers}", steps, workers))
        finally:
            local_stack.down(folder / "state")
    head = f"{report.cpu_model()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {size.samples} samples, tiles of {size.tile} px"
    print(
        f"{head}\n{'source':<10}{'threads':>8}{'samples/s':>11}{'images/s':>10}{'tiles/s':>9}{'tokens/s':>10}{'MB/s':>8}{'CPU ms an image':>17}"
    )
    for row in rows:
        print(
            f"{row['from'].split('-')[0]:<10}{row['threads']:>8}{row['samples_per_second']:>11.1f}{row['images_per_second']:>10.1f}"
            f"{row['tiles_per_second']:>9.1f}{row['tokens_per_second']:>10.0f}{row['megabytes_per_second']:>8.1f}{row['cpu_ms_per_image']:>17.1f}"
        )
    print("MB/s: bytes of all shards of the plan / wall time; images are JPEGs of noise, the dearest to decode")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": head, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
