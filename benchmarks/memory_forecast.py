"""Forecast against measurement: bytes that a rank has allocated at its peak, on models that a CPU can train.

    python -m benchmarks.memory_forecast [--cases N ...] [--out FILE]

Every case trains a random POINTS model for two optimizer steps of two packs in fresh processes, one or two ranks (gloo),
under ZeRO 0 to 3, in fp32 or bf16. The forecast knows the configuration alone (`vlmflow.training.memory`). Two measurements
on rank 0, of the most bytes at a time while training:

- allocated: torch's record of its allocator. gloo frees some buffers from threads that the record does not see, so under
  ZeRO 3, which gathers through gloo, it is too high by these, each time by another amount.
- tensors: bytes of the storages that have memory, each counted from the operator that made it to its end. What gloo and an
  operator allocate inside is not in it.

The error is that of the forecast against the second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

STEPS, MICROS = 2, 2
TOKENS, TILES, TARGETS = 1024, 12, 256


class Case(NamedTuple):
    """A training: size of the model, what trains (part of parameter names), ZeRO stage, dtype, ranks."""

    size: str
    train: str
    zero: int
    dtype: str
    ranks: int


CASES = [
    Case("20M", "all", 0, "fp32", 1),
    Case("20M", "all", 0, "fp32", 2),
    Case("20M", "all", 1, "fp32", 2),
    Case("20M", "all", 2, "fp32", 2),
    Case("20M", "all", 3, "fp32", 2),
    Case("20M", "all", 1, "bf16", 2),
    Case("20M", "all", 2, "bf16", 2),
    Case("20M", "all", 3, "bf16", 2),
    Case("20M", "projector", 1, "bf16", 2),
    Case("20M", "projector", 2, "bf16", 1),
    Case("20M", "language", 3, "bf16", 2),
    Case("90M", "all", 0, "fp32", 1),
    Case("90M", "language", 2, "fp32", 2),
    Case("90M", "all", 1, "bf16", 1),
    Case("90M", "all", 2, "bf16", 2),
    Case("90M", "language", 3, "bf16", 2),
]
SIZES = {
    "20M": {"vision": (192, 768, 5, 4), "language": (384, 1024, 6, 6, 4000)},
    "90M": {"vision": (320, 1280, 8, 5), "language": (640, 1792, 12, 10, 8000)},
}


def config_of(size: str) -> Any:
    """Configuration of a model of about that size; as many key as query heads, so that CPUs have a flash kernel."""
    from vlmflow.models.points.configuration_points import PointsConfig

    width, inner, layers, heads = SIZES[size]["vision"]
    hidden, mlp, depth, attention, vocabulary = SIZES[size]["language"]
    vision = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
              "num_attention_heads": heads, "patch_size": 14}  # fmt: skip
    text = {"model_type": "qwen2", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": depth,
            "num_attention_heads": attention, "num_key_value_heads": attention, "vocab_size": vocabulary,
            "tie_word_embeddings": False}  # fmt: skip
    return PointsConfig(vision_config=vision, text_config=text, tile=112, image_token_id=0)


def freeze(model: Any, train: str) -> None:
    """Set what trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train == "all" or train in name or (train == "language" and "projector" in name))


def forecast(case: Case) -> Any:
    """What the forecast says, from the configuration alone."""
    import torch

    from vlmflow.training.memory import footprint, size_of
    from vlmflow.training.shape import blank
    from vlmflow.training.trace import rehearse

    model = blank(config_of(case.size), torch.bfloat16 if case.dtype == "bf16" else torch.float32)
    freeze(model, case.train)
    seen = rehearse(model, TOKENS, TILES, TARGETS)
    return footprint(size_of(model.named_parameters()), seen, case.zero, case.ranks, case.dtype, MICROS, overlap=False)


def counter() -> Any:
    """Counts live bytes; a storage whose memory was given back early (`tensor.data = ...`) counts no more."""
    import torch

    from vlmflow.training.trace import Alive

    class Tensors(Alive):
        def _sweep(self) -> None:
            for key, (storage, size) in list(self._large.items()):
                found = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
                if found is None or not found.data_ptr():
                    self._gone(key, size)

    return Tensors()


def train(case: Case, rank: int, rendezvous: str) -> None:
    """One rank of a case; rank 0 prints what it measured."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from vlmflow import models
    from vlmflow.models.points.modeling_points import PointsForConditionalGeneration
    from vlmflow.training import engine as ds

    torch.set_num_threads(1)
    models.register()
    ds.join(f"file://{rendezvous}", rank, case.ranks)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    alive = counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, alive:
        torch.manual_seed(0)
        made = PointsForConditionalGeneration(config_of(case.size)).to(dtype)
        made.set_attn_implementation("vlmflow_varlen")
        freeze(made, case.train)
        trained = [p for p in made.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if (p.ndim > 1) == big], "lr": 1e-4, "peak": 1e-4} for big in (True, False)
        ]
        optimizer = {"betas": (0.9, 0.95), "eps": 1e-8, "clip": 1.0}
        engine = ds.make_engine(made, [g for g in groups if g["params"]], optimizer, case.zero, case.dtype)
        engine.train()
        del made, trained, groups
        begun, alive.done = time.time_ns(), 1  # the peak is looked for from here on
        for _ in range(STEPS):
            for _ in range(MICROS):
                loss = _loss(engine)
                ds.backward(engine, loss / TARGETS)
                del loss
            ds.step(engine)
    if rank == 0:
        print(json.dumps({"allocated": _allocated(recorded, begun), "tensors": alive.frontier[1]}), flush=True)
    os._exit(0)  # gloo's threads would make an ordinary exit slow


def _loss(engine: Any) -> Any:
    """Loss of a pack of one sample; the batch lives as long as its graph."""
    import torch

    from vlmflow.models.loss import packed_loss

    ids = torch.randint(10, 1000, (1, TOKENS))
    ids[0, : TILES * 16] = 0
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    batch = {
        "input_ids": ids,
        "labels": torch.where(torch.arange(TOKENS) >= TOKENS - TARGETS, ids, -100),
        "position_ids": torch.arange(TOKENS)[None],
        "pixel_values": torch.zeros(TILES, 112, 112, 3, dtype=torch.uint8),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": TOKENS,
        "max_length_k": TOKENS,
    }
    return packed_loss(engine, batch)[0]


def _allocated(recorded: Any, begun: int) -> int:
    """Most bytes that torch's CPU allocator had given out at a time after `begun` (ns)."""
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = most = 0
    for at, size in changes:
        alive += size
        if at > begun:
            most = max(most, alive)
    return most


def measure(case: Case) -> dict[str, int]:
    """Run a case in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.memory_forecast", "--rank"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*command, str(rank), "--case", json.dumps(case), "--rendezvous", f"{folder}/meet"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(case.ranks)
        ]
        ended = [(*process.communicate(), process.returncode) for process in ranks]
    if any(code for *_, code in ended):
        raise RuntimeError(f"{case} failed:\n" + "\n".join(error[-2000:] for _, error, _ in ended))
    return json.loads([line for line in ended[0][0].splitlines() if line.startswith("{")][-1])


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="numbers in CASES")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_forecast_cpu.json"))
    parser.add_argument("--rank", type=int)
    parser.add_argument("--case")
    parser.add_argument("--rendezvous")
    given = parser.parse_args()
    if given.rank is not None:
        train(Case(*json.loads(given.case)), given.rank, given.rendezvous)
    rows = []
    print("model  trains     ZeRO dtype ranks  forecast allocated   tensors   error (MiB)", flush=True)
    for case in (CASES[number] for number in given.cases):
        expected, seen = forecast(case), measure(case)
        error = expected.total / seen["tensors"] - 1
        print(
            f"{case.size:6} {case.train:10} {case.zero:4} {case.dtype:5} {case.ranks:5} {expected.total / 2**20:9.1f} "
            f"{seen['allocated'] / 2**20:9.1f} {seen['tensors'] / 2**20:9.1f} {error:+7.1%}",
            flush=True,
        )
        rows.append({**case._asdict(), "forecast": expected.as_json(), **seen, "error": round(error, 4)})
    worst = max(abs(row["error"]) for row in rows)
    print(f"worst error {worst:.1%}")
    import torch

    result = {"torch": torch.__version__, "tokens": TOKENS, "tiles": TILES, "rows": rows, "worst": worst}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
