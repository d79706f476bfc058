"""Jobs of the tiny world, what they left, and when two of them count as equal; for the tests with several processes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import training_world as world

from vlmflow.training import run as training
from vlmflow.training.job import Job
from vlmflow.training.launch import launch

ALL = ("vision", "vision.ocr", "projector", "language")
# With all of ALL training, a rank without an image would leave the others waiting in a collective.
COMMON = {"budget": {"tokens": 96, "tiles": 8}, "packs": 2, "max_steps": 5}


def rules(*modules: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"modules": m, "lr": 0.002, **fields} for m in modules]


class Jobs:
    """One initial model, one dataset whose samples have an image now and then, and jobs on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.init = world.initial(world.context(root, world.recipe()))
        self.data = world.dataset(root, [world.sample(i, images=int(i % 3 == 0)) for i in range(24)])

    def make(self, name: str, after: Job | None = None, **stage: Any) -> Job:
        """A job; one that comes ``after`` another begins with the other's newest checkpoint."""
        ctx = world.context(self.root / name, world.recipe(**{"train": rules(*ALL), **COMMON, **stage}))
        spec = training.stage_of(ctx.recipe, "sft")
        job = training._job(ctx, name, name, spec, list(spec.data), self.init, {"seed": self.data})
        changed = {} if after is None else {"checkpoints": after.checkpoints}
        job = job.model_copy(update={"tracking": {}, **changed})
        (Path(job.work) / "job.json").write_text(job.model_dump_json())
        return job

    def trainer(self, job: Job, **options: Any) -> Any:
        """A trainer in this process, the only rank."""
        from vlmflow.training.trainer import Trainer

        return Trainer(job, rendezvous=f"file://{self.root}/meeting", **options)


def train(jobs: Iterable[Job]) -> list[str]:
    """Two processes train the jobs one after another; returns the notes that rank 0 gave."""
    events: list[dict[str, Any]] = []
    launch([Path(job.work) / "job.json" for job in jobs], 2, 1, events.append)
    return [e["text"] for e in events if e["event"] == "note"]


def raw(job: Job) -> dict[str, Any]:
    """Published tensors by name."""
    from safetensors.torch import load_file

    return load_file(job.out / "model.safetensors")


def norms(job: Job) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in job.log.read_text().splitlines()]


def assert_same_bits(found: Job, expected: Job) -> None:
    import torch

    ours, theirs = raw(found), raw(expected)
    assert set(ours) == set(theirs)
    assert not [n for n in theirs if not torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8))]


def assert_equal(found: Job, expected: Job) -> None:
    """Equal up to the order of float sums: gradient norms 1e-3 relative, weights 1e-5."""
    assert norms(found) == pytest.approx(norms(expected), rel=1e-3)
    ours, theirs = raw(found), raw(expected)
    assert set(ours) == set(theirs)
    worst = max((float((ours[n] - theirs[n]).abs().max()), n) for n in theirs)
    assert worst[0] < 1e-5, f"weights differ by {worst}"
