"""Pull against img2dataset: 4,000 photo-like JPEGs from a loopback server, kept and resized; endless bodies; slow drips.

What each contender proves about a picture that it keeps as it came:

* img2dataset --disable_all_reencoding: nothing; whatever the server sends is stored.
* img2dataset --resize_mode=no --skip_reencode: a full decode (OpenCV).
* ours, proof = structure: markers, tables, scans and end mark (vlmflow/curation/proof.py), which the decoder would accept.
* ours, proof = decode: the same and one decode at 1/8.

Ours also judges every address, takes hashes of every image and journals each one on disk.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from curation_parts import watched
from curation_parts.corpus import corpus

HERE = Path(__file__).resolve().parent
THEIR_FLAGS = ["--input_format=parquet", "--url_col=url", "--caption_col=caption", "--output_format=webdataset",
               "--number_sample_per_shard=1000", "--enable_wandb=False", "--thread_count=64"]  # fmt: skip
ASIS = ["--disable_all_reencoding=True"]
CHECKED = ["--resize_mode=no", "--skip_reencode=True"]
RESIZED = ["--resize_mode=keep_ratio_largest", "--resize_only_if_bigger=True", "--image_size=512", "--encode_quality=92",
           "--skip_reencode=True"]  # fmt: skip
WARM = 20  # pictures of the run whose CPU time counts as start-up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--img2dataset", type=Path, help="its command, in a venv of its own; else only ours is measured"
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender, in turn; the median counts")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "vlmflow-bench-pull", help="corpus and runs"
    )
    parser.add_argument("--only", default="", help="rows whose name matches this pattern")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    count = min(arguments.images, 200) if arguments.quick else arguments.images
    paths = corpus(arguments.work / "corpus", count)
    server = subprocess.Popen(
        [sys.executable, str(HERE / "pull_server.py"), str(arguments.work / "corpus")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            bench = _Bench(arguments, Path(folder), f"http://127.0.0.1:{int(server.stdout.readline())}", paths)
            return bench.all()
    finally:
        server.kill()


class _Bench:
    def __init__(self, arguments: argparse.Namespace, folder: Path, server: str, paths: list[Path]) -> None:
        self.arguments, self.folder, self.server, self.paths = arguments, folder, server, paths
        self.rows: list[dict[str, Any]] = []
        self.startup: dict[str, float] = {}
        self.number = 0

    def all(self) -> dict[str, Any]:
        count, theirs = len(self.paths), self.arguments.img2dataset
        good = [f"{self.server}/img/{path.name}" for path in self.paths]
        print(f"{'':44} {'images':>6} {'CPU s':>7} {'img/CPU-s':>9} {'wall s':>7} {'PSS MiB':>8} {'RSS MiB':>8}")
        clean, few = self.table("clean", good), self.table("few", good[:WARM])
        resize = {"resize": {"side": 512}}
        if theirs is None:
            print(
                "img2dataset: not measured. python3.11 -m venv V; V/bin/pip install img2dataset; then --img2dataset V/bin/img2dataset"
            )
        contenders = [
            partial(self.ours, f"ours, {name}", clean, few, settings, count)
            for name, settings in (("structure", {"proof": "structure"}), ("decode", {}), ("resize 512", resize))
        ]
        for name, flags in (("as it came, unchecked", ASIS), ("full decode, kept", CHECKED), ("resize 512", RESIZED)):
            for processes in (1,) if flags is RESIZED else (1, 2):  # its codecs cost the same in either
                if theirs is not None:
                    label = f"img2dataset, {name}, {processes} proc"
                    contenders.append(partial(self.theirs, label, clean, few, flags, processes, count))
        for number in range(1 if self.arguments.quick else self.arguments.rounds):
            for contender in contenders if number % 2 == 0 else reversed(contenders):
                contender()
        self.faults(good)
        return {"images": count, "bytes": sum(p.stat().st_size for p in self.paths), "rows": self.rows, "ratios": self.ratios(),
                "versions": self.versions()}  # fmt: skip

    def faults(self, good: list[str]) -> None:
        # of the largest picture: not done before the deadline at either rate
        large = max(self.paths, key=lambda path: path.stat().st_size).name
        drips = [f"{self.server}/drip/{rate}/{large}/{i}" for i in range(5) for rate in (500, 1500)]
        for name, bad in (("8 endless", [f"{self.server}/endless/{i}" for i in range(8)]), ("10 drips", drips)):
            table = self.table(name.replace(" ", "-"), [*good[:100], *bad, *good[100:200]])
            kept = min(200, len(good))
            self.ours(f"ours, {name} + {kept} good", table, None, {}, kept)
            if self.arguments.img2dataset:
                self.theirs(f"img2dataset, {name} + {kept} good", table, None, ASIS, 1, None)

    def table(self, name: str, urls: list[str]) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / f"{name}.parquet"
        captions = [f"picture {i}" for i in range(len(urls))]
        pq.write_table(pa.table({"url": urls, "text": captions, "caption": captions}), path)
        return path

    def ours(self, name: str, table: Path, few: Path | None, settings: dict[str, Any], expected: int) -> None:
        def command(which: Path) -> list[str]:
            self.number += 1
            return [
                sys.executable,
                str(HERE / "pull_ours.py"),
                str(self.folder / str(self.number)),
                str(which),
                json.dumps(settings),
            ]

        environment = {"PYTHONPATH": str(HERE.parents[1]), "VLMFLOW_QUIET": "1"}
        self.measure(
            name, command, table, few, environment, lambda: self.check_ours(expected, not settings.get("resize"))
        )

    def theirs(
        self, name: str, table: Path, few: Path | None, flags: list[str], processes: int, expected: int | None
    ) -> None:
        def command(which: Path) -> list[str]:
            self.number += 1
            places = [f"--url_list={which}", f"--output_folder={self.folder / str(self.number)}"]
            return [str(self.arguments.img2dataset), *places, *THEIR_FLAGS, f"--processes_count={processes}", *flags]

        environment = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
        same = flags is not RESIZED
        self.measure(name, command, table, few, environment, lambda: self.check_tars(expected, same))

    def measure(
        self, name: str, command: Any, table: Path, few: Path | None, environment: dict[str, str], check: Any
    ) -> None:
        if not re.search(self.arguments.only, name):
            return
        if few is not None and name not in self.startup:
            self.startup[name] = statistics.median(watched.run(command(few), environment).cpu for _ in range(3))
        found = watched.run(command(table), environment)
        if found.code:
            raise SystemExit(f"{name} ended with {found.code}:\n{found.out[-3000:]}")
        kept = check()
        row: dict[str, Any] = {"name": name, "images": kept, "cpu_s": round(found.cpu, 2), "wall_s": round(found.wall, 2),
                               "pss_mib": round(found.pss), "rss_mib": round(found.largest)}  # fmt: skip
        if few is not None:
            row["startup_cpu_s"] = round(self.startup[name], 2)
            row["per_cpu_s"] = round((kept - WARM) / max(found.cpu - self.startup[name], 1e-6), 1)
        self.rows.append(row)
        rate = f"{row['per_cpu_s']:9.0f}" if few is not None else " " * 9
        print(
            f"{name:44} {kept:6} {found.cpu:7.1f} {rate} {found.wall:7.1f} {found.pss:8.0f} {found.largest:8.0f}",
            flush=True,
        )

    def tars(self) -> list[Path]:
        return sorted((self.folder / str(self.number)).rglob("*.tar"))

    def check_ours(self, expected: int, same: bool) -> int:
        kept = self.check_tars(expected, same)
        assert kept == expected, f"ours kept {kept} of {expected}"
        return kept

    def check_tars(self, expected: int | None, same: bool) -> int:
        """Number of pictures in the last run's shards; those kept as they came must be bytes of the corpus."""
        wanted = {path.stat().st_size: path for path in self.paths} if same else {}
        kept = 0
        for tar in self.tars():
            with tarfile.open(tar) as file:
                for member in file:
                    if member.name.endswith(".jpg"):
                        kept += 1
                        if same and expected is not None and kept % 50 == 1:
                            content = file.extractfile(member)
                            assert content is not None and member.size in wanted, f"{member.name}: bytes of no picture"
        assert expected is None or kept >= expected, f"{kept} of {expected} pictures kept"
        return kept

    def ratios(self) -> dict[str, float]:
        """Images per CPU-second, medians over the rounds: ours over img2dataset's best number of processes."""
        rates: dict[str, list[float]] = defaultdict(list)
        for row in self.rows:
            if "per_cpu_s" in row:
                rates[row["name"]].append(row["per_cpu_s"])

        def best(start: str) -> float:
            return max((statistics.median(found) for name, found in rates.items() if name.startswith(start)), default=0)

        pairs = {
            "originals, structure / its unchecked": ("ours, structure", "img2dataset, as it came"),
            "originals, structure / its full decode": ("ours, structure", "img2dataset, full decode"),
            "originals, decode / its unchecked": ("ours, decode", "img2dataset, as it came"),
            "originals, decode / its full decode": ("ours, decode", "img2dataset, full decode"),
            "resize 512": ("ours, resize", "img2dataset, resize"),
        }
        found = {}
        for name, (mine, other) in pairs.items():
            ours, theirs = best(mine), best(other)
            if ours and theirs:
                found[name] = round(ours / theirs, 2)
                print(f"{name:44} {found[name]:6.2f} x")
        return found

    def versions(self) -> dict[str, str]:
        versions = {"python": sys.version.split()[0]}
        if self.arguments.img2dataset:
            python = self.arguments.img2dataset.parent / "python"
            text = "import importlib.metadata as m; print(m.version('img2dataset'))"
            versions["img2dataset"] = subprocess.run(
                [str(python), "-c", text], capture_output=True, text=True
            ).stdout.strip()
        for name in ("aiohttp", "Pillow", "uvloop"):
            import importlib.metadata

            with suppress(importlib.metadata.PackageNotFoundError):  # uvloop is used where it is installed
                versions[name] = importlib.metadata.version(name)
        return versions
