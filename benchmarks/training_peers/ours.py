"""Our trainer on the benchmark's samples, and the same packs in a loop without anything around it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from training_peers.measure import COUNTED, Steps
from training_peers.world import Size, context, recipe
from vlmflow import models
from vlmflow.dataset.manifest import Manifest
from vlmflow.models.chat import Segment
from vlmflow.models.loss import packed_loss
from vlmflow.models.store import load_ref
from vlmflow.training import plan_file
from vlmflow.training import run as training
from vlmflow.training.examples import Encoder
from vlmflow.training.flops import CostModel, cost_model, count
from vlmflow.training.job import Job
from vlmflow.training.loader import Loader


def job(
    folder: Path, size: Size, name: str, total: int, threads: int, manifest: Manifest | None = None, **stage: Any
) -> Job:
    """The job of our trainer for ``total`` steps over the shards under ``folder``, planned and stored."""
    made = recipe(size, max_steps=total, threads=threads, **stage)
    ctx = context(folder / name, made)
    spec = training.stage_of(made, "sft")
    manifest = manifest or Manifest.model_validate_json((folder / "manifest.json").read_text())
    reference = load_ref(folder / "model.json")
    whole = training._job(ctx, name, name, spec, list(spec.data), reference, {"mixed": manifest})
    return whole.model_copy(update={"tracking": {}})


def loader(made: Job, plan: Any = None, rank: int = 0, world: int = 1, workers: int = 1) -> Loader:
    """The loader of a job without its trainer; ``plan`` may deal the job's items in another way."""
    folder = made.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models.register()
    config = AutoConfig.from_pretrained(folder)
    family = models.family(made.family)
    encoder = Encoder(family, tokenizer, config, made.stage, [use for use, _ in made.uses], made.seed)
    dummy, _ = family.expand([Segment(image=0)], tokenizer, [1], config)

    def tile(image: Any, max_tiles: int) -> Any:
        return family.tile(image, {"tile": config.tile, "max_tiles": max_tiles})

    plan = plan or plan_file.load(made.plan, made.cache)
    return Loader(plan, encoder, tile, family.positions, dummy, config.tile, made.cache, rank, world, workers=workers)


def train(folder: Path, size: Size, steps: Steps, threads: int) -> None:
    """Our trainer as users run it: shards, decoding threads, DeepSpeed engine, clipping, log."""
    from vlmflow.training.trainer import Trainer

    class Timed(Trainer):
        def _step(self, step: int, micros: list[Any]) -> Any:
            result = super()._step(step, micros)
            for micro in micros:
                lengths = lengths_of(micro.batch)
                real = lengths if micro.images else lengths[:-1]  # the last segment is the dummy image's
                steps.add(
                    real, sum(lengths), len(micro.batch["pixel_values"]) if micro.images else 0, targets_of(micro.batch)
                )
            steps.end()
            return result

    made = job(folder, size, f"ours-{os.getpid()}", steps.total, threads)
    trainer = Timed(made, rendezvous=f"file://{made.work}/meeting")
    steps.begin()
    trainer.run()
    timed = [json.loads(line) for line in made.log.read_text().splitlines()][steps.warmup :]
    waited = sum(record["data_wait"] * record["seconds"] for record in timed)
    steps.extra["data_wait"] = round(waited / sum(record["seconds"] for record in timed), 5)
    steps.extra["fill"] = trainer.plan.report["fill_tokens"]


def collect(made: Loader) -> list[list[Any]]:
    """The micro-batches of every step, ready in memory."""
    try:
        return [micros for _, micros in made.steps()]
    finally:
        made.close()


def load(folder: Path, size: Size, attention: str) -> Any:
    """The start model; vision frozen, projector and language model trainable; on the device, in train mode."""
    dtype = torch.bfloat16 if size.dtype == "bf16" else torch.float32
    model, _ = models.load_model(load_ref(folder / "model.json").uri.removeprefix("file://"), dtype, attention)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("model.vision_tower.", "model.vision_tower_ocr.")))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def cost_of(model: Any) -> CostModel:
    """Operations of a step of this model, by the rules of `vlmflow.training.flops`."""
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return cost_model(count(model, models.family("points"), trains))


def lengths_of(batch: dict[str, Any]) -> list[int]:
    """Sample lengths of one of our packs, the dummy image's included."""
    return np.diff(batch["cu_seq_lens_q"]).tolist()


def targets_of(batch: dict[str, Any]) -> int:
    """Tokens of a batch that carry a loss."""
    return int((np.asarray(batch["labels"]) != -100).sum())


def bare(
    model: Any,
    work: list[list[tuple[dict[str, Any], list[int]]]],
    steps: Steps,
    between: Callable[[list[Any]], None] = lambda trained: None,
) -> None:
    """Forward, backward, clip, fused AdamW over ready (batch, sample lengths), and nothing else.

    This is what the overhead of a loop is measured by, and the most favourable loop for the other ways of packing.

    Args:
        between: called with the trained parameters before the update: where ranks add their gradients up.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    device = next(model.parameters()).device
    steps.begin()
    for micros in work:
        targets = sum(targets_of(batch) for batch, _ in micros)
        for batch, lengths in micros:
            tensors = {k: torch.as_tensor(v).to(device) if np.ndim(v) else v for k, v in batch.items()}
            (packed_loss(model, tensors)[0] / max(1, targets)).backward()
            steps.add(
                lengths, int(np.prod(batch["input_ids"].shape)), len(batch.get("pixel_values", ())), targets_of(batch)
            )
        between(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.end()


class ByCount:
    """The same steps dealt as samplers do: every rank gets the same number of samples, in one micro-batch."""

    def __init__(self, plan: Any) -> None:
        self.plan, self.steps, self.shards = plan, plan.steps, plan.shards

    def deal(self, step: int, world: int) -> list[list[int]]:
        return [[step * world + rank] for rank in range(world)]

    def items_of(self, number: int, world: int = 2) -> list[Any]:
        items = [item for pack in self.plan.packs_of(number // world) for item in self.plan.items_of(pack)]
        return items[number % world :: world]

    def imbalance(self, world: int) -> float:
        """Mean over steps of the largest rank's cost over the mean, by the plan's own cost model."""
        ratios = []
        for step in range(self.steps):
            loads = [
                sum(
                    self.plan.cost.cost(i.tokens, i.squares, i.tiles, i.targets)
                    for i in self.items_of(step * world + rank)
                )
                for rank in range(world)
            ]
            ratios.append(max(loads) * world / sum(loads))
        return float(np.mean(ratios))


def two_ranks(folder: Path, size: Size, steps: Steps, threads: int, balanced: bool) -> None:
    """One of two gloo ranks over the same steps of four packs; ``balanced`` = dealt by cost, else by number of samples."""
    rank, world = int(os.environ["RANK"]), 2
    torch.distributed.init_process_group("gloo", f"file://{os.environ['MEETING']}", rank=rank, world_size=world)
    made = job(folder, size, f"ranks-{os.getpid()}", steps.total, threads, packs=4)
    plan = plan_file.load(made.plan, made.cache)
    dealt = plan if balanced else ByCount(plan)
    seen = collect(loader(made, dealt, rank, world))

    def add_up(trained: list[Any]) -> None:
        flat = torch.cat([p.grad.view(-1) for p in trained])
        torch.distributed.all_reduce(flat)
        at = 0
        for p in trained:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()

    torch.distributed.barrier()
    model = load(folder, size, "vlmflow_varlen")
    bare(model, [[(m.batch, lengths_of(m.batch)) for m in micros] for micros in seen], steps, add_up)
    for values in (getattr(steps, name) for name in COUNTED):
        both = torch.tensor(values)
        torch.distributed.all_reduce(both)
        values[:] = both.tolist()
    steps.extra["imbalance"] = round(dealt.imbalance(world), 4)
