"""Two processes train what one trains, under every ZeRO stage, even when one of them sees no image."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import training_world as world

from vlmflow.training import run as training
from vlmflow.training.job import Job
from vlmflow.training.launch import launch

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

STAGES = {
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "bf16": {"zero": 2, "dtype": "bf16"},
}
# vision and projector train, so that a rank without an image would leave the others waiting in a collective
COMMON = {
    "train": [{"modules": m, "lr": 0.002} for m in ("vision", "vision.ocr", "projector", "language")],
    "budget": {"tokens": 96, "tiles": 8},
    "packs": 2,
    "max_steps": 5,
}


def job_of(root: Path, init: Any, data: Any, name: str, **stage: Any) -> Job:
    ctx = world.context(root / name, world.recipe(**COMMON, **stage))
    spec = training.stage_of(ctx.recipe, "sft")
    job = training._job(ctx, name, name, spec, list(spec.data), init, {"seed": data}).model_copy(
        update={"tracking": {}}
    )
    (Path(job.work) / "job.json").write_text(job.model_dump_json())
    return job


def weights(job: Job) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {n: t.float() for n, t in load_file(job.out / "model.safetensors").items()}


def norms(job: Job) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in job.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Jobs trained by one process (``one``) and by two; one of the two often has a pack without images."""
    from vlmflow.training.trainer import Preempted, Trainer

    root = tmp_path_factory.mktemp("ranks")
    init = world.initial(world.context(root, world.recipe()))
    data = world.dataset(root, [world.sample(i, images=int(i % 3 == 0)) for i in range(24)])
    jobs = {name: job_of(root, init, data, name, processes=2, **stage) for name, stage in STAGES.items()}
    for name, zero in (("grown", 0), ("grown2", 2)):  # begun by one process, stopped after a step, finished by two
        jobs[name] = job_of(root, init, data, name, processes=2, zero=zero)
        stop = threading.Event()
        stop.set()
        with pytest.raises(Preempted):
            Trainer(jobs[name], rendezvous=f"file://{root}/meeting", stop=stop).run()
    events: list[dict[str, Any]] = []
    launch([Path(job.work) / "job.json" for job in jobs.values()], 2, 1, events.append)
    notes = [e["text"] for e in events if e["event"] == "note"]
    assert sum("resumed at step 1 of 5 (written by 1 processes)" in note for note in notes) == 2, notes
    jobs["one"] = job_of(root, init, data, "one")
    alone = Trainer(jobs["one"], rendezvous=f"file://{root}/meeting")
    alone.run()
    return {"jobs": jobs, "plan": alone.plan}


def test_some_rank_had_no_image(trained: dict[str, Any]) -> None:
    plan = trained["plan"]
    dealt = [plan.deal(step, 2) for step in range(plan.steps)]
    without = [
        any(sum(int(plan.pack_tiles[p]) for p in rank if p is not None) == 0 for rank in ranks) for ranks in dealt
    ]
    assert any(without) and not all(without)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "grown", "grown2"])
def test_two_processes_equal_one(trained: dict[str, Any], name: str) -> None:
    one, two = trained["jobs"]["one"], trained["jobs"][name]
    assert norms(two) == pytest.approx(norms(one), rel=1e-3)
    expected, found = weights(one), weights(two)
    worst = max(float((expected[n] - found[n]).abs().max()) for n in expected)
    assert worst < 1e-5, f"{name}: weights differ by {worst}"


def test_bf16_follows_fp32(trained: dict[str, Any]) -> None:
    jobs = trained["jobs"]
    assert norms(jobs["bf16"])[0] == pytest.approx(norms(jobs["one"])[0], rel=0.1)
    from safetensors import safe_open

    with safe_open(jobs["bf16"].out / "model.safetensors", "pt") as file:
        assert {file.get_tensor(n).dtype for n in file.keys()} == {torch.bfloat16}
