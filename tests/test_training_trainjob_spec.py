"""What is sent to the cluster: TrainJob, TrainingRuntime, the installation's settings, and what refuses a wrong one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from vlmflow.errors import RecipeError, ServiceError
from vlmflow.training.launchers import LaunchRequest
from vlmflow.training.trainjob import config as settings
from vlmflow.training.trainjob import schema, spec
from vlmflow.training.trainjob.config import Pool, TrainJobConfig, from_environment
from vlmflow.training.trainjob.runtime import training_runtime

REQUEST = LaunchRequest(
    folder="s3://bucket/vlm/training/abc",
    model="s3://bucket/vlm/models/abc/model.json",
    key="0123456789abcdef" * 4,
    label="sft-LLaVA_665k.mix",
    stage="sft",
    processes=16,
    threads=4,
    run_id="4f1e7a3c-run",
    scratch=Path("/scratch"),
)
POOL = Pool(
    gpus=8,
    queue="research",
    priority="high",
    node_selector={"cloud/pool": "h100"},
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
)
CONFIG = TrainJobConfig(
    namespace="team-a",
    image="registry/vlmflow-train@sha256:0",
    service_account="vlmflow-train",
    image_pull_secrets=["registry"],
    env=[{"name": "NCCL_DEBUG", "value": "WARN"}],
    pools={"default": POOL},
)


def job(**changes: Any) -> dict[str, Any]:
    config = CONFIG.model_copy(update=changes)
    return spec.train_job(REQUEST, config, config.shape(REQUEST.stage, REQUEST.processes))


def pod_of(made: dict[str, Any]) -> dict[str, Any]:
    [patch] = made["spec"]["runtimePatches"]
    [replicated] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


def test_the_trainjob_fits_the_schema_and_says_what_the_installation_wants() -> None:
    made = job()
    schema.check(made)
    trainer, pod = made["spec"]["trainer"], pod_of(made)
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"
    assert trainer["command"][-1] == "s3://bucket/vlm/training/abc/job.json"
    assert made["spec"]["suspend"] is True and made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert pod["nodeSelector"] == {"cloud/pool": "h100"} and pod["serviceAccountName"] == "vlmflow-train"
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "8192Mi"}
    assert made["spec"]["activeDeadlineSeconds"] == 14 * 86400


def test_without_a_queue_it_starts_at_once() -> None:
    made = job(pools={"default": Pool(gpus=8)})
    assert "suspend" not in made["spec"] and spec.QUEUE_LABEL not in made["metadata"]["labels"]


def test_the_name_follows_from_store_and_digest_alone() -> None:
    name = spec.name_of(REQUEST)
    same = LaunchRequest(**{**vars(REQUEST), "run_id": "another", "processes": 8, "threads": 1})
    other = LaunchRequest(**{**vars(REQUEST), "folder": "s3://elsewhere/training/abc"})
    assert spec.name_of(same) == name != spec.name_of(other)
    longest = LaunchRequest(**{**vars(REQUEST), "label": "x" * 200})
    # host names of the pods and names of their Job are made of it
    assert len(f"{spec.name_of(longest)}-node-0-1000") <= 63
    assert len(REQUEST.key) > 63 and len(job()["metadata"]["labels"][spec.KEY_LABEL]) <= 63


def test_no_secret_value_is_written_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = "planted-secret-value"
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, planted)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{planted}@mlflow:5000")
    monkeypatch.setenv("MLFLOW_RUN_ID", "run-of-this-task")
    made = job()
    assert planted not in json.dumps(made)
    env = {entry["name"]: entry for entry in made["spec"]["trainer"]["env"]}
    assert env["AWS_SECRET_ACCESS_KEY"]["valueFrom"]["secretKeyRef"]["key"] == "secretkey"
    assert env["MLFLOW_TRACKING_URI"]["valueFrom"]["configMapKeyRef"]["key"] == "mlflowTrackingUri"
    assert env["MLFLOW_RUN_ID"]["value"] == "run-of-this-task", "Kubeflow's run of this task goes on in the pods"


def test_pods_get_the_same_configuration_as_pipeline_tasks() -> None:
    from pipelines import platform

    assert (settings.CONFIG_MAP, settings.STORE_SECRET) == (platform.CONFIG_MAP, platform.STORE_SECRET)
    assert settings.MLFLOW_SECRET == platform.MLFLOW_SECRET and settings.MLFLOW_KEYS == platform.MLFLOW_KEYS
    assert settings.STORE_KEYS == platform.STORE_KEYS and settings.CONFIG_KEYS.items() <= platform.CONFIG.items()


def change(made: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(made)
    *folders, last = path.split(".")
    here: Any = made
    for part in folders:
        here = here[int(part) if part.isdigit() else part]
    here[last] = value
    return made


POD = "spec.runtimePatches.0.trainingRuntimeSpec.template.spec.replicatedJobs.0.template.spec.template.spec"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.podTemplateOverrides", [], "podTemplateOverrides"),
        ("spec.trainer.nodes", 2, "'nodes' was unexpected"),
        (f"{POD}.priorityClassName", "high", "priorityClassName"),
        (f"{POD}.tolerations.0.effects", "NoSchedule", "effects"),
        ("spec.trainer.numNodes", "2", "numNodes"),
        ("spec.trainer.resourcesPerNode.limits", {"memory": "12Gib"}, "12Gib"),
        ("spec.runtimePatches.0.manager", "vlmflow", "not of the form domain/name"),
        ("spec.runtimePatches.0.trainingRuntimeSpec.template.spec.failurePolicy", {}, "failurePolicy"),
        (f"{POD}.containers.0.env", [{"name": "A", "value": "b"}], "use spec.trainer.env"),
        ("spec.trainer.env.0", {"name": "PET_NNODES", "value": "1"}, "set by Trainer itself"),
        ("metadata.name", "Upper", "must be a DNS label"),
        ("metadata.name", "x" * 52, "at most 51 characters"),
        ("apiVersion", "trainer.kubeflow.org/v1", "is not trainer.kubeflow.org/v1alpha1"),
        ("spec.trainer", {"numNodes": 1}, "would guess from CPU cores"),
    ],
)
def test_what_the_cluster_would_drop_or_refuse_is_not_sent(path: str, value: Any, message: str) -> None:
    made = job()
    if path == "spec.trainer.env.0":
        made["spec"]["trainer"]["env"].insert(0, value)
    else:
        made = change(made, path, value)
    with pytest.raises(ServiceError, match="was not sent") as refused:
        schema.check(made)
    assert message in str(refused.value)


def test_the_runtime_fits_the_schema_and_pod_security_restricted() -> None:
    made = training_runtime("registry/vlmflow-train@sha256:0", restarts=3)
    schema.check(made)
    schema.check(training_runtime("x", kind="ClusterTrainingRuntime"))
    jobset = made["spec"]["template"]["spec"]
    assert jobset["failurePolicy"]["maxRestarts"] == 3 and made["spec"]["mlPolicy"]["torch"] == {}
    [replicated] = jobset["replicatedJobs"]
    assert replicated["template"]["spec"]["backoffLimit"] == 0
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 300
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # the Job inside is Kubernetes' own kind: its schema knows podFailurePolicy's rules
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "node"},
        "spec": replicated["template"]["spec"],
    }
    for version in ("1.33", "1.35", "1.37"):
        kubernetes_validate.validate(batch, version, strict=True)


def test_restart_rules_point_at_the_pod_rules_they_mean() -> None:
    """Kubernetes names a pod failure rule by its index; the JobSet's rules must follow when one is moved."""
    jobset = training_runtime("x")["spec"]["template"]["spec"]
    pod_rules = jobset["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    actions = {rule["onJobFailureMessagePatterns"][0]: rule["action"] for rule in jobset["failurePolicy"]["rules"]}
    for index, rule in enumerate(pod_rules):
        expected = "FailJobSet" if "onExitCodes" in rule else "RestartJobSetAndIgnoreMaxRestarts"
        assert actions[f"rule at index {index}$"] == expected


def test_exit_codes_of_input_errors_end_a_training_for_good() -> None:
    from vlmflow import errors
    from vlmflow.training.job import PREEMPTED
    from vlmflow.training.trainjob.runtime import PERMANENT

    for kind in (errors.RecipeError, errors.DataError, errors.ModelError, errors.CheckpointError, errors.StepFailed):
        assert kind.exit_code in PERMANENT
    for kind in (errors.StorageError, errors.ServiceError):
        assert kind.exit_code not in PERMANENT
    assert PREEMPTED not in PERMANENT


@pytest.mark.parametrize(
    ("pool", "processes", "shape"),
    [
        (Pool(gpus=8), 8, (1, 8)),
        (Pool(gpus=8), 64, (8, 8)),
        (Pool(gpus=8, shared=True), 7, (1, 7)),
        (Pool(gpus=0, processes=2), 6, (3, 2)),
        (Pool(gpus=1), 3, (3, 1)),
    ],
)
def test_processes_become_nodes(pool: Pool, processes: int, shape: tuple[int, int]) -> None:
    assert pool.shape(processes, "default") == shape


@pytest.mark.parametrize(
    ("pool", "processes", "message"),
    [
        (Pool(gpus=8), 7, r"processes: 7 .* pool 'big' has 8 GPUs .* Use 8 or 16 \(or let"),
        (Pool(gpus=8), 12, r"processes: 12 .* 4 of them would stand idle .* Use 8 or 16 \(or let"),
        (Pool(gpus=8, shared=True), 12, r"Use 8 or 16\."),
        (Pool(gpus=0, processes=4), 3, r"has 4 CPU processes .* Use 4 or 8"),
    ],
)
def test_processes_that_fill_no_node_are_refused_with_both_numbers(pool: Pool, processes: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pool.shape(processes, "big")


def test_a_stage_may_have_a_pool_of_its_own() -> None:
    config = TrainJobConfig(pools={"default": Pool(gpus=8), "ocr": Pool(gpus=2)})
    assert config.shape("ocr", 2) == (1, 2) and config.shape("sft", 8) == (1, 8)


def test_settings_come_from_the_environment_as_text_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "namespace: team-a\npools:\n  default: {gpus: 4}\n"
    (tmp_path / "trainjob.yaml").write_text(text)
    for given in (text, str(tmp_path / "trainjob.yaml")):
        monkeypatch.setenv(settings.VARIABLE, given)
        assert from_environment().shape("sft", 4) == (1, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("namespace: a\ngpus: 8", "gpus: Extra inputs are not permitted"),
        ("namespace: a\npools: {default: {gpus: -1}}", r"pools.default.gpus: .*greater than or equal to 0"),
        ("namespace: a\npools: {sft: {gpus: 8}}", "there is no pool 'default'"),
        ("namespace: a\nenv: [{name: HF_TOKEN, value: abc}]", "valueFrom.secretKeyRef"),
        ("namespace: [", "is not YAML"),
        ("/nowhere/trainjob.yaml", "is not a file"),
        ("", "no namespace"),
    ],
)
def test_wrong_settings_are_named(text: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(settings.VARIABLE, text)
    monkeypatch.setattr(settings, "NAMESPACE_FILE", tmp_path / "none")
    with pytest.raises(ServiceError, match=message):
        from_environment()


def test_a_pod_knows_its_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "namespace").write_text("team-b\n")
    monkeypatch.setattr(settings, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.delenv(settings.VARIABLE, raising=False)
    assert from_environment().namespace == "team-b"
