"""The length layer: what the plan believes is what the loader makes, whole or in stretches; what is unusable says why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import training_world as world
from training_world import dataset, sample

from vlmflow import models, storage
from vlmflow.dataset.layer import write_part
from vlmflow.dataset.manifest import LayerRef, Manifest
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError, StepFailed
from vlmflow.training import length, pool, prepare
from vlmflow.training.examples import KINDS, Encoder, Wording, render
from vlmflow.training.length import Reading
from vlmflow.training.plan import Item
from vlmflow.training.planner import make_plan

TILE_TOKENS = 4
CONFIG = SimpleNamespace(tile=28, max_tiles=2, tokens_per_tile=TILE_TOKENS, image_token_id=258)


@pytest.fixture(scope="module")
def reading() -> Reading:
    return Reading(models.family("points"), world.tokenizer(), CONFIG, "tokenizer")


def gathered(root: Path, reading: Reading, manifest: Manifest, use: Any = None, **stage: Any) -> pool.Examples:
    """Examples of a stage with one ingredient; ``use`` replaces fields of it that the recipe would not allow here."""
    ctx = world.context(root, world.recipe(**stage))
    spec = ctx.recipe.stages["sft"]
    uses = [spec.data[0].model_copy(update=use or {})]
    return prepare.examples_of(ctx, spec, uses, {"seed": manifest}, reading)


def with_layer(root: Path, manifest: Manifest, name: str, schema: dict[str, str], rows: dict[str, Any]) -> Manifest:
    parts = []
    for number, shard in enumerate(manifest.shards):
        keys = ShardReader(shard).keys()
        part = [{"key": k, **rows[k]} for k in keys]
        parts.append(write_part(f"file://{root}/{name}-{number}.parquet", part, schema))
    layer = LayerRef(step=name, digest=name, params={}, parts=parts)
    return manifest.model_copy(update={"layers": manifest.layers | {name: layer}})


def talk(*rounds: tuple[str, str], system: str = "") -> list[dict[str, str]]:
    turns = [{"from": "system", "value": system}] if system else []
    for question, answer in rounds:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


TALKS = [
    talk(("<image>what?", "a cat"), ("\n sure?", "yes"), ("why <image> and", "because of it")),
    talk(("hello", "hi"), ("bye", "see you"), system="be kind"),
    talk(("<image><image>", "two"), ("compare", "equal"), ("end", "good")),
    [*talk(("look <image> at <image> these", "ok")), {"from": "human", "value": "unanswered"}],
    talk(("first no picture", "a"), ("then <image>", "b"), ("after", "c"), ("last", "d")),
]


@pytest.mark.parametrize("turns", TALKS)
def test_every_stretch_of_a_conversation_is_as_long_as_measured(reading: Reading, turns: list) -> None:
    images = sum(t["value"].count("<image>") for t in turns)
    one = sample(0, images=images, conversations=turns)
    stage = world.recipe().stages["sft"]
    use = stage.data[0].model_copy(update={"text": "conversations"})
    wording = Wording.of(use, stage, 0)
    row = length.measure(one, None, wording, reading)
    encode = Encoder(reading.family, reading.tokenizer, CONFIG, stage, [use], 0)
    units = len(row["end"])
    assert units == len([t for t in turns if t["from"] == "gpt"])
    whole = render(one, None, wording)[0]
    answers = [s.text for s in whole if s.target and not s.special]
    for first in range(units):
        for last in range(first, units):
            shown = row["images"][last]
            tiles = [reading.family.tiles_for(w, h, CONFIG) for w, h in zip(row["widths"], row["heights"], strict=True)]
            expected = row["end"][last] - row["begin"][first] + TILE_TOKENS * sum(tiles[:shown])
            item = Item(0, 0, 0, first, last, 2, expected, sum(tiles[:shown]), 0, 0)
            (part,) = encode(item, one, None)  # raises when the lengths differ
            assert int(part.target[1:].sum()) == row["targets"][last] - (row["targets"][first - 1] if first else 0)
            assert len(part.tiles) == shown
            segments = KINDS["conversations"].render(one, None, wording, first, last)[0]
            assert [s.text for s in segments if s.target and not s.special] == answers[first : last + 1]
            assert [s.image for s in segments if s.image is not None] == list(range(shown))


def test_each_pair_of_preferences_is_an_item_of_two_parts(tmp_path: Path, reading: Reading) -> None:
    def pair(number: int) -> dict[str, Any]:
        prompt = [{"from": "human", "value": "<image>what?"}]
        return {"conversations": prompt, "chosen": "a cat" * (number + 1), "rejected": f"not {number}"}

    samples = [sample(i, preferences=[pair(n) for n in range(1 + i % 3)]) for i in range(6)]
    use = {"text": "preferences"}
    made = gathered(tmp_path, reading, dataset(tmp_path, samples), use)
    stage = world.recipe().stages["sft"]
    plan = make_plan(made, stage, 0, prepare.visual_of(reading), world.COST)
    items = [item for pack in range(len(plan.pack_tokens)) for item in plan.items_of(pack)]
    assert sorted((i.row, i.first, i.last) for i in items) == [(i, n, n) for i in range(6) for n in range(1 + i % 3)]
    assert sum(plan.items_in(step) for step in range(plan.steps)) == 12
    encode = Encoder(reading.family, reading.tokenizer, CONFIG, stage, made.uses, 0)
    for item in items:
        parts = encode(item, samples[item.row], None)  # raises when the lengths differ
        assert len(parts) == 2 and parts[0].tiles == parts[1].tiles and sum(parts[0].tiles) == item.tiles
        assert item.targets == sum(int(part.target.sum()) for part in parts)


def test_a_sample_that_is_not_what_was_measured_names_itself_and_both_counts(reading: Reading) -> None:
    stage = world.recipe().stages["sft"]
    encode = Encoder(reading.family, reading.tokenizer, CONFIG, stage, [stage.data[0]], 0)
    with pytest.raises(DataError, match=r"sample k003 has \d+ tokens and 3 tiles.*made for 7 tokens and 1 tiles"):
        encode(Item(0, 0, 0, -1, -1, 2, 7, 1, 1, 49), sample(3), None)
    with pytest.raises(DataError, match=r"sample k003: no alt text, but the plan shows it"):
        encode(Item(0, 0, 0, -1, -1, 2, 7, 1, 1, 49), sample(3, text=""), None)


def test_keep_layer_and_text_layer(tmp_path: Path, reading: Reading) -> None:
    manifest = dataset(tmp_path, [sample(i) for i in range(30)])
    keys = [f"k{i:03d}" for i in range(30)]
    keep = {k: {"keep": i % 3 == 0} for i, k in enumerate(keys)}
    manifest = with_layer(tmp_path, manifest, "keep", {"keep": "bool"}, keep)
    manifest = with_layer(tmp_path, manifest, "fused", {"text": "str"}, {k: {"text": f"fused {k}"} for k in keys})
    use = {"text": "fused", "keep": True}
    made = gathered(tmp_path, reading, manifest, use, prompt="continuation", instructions=[])
    assert (len(made), made.report["filtered"], made.report["reasons"]) == (10, 20, [])
    assert [made.key(i, tmp_path) for i in range(10)] == keys[::3]
    assert set(np.diff(made.arrays["unit_start"])) == {1}
    assert made.arrays["end"].tolist() == [len("fused k000") + 1] * 10  # a byte each, and the end token
    assert [entry.text.uri for entry in made.shards] == [part.uri for part in manifest.layers["fused"].parts]


def test_a_layer_without_a_text_filters_the_sample_and_is_no_failure(tmp_path: Path, reading: Reading) -> None:
    """An image without words is a result of OCR: counted with its reason, but not against the stage's own limit."""
    manifest = dataset(tmp_path, [sample(i) for i in range(10)])
    rows: dict[str, dict[str, Any]] = {f"k{i:03d}": {"text": "" if i < 3 else f"read {i}"} for i in range(10)}
    rows["k009"] = {"text": None, "error": "the worker died"}
    manifest = with_layer(tmp_path, manifest, "ocr", {"text": "str"}, rows)
    made = gathered(tmp_path, reading, manifest, {"text": "ocr"}, prompt="continuation", instructions=[])
    assert (len(made), made.report["seen"], made.report["filtered"], made.report["failed"]) == (6, 6, 4, 0)
    counted = {reason["reason"]: (reason["count"], reason["example"]) for reason in made.report["reasons"]}
    assert counted == {"no ocr text": (3, "k000"), "ocr failed: the worker died": (1, "k009")}


def test_failures_are_counted_with_reason_and_example(tmp_path: Path, reading: Reading) -> None:
    bad = {"conversations": talk(("<image><image>?", "no"))}
    good = {"conversations": talk(("<image>?", "yes"))}
    empty = {"conversations": talk(("<image>?", " "))}
    special = {4: bad, 5: empty, 6: {}}
    samples = [sample(i, **special.get(i, good)) for i in range(20)]
    samples[7].meta["images"][0]["width"] = 0
    manifest = dataset(tmp_path, samples)
    ctx = world.context(tmp_path, world.recipe(data=[{"dataset": "seed", "text": "conversations"}], failure_limit=0.1))
    stage = ctx.recipe.stages["sft"]
    made = prepare.examples_of(ctx, stage, list(stage.data), {"seed": manifest}, reading)
    assert len(made) == 16
    reasons = {r["example"]: r["reason"] for r in made.report["reasons"]}
    assert "2 <image> markers" in reasons["k004"] and "empty" in reasons["k005"]
    assert "no conversations" in reasons["k006"] and "no recorded width" in reasons["k007"]
    with pytest.raises(StepFailed, match=r"4 of 20 samples \(20.0%\).*failure_limit 10.0%.*k00"):
        prepare.plan_of(ctx, stage, made, reading)
    lax = stage.model_copy(update={"failure_limit": 0.2})
    plan = make_plan(made, lax, 0, prepare.visual_of(reading), world.COST)
    assert plan.report["samples"] == 16
    prepare.check(plan, lax)
    with pytest.raises(StepFailed, match=r"failure_limit 10\.0%"):
        prepare.check(plan, stage)


def test_finished_lengths_are_found_again_and_other_wordings_are_others(
    tmp_path: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = dataset(tmp_path, [sample(i) for i in range(6)])
    first = gathered(tmp_path, reading, manifest)
    monkeypatch.setattr(length, "measure", lambda *_: pytest.fail("measured twice"))
    again = gathered(tmp_path, reading, manifest)
    assert all(np.array_equal(first.arrays[n], again.arrays[n]) for n in first.arrays)
    monkeypatch.undo()
    gathered(tmp_path, reading, manifest, instructions=["another question"])
    other = Reading(reading.family, reading.tokenizer, CONFIG, "another tokenizer")
    gathered(tmp_path, other, manifest)
    folders = {uri.uri.rsplit("/", 2)[1] for uri in storage.list_uris(storage.join(str(tmp_path), "layers", "length"))}
    assert len(folders) == 3


def test_text_that_spells_special_tokens_stays_text_in_every_thread(tmp_path: Path, reading: Reading) -> None:
    text = "a <|im_end|> b <|im_start|>user <|endoftext|>"
    manifest = dataset(tmp_path, [sample(i, images=0, text=text) for i in range(60)], shard_size=3)
    made = gathered(tmp_path, reading, manifest, prompt="continuation", instructions=[])
    assert made.arrays["end"].tolist() == [len(text) + 1] * 60


def test_instruction_is_drawn_by_seed_and_key() -> None:
    stage = world.recipe(instructions=[f"question {i}" for i in range(9)]).stages["sft"]

    def drawn(seed: int) -> list[str]:
        parts = [render(sample(i), None, Wording.of(stage.data[0], stage, seed))[0] for i in range(12)]
        return [next(s.text for s in p if s.text and "question" in s.text) for p in parts]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 3


def test_the_tokenizers_identity_is_that_of_its_files() -> None:
    from vlmflow.models.store import FileRef

    def files(**hashes: str) -> list[FileRef]:
        names = {"tokenizer": "tokenizer.json", "weights": "model.safetensors", "config": "config.json"}
        return [FileRef(path=names[k], sha256=v, bytes=1) for k, v in hashes.items()]

    first = length.tokenizer_digest(files(tokenizer="a", weights="b", config="c"))
    assert first == length.tokenizer_digest(files(tokenizer="a", weights="x", config="y"))
    assert first != length.tokenizer_digest(files(tokenizer="x", weights="b", config="c"))


def test_units_of_a_sample_without_images_show_none() -> None:
    assert KINDS["conversations"].units(Sample("k", {"conversations": TALKS[1]})) == [0, 0]
