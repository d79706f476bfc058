"""The pipeline `evaluate` really run by kfp.local: from a model's address to its scores and the summary of the run."""

from __future__ import annotations

import models_tiny
import registry_samples as samples

from vlmflow import compiler, local, storage
from vlmflow.estimate import Estimate
from vlmflow.evaluation.tsv import encode_image, write_table
from vlmflow.models import store
from vlmflow.models.initial import save
from vlmflow.recipe import dump


def test_a_model_named_by_its_address_is_scored(tmp_path, monkeypatch):
    table = tmp_path / "digits.tsv"
    pictures = [encode_image(models_tiny.picture(i)) for i in range(4)]
    rows = [
        {
            "index": i,
            "image": image,
            "question": f"read {i}",
            "answer": "7",
            "split": "report" if i % 2 else "selection",
        }
        for i, image in enumerate(pictures)
    ]
    write_table(table, rows)
    evaluation = {"benchmarks": {"digits": {"table": table.as_uri(), "kind": "reading"}}, "max_new_tokens": 2}
    ctx = samples.context(tmp_path, evaluation=evaluation)
    (tmp_path / "recipe.yaml").write_text(dump(ctx.recipe), encoding="utf-8")
    save(models_tiny.build(), models_tiny.tokenizer(), tmp_path / "model")
    model = store.publish(ctx, tmp_path / "model", "points-test", store.ModelLineage(step="soup"), "k")
    monkeypatch.setenv("VLMFLOW_ROOT", ctx.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # an evaluation needs no registry

    follower = Estimate([])
    arguments = {"recipe": str(tmp_path / "recipe.yaml"), "models": [model.uri], "split": "selection"}
    package = compiler.compile_pipeline("evaluate").text
    local.execute(package, arguments, tmp_path / "state" / "runs" / "r1", follower)

    steps = ["preflight", "contestants", "evaluate-1", "scoreboard"]
    assert list(follower.ended) == [*steps, "finish"]
    ended = storage.read_json(f"{ctx.root}/runs/r1/end.json")
    assert ended["state"] == "SUCCEEDED" and [step["step"] for step in ended["steps"]] == steps
    summary = storage.read_json(f"{ctx.root}/runs/r1/summary.json")
    assert summary["models"] == ["points-test"] and summary["scores"]["points-test"].keys() == {"digits", "mean"}
    (written,) = (tmp_path / "state/runs/r1/artifacts").rglob("scoreboard/table")
    assert storage.read_json(str(written))["points-test"]["split"] == "selection"
