"""The pack plan on a million samples of mixed length: how full, how even, how fast.

    python benchmarks/plan.py --samples 1000000

Lengths are drawn: captions of 30 to 200 tokens (lognormal) with an image of 1 to 52 tiles of 64 tokens, conversations of
40 to 700 tokens with and without one. Four mixtures are planned; costs are those of a model whose language part is
about twenty times its encoder. Prints one table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from vlmflow.dataset.manifest import ShardRef
from vlmflow.recipe.mixture import DataUse
from vlmflow.recipe.stage import StageSpec
from vlmflow.training.flops import CostModel
from vlmflow.training.plan_view import padding
from vlmflow.training.planner import make_plan
from vlmflow.training.pool import Examples, ShardUse, Visual

TILE_TOKENS, MOST_TILES = 64, 52
SHARD = 1000  # samples of a shard
WORLDS = (2, 8, 64)
MIXTURES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "grouped by modality": {"group": "modality"},
    "text 100 % to 30 %": {"text_share": {"start": 1.0, "end": 0.3, "warmup": 0.2}},
    "9 tiles, then 52": {"tiles": [{"until": 0.5, "max_tiles": 9}]},
}


def samples(n: int, seed: int = 0) -> Examples:
    """Drawn lengths as examples of one ingredient."""
    random = np.random.default_rng(seed)
    kind = random.choice(4, n, p=[0.4, 0.35, 0.15, 0.1])
    caption = np.clip(random.lognormal(np.log(80), 0.5, n), 30, 200).astype(np.int64)
    talk = np.clip(random.lognormal(np.log(500), 0.8, n), 40, 700).astype(np.int64)
    tiles = np.where(kind == 3, 0, np.minimum(MOST_TILES, random.geometric(0.12, n)))
    text = np.where(kind >= 2, talk, caption)
    shown = (tiles > 0).astype(np.int64)
    arrays = {
        "use": np.zeros(n, dtype=np.int64),
        "shard": np.arange(n) // SHARD,
        "row": np.arange(n) % SHARD,
        "unit_start": np.arange(n + 1),
        "begin": np.zeros(n, dtype=np.int64),
        "end": text,
        "targets": np.maximum(1, text // 2),
        "images": shown,
        "image_start": np.concatenate([[0], np.cumsum(shown)]),
        "size": tiles[tiles > 0] - 1,
        "sizes": np.stack([np.arange(1, MOST_TILES + 1), np.ones(MOST_TILES, dtype=np.int64)], axis=1),
    }
    shards = [
        ShardUse(
            use=0, dataset="drawn", shard=ShardRef(uri="", sha256=f"{i:064x}", bytes=0, samples=SHARD, source="drawn")
        )
        for i in range(-(-n // SHARD))
    ]
    report = {"examples": n, "seen": n, "filtered": 0, "failed": 0, "reasons": []}
    return Examples([DataUse(dataset="drawn", text="alt")], shards, arrays, report)


def main() -> None:
    """Plan every mixture, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=8192, help="budget of a pack")
    parser.add_argument("--packs", type=int, default=64, help="packs a step")
    parser.add_argument("--json", type=Path, default=None, help="where the result is written")
    arguments = parser.parse_args()
    drawn = samples(arguments.samples)
    visual = Visual(TILE_TOKENS, MOST_TILES, lambda width, height, most: min(width, most))
    cost = CostModel(per_token=1.0, per_token_squared=1 / 30_000, per_tile=TILE_TOKENS / 2)
    rows = []
    print(
        f"{'mixture':<22}{'seconds':>8}{'steps':>7}{'fill':>9}{'padded':>9}{'buckets':>9}   imbalance of {WORLDS} ranks"
    )
    for name, mixture in MIXTURES.items():
        stage = StageSpec.model_validate(
            {
                "prompt": "continuation",
                "data": [{"dataset": "drawn", "text": "alt"}],
                "train": [{"modules": "language", "lr": 1e-5}],
                "mixture": mixture,
                "budget": {"tokens": arguments.tokens, "tiles": 512},
                "packs": arguments.packs,
            }
        )
        began = time.perf_counter()
        plan = make_plan(drawn, stage, 0, visual, cost)
        seconds = time.perf_counter() - began
        waste = padding(plan, arguments.tokens)
        uneven = {world: round(plan.imbalance(world), 4) for world in WORLDS}
        rows.append({"mixture": name, "seconds": round(seconds, 1), "steps": plan.steps, "imbalance": uneven})
        rows[-1] |= {"fill": plan.report["fill_tokens"], "padding": waste, "digest": plan.digest()}
        print(
            f"{name:<22}{seconds:>8.1f}{plan.steps:>7}{plan.report['fill_tokens']:>9.2%}{waste['batches']:>9.1%}"
            f"{waste['buckets']:>9.1%}   {', '.join(f'{value:.3f}' for value in uneven.values())}",
            flush=True,
        )
    memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(
        f"{arguments.samples} samples, {arguments.packs} packs of {arguments.tokens} tokens a step, peak memory {memory} MiB"
    )
    if arguments.json:
        about = {
            "samples": arguments.samples,
            "tokens": arguments.tokens,
            "packs": arguments.packs,
            "memory_mib": memory,
        }
        machine = {"python": platform.python_version(), "numpy": np.__version__, "processor": platform.machine()}
        arguments.json.write_text(json.dumps({**about, **machine, "plans": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
