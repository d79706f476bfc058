"""The pack plan: budgets kept, nothing lost, the same steps whatever the number of processes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmflow.errors import DataError
from vlmflow.training.plan import Budget, Lengths, make_plan


def lengths(tokens: list[int], tiles: list[int] | None = None, weight: float = 1.0, shards: int = 3) -> Lengths:
    n = len(tokens)
    return Lengths(
        tokens=np.array(tokens, dtype=np.int64),
        tiles=np.array(tiles if tiles is not None else [1] * n, dtype=np.int64),
        targets=np.array([max(1, t // 3) for t in tokens], dtype=np.int64),
        weight=np.full(n, weight),
        shard=np.arange(n, dtype=np.int64) * shards // max(1, n),
    )


samples = st.lists(st.tuples(st.integers(1, 70), st.integers(0, 5)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(samples, st.integers(1, 4), st.integers(0, 3), st.integers(1, 5))
def test_every_sample_once_within_both_budgets(drawn: list, packs: int, seed: int, world: int) -> None:
    data = lengths([t for t, _ in drawn], [v for _, v in drawn])
    budget = Budget(tokens=64, tiles=4)
    fits = [i for i, (t, v) in enumerate(drawn) if t <= 64 and v <= 4]
    if not fits:
        with pytest.raises(DataError, match="none of"):
            make_plan(data, budget, packs, seed)
        return
    plan = make_plan(data, budget, packs, seed)
    assert sorted(plan.order.tolist()) == fits
    assert {i for i, _ in plan.dropped} == set(range(len(drawn))) - set(fits)
    for pack in range(len(plan.pack_tokens)):
        inside = plan.samples_of(pack)
        assert sum(drawn[i][0] for i in inside) == plan.pack_tokens[pack] <= 64
        assert sum(drawn[i][1] for i in inside) == plan.pack_tiles[pack] <= 4
    assert sum(plan.targets_of(s) for s in range(plan.steps)) == data.targets[fits].sum()
    for step in range(plan.steps):
        dealt = plan.deal(step, world)
        assert len({len(mine) for mine in dealt}) == 1, "ranks with unequal micro-batches wait for ever"
        assert sorted(p for mine in dealt for p in mine if p is not None) == list(plan.packs_of(step))


def test_same_inputs_same_plan_other_seed_other_plan() -> None:
    data = lengths([5 + i % 13 for i in range(100)])
    first, again, other = (make_plan(data, Budget(64, 8), 2, seed, epochs=2) for seed in (1, 1, 2))
    assert first.digest() == again.digest() != other.digest()
    half = len(first.order) // 2
    assert first.order[:half].tolist() != first.order[half:].tolist(), "every epoch has its own order"


def test_epochs_weights_and_steps() -> None:
    data = lengths([10] * 40, weight=2.0)
    assert Counter(make_plan(data, Budget(64, 8), 2, 0, epochs=1).order.tolist()) == dict.fromkeys(range(40), 2)
    partial = make_plan(lengths([10] * 40), Budget(64, 8), 2, 0, epochs=1.5)
    assert len(partial.order) == 60
    halved = make_plan(lengths([10] * 400, weight=0.5), Budget(64, 8), 2, 0)
    assert 150 < len(halved.order) < 250
    assert max(Counter(halved.order.tolist()).values()) == 1
    assert make_plan(lengths([10] * 40), Budget(64, 8), 2, 0, epochs=5, max_steps=3).steps == 3


def test_a_mixture_that_shows_nothing_says_so() -> None:
    with pytest.raises(DataError, match=r"none of 2 usable samples.*sum to 0\.002.*Raise `weight`"):
        make_plan(lengths([10, 10], weight=0.001), Budget(64, 8), 2, 0)


def test_windows_keep_shards_together() -> None:
    data = lengths([10] * 120, shards=6)
    order = make_plan(data, Budget(10, 8), 1, 0, window=2, look_ahead=1).order
    windows = [set(data.shard[order[i : i + 40]].tolist()) for i in (0, 40, 80)]
    assert all(len(window) == 2 for window in windows), "two shards at a time are read"


def test_dealing_by_cost_beats_dealing_by_count() -> None:
    random = np.random.default_rng(0)
    tokens = np.concatenate([random.integers(50, 64, 60), random.integers(5, 12, 60)]).tolist()
    plan = make_plan(lengths(tokens, [0] * 120), Budget(64, 8), 8, 0, look_ahead=2)
    naive = []
    for step in range(plan.steps):
        packs = [plan.cost(p) for p in plan.packs_of(step)]
        loads = [sum(packs[:4]), sum(packs[4:])]
        naive.append(max(loads) / (sum(loads) / 2))
    assert plan.imbalance(2) <= float(np.mean(naive))


def test_look_ahead_fills_packs() -> None:
    tokens = np.random.default_rng(3).integers(20, 60, 600).tolist()
    greedy = make_plan(lengths(tokens, [0] * 600), Budget(128, 8), 1, 0, look_ahead=1).report["fill_tokens"]
    ahead = make_plan(lengths(tokens, [0] * 600), Budget(128, 8), 1, 0).report["fill_tokens"]
    assert ahead > greedy
    assert ahead > 0.9


def test_drop_names_length_and_budget() -> None:
    plan = make_plan(lengths([10, 100, 10], [1, 1, 9]), Budget(64, 8), 1, 0)
    assert dict(plan.dropped) == {1: "100 tokens, budget 64", 2: "9 tiles, budget 8"}
    assert plan.report["dropped"] == 2
