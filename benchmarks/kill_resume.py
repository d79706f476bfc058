"""Kill a whole run at random instants and compare it, hash by hash, with one that was left alone.

    python benchmarks/kill_resume.py --kills 20

Runs the tiny recipe at a reduced size twice, each with a store and an MLflow server of its own: once undisturbed, once
with SIGKILL at random moments of its life, to one step's processes or to the whole run in turn, and the same command
again after each kill. At the end every shard, layer, manifest, weight file, score and export of the two stores must be
equal. Prints one table and writes JSON; exits non-zero when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vlmflow import demo, local_stack, process_tree, recipe
from vlmflow.digest import sha256_file

RECIPE = "recipes/points-tiny.yaml"
SIZES = demo.Sizes(
    seed=96, texts=24, web=120, base=96, charts=24, pairs=24, describe=24, digits=30, words=24, mcq=16, yesno=16
)
SMALL = [
    "bootstrap.max_steps=40",
    "bootstrap.checkpoint.every=8",
    "stages.ocr.max_steps=6",
    "stages.ocr.checkpoint.every=2",
    "stages.align.max_steps=4",
    "stages.align.checkpoint.every=2",
    "stages.sft.max_steps=6",
    "stages.sft.checkpoint.every=2",
    "pull.samples_per_shard=40",
    # So short a training describes badly; here only the hashes count.
    "curation.caption.failure_limit=1",
    "curation.fuse.failure_limit=1",
    "curation.perplexity.failure_limit=1",
    "curation.fuse.fallback=alt",
]
# What a run measures about itself: its clock, its throughput.
MEASURED = ("runs/", "train_log.jsonl", "trainable.json", "model.json")


def start(state: Path, overrides: list[str]) -> subprocess.Popen:
    """The command a user types, in a session of its own."""
    command = [sys.executable, "-m", "vlmflow.cli", "run", RECIPE, *overrides, "--state-dir", str(state)]
    log = open(state.with_suffix(".log"), "ab")  # noqa: SIM115 - the child writes to it
    return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def inventory(state: Path) -> dict[str, str]:
    """sha256 of every stored object that a run's result consists of, by key."""
    root = state / "s3" / "vlmflow"
    found = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")}
    return {key: sha256_file(path) for key, path in sorted(found.items()) if not any(m in key for m in MEASURED)}


def strike(run: subprocess.Popen, whole: bool) -> str:
    """SIGKILL the newest step's processes, or everything the command started; returns what was hit."""
    below = process_tree.descendants(run.pid)
    commands = {}
    for pid in below:
        try:
            commands[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    steps = [
        pid for pid, text in commands.items() if "kfp.dsl.executor_main" in text or "vlmflow.training.worker" in text
    ]
    victims = [*below, run.pid] if whole or not steps else [steps[-1]]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return "whole run" if whole or not steps else "one process of a step"


def main() -> int:
    """Run the comparison and stop the servers that it started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=None, help="working folder (default: a temporary one)")
    parser.add_argument("--json", type=Path, default=None, help="where the result is written")
    arguments = parser.parse_args()
    state = arguments.state or Path(tempfile.mkdtemp(prefix="vlmflow-kill-"))
    chance = random.Random(arguments.seed)
    try:
        return compare(arguments, state, chance)
    finally:
        for name in ("calm", "killed"):
            local_stack.down(state / name)


def compare(arguments: argparse.Namespace, state: Path, chance: random.Random) -> int:
    """Both runs and the table of what differs; 0 when nothing does."""
    with demo.serve(state / "site", SIZES, port=0) as site:
        plain = recipe.load(RECIPE).model_dump(mode="json")
        overrides = [*site.overrides(demo.fields(plain)), *SMALL]
        began = time.monotonic()
        if start(state / "calm", overrides).wait():
            print((state / "calm.log").read_text()[-3000:], file=sys.stderr)
            return 1
        seconds = time.monotonic() - began
        print(f"undisturbed run: {seconds:.0f} s, {len(inventory(state / 'calm'))} objects", flush=True)
        kills: list[dict] = []
        while True:
            run = start(state / "killed", overrides)
            if len(kills) < arguments.kills:
                # Steps found finished pass quickly, so most of a rerun's life is where the last one died.
                wait = chance.uniform(1.0, max(4.0, 2.5 * seconds / max(1, arguments.kills)))
                try:
                    run.wait(wait)
                except subprocess.TimeoutExpired:
                    hit = strike(run, whole=len(kills) % 2 == 0)
                    kills.append({"after_s": round(wait, 1), "hit": hit})
                    print(f"kill {len(kills)}: {hit} after {wait:.1f} s", flush=True)
                    run.wait()
                    continue
            if run.wait() == 0:
                break
            if len(kills) >= arguments.kills and run.returncode:
                print((state / "killed.log").read_text()[-3000:], file=sys.stderr)
                return 1
    calm, killed = inventory(state / "calm"), inventory(state / "killed")
    different = sorted(key for key in calm.keys() & killed.keys() if calm[key] != killed[key])
    missing, extra = sorted(calm.keys() - killed.keys()), sorted(killed.keys() - calm.keys())
    kinds = {
        kind: sum(key.startswith(f"{kind}/") for key in calm) for kind in sorted({key.split("/")[0] for key in calm})
    }
    print(f"\n{'objects':<14}{'number':>8}\n" + "\n".join(f"{kind:<14}{number:>8}" for kind, number in kinds.items()))
    print(f"kills {len(kills)}, different {len(different)}, missing {len(missing)}, extra {len(extra)}")
    for name, keys in (("different", different), ("missing", missing), ("extra", extra)):
        for key in keys[:10]:
            print(f"  {name}: {key}")
    if arguments.json:
        result = {"kills": kills, "objects": kinds, "different": different, "missing": missing, "extra": extra}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if different or missing or extra else 0


if __name__ == "__main__":
    sys.exit(main())
