"""Fan-out: a dataset curated by groups of shards is the one that a single task makes, byte by byte."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from curation_world import MODEL, FakeVLM, context, dataset, png, sample
from test_curation_contamination import tables

from vlmflow import ports
from vlmflow.curation import caption, clean, contamination, dedup, describe, fuse, keep, perplexity, phash
from vlmflow.dataset import groups
from vlmflow.dataset.manifest import Manifest
from vlmflow.errors import DataError, StepFailed
from vlmflow.models import inference

RULES = {
    "dataset": "web",
    "caption": {"engine": "model"},
    "fuse": {"engine": "rules"},
    "describe": {"engine": "model", "repair": False, "failure_limit": 1.0},
    "clean": {"text": "fused"},
    "contamination": {},
    "dedup": {"images": None},
    "keep": {"fraction": 0.5},
}
STEPS = (  # in the order of pipelines/parts.py
    (caption, True), (fuse, False), (describe, True), (phash, False), (clean, False), (contamination, False), (perplexity, True),
)  # fmt: skip
LAYERS = {"synthetic", "fused", "described", "phash", "clean", "contamination", "ppl", "dedup", "keep"}


@pytest.fixture
def world(tmp_path, monkeypatch):
    vlm = FakeVLM()
    monkeypatch.setattr(inference, "load", lambda folder: vlm)
    monkeypatch.setattr(caption.store, "fetch", lambda ref, scratch: Path("/nowhere"))
    samples = [sample(f"s{i:03d}", f"a picture number {i}", png(i * 9)) for i in range(22)]
    return dataset(tmp_path / "shards", samples, per_shard=4), vlm, tmp_path


def curate(ctx, manifest: Manifest, count: int) -> Manifest:
    """As the pipeline does: every step over each group, then every step over all shards, then the selection."""
    parts = []
    for group in groups.deal(manifest, count) if count else []:
        part = manifest
        for step, wants in STEPS:
            part = ports.curate(ctx, step, part, *([MODEL] if wants else []), group=group)
        parts.append(part)
    if count:
        groups.check_whole(manifest, parts)
    for step, wants in STEPS:
        manifest = ports.curate(ctx, step, manifest, *([MODEL] if wants else []))
    return ports.curate(ctx, keep, ports.curate(ctx, dedup, manifest))


def stored(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_bytes_whatever_the_grouping(world):
    raw, _, folder = world
    found = []
    for count in (0, 1, 2, 5, 99):
        ctx = context(folder / "run", **RULES)  # the same place every time: addresses are part of a manifest
        ctx.recipe.evaluation = SimpleNamespace(benchmarks=tables(folder / "benchmarks"))
        root = Path(ctx.root)
        made = curate(ctx, raw, count)
        found.append((made.digest, stored(root)))
        assert (root / "manifests" / f"{made.digest}.json").is_file()
        root.rename(folder / f"kept-{count}")
    assert all(each == found[0] for each in found[1:])
    kinds = [name.split("/")[0] for name in found[0][1]]
    assert kinds.count("layers") == len(LAYERS) * len(raw.shards)  # a part a shard of each layer
    assert kinds.count("manifests") == len(LAYERS)  # and a manifest of each step
    assert found[0][0] == made.digest and made.layers.keys() == LAYERS


def test_after_the_groups_nothing_is_computed_again(world):
    raw, vlm, folder = world
    ctx = context(folder / "run", **RULES)
    for group in groups.deal(raw, 3):
        part = ports.curate(ctx, caption, raw, MODEL, group=group)
        assert part.layers["synthetic"].summary == {} and len(part.shards) == group["shards"]
    assert not (Path(ctx.root) / "manifests").exists()  # groups seal nothing
    before = len(vlm.calls)
    assert before
    ports.curate(ctx, caption, raw, MODEL)
    assert len(vlm.calls) == before


def test_failures_are_judged_over_all_shards_not_in_a_group(world):
    raw, _, folder = world
    bad = [sample(f"b{i}", "text", b"no picture") for i in range(4)]
    more = dataset(folder / "bad", bad, per_shard=4)
    whole = raw.model_copy(update={"shards": [*raw.shards, *more.shards]})
    some = context(folder / "some", **{**RULES, "caption": {"engine": "model", "failure_limit": 0.2}})
    none = context(folder / "none", **{**RULES, "caption": {"engine": "model", "failure_limit": 0.1}})
    for ctx in (some, none):
        for group in groups.deal(whole, 99):  # the last one fails wholly
            ports.curate(ctx, caption, whole, MODEL, group=group)
    assert ports.curate(some, caption, whole, MODEL).layers["synthetic"].summary["finish"]["failed"] == 4
    with pytest.raises(StepFailed, match="4 of 26"):
        ports.curate(none, caption, whole, MODEL)


@pytest.mark.parametrize(("count", "sizes"), [(1, [6]), (2, [3, 3]), (4, [1, 2, 1, 2]), (6, [1] * 6), (50, [1] * 6)])
def test_groups_hold_every_shard_once_in_order(world, count, sizes):
    raw, _, _ = world
    dealt = groups.deal(raw, count)
    assert [group["shards"] for group in dealt] == sizes
    parts = [groups.cut(raw, group) for group in dealt]
    assert [shard for part in parts for shard in part.shards] == raw.shards
    assert all(groups.cut(part, group) == part for part, group in zip(parts, dealt, strict=True))
    groups.check_whole(raw, parts)


def test_an_empty_dataset_has_one_empty_group():
    empty = Manifest(name="web", shards=[])
    (group,) = groups.deal(empty, 8)
    assert group == {"name": "1", "first": "", "last": "", "shards": 0}
    assert groups.cut(empty, group) == empty


def test_a_group_of_another_dataset_and_a_lost_group_are_refused(world):
    raw, _, folder = world
    other = dataset(folder / "other", [sample("o1", "x", png(1))])
    (group,) = groups.deal(other, 1)
    with pytest.raises(DataError, match="does not hold group 1"):
        groups.cut(raw, group)
    dealt = groups.deal(raw, 2)
    with pytest.raises(DataError, match="does not hold group 1"):
        groups.cut(raw, {**dealt[0], "shards": 2})
    with pytest.raises(DataError, match="has 6 shards, its 1 groups hold 3, 3 are missing"):
        groups.check_whole(raw, [groups.cut(raw, dealt[0])])
