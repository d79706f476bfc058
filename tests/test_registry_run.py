"""Registration against a real MLflow server: one version per model and recipe, whatever is repeated or killed."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import registry_samples as samples

from vlmflow import local_stack
from vlmflow.errors import DataError, RegistryError
from vlmflow.registry import run as registry
from vlmflow.registry import tracking


@pytest.fixture
def environment(stack, monkeypatch):
    for name, value in local_stack.environment(stack).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return stack


SOUP = SimpleNamespace(chosen="greedy", trace=[{"add": "base", "accuracy": 0.8, "kept": True}], soups={})


def test_a_version_carries_lineage_scores_and_gates(environment, tmp_path):
    ctx = samples.context(tmp_path)
    model = samples.published(ctx, tmp_path)
    data = {"sft": samples.manifest()}
    made = registry.run(ctx, model, samples.score_table(model), SOUP, data)
    assert made.name == "points-test-candidates"

    mlflow = tracking.client()
    version = mlflow.get_model_version(made.name, made.version)
    assert version.tags["weights.sha256"] == model.weights_sha256
    assert version.tags["data.sft"] == data["sft"].digest
    assert json.loads(version.tags["lineage.parents"]) == ["c" * 64]
    assert version.tags["soup.chosen"] == "greedy"
    assert {k: v for k, v in version.tags.items() if k.startswith("gate.")} == {
        f"gate.{name}": "pass"
        for name in ("absolute_floor", "times_chance", "better_than_untrained", "lineage_complete", "weights_unchanged")
    }
    assert "digits 0.800 (chance 0.100, n 40, report split)" in version.description
    found = mlflow.get_run(made.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["digits/final"] == pytest.approx(0.8)
    assert found.data.metrics["digits/untrained"] == pytest.approx(0.1)
    assert found.data.metrics["digits/chance"] == pytest.approx(0.1)
    assert found.data.params["stages.sft.train.0.lr"] == "0.001"
    assert found.inputs.dataset_inputs[0].dataset.name == "sft"
    assert [m.name for m in mlflow.search_registered_models()] == [made.name], "NAME itself belongs to the promoter"

    again = registry.run(ctx, model, samples.score_table(model), SOUP, data)
    assert again == made
    assert len(mlflow.search_model_versions(f"name = '{made.name}'")) == 1

    from mlflow.artifacts import download_artifacts

    local = download_artifacts(
        f"models:/{made.name}/{made.version}", dst_path=str(tmp_path), tracking_uri=environment.mlflow_uri
    )
    assert (Path(local) / "model.safetensors").read_bytes() == b"weights"
    assert urllib.request.urlopen(made.url.split("#")[0], timeout=10).status == 200


def test_a_model_in_s3_is_referred_to_not_copied(environment, tmp_path):
    ctx = samples.context(tmp_path)
    ctx.root = environment.root
    model = samples.published(ctx, tmp_path, b"other weights", key="s3")
    made = registry.run(ctx, model, samples.score_table(model), None, {"sft": samples.manifest()})
    assert made.source == model.uri == "s3://vlmflow/models/s3"
    assert tracking.client().get_model_version_download_uri(made.name, made.version) == model.uri


def test_a_kill_before_the_version_is_mended_without_a_second_run_or_model(environment, tmp_path, monkeypatch):
    ctx = samples.context(tmp_path)
    model = samples.published(ctx, tmp_path, b"third weights", key="third")
    table = samples.score_table(model)
    from mlflow import MlflowClient

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "finalize_logged_model", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            registry.run(ctx, model, table, None, {})
    made = registry.run(ctx, model, table, None, {})
    mlflow = tracking.client()
    key = mlflow.get_model_version(made.name, made.version).tags[tracking.KEY_TAG]
    experiment = tracking.experiment(mlflow, ctx.recipe.registry.experiment)
    assert len(mlflow.search_runs([experiment], f"tags.`{tracking.KEY_TAG}` = '{key}'")) == 1
    assert len(mlflow.search_logged_models([experiment], f"tags.`{tracking.KEY_TAG}` = '{key}'")) == 1
    assert len(mlflow.get_metric_history(made.run_id, "digits/untrained")) == 1
    assert made.gates["lineage_complete"] == "fail" and "datasets" in made.gate_details["lineage_complete"]


def test_a_complete_version_keeps_what_was_recorded_and_other_scores_make_another(environment, tmp_path, monkeypatch):
    """A rerun by newer code made nothing, so it must not sign; metrics and gates must be of the same scores."""
    ctx = samples.context(tmp_path)
    model = samples.published(ctx, tmp_path, b"fifth weights", key="fifth")
    table, data = samples.score_table(model), {"sft": samples.manifest()}
    mlflow = tracking.client()
    monkeypatch.setenv("VLMFLOW_CODE_VERSION", "first")
    first = registry.run(ctx, model, table, SOUP, data)
    monkeypatch.setenv("VLMFLOW_CODE_VERSION", "second")
    made = registry.run(ctx, model, table, SOUP, data)
    assert made == first
    assert mlflow.get_model_version(made.name, made.version).tags["code.version"] == "first"
    run = mlflow.get_run(made.run_id)
    assert run.data.tags["code.version"] == "first" and run.info.status == "FINISHED"

    worse = registry.run(ctx, model, {**table, "greedy soup": samples.scores(model.weights_sha256, 12)}, SOUP, data)
    assert worse.version != made.version and worse.gates["absolute_floor"] == "fail"
    assert mlflow.get_run(worse.run_id).data.metrics["digits/final"] == pytest.approx(0.3)
    assert mlflow.get_model_version(made.name, made.version).tags["gate.absolute_floor"] == "pass"


def test_gates_decide_by_the_selection_split_and_the_metrics_report_the_other(environment, tmp_path):
    ctx = samples.context(tmp_path)
    model = samples.published(ctx, tmp_path, b"sixth weights", key="sixth")
    good = samples.score_table(model)
    bad = {"untrained": samples.scores("0" * 64, 4), "greedy soup": samples.scores(model.weights_sha256, 6)}
    for each in bad.values():
        each.split = "selection"
    made = registry.run(ctx, model, good, SOUP, {"sft": samples.manifest()}, bad)
    assert made.gates["absolute_floor"] == made.gates["times_chance"] == "fail"
    assert made.gate_split == "selection" and "digits 0.150 of 0.500" in made.gate_details["absolute_floor"]
    assert tracking.client().get_run(made.run_id).data.metrics["digits/final"] == pytest.approx(0.8)
    again = registry.run(ctx, model, good, SOUP, {"sft": samples.manifest()}, bad)
    assert again == made


def test_a_given_run_is_used(environment, tmp_path, monkeypatch):
    mlflow = tracking.client()
    given = mlflow.create_run(tracking.experiment(mlflow, "from-kubeflow")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    ctx = samples.context(tmp_path)
    model = samples.published(ctx, tmp_path, b"fourth weights", key="fourth")
    assert registry.run(ctx, model, samples.score_table(model)).run_id == given


def test_errors_name_the_variable_and_the_server(tmp_path, monkeypatch):
    ctx = samples.context(tmp_path)
    model = samples.published(ctx, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_URI is not set"):
        registry.run(ctx, model, samples.score_table(model))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(RegistryError, match=r"no MLflow server answers at MLFLOW_TRACKING_URI=http://127.0.0.1:9"):
        registry.run(ctx, model, samples.score_table(model))
    with pytest.raises(DataError, match="evaluate it first"):
        registry.run(ctx, model, {"untrained": samples.scores("0" * 64, 4)})


def test_another_server_is_not_taken_for_mlflow(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment.s3_endpoint)
    with pytest.raises(RegistryError, match="not an MLflow server"):
        tracking.client()


def test_flatten_keeps_every_setting():
    assert registry.flatten({"a": [{"b": 1}, {"b": None}], "c": [1, 2], "d": {}, "e": "x"}) == {
        "a.0.b": "1", "a.1.b": "null", "c": "[1, 2]", "d": "{}", "e": "x",
    }  # fmt: skip
