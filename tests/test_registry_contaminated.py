"""What share of a benchmark stands in training data: measured by the curation, judged by the gate."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import registry_samples as samples

from vlmflow.dataset.layer import seal_columns
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import describe_shard, write_shard
from vlmflow.registry import contaminated, policy
from vlmflow.registry.dossier import Dossier
from vlmflow.step import Context


def dataset(
    ctx: Context, folder: Path, name: str, found: dict[str, list[str]], kept: set[str] | None = None
) -> Manifest:
    """Samples that meet these items, two a shard; `kept` are those that a selection left."""
    keys, shards = list(found), []
    for start in range(0, len(keys), 2):
        path = folder / f"{name}-{start}.tar"
        mine = [Sample(key, {"source": "s", "text": key, "images": []}) for key in keys[start : start + 2]]
        shards.append(describe_shard(path, path.as_uri(), write_shard(path, mine), "s"))
    made = Manifest(name=name, shards=shards)
    parts = [keys[start : start + 2] for start in range(0, len(keys), 2)]
    tables = [
        pa.table({"key": part, "found": pa.array([found[k] for k in part], pa.list_(pa.string()))}) for part in parts
    ]
    made = seal_columns(
        ctx, made, "contamination", params={}, version=1, schema={"found": "list<str>"}, parts=tables,
        summary={"items": {"digits": 10, "words": 4}},
    )  # fmt: skip
    if kept is not None:
        tables = [pa.table({"key": part, "keep": [key in kept for key in part]}) for part in parts]
        made = seal_columns(ctx, made, "keep", params={}, version=1, schema={"keep": "bool"}, parts=tables)
    return made


def test_an_item_counts_once_over_all_datasets(tmp_path: Path) -> None:
    ctx = samples.context(tmp_path)
    sft = dataset(ctx, tmp_path, "sft", {"a": ["digits/1", "digits/2"], "b": [], "c": ["digits/1"]})
    web = dataset(ctx, tmp_path, "web", {"d": ["digits/2"], "e": ["words/7"]})
    assert contaminated.measured(ctx.recipe, {"sft": sft}) == {"digits": 0.2, "words": 0.0}
    assert contaminated.measured(ctx.recipe, {"sft": sft, "web": web}) == {"digits": 0.2, "words": 0.25}


@pytest.mark.parametrize(("keep", "expected"), [([True], 0.1), ([True, False], 0.3)])
def test_what_no_stage_takes_does_not_count(tmp_path: Path, keep: list[bool], expected: float) -> None:
    """A dataset counts by its kept samples only where every stage takes no others."""
    source = {"base": {"table": "file:///t.csv"}}
    uses = [{"dataset": "web", "text": "alt", "keep": only} for only in keep]
    ctx = samples.context(
        tmp_path,
        data={"sft": {"sources": source}, "web": {"sources": source}},
        curation={"dataset": "web", "scorer": "s3://b/models/p"},
        stages={"sft": {**samples.STAGE, "prompt": "continuation", "data": uses}},
    )
    web = dataset(ctx, tmp_path, "web", {"a": ["digits/1"], "b": ["digits/2"], "c": ["digits/3"]}, kept={"b"})
    assert contaminated.measured(ctx.recipe, {"web": web})["digits"] == expected


def test_data_that_was_never_compared_is_not_called_clean(tmp_path: Path) -> None:
    ctx = samples.context(tmp_path)
    compared = dataset(ctx, tmp_path, "sft", {"a": []})
    assert contaminated.measured(ctx.recipe, {"sft": compared, "seed": samples.manifest("seed")}) == {}
    assert contaminated.measured(ctx.recipe, {}) == {}
    ref = samples.published(ctx, tmp_path)
    row = samples.scores(ref.weights_sha256, 20)
    from vlmflow.registry.rows import score_rows

    brings = Dossier(
        model=ref, rows=score_rows({"final": row}), final="final", untrained="untrained", tables={}, data=[],
        gates=ctx.recipe.registry.gates, recipe_digest="r", contamination=contaminated.measured(ctx.recipe, {"sft": compared}),
    )  # fmt: skip
    assert policy.contamination_below(brings, 0.01).passed
    assert not policy.contamination_below(brings.model_copy(update={"contamination": {}}), 0.01).passed
