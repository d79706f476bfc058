"""Preference pairs on top of the tiny world: jobs of a DPO stage and what they leave behind."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import training_world as world

from vlmflow import storage
from vlmflow.dataset.sample import Sample
from vlmflow.training import run as training
from vlmflow.training.job import Job

STAGE: dict[str, Any] = {
    "objective": {"kind": "dpo", "beta": 0.5},
    "data": [{"dataset": "seed", "text": "preferences"}],
    "instructions": [],
    "budget": {"tokens": 400, "tiles": 12},
    "train": [{"modules": "projector", "lr": 0.003}, {"modules": "language", "lr": 0.003}],
}


def pairs_sample(number: int, images: int = 1, pairs: int = 1, **changes: Any) -> Sample:
    """A sample with pairs of answers of various lengths."""
    asked = [{"from": "human", "value": "<image>" * images + "say " + "x" * (number % 5)}]
    made = [
        {"conversations": asked, "chosen": "yes " * (1 + (number + p) % 4), "rejected": "no" + "o" * (number % 6 + p)}
        for p in range(pairs)
    ]
    made[0] |= changes
    return world.sample(number, images=images, preferences=made)


def make_place(root: Path) -> Any:
    """A model and 16 samples with 24 pairs, a quarter of them without image."""
    init = world.initial(world.context(root, world.recipe()))
    data = world.dataset(root, [pairs_sample(i, images=int(i % 4 != 1), pairs=1 + i % 2) for i in range(16)])
    return SimpleNamespace(root=root, init=init, data=data)


def make_job(place: Any, name: str, data: Any = None, **stage: Any) -> Job:
    ctx = world.context(place.root / name, world.recipe(**{**STAGE, **stage}))
    spec = training.stage_of(ctx.recipe, "sft")
    job = training._job(ctx, name, name, spec, list(spec.data), place.init, {"seed": data or place.data})
    job = job.model_copy(update={"tracking": {}})
    (job.work / "job.json").write_text(job.model_dump_json())
    return job


def trainer(job: Job, stop: threading.Event | None = None) -> Any:
    from vlmflow.training.trainer import Trainer

    return Trainer(job, rendezvous=f"file://{job.work}/meeting", stop=stop)


def weights_of(job: Job) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(job.out / "model.safetensors")


def train(job: Job) -> dict[str, Any]:
    trainer(job).run()
    return weights_of(job)


def log_of(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.log.read_text().splitlines()]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Equal weights, bit for bit."""
    import torch

    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


def stored(job: Job) -> dict[str, bytes]:
    """Files of all references of a job's store."""
    return {i.uri.rsplit("/", 1)[-1]: storage.read_bytes(i.uri) for i in storage.list_uris(job.references)}
