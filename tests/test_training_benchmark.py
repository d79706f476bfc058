"""The benchmark's gate at minimal size: contenders are equal or marked, and what is marked gets no ratio."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import numpy as np
from training_peers import gate, layouts, ours, report, world
from training_peers.measure import Steps
from training_peers.world import QUICK, Row


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, rows) of the smallest size."""
    folder = tmp_path_factory.mktemp("benchmark")
    world.build(folder, QUICK)
    model = ours.load(folder, QUICK, "sdpa")
    return model, world.rows(folder, QUICK, model.config)


def test_packed_and_padded_equal_samples_one_by_one_and_nanovlm_does_not(made: Any) -> None:
    model, rows = made
    assert any(len(row.tiles) for row in rows) and any(not len(row.tiles) for row in rows)
    worst = gate.check(model, rows[:6])
    assert {name for name, value in worst.items() if value <= gate.TOLERANCE} == {"padded", "dense", "trl", "ours"}
    assert worst["nanovlm"] > 1000 * gate.TOLERANCE


def test_an_edited_neighbour_is_seen_by_nanovlm_alone(made: Any) -> None:
    model, rows = made
    moved = gate.leak(model, rows[:4])
    assert moved["ours"] == 0 and moved["dense"] == 0 and moved["nanovlm"] > 1e-4


def test_the_gate_notices_a_gradient_that_is_wrong() -> None:
    norms = {"a": 1.0, "b": 1e-3}
    assert gate.compare(5.0, norms, 5.0, norms) == 0
    assert gate.compare(5.0, norms, 5.0, {"a": 1.0, "b": 1.1e-3}) == pytest.approx(1e-4)
    assert gate.compare(5.0, norms, 5.1, norms) == pytest.approx(0.02)
    assert gate.compare(5.0, norms, 5.0, {"a": 1.0}) == pytest.approx(1e-3), "a gradient that is missing"


def row(length: int) -> Row:
    return Row(np.arange(length), np.arange(length), np.zeros((0, 8, 8, 3), np.uint8), 0)


def test_knapsack_keeps_every_sample_and_its_capacity() -> None:
    rows = [row(n) for n in (5, 90, 40, 40, 33, 60, 7, 12)]
    sacks = layouts.knapsack(rows, 100)
    assert sorted(len(r.ids) for sack in sacks for r in sack) == sorted(len(r.ids) for r in rows)
    assert max(sum(len(r.ids) for r in sack) for sack in sacks) <= 100
    batch = layouts.leaking(sacks[0], 100)
    assert batch["attention_mask"].sum() == sum(len(r.ids) for r in sacks[0]) and batch["input_ids"].shape == (1, 100)


def test_padding_warm_up_and_ratios_are_counted_as_printed() -> None:
    steps = Steps(3, 1)
    steps.begin()
    for _ in range(3):
        steps.add([30, 50], 100, 2, 60)
        steps.end()
    assert steps.as_json()["tokens"] == [80, 80], "the warm-up step is left out"
    run = {**steps.as_json(), "seconds": [1.0, 3.0]}
    slow, fast = {**run, "seconds": [2.0, 3.0]}, {**run, "seconds": [1.0, 1.0]}
    passes = {"ours": [slow, fast], "padded:4": [slow, run], "nanovlm": [run], "trl:4": [{"failed": "no"}]}
    head = {"peak_flops": 1e12, "peak_is": "a guess"}
    found = report.summary(
        head,
        {"equal": ["ours", "padded"], "cost": {"per_token": 5e9, "per_target": 1e9}},
        passes,
        QUICK,
        {k: k for k in ("ours", "padded", "nanovlm", "trl")},
    )
    assert found["rows"]["ours"]["tokens_per_second"] == 80, "the best pass"
    assert found["rows"]["padded:4"]["ours_is"] == pytest.approx(2.0) and found["figures"][
        "over_padded"
    ] == pytest.approx(2.0)
    assert found["rows"]["ours"]["mfu"] == pytest.approx((160 * 5e9 + 120 * 1e9) / 2 / 1e12)
    assert found["rows"]["padded:4"]["padding"] == pytest.approx(0.2)
    assert (
        found["rows"]["nanovlm"]["ours_is"] is None and "leaks" in found["text"] and "cannot run: no" in found["text"]
    )
