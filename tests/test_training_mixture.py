"""Weights, caps, the share of text, modality grouping and the image-size ramp."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_world import examples, plan_of, recipe

from vlmflow.errors import DataError
from vlmflow.recipe.mixture import DataUse, TextShareSpec
from vlmflow.training.mixture import Mixer, Stream, expected, one_pass, text_share


def use(**fields: Any) -> DataUse:
    return DataUse(dataset="seed", text="alt", **fields)


def everything(n: int) -> np.ndarray:
    return np.ones(n, dtype=bool)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 3.5), min_size=1, max_size=3), st.integers(1, 50), st.integers(1, 6), st.integers(0, 9))
def test_every_sample_is_shown_as_its_weight_says(weights: list[float], n: int, epochs: int, seed: int) -> None:
    made = examples([(10, 0)] * n, uses=[use(weight=w) for w in weights])
    counts: Counter[int] = Counter()
    for epoch in range(epochs):
        counts.update(one_pass(made, everything(n), seed, epoch).tolist())
    for number, weight in enumerate(weights):
        mine = [counts[i] for i in range(n) if made.arrays["use"][i] == number]
        assert all(np.floor(weight * epochs - 1e-9) <= c <= np.ceil(weight * epochs + 1e-9) for c in mine)
        assert abs(sum(mine) - weight * epochs * len(mine)) <= 1
    assert expected(made, everything(n)) == pytest.approx(sum(weights[i % len(weights)] for i in range(n)))


def test_copies_of_a_sample_are_apart() -> None:
    """In an epoch that shows everything twice, a sample does not come twice within a window."""
    made = examples([(10, 0)] * 2560, shards=256, uses=[use(weight=2.0)])
    order = one_pass(made, everything(2560), 0, 0)
    windows = np.arange(len(order)) // 640
    twice = sum(len(set(order[windows == w].tolist())) < 640 - 260 for w in range(8))
    assert twice == 0
    assert Counter(order.tolist()) == dict.fromkeys(range(2560), 2)


def test_cap_holds_for_each_source_and_is_drawn_anew() -> None:
    made = examples([(10, 0)] * 300, shards=6, uses=[use(cap=20)])
    source = np.array(made.sources)[made.arrays["shard"]]
    epochs = [one_pass(made, everything(300), 3, epoch) for epoch in range(4)]
    for order in epochs:
        assert Counter(source[order].tolist()) == {"a": 20, "b": 20}
        assert len(set(order.tolist())) == 40
    assert len({tuple(sorted(order.tolist())) for order in epochs}) == 4
    assert expected(made, everything(300)) == 40
    assert one_pass(examples([(10, 0)] * 12, uses=[use(cap=20)]), everything(12), 3, 0).shape == (12,)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 30), st.integers(1, 30), st.integers(1, 40))
def test_the_running_share_follows_its_target(
    start: float, end: float, warmup: float, texts: int, images: int, block: int
) -> None:
    made = examples([(10, 0)] * texts + [(10, 1)] * images, uses=[use(weight=3.0)])
    share = {"start": start, "end": end, "warmup": warmup}
    stage = recipe(mixture={"text_share": share}).stages["sft"]
    mixer = Mixer(made, everything(len(made)), stage, 0, 2)
    shown = []
    while len(drawn := mixer.take(block)[0]):
        shown += drawn.tolist()
    assert len(shown) == mixer.total == 3 * (texts + images)
    text = np.cumsum(made.text_only[np.array(shown)])
    progress = np.arange(len(shown)) / mixer.total
    target = np.cumsum(text_share(TextShareSpec(**share), progress))
    assert np.abs(text - target).max() <= 0.5 + 1e-6
    for stream, own in zip(mixer.streams, (texts, images), strict=True):
        counts = Counter(i for i in shown if made.text_only[i] == (stream is mixer.streams[0]))
        passes = stream.taken / own
        assert all(np.floor(passes / 3) * 3 <= c for c in counts.values()) or passes < 3
        assert sum(counts.values()) == stream.taken


def test_a_stream_that_runs_out_repeats_and_the_report_says_so() -> None:
    made = examples([(10, 0)] * 10 + [(10, 1)] * 90)
    plan = plan_of(made, mixture={"text_share": {"start": 1.0, "end": 0.5, "warmup": 0.5}})
    shown = Counter(plan.items["row"].tolist())
    texts = [shown[i] for i in range(10)]
    assert sum(texts) == pytest.approx(0.625 * 100, abs=2) and max(texts) - min(texts) <= 1
    assert plan.report["text_passes"] == pytest.approx(sum(texts) / 10)
    assert plan.report["image_passes"] < 0.5 and plan.report["text_share"] == pytest.approx(0.62, abs=0.02)
    first = plan.items["tiles"][: len(plan.items) // 8]
    assert (first == 0).mean() > 0.85, "at first nearly all is text"


def test_a_share_of_what_does_not_exist_is_refused() -> None:
    for images, what in ((0, "samples with images"), (1, "text-only samples")):
        with pytest.raises(DataError, match=rf"asks for {what} .*none of the 8 usable"):
            plan_of(examples([(10, images)] * 8), mixture={"text_share": {"start": 0.9, "end": 0.5}})
    only = plan_of(examples([(10, 0)] * 8), mixture={"text_share": {"start": 1.0, "end": 1.0}})
    assert len(only.items) == 8


def test_a_share_of_samples_that_are_never_shown_is_refused() -> None:
    uses = [use(weight=0.0001), use()]
    made = examples([(10, 0), (10, 1)], uses=uses)
    with pytest.raises(DataError, match=r"1000 passes over 1 samples .* raise their `weight`"):
        plan_of(made, mixture={"text_share": {"start": 1.0, "end": 1.0}})


def test_modality_grouping_and_max_steps() -> None:
    made = examples([(20, i % 2) for i in range(200)])
    plan = plan_of(made, packs=3, max_steps=4, mixture={"group": "modality"})
    assert plan.steps == 4
    kinds = []
    for step in range(4):
        items = [item for pack in plan.packs_of(step) for item in plan.items_of(pack)]
        assert len({item.tiles > 0 for item in items}) == 1
        kinds.append(items[0].tiles > 0)
    whole = plan_of(made, packs=3, mixture={"group": "modality"})
    text = [whole.items_of(whole.packs_of(s)[0])[0].tiles == 0 for s in range(whole.steps)]
    switches = sum(a != b for a, b in pairwise(text))
    assert switches > 4, "steps of both kinds alternate over the training"


@pytest.mark.parametrize("max_steps", [None, 60])
def test_image_sizes_ramp_with_the_training(max_steps: int | None) -> None:
    made = examples([(10, 1)] * 4000)
    ramp = [{"until": 0.25, "max_tiles": 1}, {"until": 0.5, "max_tiles": 4}]
    plan = plan_of(made, budget={"tokens": 256, "tiles": 64}, packs=2, max_steps=max_steps, mixture={"tiles": ramp})
    where = np.repeat(np.arange(len(plan.pack_tokens)), np.diff(plan.pack_start)) / len(plan.pack_tokens)
    limit = plan.items["max_tiles"]
    assert set(limit) == {1, 2, 4}
    if max_steps:  # the shares are of the steps
        assert where[limit == 1].max() == pytest.approx(0.25, abs=0.08)
        assert where[limit == 4].max() == pytest.approx(0.5, abs=0.08)
    else:  # of the samples
        assert (limit == 1).mean() == pytest.approx(0.25, abs=0.01) and (limit == 4).mean() == pytest.approx(
            0.25, abs=0.01
        )
        assert where[limit == 1].max() < where[limit == 2].min()
    assert np.array_equal(plan.items["tiles"], limit)


def test_a_stream_gives_all_of_its_epochs_and_no_more() -> None:
    made = examples([(10, 0)] * 20)
    stream = Stream(made, everything(20), 0, epochs=2.25)
    assert len(stream.take(7)) == 7
    rest = stream.take(1000)
    assert len(rest) == 45 - 7 and len(stream.take(1)) == 0 and stream.passes == 3
