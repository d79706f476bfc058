"""What the chart's schema and templates refuse, and what its files say to each other."""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import chart_case as chart
import helm_python
import pytest
import yaml

from pipelines import platform
from vlmflow.errors import RecipeError
from vlmflow.training.trainjob import preflight, runtime, schema
from vlmflow.training.trainjob.config import TrainJobConfig

DEFAULTS = yaml.safe_load((chart.CHART / "values.yaml").read_text())
SCHEMA = json.loads((chart.CHART / "values.schema.json").read_text())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("profil", "production"),
        ("profile", "test"),
        ("images.train.tag", "latest"),
        ("images.train.digest", "sha256:abc"),
        ("objectStore.mode", "gcs"),
        ("objectStore.endpoint", "s3.example.com"),
        ("objectStore.existingSecret", ""),
        ("objectStore.secretKey", "hunter2"),
        ("promoter.period", 1),
        ("promoter.after.deployment.env", "model-uri"),
        ("training.pools.default.gpus", -1),
        ("training.pools.default.memoryGiBPerProcess", "12Gib"),
        ("training.pools.Sft", {}),
        ("promoter.resources.limits.memory", "12Gib"),
        ("mlflow.backend.kind", "mysql"),
        ("networkPolicy.egressCidrs", ["everything"]),
        ("platform.root", "minio://bucket"),
    ],
)
def test_the_schema_refuses(path: str, value: Any) -> None:
    changes: dict[str, Any] = {}
    node = changes
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    with pytest.raises(helm_python.HelmValuesError) as problem:
        chart.templates(changes)
    assert last in str(problem.value) or parents[-1] in str(problem.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"profile": "production"}, "digest is empty"),
        ({"objectStore": {"mode": "minio"}}, "objectStore.bundled.image.repository is empty"),
        ({"mlflow": {"enabled": True}}, "mlflow.adminSecret is empty"),
        ({"mlflow": {"enabled": True, "adminSecret": "a", "replicas": 2}}, "one file has one writer"),
        ({"mlflow": {"enabled": True, "adminSecret": "a", "backend": {"kind": "postgres"}}}, "key `uri`"),
        ({"captioner": {"enabled": True, "image": {"tag": "v1"}}}, "captioner.model"),
        (
            {"promoter": {"models": ["m"], "after": {"deployment": {"name": "serving"}}}},
            "promoter.after.deployment.container",
        ),
    ],
)
def test_templates_refuse_what_cannot_work(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmRenderError, match=said):
        chart.templates(changes)


@pytest.mark.parametrize("missing", ["promoter.credentialsSecret", "promoter.webhookSecret", "images.services.digest"])
def test_production_demands_secrets_and_digests(missing: str) -> None:
    changes = copy.deepcopy(chart.values("production"))
    node = changes
    *parents, last = missing.split(".")
    for part in parents:
        node = node[part]
    del node[last]
    with pytest.raises(helm_python.HelmRenderError, match=missing.split(".")[0]):
        chart.templates(changes)


def test_production_refuses_the_bundled_store() -> None:
    changes = chart.values("production") | {"objectStore": chart.values("evaluation")["objectStore"]}
    with pytest.raises(helm_python.HelmRenderError, match="without redundancy"):
        chart.templates(changes)


def test_every_value_is_described_and_every_description_has_a_value() -> None:
    def walk(schema: dict[str, Any], values: Any, path: str) -> None:
        assert schema.get("description") or not path, path
        if isinstance(values, dict) and "properties" in schema:
            described = set(schema["properties"]) - {"global"}
            assert described == set(values), path
            assert schema["additionalProperties"] is False, path
            for name in described:
                walk(schema["properties"][name], values[name], f"{path}.{name}")

    walk(SCHEMA, DEFAULTS, "")


@pytest.mark.parametrize("case", chart.MATRIX)
def test_the_chart_lints(case: str) -> None:
    found = helm_python.lint(str(chart.CHART), chart.values(case), strict=True)
    assert not found["errors"] and not [m for m in found["messages"] if m["severity"] >= 2], found


def test_pipelines_read_what_the_chart_writes() -> None:
    found = {i["metadata"]["name"]: i for i in chart.rendered("default") if i["kind"] == "ConfigMap"}
    data = found[platform.CONFIG_MAP]["data"]
    assert set(platform.CONFIG) <= set(data)
    assert all(isinstance(value, str) for value in data.values())


def test_the_training_settings_are_the_launchers_own() -> None:
    found = {i["metadata"]["name"]: i for i in chart.rendered("production") if i["kind"] == "ConfigMap"}
    config = TrainJobConfig.model_validate(json.loads(found["vlmflow"]["data"]["trainJob"]))
    assert config.runtime == "v-vlmflow-train" and config.service_account == "v-vlmflow-training"
    assert config.pools["ocr"].shared and config.pools["ocr"].gpus == 1
    assert config.pool("align")[0] == "default" and config.pools["default"].node_selector == {"pool": "h100"}
    assert config.image_pull_secrets == ["registry"]
    assert config.secrets["mlpipeline-minio-artifact"] == "vlmflow-store"
    with pytest.raises(RecipeError, match="7 were asked for"):
        config.shape("sft", 7)


def test_the_runtime_is_the_one_that_the_library_prints() -> None:
    (found,) = [copy.deepcopy(i) for i in chart.rendered("production") if i["kind"] == "TrainingRuntime"]
    schema.check(found)
    expected = runtime.training_runtime("image", name="v-vlmflow-train")
    pod = found["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    labels = pod.pop("metadata")["labels"]
    assert labels["app.kubernetes.io/component"] == "training"
    container = pod["spec"]["containers"][0]
    assert container.pop("image").startswith("registry.example.com/vlmflow/vlmflow-train@sha256:")
    expected_pod = expected["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    del expected_pod["spec"]["containers"][0]["image"]
    for name, value in expected_pod["spec"]["containers"][0]["securityContext"].items():
        assert container["securityContext"].pop(name) == value
    del container["securityContext"], expected_pod["spec"]["containers"][0]["securityContext"]
    assert found["spec"] == expected["spec"]


def test_without_a_model_there_is_no_promoter() -> None:
    """Its command refuses to start without one: the smallest installation would have a pod that never runs."""
    names = {item["metadata"]["name"] for item in chart.rendered("default")}
    assert "v-vlmflow-pipelines" in names and not any("promoter" in name for name in names)
    made = chart.objects({"promoter": {"models": ["m"], "webhookSecret": "s"}})
    kinds = {item["kind"] for item in made if item["metadata"]["name"] == "v-vlmflow-promoter"}
    assert {"Deployment", "Service", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget"} == kinds


def test_what_helm_does_not_remove_removes_itself() -> None:
    (job,) = [item for item in chart.rendered("default") if item["kind"] == "Job"]
    assert "hook-succeeded" in job["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    assert job["spec"]["ttlSecondsAfterFinished"] > 0


def test_the_pipelines_may_ask_all_that_the_preflight_asks() -> None:
    (role,) = [
        i for i in chart.rendered("production") if i["kind"] == "Role" and i["metadata"]["name"].endswith("-pipelines")
    ]
    given = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked = {
        (group, f"{resource}/{part}" if part else resource, verb)
        for group, resource, part, verbs in [*preflight.NEEDED, *preflight.WANTED]
        for verb in verbs
    }
    asked |= {("trainer.kubeflow.org", "trainingruntimes", "get"), (preflight.KUEUE, "localqueues", "get")}
    assert asked <= given


def test_the_policies_are_the_promoters_own() -> None:
    from services.promoter.__main__ import policies

    (found,) = [i for i in chart.rendered("production") if i["metadata"]["name"].endswith("-policies")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policies.json"
        path.write_text(found["data"]["policies.json"])
        asked = policies(str(path), ["points-9b"], "approved-by")
    assert asked["points-9b"].floors == {"mmbench": 0.6} and asked["points-9b"].approval_tag == "approved-by"


def test_the_pipelines_are_compiled_for_the_nodes_and_secrets_of_the_values() -> None:
    from vlmflow.compiler import PIPELINES, compile_pipeline
    from vlmflow.installation import VARIABLE, Installation

    pool = {"node_selector": {"pool": "gpu"}, "tolerations": [{"key": "gpu", "effect": "NoSchedule"}], "memory": "64Gi"}
    changes = {
        "pipelines": {"pools": {"gpu": pool}, "steps": {"caption": "gpu"}},
        "imagePullSecrets": [{"name": "pull"}],
    }
    changes |= {"promoter": {"models": ["m", "n"], "approvalTag": "by", "policies": {"n": {"regression": 0.1}}}}
    changes["promoter"]["credentialsSecret"] = "promoter-login"
    found = chart.objects(changes)
    (job,) = [item for item in found if item["kind"] == "Job" and item["metadata"]["name"].endswith("bootstrap")]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (text,) = [each["value"] for each in container["env"] if each["name"] == VARIABLE]
    asked = Installation.model_validate_json(text)
    assert asked.pool("caption") is not None and asked.pool("ocr") is None and asked.pull_secrets == ["pull"]
    assert asked.secrets["vlmflow-promoter"] == "promoter-login" and "vlmflow-endpoints" not in asked.secrets
    assert compile_pipeline("curate", installation=asked)
    assert {arg.removeprefix("--pipeline=") for arg in container["args"] if "--pipeline=" in arg} == set(PIPELINES)
    (platform,) = [item for item in found if item["kind"] == "ConfigMap" and item["metadata"]["name"] == "vlmflow"]
    policies = json.loads(platform["data"]["promotionPolicies"])
    assert policies == {"m": {"approval_tag": "by"}, "n": {"approval_tag": "by", "regression": 0.1}}


def test_the_notes_name_three_commands() -> None:
    notes = next(text for path, text in chart.templates({}).items() if path.endswith("NOTES.txt"))
    for command in ("helm test v -n ml", "kubectl -n ml", "vlmflow submit"):
        assert command in notes


def test_the_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location(
        "reference", chart.CHART.parents[1] / "docs" / "make_chart_reference.py"
    )
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (chart.CHART / "README.md").read_text() == made.text(), "run: python docs/make_chart_reference.py"
