"""Perplexity of captions: one sample at a time, padded batches, length buckets, and ours, on the same scorer.

Before any time counts, every contender's log-likelihood of every sample must equal ours within 1e-5 relative (1e-2 in
bf16). Contenders run in fresh processes in the order A B ... B A; the faster of the two passes counts.
Tokens are real ones: text and image, no padding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from curation_parts.perplexity_world import TEXT, TINY, TINY_32K, TWO_B, World, build, load

WAYS = Path(__file__).with_name("perplexity_ways.py")
PEERS = ["one_by_one", "padded_random", "bucketed_2048", "bucketed_4096"]
EQUAL = {"fp32": 1e-5, "bf16": 1e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda = a 2.1 B scorer in bf16 on the GPU"
    )
    parser.add_argument("--samples", type=int, help="samples of each comparison")
    parser.add_argument(
        "--cpu-clock", action="store_true", help="judge by CPU seconds: for a machine that is not quiet"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All comparisons; prints one table each."""
    worlds = [TWO_B] if arguments.device == "cuda" else [TINY, TINY_32K, TEXT]
    if arguments.quick:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        worlds = [replace(w, samples=12, language={**w.language, **small}) for w in worlds]
    if arguments.samples:
        worlds = [replace(world, samples=arguments.samples) for world in worlds]
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {
        "versions": versions,
        "comparisons": [compare(world, "cpu" if arguments.cpu_clock else "wall") for world in worlds],
    }


def compare(world: World, clock: str) -> dict[str, Any]:
    """One table."""
    peers = [*PEERS, *(["bucketed_16384"] if world.device == "cuda" else [])]
    peers = [name for name in peers if world.padded or name != "padded_random"]
    order = [*peers, "ours"]
    with tempfile.TemporaryDirectory() as scratch:
        about = build(Path(scratch), world)
        tokens = _tokens(Path(scratch))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
        for name in [*order, *reversed(order)]:
            runs[name].append(_child(name, scratch))
    gaps = {name: _gap(found[0]["found"], runs["ours"][0]["found"]) for name, found in runs.items()}
    if wrong := {name: gap for name, gap in gaps.items() if gap > EQUAL[world.dtype]}:
        raise SystemExit(
            f"no comparison: log-likelihoods differ from ours by {wrong} relative, {EQUAL[world.dtype]} is allowed"
        )
    seconds = {name: min(run[clock] for run in found) for name, found in runs.items()}
    rows = {
        name: {
            "tokens_per_second": round(tokens / seconds[name]),
            "ours_is_faster_by": round(seconds[name] / seconds["ours"], 2),
            "peak_mib": max(run["peak_mib"] for run in found),
            "largest_difference": gaps[name],
        }
        for name, found in runs.items()
    }
    bars = {
        "one_by_one": rows["one_by_one"]["ours_is_faster_by"],
        "best_bucketed": min(row["ours_is_faster_by"] for name, row in rows.items() if name.startswith("bucketed")),
    }
    threads = runs["ours"][0]["threads"]
    print(f"\n{world.name}: {about['parameters'] / 1e6:.1f} M parameters ({about['language_parameters'] / 1e6:.1f} M language), "
          f"{world.samples} samples, {tokens} tokens, {world.device} {world.dtype}, {threads} threads, {clock} seconds")  # fmt: skip
    print(f"{'':16}{'tokens/s':>10}{'ours is':>10}{'peak MiB':>10}{'differs':>10}")
    for name, row in rows.items():
        print(f"{name:16}{row['tokens_per_second']:>10,}{row['ours_is_faster_by']:>9.2f}x{row['peak_mib']:>10,.0f}"
              f"{row['largest_difference']:>10.0e}")  # fmt: skip
    return {"world": world.name, **about, "samples": world.samples, "tokens": tokens, "device": world.device,
            "dtype": world.dtype, "threads": threads, "clock": clock, "ways": rows, "bars": bars}  # fmt: skip


def _child(way: str, scratch: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(WAYS), way, scratch], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"contender {way} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _tokens(folder: Path) -> int:
    from vlmflow.models.inference import VLM, prepared

    work = load(folder)
    return sum(len(item.ids) for item in prepared(VLM(work.model, work.tokenizer), work.requests))


def _gap(found: list[Any], ours: list[Any]) -> float:
    """Largest relative difference of a log-likelihood; token counts must agree."""
    if [count for _, count in found] != [count for _, count in ours]:
        raise SystemExit("no comparison: the contenders count different tokens")
    return max(abs(a - b) / abs(b) for (a, _), (b, _) in zip(found, ours, strict=True))
