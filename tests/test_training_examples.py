"""Which samples become examples, and what happens to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_world import dataset, recipe, sample

from vlmflow.dataset.layer import write_part
from vlmflow.dataset.manifest import LayerRef, Manifest
from vlmflow.errors import StepFailed
from vlmflow.training.examples import Encoded, prepare, segments_of


def encode(segments: list[Any], images: list[dict[str, Any]]) -> Encoded:
    """One id a character; two ids an image."""
    ids, target = [], []
    for segment in segments:
        new = [1, 1] if segment.image is not None else [ord(c) % 99 + 2 for c in segment.text]
        ids += new
        target += [segment.target] * len(new)
    return Encoded(ids, target, [1] * len(images))


def with_layer(
    root: Path, manifest: Manifest, name: str, schema: dict[str, str], rows: dict[str, dict[str, Any]]
) -> Manifest:
    parts = []
    from vlmflow.dataset.shard import ShardReader

    for number, shard in enumerate(manifest.shards):
        keys = ShardReader(shard).keys()
        parts.append(
            write_part(f"file://{root}/{name}-{number}.parquet", [{"key": k, **rows[k]} for k in keys], schema)
        )
    return manifest.model_copy(
        update={"layers": manifest.layers | {name: LayerRef(step=name, digest=name, params={}, parts=parts)}}
    )


def build(root: Path, manifest: Manifest, **stage: Any):
    spec = recipe(**stage).stages["sft"]
    return prepare(root / "examples", [(use, manifest) for use in spec.data], spec, encode, 7, root / "scratch")


def test_keep_layer_text_layer_and_weight(tmp_path: Path) -> None:
    manifest = dataset(tmp_path, [sample(i) for i in range(30)])
    keys = [f"k{i:03d}" for i in range(30)]
    manifest = with_layer(
        tmp_path, manifest, "keep", {"keep": "bool"}, {k: {"keep": i % 3 == 0} for i, k in enumerate(keys)}
    )
    manifest = with_layer(tmp_path, manifest, "fused", {"text": "str"}, {k: {"text": f"fused {k}"} for k in keys})
    spec = recipe(prompt="continuation", instructions=[]).stages["sft"]
    use = spec.data[0].model_copy(update={"text": "fused", "keep": True, "weight": 2.0})
    made = prepare(tmp_path / "examples", [(use, manifest)], spec, encode, 7, tmp_path)
    assert len(made) == 10
    assert made.report["filtered"] == 20
    expected = encode(segments_of(sample(3), {"text": "fused k003"}, use, spec, 7), [{}])
    assert made.ids(1).tolist() == expected.ids
    got = made.lengths()
    assert set(got.weight) == {2.0} and set(got.tiles) == {1}
    assert got.tokens.tolist() == [len(made.ids(i)) for i in range(10)]
    assert got.targets.tolist() == [int((made.labels(i) != -100).sum()) for i in range(10)]


def test_a_layer_without_a_text_filters_the_sample_and_is_no_failure(tmp_path: Path) -> None:
    """An image without words is a result of OCR: counted with its reason, but not against the stage's own limit."""
    manifest = dataset(tmp_path, [sample(i) for i in range(10)])
    rows: dict[str, dict[str, Any]] = {f"k{i:03d}": {"text": "" if i < 3 else f"read {i}"} for i in range(10)}
    rows["k009"] = {"text": None, "error": "the worker died"}
    manifest = with_layer(tmp_path, manifest, "ocr", {"text": "str"}, rows)
    spec = recipe(prompt="continuation", instructions=[], failure_limit=0.0).stages["sft"]
    use = spec.data[0].model_copy(update={"text": "ocr"})
    made = prepare(tmp_path / "examples", [(use, manifest)], spec, encode, 7, tmp_path)
    assert (len(made), made.report["seen"], made.report["filtered"], made.report["failed"]) == (6, 6, 4, 0)
    counted = {reason["reason"]: (reason["count"], reason["example"]) for reason in made.report["reasons"]}
    assert counted == {"no ocr text": (3, "k000"), "ocr failed: the worker died": (1, "k009")}


def test_failures_are_counted_with_reason_and_example(tmp_path: Path) -> None:
    bad = {"conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "no"}]}
    good = {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]}
    empty = {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": " "}]}
    samples = [sample(i, **(bad if i == 4 else empty if i == 5 else {} if i == 6 else good)) for i in range(20)]
    manifest = dataset(tmp_path, samples)
    data = [{"dataset": "seed", "text": "conversations"}]
    made = build(tmp_path, manifest, data=data, failure_limit=0.2)
    assert len(made) == 17
    reasons = {r["example"]: r["reason"] for r in made.report["reasons"]}
    assert (
        "2 <image> markers" in reasons["k004"] and "empty" in reasons["k005"] and "no conversations" in reasons["k006"]
    )
    with pytest.raises(StepFailed, match=r"3 of 20 samples \(15.0%\).*failure_limit 10.0%.*k00"):
        build(tmp_path / "again", manifest, data=data, failure_limit=0.1)


def test_instruction_is_drawn_by_seed_and_key() -> None:
    stage = recipe(instructions=[f"question {i}" for i in range(9)]).stages["sft"]

    def drawn(seed: int) -> list[str]:
        parts = [segments_of(sample(i), None, stage.data[0], stage, seed) for i in range(12)]
        return [next(s.text for s in p if s.text and "question" in s.text) for p in parts]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 3


def test_finished_examples_are_found_again(tmp_path: Path) -> None:
    manifest = dataset(tmp_path, [sample(i) for i in range(6)])
    first = build(tmp_path, manifest)
    spec = recipe().stages["sft"]

    def never(*_: Any) -> Encoded:
        raise AssertionError("encoded twice")

    again = prepare(tmp_path / "examples", [(spec.data[0], manifest)], spec, never, 7, tmp_path)
    assert all(np.array_equal(first.arrays[n], again.arrays[n]) for n in first.arrays)


def test_loader_names_an_image_whose_size_was_recorded_wrongly(tmp_path: Path) -> None:
    from vlmflow.errors import DataError
    from vlmflow.training.loader import Loader
    from vlmflow.training.plan import Budget, make_plan

    made = build(tmp_path, dataset(tmp_path, [sample(i) for i in range(4)]))
    plan = make_plan(made.lengths(), Budget(200, 8), 1, 0)
    loader = Loader(
        made, plan, lambda image: np.zeros((3, 28, 28, 3), np.uint8), lambda ids: np.arange(len(ids)), [1], 28, tmp_path
    )
    with pytest.raises(DataError, match=r"sample k00\d.*gives 3 tiles but 1 were expected"):
        next(loader.steps())
    loader.close()
