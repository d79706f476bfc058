"""The preference stage in processes of its own: two ranks, a killed rank, and from a table to a published model."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import training_world as world
from preference_world import STAGE, log_of, make_job, make_place, same, stored, train, weights_of

from vlmflow import storage
from vlmflow.errors import StepFailed
from vlmflow.training import launch
from vlmflow.training import run as training

pytest.importorskip("torch")
pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_place(tmp_path_factory.mktemp("ranks"))


def test_killed_rank_and_the_same_command_give_the_same_bits(place: Any) -> None:
    job = make_job(place, "killed", epochs=2)
    seen: dict[str, int] = {}

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            seen["pid"] = event["pid"]
        if event["event"] == "checkpoint":
            os.kill(seen["pid"], signal.SIGKILL)

    with pytest.raises(StepFailed, match="SIGKILL"):
        launch.launch([job.work / "job.json"], 1, 1, on_event)
    assert same(train(job), train(make_job(place, "whole", epochs=2)))


def test_two_processes_equal_one_under_every_zero_stage(place: Any) -> None:
    """All parts train, and some pack has no image: a rank that runs less than the others would stop them."""
    rules = [{"modules": m, "lr": 0.002} for m in ("vision", "vision.ocr", "projector", "language")]
    stage = {"packs": 2, "max_steps": 4, "epochs": 4, "train": rules}
    one = make_job(place, "rank1", **stage)
    several = [make_job(place, f"zero{zero}", **stage, processes=2, zero=zero) for zero in (0, 2, 3)]
    train(one)
    launch.launch([job.work / "job.json" for job in several], 2, 1, lambda event: None)
    expected = weights_of(one)
    for job in several:
        assert stored(job) == stored(one)
        found = weights_of(job)
        assert max(float((expected[n] - found[n]).abs().max()) for n in expected) < 1e-5
        for a, b in zip(log_of(one), log_of(job), strict=True):
            for name in ("loss", "margin", "accuracy", "nll_chosen", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_from_a_table_to_a_published_model(tmp_path: Path) -> None:
    """Pull, train and publish as docs/training.md shows; the same call again trains nothing."""
    from curation_server import serving

    from vlmflow.curation import pull

    stage = {**STAGE, "epochs": 3}
    with serving() as server:
        rows = [
            {"url": server.url(f"/img/{i}"), "question": "what?", "chosen": "yes " * (i % 3 + 1), "rejected": "no"}
            for i in range(6)
        ]
        rows[0]["chosen"] = "no"
        table = tmp_path / "pairs.jsonl"
        table.write_text("\n".join(map(json.dumps, rows)))
        made = world.recipe(**stage, failure_limit=0.2).model_dump(mode="json")
        source = {"table": table.as_uri(), "preferences_column": {"prompt": "question"}}
        made["data"] = {"seed": {"sources": {"a": source}}}
        made["pull"]["allow_hosts"] = ["127.0.0.1"]
        ctx = world.context(tmp_path, world.recipes.parse(made))
        data = {"seed": pull.run(ctx, "seed")}
    init = world.initial(ctx)
    ref = training.run(ctx, "sft", init, data)
    log = [json.loads(line) for line in storage.read_bytes(ref.lineage.log_uri or "").splitlines()]
    assert log[0]["loss"] == round(math.log(2), 6) and log[-1]["margin"] > 0
    assert ref.lineage.parents == [init.weights_sha256] and ref.weights_sha256 != init.weights_sha256
    assert training.run(ctx, "sft", init, data) == ref
