"""What a rank needs in memory to load a model and make its engine, whole (ZeRO 0) and partitioned (ZeRO 3), on CPUs.

    python benchmarks/load_memory.py

Writes a random model, then two processes load it under each stage and make an engine that trains the projector. Counted
is the growth of a process's own memory (anonymous pages): pages of the weight file are shared and can be dropped. glibc is
told to give freed blocks back (MALLOC_MMAP_THRESHOLD_), or it would keep what modules took before they were partitioned.
Prints one table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

STAGES = (0, 3)
RANKS = 2


def own_memory() -> float:
    """Anonymous memory of this process, MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024


class Peak(threading.Thread):
    """The largest own memory since it started, looked at every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = own_memory()

    def run(self) -> None:
        while True:
            self.most = max(self.most, own_memory())
            time.sleep(0.005)

    def grown(self) -> float:
        return max(self.most, own_memory()) - self.before


def rank(folder: str, zero: int) -> dict[str, Any]:
    """Load and make an engine in this process; its growth in MiB."""
    from vlmflow import models
    from vlmflow.training import engine as ds
    from vlmflow.training.engine_state import numel

    number = int(os.environ["RANK"])
    ds.join(f"file://{folder}/meeting-{zero}", number, RANKS)
    models.register()
    peak = Peak()
    peak.start()
    model, _ = ds.load_model(f"{folder}/model", zero, "fp32")
    loaded = peak.grown()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    group = {"params": trained, "lr": 1e-3, "peak": 1e-3, "weight_decay": 0.0}
    size = sum(numel(p) for p in model.parameters()) * 4 / 2**20
    ds.make_engine(model, [group], {"betas": (0.9, 0.999), "eps": 1e-8, "clip": 1.0}, zero, "fp32")
    return {"zero": zero, "rank": number, "model": size, "load": loaded, "engine": peak.grown()}


def write_model(folder: Path) -> None:
    """A random model of about 0.2 billion parameters."""
    from training_peers import world

    from vlmflow import models

    language = {**world.TINY.language, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    made = world.recipe(replace(world.TINY, language={**language, "num_attention_heads": 16}))
    tokens = world.tokenizer()
    models.family("points").build(made.model, tokens, 3).save_pretrained(folder)
    tokens.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("load_memory.json"), help="where the JSON goes")
    parser.add_argument("--rank-of", nargs=2, metavar=("FOLDER", "ZERO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        print("\x1e" + json.dumps(rank(options.rank_of[0], int(options.rank_of[1]))), flush=True)
        os._exit(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        for zero in STAGES:
            command = [sys.executable, __file__, "--rank-of", folder, str(zero)]
            world = {"WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            ranks = [
                subprocess.Popen(
                    command,
                    env={**os.environ, **world, "RANK": str(r), "LOCAL_RANK": str(r)},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for r in range(RANKS)
            ]
            said = [process.communicate()[0] for process in ranks]
            rows += [json.loads(text.rsplit("\x1e", 1)[1]) for text in said]
    print(f"{'ZeRO':>4} {'rank':>4} {'model':>8} {'load':>8} {'+ engine':>8}   MiB")
    for row in rows:
        print(f"{row['zero']:>4} {row['rank']:>4} {row['model']:8.0f} {row['load']:8.0f} {row['engine']:8.0f}")
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
