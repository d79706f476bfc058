"""Several ranks on each of several nodes, against as many ranks of one machine and against one, bit by bit.

    python benchmarks/train_nodes.py --nodes 2 --ranks 2 --zero 0 2 3

Trains the tests' tiny stage three times under each ZeRO stage, through the training step: by one process, by nodes x ranks
local processes, and by emulated nodes. A node is what a pod of a TrainJob runs, ``python -m vlmflow.training.node``, with
the variables of Trainer's torch policy and a disk of its own; nodes meet over loopback with gloo. Nodes must have the bits
of local processes, and one process their weights within 1e-5. Prints one line a case, writes JSON with ``--out``; exits
non-zero when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]  # the tests' tiny world

import training_world as world  # noqa: E402

from vlmflow.models.store import ModelRef  # noqa: E402
from vlmflow.training import launchers  # noqa: E402
from vlmflow.training import run as training  # noqa: E402

TOLERANCE = 1e-5
SECONDS = 900  # that one training may take


class Nodes:
    """A launcher in the place of the local one: nodes of equally many ranks, each with a scratch folder of its own."""

    def __init__(self, folder: Path, nodes: int, ranks: int) -> None:
        self.folder, self.nodes, self.ranks = folder, nodes, ranks

    def __call__(self, request: launchers.LaunchRequest, on_event: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = {
            "PET_NNODES": str(self.nodes),
            "PET_NPROC_PER_NODE": str(self.ranks),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(HERE.parent),
        }
        started = []
        for number in range(self.nodes):
            own = {"PET_NODE_RANK": str(number), "VLMFLOW_SCRATCH": str(self.folder / f"node-{number}")}
            command = [sys.executable, "-m", "vlmflow.training.node", request.job]
            with open(self.folder / f"node-{number}.log", "w") as log:
                started.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **meeting, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            codes = [process.wait(SECONDS) for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            logs = [(self.folder / f"node-{number}.log").read_text()[-2000:] for number in range(self.nodes)]
            raise SystemExit(f"nodes ended with {codes}:\n" + "\n".join(logs))


def weights(ref: ModelRef) -> dict[str, Any]:
    """Published tensors by name."""
    from safetensors.torch import load_file

    return load_file(Path(ref.uri.removeprefix("file://")) / "model.safetensors")


def compare(folder: Path, nodes: int, ranks: int, zero: int, steps: int) -> dict[str, Any]:
    """One line of the table: nodes against local processes (bits), and against one process (largest difference)."""
    init = world.initial(world.context(folder, world.recipe()))
    data = {"seed": world.dataset(folder, [world.sample(i, images=i % 4 != 1) for i in range(48)])}

    def train(name: str, processes: int, launcher: Any = None) -> ModelRef:
        stage = {"processes": processes, "epochs": 4, "max_steps": steps, "packs": 2 * nodes * ranks, "zero": zero}
        place = world.context(folder / name, world.recipe(**stage))
        place.root = f"file://{place.root}"
        kept = launchers.LAUNCHERS["local"]
        launchers.LAUNCHERS["local"] = launcher or kept
        try:
            return training.run(place, "sft", init, data)
        finally:
            launchers.LAUNCHERS["local"] = kept

    spread = train("nodes", nodes * ranks, Nodes(folder, nodes, ranks))
    local, one = train("local", nodes * ranks), train("one", 1)
    ours, theirs, begun = weights(spread), weights(one), weights(init)
    return {
        "zero": zero,
        "nodes": nodes,
        "ranks": ranks,
        "steps": steps,
        "bits_of_local": [f.sha256 for f in spread.files] == [f.sha256 for f in local.files],
        "from_one_process": max(float((ours[n] - theirs[n]).abs().max()) for n in theirs),
        "moved": max(float((ours[n] - begun[n]).abs().max()) for n in begun),
    }


def main() -> int:
    """Print the table; returns 1 when nodes differ from local processes, or from one process by more than 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for zero in given.zero:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row := compare(Path(folder), given.nodes, given.ranks, zero, given.steps))
        print(json.dumps(row), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return int(any(not row["bits_of_local"] or row["from_one_process"] >= TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
