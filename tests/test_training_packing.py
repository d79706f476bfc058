"""Bins: both budgets kept, nearly full on realistic lengths, equal work for every number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmflow.training.packing import Packer, deal, group

TILE_TOKENS = 64


def realistic(n: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """(tokens, tiles): captions of 30-200 tokens, images of 1 to 52 tiles of 64 tokens, conversations with and without."""
    random = np.random.default_rng(seed)
    kind = random.choice(4, n, p=[0.4, 0.35, 0.15, 0.1])
    caption = np.clip(random.lognormal(np.log(80), 0.5, n), 30, 200).astype(int)
    talk = np.clip(random.lognormal(np.log(500), 0.8, n), 40, 700).astype(int)
    tiles = np.where(kind == 3, 0, np.minimum(52, random.geometric(0.12, n)))
    return (np.where(kind >= 2, talk, caption) + TILE_TOKENS * tiles).tolist(), tiles.tolist()


def packed(tokens: list[int], tiles: list[int], budget: tuple[int, int], buffer: int = 1024) -> list[list[int]]:
    packer = Packer(*budget, buffer)
    for item, lengths in enumerate(zip(tokens, tiles, strict=True)):
        packer.add(item, *lengths)
    packer.flush()
    assert packer.closed == len(packer.bins)
    return packer.bins


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 6)), max_size=80), st.integers(1, 20))
def test_every_item_once_within_both_budgets(drawn: list[tuple[int, int]], buffer: int) -> None:
    bins = packed([t for t, _ in drawn], [v for _, v in drawn], (64, 6), buffer)
    assert sorted(item for b in bins for item in b) == list(range(len(drawn)))
    for b in bins:
        assert sum(drawn[i][0] for i in b) <= 64 and sum(drawn[i][1] for i in b) <= 6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=120), st.integers(1, 16))
def test_memory_and_waiting_are_bounded(tokens: list[int], buffer: int) -> None:
    packer = Packer(64, 1, buffer)
    arrived: list[int] = []
    for item, length in enumerate(tokens):
        packer.add(item, length, 0)
        arrived.append(item)
        done = {i for b in packer.bins for i in b}
        assert len(arrived) - len(done) < buffer, "more items wait than the buffer holds"
    packer.flush()
    opened = [min(b) for b in packer.bins]
    assert opened == sorted(opened), "a bin begins with the oldest item that waits"


@pytest.mark.parametrize("budget", [4096, 8192])
def test_packs_are_at_least_97_percent_full(budget: int) -> None:
    tokens, tiles = realistic(20_000)
    bins = packed(tokens, tiles, (budget, 10**6))
    fill = [sum(tokens[i] for i in b) / budget for b in bins]
    assert np.mean(fill) >= 0.97
    one_by_one = packed(tokens, tiles, (budget, 10**6), buffer=1)
    assert len(bins) < 0.9 * len(one_by_one)


def test_lengths_do_not_decide_when_a_sample_comes() -> None:
    """Were bins filled with the longest first, short samples would come last, or never when training ends early."""
    tokens, tiles = realistic(6000)
    bins = packed(tokens, tiles, (8192, 10**6))
    place = np.empty(6000)
    for number, b in enumerate(bins):
        place[b] = number / len(bins)
    short, long = (np.array(tokens) < np.median(tokens)), (np.array(tokens) >= np.median(tokens))
    assert abs(place[short].mean() - place[long].mean()) < 0.02
    early = place < 0.2
    assert abs(early[short].mean() - early[long].mean()) < 0.04


def test_the_second_budget_binds_alone() -> None:
    tokens, tiles = realistic(4000)
    bins = packed(tokens, tiles, (10**6, 64))
    assert np.mean([sum(tiles[i] for i in b) / 64 for b in bins]) > 0.97


@pytest.mark.parametrize(("packs", "world"), [(2, 2), (8, 2), (8, 8), (64, 8), (64, 64)])
def test_ranks_have_equal_work(packs: int, world: int) -> None:
    """Costs of tokens, of squared lengths and of tiles, in the proportions of a 7B model with a 0.3B encoder."""
    tokens, tiles = realistic(60_000)
    bins = packed(tokens, tiles, (8192, 10**6))
    cost = np.array([sum(tokens[i] + tokens[i] ** 2 / 30_000 + 32 * tiles[i] for i in b) for b in bins])
    ratios, by_count = [], []
    for step in group(cost, packs, np.random.default_rng(0)):
        if len(step) < packs:  # the last step
            continue
        loads = [cost[step][mine].sum() for mine in deal(cost[step].tolist(), world)]
        ratios.append(max(loads) / np.mean(loads))
    for start in range(0, len(cost) - packs, packs):
        loads = cost[start : start + packs].reshape(world, -1).sum(axis=1)
        by_count.append(loads.max() / loads.mean())
    assert np.mean(ratios) <= 1.05 and np.mean(ratios) < np.mean(by_count)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1e15), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 9))
def test_grouping_and_dealing_cover_each_bin_once(costs: list[float], packs: int, world: int) -> None:
    cost = np.array(costs)
    steps = group(cost, packs, np.random.default_rng(1), steps_inside=2)
    assert sorted(int(b) for step in steps for b in step) == list(range(len(costs)))
    assert all(len(step) == packs for step in steps[:-1]) and len(steps[-1]) <= packs
    for place, step in enumerate(steps[: len(costs) // packs // 2 * 2]):
        assert {int(b) // (2 * packs) for b in step} <= {place // 2, len(costs) // (2 * packs)}, "a bin left its window"
    dealt = deal(costs, world)
    assert sorted(p for mine in dealt for p in mine) == list(range(len(costs)))
    assert max(len(mine) for mine in dealt) == -(-len(costs) // world)


def test_steps_of_like_cost_come_in_no_order() -> None:
    cost = np.random.default_rng(0).random(64)
    means = [cost[step].mean() for step in group(cost, 4, np.random.default_rng(0))]
    assert means != sorted(means)
    assert max(np.ptp(cost[step]) for step in group(cost, 4, np.random.default_rng(0))) < 0.3
