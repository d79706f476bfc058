"""A small recipe, model, datasets and scores for the tests of registry and export."""

from __future__ import annotations

from vlmflow.dataset.manifest import Lineage, Manifest, ShardRef
from vlmflow.evaluation.scores import BenchmarkScore, Scores, wilson
from vlmflow.models import store
from vlmflow.recipe import Recipe
from vlmflow.step import Context

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
STAGE = {
    "prompt": "chat",
    "data": [{"dataset": "sft", "text": "conversations"}],
    "train": [{"modules": "language", "lr": 0.001}],
}


def recipe(**changes) -> Recipe:
    base = {
        "name": "points-test",
        "model": {
            "vision": {"config": TOWER},
            "vision_ocr": {"config": TOWER},
            "language": {"config": {"model_type": "qwen2", "hidden_size": 32}},
            "tokenizer": {"train_vocab": 300, "train_on": ["sft"]},
            "tiling": {"tile": 28, "max_tiles": 2},
        },
        "data": {"sft": {"sources": {"base": {"table": "file:///t.csv", "conversations_column": "conversations"}}}},
        "stages": {"sft": STAGE},
        "evaluation": {"benchmarks": {"digits": {"table": "file:///d.tsv", "kind": "reading"}}},
        "registry": {"model": "points-test", "gates": {"floors": {"digits": 0.5}, "times_chance": {"digits": 4}}},
        "export": {"licence": "apache-2.0"},
    }
    return Recipe.model_validate({**base, **changes})


def context(tmp_path, **changes) -> Context:
    return Context(recipe(**changes), (tmp_path / "root").as_uri(), tmp_path / "scratch", "test")


def manifest(name: str = "sft") -> Manifest:
    shard = ShardRef(uri=f"file:///{name}.tar", sha256="a" * 64, bytes=10, samples=7, source="base")
    return Manifest(name=name, shards=[shard], lineage=[Lineage(step="pull", params={"table": "file:///t.csv"})])


def published(ctx, tmp_path, content: bytes = b"weights", key: str = "k") -> store.ModelRef:
    folder = tmp_path / f"model-{key}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    lineage = store.ModelLineage(
        step="soup", params={"kind": "greedy"}, parents=["c" * 64], ancestor="d" * 64, data=[manifest().digest]
    )
    return store.publish(ctx, folder, "points-test", lineage, key)


def scores(sha: str, right: int, n: int = 40) -> Scores:
    one = BenchmarkScore(
        accuracy=right / n, n=n, chance=0.1, parsed=1.0, errors=0, interval=wilson(right, n), kind="reading",
        table_sha256="e" * 64, split_by="hash",
    )  # fmt: skip
    return Scores(model_sha=sha, split="report", benchmarks={"digits": one}, mean=right / n)


def score_table(model: store.ModelRef) -> dict[str, Scores]:
    return {
        "untrained": scores("0" * 64, 4),
        "candidate base": scores("c" * 64, 30),
        "greedy soup": scores(model.weights_sha256, 32),
    }
