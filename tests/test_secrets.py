"""No secret ever appears in a compiled package, a parameter, a log line, an MLflow record or an artifact."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import registry_world as world
from kfp_server import Kfp

from vlmflow import compiler, kfp_api, local_stack
from vlmflow.client import Client
from vlmflow.registry import promote, tracking
from vlmflow.registry.policy import Policy
from vlmflow.training.launchers import LaunchRequest
from vlmflow.training.trainjob import spec
from vlmflow.training.trainjob.config import Pool, TrainJobConfig

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "points-tiny.yaml"
PLANTED = {
    name: f"planted-{name.lower().replace('_', '-')}-9f27"
    for name in (
        "MLFLOW_TRACKING_PASSWORD",
        "VLMFLOW_CAPTION_KEY",
        "VLMFLOW_FUSE_KEY",
        "VLMFLOW_KFP_TOKEN",
        "VLMFLOW_WEBHOOK_SECRET",
        "VLMFLOW_PROMOTER_PASSWORD",
        "VLMFLOW_TRAINER_PASSWORD",
        "HF_TOKEN",
    )
}


@pytest.fixture
def secrets(stack: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bytes]:
    """The values to look for: those planted, and the real key of the store."""
    environment = local_stack.environment(stack)
    for name, value in {**environment, **PLANTED, "MLFLOW_TRACKING_USERNAME": "trainer"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("VLMFLOW_CONFIG", str(tmp_path / "none.yaml"))
    return [value.encode() for value in [*PLANTED.values(), environment["AWS_SECRET_ACCESS_KEY"]]]


def leaks(folder: Path, secrets: list[bytes]) -> list[str]:
    """Files under a folder that hold one of the values; the stack's own file of keys is the one that may."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "credentials.json" and any(s in path.read_bytes() for s in secrets)
    ]


def test_neither_records_nor_artifacts_nor_logs(
    secrets: list[bytes], stack: Any, tmp_path: Path, caplog: Any, capfd: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    made, _ = world.candidate(tmp_path / "a", 30, "secretive")
    outcome = promote.reconcile(tracking.client(), "secretive", Policy())
    assert outcome.action == "promoted" and made.version == "1"
    said = capfd.readouterr()
    for text in (said.out, said.err, caplog.text, json.dumps(made.model_dump(mode="json"))):
        assert not any(secret.decode() in text for secret in secrets)
    assert leaks(tmp_path, secrets) == []
    state = Path(stack.state_dir)
    assert any((state / name).exists() for name in ("mlflow", "mlflow.db", "s3")), list(state.iterdir())
    assert leaks(state, secrets) == [], "MLflow's database, its artifacts, the store, the servers' logs"


def test_neither_packages_nor_parameters_nor_jobs(secrets: list[bytes], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("vlmflow.storage.write_bytes", lambda uri, data: (tmp_path / "recipe").write_bytes(data))
    packages = {name: compiler.compile_pipeline(name).text for name in compiler.PIPELINES}
    with Kfp(token=PLANTED["VLMFLOW_KFP_TOKEN"]) as kfp:
        monkeypatch.setenv("VLMFLOW_KFP_ENDPOINT", kfp.endpoint)
        connected = kfp_api.connect(kfp.endpoint, PLANTED["VLMFLOW_KFP_TOKEN"])
        kfp_api.register(connected, "points", packages["points"], tmp_path)
        sent = Client(root="s3://bucket/root").submit(RECIPE, ["seed=3"])
        bodies = b"".join(kfp.bodies)
    request = LaunchRequest(
        folder="s3://b/training/a", model="s3://b/models/a/model.json", key="0" * 64, label="sft", stage="sft",
        processes=8, threads=1, run_id="run", scratch=tmp_path,
    )  # fmt: skip
    config = TrainJobConfig(namespace="ml", pools={"default": Pool()})
    job = json.dumps(spec.train_job(request, config, config.shape("sft", 8)))
    for secret in secrets:
        assert not any(secret.decode() in text for text in packages.values())
        assert secret not in bodies and secret.decode() not in job + repr(sent)
    assert leaks(tmp_path, secrets) == []


def test_commands_print_none(secrets: list[bytes], tmp_path: Path) -> None:
    for command in (["recipe", "show", str(RECIPE)], ["doctor", "--no-kubernetes"], ["compile", "--to", str(tmp_path)]):
        done = subprocess.run([sys.executable, "-m", "vlmflow.cli", *command], capture_output=True, check=False)
        assert done.stdout or done.stderr
        assert not any(secret in done.stdout + done.stderr for secret in secrets), command
    assert leaks(tmp_path, secrets) == []
