"""Our trainer on the benchmark's samples, and the same packs in a loop without anything around it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training_peers.measure import Steps
from training_peers.world import Size, context, recipe
from vlmflow import models
from vlmflow.dataset.manifest import Manifest
from vlmflow.models.loss import packed_loss
from vlmflow.models.store import load_ref
from vlmflow.training import run as training
from vlmflow.training.job import Job


def job(folder: Path, size: Size, name: str, total: int, threads: int, **stage: Any) -> Job:
    """The job of our trainer for ``total`` steps over the shards under ``folder``."""
    made = recipe(size, max_steps=total, threads=threads, **stage)
    ctx = context(folder / name, made)
    spec = training.stage_of(made, "sft")
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    reference = load_ref(folder / "model.json")
    whole = training._job(ctx, name, name, spec, list(spec.data), reference, {"mixed": manifest})
    return whole.model_copy(update={"tracking": {}})


def train(folder: Path, size: Size, steps: Steps, threads: int) -> None:
    """Our trainer as users run it: shards, decoding threads, DeepSpeed engine, clipping, log."""
    from vlmflow.training.trainer import Trainer

    class Timed(Trainer):
        def _step(self, step: int, micros: list[Any]) -> Any:
            result = super()._step(step, micros)
            for micro in micros:
                lengths = lengths_of(micro.batch)
                real = lengths if micro.images else lengths[:-1]  # the last segment is the dummy image's
                steps.add(real, sum(lengths), int(micro.images))
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


def collect(folder: Path, size: Size, name: str, total: int, threads: int, **stage: Any) -> tuple[list[list[Any]], Any]:
    """(micro-batches of every step as our loader makes them, the trainer that planned them); nothing is trained."""
    from vlmflow.training.trainer import StepResult, Trainer

    seen: list[list[Any]] = []

    class Collector(Trainer):
        def _step(self, step: int, micros: list[Any]) -> StepResult:
            seen.append(micros)
            return StepResult(0.0, 0.0, 0, False, {})

        def _finish(self) -> None:
            pass

    made = job(folder, size, name, total, threads, **stage)
    trainer = Collector(made, rendezvous=f"file://{made.work}/meeting")
    trainer.run()
    return seen, trainer


def load(folder: Path, size: Size, attention: str) -> Any:
    """The start model; vision frozen, projector and language model trainable; on the device, in train mode."""
    dtype = torch.bfloat16 if size.dtype == "bf16" else torch.float32
    model, _ = models.load_model(load_ref(folder / "model.json").uri.removeprefix("file://"), dtype, attention)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("model.vision_tower.", "model.vision_tower_ocr.")))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def lengths_of(batch: dict[str, Any]) -> list[int]:
    """Sample lengths of one of our packs, the dummy image's included."""
    return np.diff(batch["cu_seq_lens_q"]).tolist()


def bare(model: Any, work: list[list[tuple[dict[str, Any], list[int]]]], steps: Steps) -> None:
    """Forward, backward, clip, fused AdamW over ready (batch, sample lengths), and nothing else.

    This is what the overhead of a loop is measured by, and the most favourable loop for the other ways of packing.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    device = next(model.parameters()).device
    steps.begin()
    for micros in work:
        targets = sum(int((batch["labels"] != -100).sum()) for batch, _ in micros)
        for batch, lengths in micros:
            tensors = {k: torch.as_tensor(v).to(device) if np.ndim(v) else v for k, v in batch.items()}
            (packed_loss(model, tensors)[0] / targets).backward()
            steps.add(lengths, batch["input_ids"].size, len(batch.get("pixel_values", ())))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.end()
