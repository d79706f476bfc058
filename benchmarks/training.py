"""How fast the trainer is, against the ways others lay out the same samples.

    python benchmarks/training.py                     # CPU, tiny model; every contender four times: hours on one core
    python benchmarks/training.py --size 2b           # a GPU, random 2B-class weights, bf16, packs of 8192 tokens
    python benchmarks/training.py --only ours padded:8 bucketed:8 bare
    python benchmarks/training.py --samples 512       # more distinct samples: length bucketing then pads much less
    python benchmarks/training.py --quick             # the equality gate and one short pass of each, for the tests

Every contender trains the same model class from the same weights on the same samples, with the same optimizer, clipping
and samples a step. First the gate: packed and padded must equal samples run one by one (fp32, 1e-5), or nothing is timed.
Then each contender runs in a fresh process with pinned threads, in the order A B C .. C B A, and its best pass counts.
Prints one table and writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE))

OURS, PADDED, BUCKETED, TRL, NANO, DENSE, BARE = "ours", "padded", "bucketed", "trl", "nanovlm", "dense", "bare"
COST, COUNT = "ranks-cost", "ranks-count"
TITLES = {
    OURS: "ours: budget packs, varlen",
    PADDED: "HF Trainer, padded",
    BUCKETED: "HF Trainer, length-bucketed",
    TRL: "TRL SFTTrainer, padded",
    DENSE: "packs, dense mask, bare loop",
    NANO: "packs as nanoVLM, bare loop",
    BARE: "our packs, bare loop",
    COST: "2 ranks, our packs dealt by cost",
    COUNT: "2 ranks, samples dealt by count",
}


def contenders(rows: tuple[int, ...], pairs: list[str]) -> list[str]:
    """Names as ``kind`` or ``kind:rows a forward``; ``pairs`` are those of two processes."""
    swept = [f"{kind}:{n}" for kind in (PADDED, BUCKETED, TRL) for n in rows]
    return [OURS, *swept, DENSE, NANO, BARE, *pairs]


def child(arguments: argparse.Namespace) -> None:
    """One pass of one contender, in this process; its numbers go to ``--out``."""
    import torch
    from training_peers import huggingface, layouts, ours
    from training_peers.measure import Steps
    from training_peers.world import rows as load_rows

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    folder, size = arguments.folder, size_of(arguments)
    kind, _, per_batch = arguments.child.partition(":")
    steps = Steps(arguments.warmup + arguments.steps, arguments.warmup)
    if kind == OURS:
        ours.train(folder, size, steps, arguments.threads)
    elif kind in (COST, COUNT):
        ours.two_ranks(folder, size, steps, arguments.threads, kind == COST)
    elif kind in (BARE, DENSE):
        seen = ours.collect(
            ours.loader(ours.job(folder, size, f"{kind}-{os.getpid()}", steps.total, arguments.threads))
        )
        model = ours.load(folder, size, "vlmflow_varlen" if kind == BARE else "sdpa")
        lay = layouts.dense if kind == DENSE else dict
        ours.bare(model, [[(lay(m.batch), ours.lengths_of(m.batch)) for m in micros] for micros in seen], steps)
    else:
        model = ours.load(folder, size, "sdpa")
        everything = load_rows(folder, size, model.config)
        if kind == NANO:
            work = []
            while len(work) < steps.total * size.packs:
                shuffled = [everything[i] for i in torch.randperm(len(everything)).tolist()]
                for sack in layouts.knapsack(shuffled, size.tokens):
                    work.append((layouts.leaking(sack, size.tokens), [len(row.ids) for row in sack]))
            grouped = [work[i * size.packs : (i + 1) * size.packs] for i in range(steps.total)]
            ours.bare(model, grouped, steps)
        else:
            scratch = str(folder / f"hf-{os.getpid()}")
            huggingface.train(model, everything, size, int(per_batch), kind == BUCKETED, kind == TRL, scratch, steps)
    if os.environ.get("RANK", "0") == "0":
        arguments.out.write_text(json.dumps(steps.as_json()))


def size_of(arguments: argparse.Namespace) -> Any:
    """The size asked for, with the number of samples asked for."""
    from training_peers.world import SIZES

    size = SIZES["quick" if arguments.quick else arguments.size]
    return replace(size, samples=arguments.samples or size.samples)


def two_processes_fit(cores: list[int], threads: int) -> bool:
    """Whether two ranks have cores of their own; on GPUs the comparison of ranks is left to the CPU."""
    import torch

    return len(cores) >= 2 * threads and not torch.cuda.is_available()


def gate(folder: Path, size: Any, count: int = 12) -> dict[str, Any]:
    """Equality and leak; ends the program when ours, or a peer that claims to be exact, is not equal."""
    import torch
    from training_peers import gate as gates
    from training_peers import ours
    from training_peers.world import rows as load_rows

    model = ours.load(folder, replace(size, dtype="fp32"), "sdpa").float()
    rows = load_rows(folder, size, model.config)[:count]
    found = gates.check(model, rows)
    with torch.no_grad():
        moved = gates.leak(model, rows[:4])
    print(f"Gate: {len(rows)} samples, fp32, dropout 0; loss and gradient norms against samples run one by one")
    for name, worst in found.items():
        verdict = "equal" if worst <= gates.TOLERANCE else "NOT EQUAL"
        print(f"  {name:<10} {worst:9.2e}  {verdict}")
    print("Leak: largest change of a sample's logits when another sample of its pack is edited")
    print("  " + ", ".join(f"{name} {value:.3g}" for name, value in moved.items()))
    unequal = [name for name, worst in found.items() if worst > gates.TOLERANCE]
    if set(unequal) - {NANO}:
        sys.exit(f"not equal: {', '.join(unequal)}; nothing is timed")
    cost = ours.cost_of(model).as_json()
    return {"cost": cost, "worst": found, "leak": moved, "equal": [name for name in found if name not in unequal]}


def run_pass(name: str, folder: Path, arguments: argparse.Namespace, number: int, cores: list[int]) -> dict[str, Any]:
    """One contender in a fresh process on the given cores."""
    out = folder / f"pass-{number}.json"
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--out", str(out)]
    for flag in ("size", "samples", "steps", "warmup", "threads"):
        if getattr(arguments, flag) is not None:
            command += [f"--{flag}", str(getattr(arguments, flag))]
    command += ["--quick"] if arguments.quick else []
    threads = {k: str(arguments.threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment["MEETING"] = str(folder / f"meeting-{number}")
    world = 2 if name in (COST, COUNT) else 1
    running = []
    for rank in range(world):
        mine = cores[rank * arguments.threads :][: arguments.threads] or cores
        log = open(folder / f"pass-{number}-{rank}.log", "w+")  # noqa: SIM115 - closed with the process's result
        pin = partial(os.sched_setaffinity, 0, mine)
        running.append(
            (
                subprocess.Popen(
                    command, env={**environment, "RANK": str(rank)}, stderr=log, stdout=log, preexec_fn=pin
                ),
                log,
            )
        )
    codes = [process.wait() for process, _ in running]
    texts = []
    for _, log in running:
        log.seek(0)
        texts.append(log.read().strip())
        log.close()
    if any(codes):
        lines = next(text for text, code in zip(texts, codes, strict=True) if code).splitlines()
        return {"failed": lines[-1] if lines else "no output"}
    return json.loads(out.read_text())


def main() -> int:
    """Gate, passes, table, JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "2b", "quick"), default="tiny")
    parser.add_argument("--samples", type=int, help="distinct samples (C.1 of the specification: 64)")
    parser.add_argument("--steps", type=int, default=None, help="timed optimizer steps of a pass (default 24)")
    parser.add_argument("--warmup", type=int, default=None, help="steps before them (default 5)")
    parser.add_argument("--passes", type=int, default=4, help="passes of each contender")
    parser.add_argument("--threads", type=int, default=1, help="threads and cores of each process")
    parser.add_argument("--only", nargs="*", help="contenders, e.g. ours padded:8 bare")
    parser.add_argument("--quick", action="store_true", help="smallest size, few steps, one pass")
    parser.add_argument(
        "--cpu-clock", action="store_true", help="CPU seconds of the process: for a busy machine, no result"
    )
    parser.add_argument("--json", type=Path, default=None, help="result file (default benchmarks/results/...)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (2 if arguments.quick else 24)
    arguments.warmup = arguments.warmup if arguments.warmup is not None else (1 if arguments.quick else 5)
    if arguments.cpu_clock:
        os.environ["VLMFLOW_BENCHMARK_CPU_CLOCK"] = "1"
    if arguments.child:
        child(arguments)
        return 0
    from training_peers import report
    from training_peers.world import build

    size = size_of(arguments)
    cores = sorted(os.sched_getaffinity(0))[::-1]
    names = arguments.only or contenders(
        size.rows, [COST, COUNT] if two_processes_fit(cores, arguments.threads) else []
    )
    with tempfile.TemporaryDirectory(prefix="vlmflow-benchmark-") as place:
        folder = Path(place)
        build(folder, size)
        head = report.machine(arguments, size, cores[: arguments.threads])
        print(head["text"])
        gated = gate(folder, size)
        passes: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        count = 1 if arguments.quick else arguments.passes
        number = 0
        for turn in range(count):
            for name in names if turn % 2 == 0 else names[::-1]:
                number += 1
                print(f"\r{number}/{count * len(names)} {name:<24}", end="", file=sys.stderr, flush=True)
                passes[name].append(run_pass(name, folder, arguments, number, cores))
        print(file=sys.stderr)
        result = report.summary(head, gated, passes, size, TITLES)
    print(result.pop("text"))
    target = arguments.json or RESULTS / f"training_{size.name}_{head['device']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
