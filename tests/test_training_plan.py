"""The pack plan: budgets kept, nothing lost, the same steps whatever the number of processes, whole in the store."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_world import TILE_TOKENS, examples, plan_of, talks

from vlmflow import storage
from vlmflow.errors import DataError
from vlmflow.recipe.mixture import DataUse
from vlmflow.training import plan_file
from vlmflow.training.plan import Plan

BUDGET = {"tokens": 64, "tiles": 4}
samples = st.lists(st.tuples(st.integers(1, 70), st.integers(0, 3)), min_size=1, max_size=60)
mixtures = st.sampled_from(
    [
        {},
        {"group": "modality"},
        {"tiles": [{"until": 0.4, "max_tiles": 1}]},
        {"tiles": [{"until": 0.5, "max_tiles": 3}]},
    ]
)


def rows(plan: Plan) -> list[int]:
    return plan.items["row"].tolist()


@settings(max_examples=80, deadline=None)
@given(samples, st.integers(1, 4), st.integers(0, 3), st.integers(1, 5), mixtures)
def test_every_sample_once_within_both_budgets(
    drawn: list, packs: int, seed: int, world: int, mixture: dict[str, Any]
) -> None:
    made = examples(drawn)
    limits = [2, *(phase["max_tiles"] for phase in mixture.get("tiles", []))]

    def fits(text: int, images: int, most: int) -> bool:
        return text + images * most * TILE_TOKENS <= 64 and images * most <= 4

    stage = {"budget": BUDGET, "packs": packs, "mixture": mixture}
    if not any(fits(t, i, most) for t, i in drawn for most in limits):
        with pytest.raises(DataError, match="none of"):
            plan_of(made, seed, **stage)
        return
    try:
        plan = plan_of(made, seed, **stage)
    except DataError:  # every sample was drawn in the phase in which it does not fit
        assert mixture.get("tiles") and not all(fits(t, i, m) for t, i in drawn for m in limits)
        return
    counts = Counter(rows(plan))
    assert set(counts.values()) <= {1}
    assert {n for n, (t, i) in enumerate(drawn) if all(fits(t, i, m) for m in limits)} <= set(counts)
    assert {drop.example for drop in plan.dropped} == {
        n for n, (t, i) in enumerate(drawn) if not all(fits(t, i, m) for m in limits)
    }
    for pack in range(len(plan.pack_tokens)):
        inside = plan.items_of(pack)
        for item in inside:
            text, images = drawn[item.row]
            assert item.max_tiles in limits
            assert item.tiles == images * item.max_tiles and item.tokens == text + TILE_TOKENS * item.tiles
            assert item.squares == item.tokens**2
        assert sum(item.tokens for item in inside) == plan.pack_tokens[pack] <= 64
        assert sum(item.tiles for item in inside) == plan.pack_tiles[pack] <= 4
        if "group" in mixture:
            assert len({item.tiles > 0 for item in inside}) == 1
    assert sum(plan.targets_of(s) for s in range(plan.steps)) == plan.items["targets"].sum() == plan.report["targets"]
    assert sum(plan.items_in(s) for s in range(plan.steps)) == len(plan.items) == plan.report["shown"]
    for step in range(plan.steps):
        assert 1 <= len(plan.packs_of(step)) <= packs
        dealt = plan.deal(step, world)
        assert len({len(mine) for mine in dealt}) == 1, "ranks with unequal micro-batches wait for ever"
        assert sorted(p for mine in dealt for p in mine if p is not None) == list(plan.packs_of(step))


def test_same_inputs_same_plan_other_seed_other_plan() -> None:
    made = examples([(5 + i % 13, i % 2) for i in range(100)])
    first, again, other = (plan_of(made, seed, epochs=2) for seed in (1, 1, 2))
    assert first.digest() == again.digest() != other.digest()
    for world in (1, 2, 8):
        again.imbalance(world)
        assert again.digest() == first.digest()


def test_epochs_and_steps() -> None:
    made = examples([(10, 0)] * 40)
    assert len(rows(plan_of(made, epochs=1.5))) == 60
    assert plan_of(made, epochs=5, max_steps=3).steps == 3
    assert plan_of(made, epochs=1, max_steps=300).steps < 300, "the epochs end before the steps do"
    both = rows(plan_of(made, epochs=2))
    assert Counter(both) == dict.fromkeys(range(40), 2)


def test_a_mixture_that_shows_nothing_says_so() -> None:
    uses = [DataUse(dataset="seed", text="alt", weight=0.001)]
    with pytest.raises(DataError, match=r"none of 2 usable samples.*sum to 0\.002.*Raise `weight`"):
        plan_of(examples([(10, 0)] * 2, uses=uses))


def test_too_long_is_dropped_with_both_numbers() -> None:
    plan = plan_of(examples([(10, 0), (100, 0), (10, 5)]), budget=BUDGET)
    assert {d.example: d.reason for d in plan.dropped} == {1: "100 tokens, budget 64", 2: "110 tokens, budget 64"}
    tight = plan_of(examples([(10, 0), (10, 3)]), budget={"tokens": 128, "tiles": 4})
    assert {d.example: d.reason for d in tight.dropped} == {1: "6 tiles, budget 4"}
    assert (plan.report["dropped"], tight.report["dropped_share"]) == (2, 0.5)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 80), st.sampled_from([0, 0, 0, 1])), min_size=1, max_size=7),
        min_size=1,
        max_size=12,
    )
)
def test_a_long_conversation_is_cut_between_rounds_and_every_round_comes_once(drawn: list) -> None:
    made, stage = talks(drawn), {"budget": BUDGET, "data": [{"dataset": "seed", "text": "conversations"}]}

    def length(talk: list, first: int, last: int) -> tuple[int, int]:
        tiles = 2 * sum(images for _, images in talk[: last + 1])  # earlier images are shown again
        return sum(tokens for tokens, _ in talk[first : last + 1]) + TILE_TOKENS * tiles, tiles

    def fits(talk: list, first: int, last: int) -> bool:
        tokens, tiles = length(talk, first, last)
        return tokens <= 64 and tiles <= 4

    possible = [[fits(talk, i, i) for i in range(len(talk))] for talk in drawn]
    if not any(map(any, possible)):
        with pytest.raises(DataError, match="none of"):
            plan_of(made, **stage)
        return
    plan = plan_of(made, **stage)
    shown: dict[int, list[int]] = {row: [] for row in range(len(drawn))}
    for pack in range(len(plan.pack_tokens)):
        for item in plan.items_of(pack):
            talk = drawn[item.row]
            whole = item.first == item.last == -1
            first, last = (0, len(talk) - 1) if whole else (item.first, item.last)
            assert (item.tokens, item.tiles) == length(talk, first, last) and fits(talk, first, last)
            assert item.targets == last - first + 1
            assert whole == fits(talk, 0, len(talk) - 1), "only what is too long is cut"
            shown[item.row] += range(first, last + 1)
            assert last == len(talk) - 1 or not fits(talk, first, last + 1), "no more parts than are needed"
    for row, rounds in shown.items():
        assert sorted(rounds) == [i for i, possible_alone in enumerate(possible[row]) if possible_alone]
    lost = [(row, i) for row, alone in enumerate(possible) for i, ok in enumerate(alone) if not ok]
    assert {(d.example, len(drawn[d.example]) == 1) for d in plan.dropped} == {
        (row, len(drawn[row]) == 1) for row, _ in lost
    }
    assert sum(d.reason.startswith("round ") for d in plan.dropped) == sum(len(drawn[row]) > 1 for row, _ in lost)
    assert plan.report["dropped"] == len({row for row, _ in lost})


def test_too_long_drop_keeps_conversations_whole() -> None:
    made = talks([[(40, 0), (40, 0)], [(10, 0), (10, 0)]])
    data = [{"dataset": "seed", "text": "conversations"}]
    plan = plan_of(made, budget={**BUDGET, "too_long": "drop"}, data=data)
    assert [(item.row, item.first) for item in plan.items_of(0)] == [(1, -1)]
    assert [d.reason for d in plan.dropped] == ["80 tokens, budget 64"]
    both = plan_of(made, budget=BUDGET, data=data)
    assert both.report["split"] == 2 and not both.dropped


def test_a_stored_plan_is_the_plan(tmp_path: Path) -> None:
    plan = plan_of(examples([(5 + i % 13, i % 2) for i in range(50)]))
    marker = plan_file.save(plan, str(tmp_path / "plan"))
    found = plan_file.load(marker)
    assert found.digest() == plan.digest() and found.report == plan.report and found.shards == plan.shards
    assert found.cost == plan.cost and found.items_of(1) == plan.items_of(1)
    before = {u.uri: storage.read_bytes(u.uri) for u in storage.list_uris(str(tmp_path))}
    plan_file.save(plan, str(tmp_path / "plan"))
    assert before == {u.uri: storage.read_bytes(u.uri) for u in storage.list_uris(str(tmp_path))}


@pytest.mark.parametrize("name", [*(f"{n}.npy" for n in plan_file.ARRAYS), plan_file.MARKER])
def test_a_damaged_plan_is_refused_and_made_again(tmp_path: Path, name: str) -> None:
    marker = plan_file.save(plan_of(examples([(10, 0)] * 9)), str(tmp_path))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"[Dd]elete it"):
        plan_file.load(marker)
    assert plan_file.find(marker) is None
    path.unlink()
    assert plan_file.find(marker) is None


def test_items_changed_behind_the_marker_are_refused(tmp_path: Path) -> None:
    import json

    plan = plan_of(examples([(10, 0)] * 9))
    marker = Path(plan_file.save(plan, str(tmp_path)))
    content = json.loads(marker.read_text())
    marker.write_text(json.dumps(content | {"digest": "0" * 64}))
    with pytest.raises(DataError, match="the file says 0000"):
        plan_file.load(str(marker))


def test_windows_of_shards() -> None:
    from vlmflow.training import mixture

    made = examples([(10, 0)] * 120, shards=6)
    order = mixture.one_pass(made, np.ones(120, bool), seed=0, epoch=0, window=2)
    windows = [set(made.arrays["shard"][order[i : i + 40]].tolist()) for i in (0, 40, 80)]
    assert all(len(window) == 2 for window in windows), "two shards at a time are read"
