"""Two processes train what one trains under ZeRO 0 to 2, even when one of them sees no image."""

from __future__ import annotations

import json
import math
import threading
from itertools import pairwise
from typing import Any

import pytest
from training_jobs import Jobs, assert_equal, norms, raw, rules, train

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

STAGES = (0, 1, 2)  # test_training_zero3.py has the fourth


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Jobs trained by one process (``one``) and by two; one of the two often has a pack without images."""
    from vlmflow.training.trainer import Preempted

    world = Jobs(tmp_path_factory.mktemp("ranks"))
    jobs = {f"fp32-{zero}": world.make(f"fp32-{zero}", processes=2, zero=zero) for zero in STAGES}
    frozen = {"train": rules("language"), "packs": 4}  # two micro-batches a rank, and four of one process
    for zero in STAGES:
        jobs[f"frozen-{zero}"] = world.make(f"frozen-{zero}", processes=2, zero=zero, **frozen)
    for zero in (1, 2):
        jobs[f"bf16-{zero}"] = world.make(f"bf16-{zero}", processes=2, zero=zero, dtype="bf16")
    jobs["noise"] = world.make("noise", processes=2, noise={"alpha": 5.0, "on": "text"})
    for zero in STAGES:  # begun by one process, stopped after a step, finished by two
        job = jobs[f"grown-{zero}"] = world.make(f"grown-{zero}", processes=2, zero=zero)
        stop = threading.Event()
        stop.set()
        with pytest.raises(Preempted):
            world.trainer(job, stop=stop).run()
    notes = train(jobs.values())
    assert sum("resumed at step 1 of 5 (written by 1 processes)" in note for note in notes) == len(STAGES), notes
    jobs["one"], jobs["one-frozen"] = world.make("one"), world.make("one-frozen", **frozen)
    for name in ("one-frozen", "one"):
        alone = world.trainer(jobs[name])
        alone.run()
    return {"jobs": jobs, "plan": alone.plan, "batches": batches(alone), "image": alone.config.image_token_id}


def batches(trainer: Any) -> list[dict[str, Any]]:
    """Every pack of a trainer's plan."""
    loader = trainer._loader(trainer.plan)
    made = [loader.micro(pack).batch for pack in range(len(trainer.plan.pack_tokens))]
    loader.close()
    return made


def test_some_rank_had_no_image(trained: dict[str, Any]) -> None:
    plan = trained["plan"]
    dealt = [plan.deal(step, 2) for step in range(plan.steps)]
    without = [
        any(sum(int(plan.pack_tiles[p]) for p in rank if p is not None) == 0 for rank in ranks) for ranks in dealt
    ]
    assert any(without) and not all(without)


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("kind", ["fp32", "grown"])
def test_two_processes_equal_one(trained: dict[str, Any], kind: str, zero: int) -> None:
    assert_equal(trained["jobs"][f"{kind}-{zero}"], trained["jobs"]["one"])


@pytest.mark.parametrize("zero", STAGES)
def test_two_micro_batches_of_two_equal_four_of_one_with_frozen_vision(trained: dict[str, Any], zero: int) -> None:
    assert_equal(trained["jobs"][f"frozen-{zero}"], trained["jobs"]["one-frozen"])


@pytest.mark.parametrize("zero", [1, 2])
def test_bf16_follows_fp32(trained: dict[str, Any], zero: int) -> None:
    job = trained["jobs"][f"bf16-{zero}"]
    assert norms(job) == pytest.approx(norms(trained["jobs"]["one"]), rel=0.02)
    assert {tensor.dtype for tensor in raw(job).values()} == {torch.bfloat16}


def test_the_noise_of_the_log_is_that_of_all_ranks(trained: dict[str, Any]) -> None:
    """On text a sample's noise depends on its share of text, so the two ranks have different norms."""
    job, plan = trained["jobs"]["noise"], trained["plan"]
    image = trained["image"]
    records = [json.loads(line) for line in job.log.read_text().splitlines()]

    def expected(packs: list[int | None]) -> list[float]:
        found = []
        for batch in (trained["batches"][pack] for pack in packs if pack is not None):
            for a, b in pairwise(batch["cu_seq_lens_q"].tolist()):
                found.append(5.0 / math.sqrt(3) * math.sqrt((batch["input_ids"][0, a:b] != image).mean()))
        return found

    differ = 0
    for step, record in enumerate(records):
        first, second = (expected(packs) for packs in plan.deal(step, 2))
        mean = sum(first + second) / len(first + second)
        assert record["noise_norm"] == pytest.approx(mean, rel=0.1)
        differ += abs(sum(first) / len(first) / mean - 1) > 0.2
    assert differ, "rank 0 alone would show the same"
