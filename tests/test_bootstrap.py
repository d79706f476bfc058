"""The bootstrap against a real S3 server, a real MLflow server with logins and the KFP stand-in; twice, and with faults."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp_server import Kfp

from services import mlflow_server
from services.bootstrap import __main__ as bootstrap
from vlmflow import local_stack
from vlmflow.errors import RegistryError, ServiceError

ADMIN, TRAINER, PROMOTER = (
    ("admin", "adm1n-Passw0rd%"),
    ("trainer", "tr4iner-Passw0rd"),
    ("promoter", "prom0ter-Passw0rd"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow with logins, as the chart starts it."""
    folder = tmp_path_factory.mktemp("mlflow")
    env = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_AUTH_DATABASE_URI": f"sqlite:///{folder}/auth.db",
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN[0],
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "flask",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": "ZmFrZS1rZXktZm9yLXRlc3RzLW9ubHktMzItYnl0ZXM=",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_ARTIFACTS_DESTINATION": (folder / "artifacts").as_uri(),
        "MLFLOW_WORKERS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    run = [sys.executable, "-m", "services.mlflow_server"]
    subprocess.run([*run, "migrate"], env=env, check=True, timeout=300)
    port = free_port()
    log = (folder / "log").open("wb")
    server = subprocess.Popen(
        [*run, "serve", "127.0.0.1", str(port)], env=env, stdout=log, stderr=log, start_new_session=True
    )
    uri = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.3)
    yield uri
    os.killpg(server.pid, 9)
    server.wait()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    state = tmp_path_factory.mktemp("store") / "state"
    yield local_stack.up(state)
    local_stack.down(state)


@pytest.fixture
def kfp() -> Iterator[Kfp]:
    with Kfp(token="kfp-token") as server:
        yield server


@pytest.fixture
def environment(store: Any, mlflow_uri: str, kfp: Kfp, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in local_stack.environment(store).items():
        monkeypatch.setenv(name, value)
    settings = {
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "MLFLOW_TRACKING_USERNAME": ADMIN[0],
        "MLFLOW_TRACKING_PASSWORD": ADMIN[1],
        "VLMFLOW_TRAINER_USERNAME": TRAINER[0],
        "VLMFLOW_TRAINER_PASSWORD": TRAINER[1],
        "VLMFLOW_PROMOTER_USERNAME": PROMOTER[0],
        "VLMFLOW_PROMOTER_PASSWORD": PROMOTER[1],
        "VLMFLOW_WEBHOOK_URL": "http://127.0.0.1:9/webhook",
        "VLMFLOW_WEBHOOK_SECRET": "whsec-planted",
        "VLMFLOW_KFP_ENDPOINT": kfp.endpoint,
        "VLMFLOW_KFP_TOKEN": "kfp-token",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


ARGUMENTS = [
    "--bucket",
    "vlmflow-new",
    "--pipeline",
    "points",
    "--model",
    "boot",
    "--image",
    "registry/vlmflow@sha256:" + "a" * 64,
]


def client(monkeypatch: pytest.MonkeyPatch, who: tuple[str, str]) -> Any:
    from vlmflow.registry import tracking

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", who[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", who[1])
    return tracking.client()


def test_a_second_run_changes_nothing(environment: None, kfp: Kfp, capsys: Any, monkeypatch: Any) -> None:
    assert bootstrap.main(ARGUMENTS) == 0
    first = capsys.readouterr()
    assert "new version" in first.out and "boot-candidates" in first.out and "webhook made" in first.out
    assert bootstrap.main(ARGUMENTS) == 0
    second = capsys.readouterr()
    assert "points (unchanged)" in second.out
    assert (
        "models made: none" in second.out and "rights changed: none" in second.out and "webhook updated" in second.out
    )
    assert len(kfp.pipelines) == 1 and len(kfp.versions) == 1
    (spec,) = (version.pipeline_spec for version in kfp.versions.values())
    images = {e["container"]["image"] for e in spec["deploymentSpec"]["executors"].values() if "container" in e}
    assert images == {"registry/vlmflow@sha256:" + "a" * 64}
    assert len(client(monkeypatch, ADMIN).list_webhooks()) == 1
    for secret in (ADMIN[1], TRAINER[1], PROMOTER[1], "whsec-planted", "kfp-token"):
        assert secret not in first.out + first.err + second.out + second.err
        assert not any(secret.encode() in body for body in kfp.bodies)


def test_each_identity_writes_its_own_model_only(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    assert bootstrap.main(ARGUMENTS) == 0
    trainer = client(monkeypatch, TRAINER)
    made = trainer.create_model_version("boot-candidates", "s3://bucket/model")
    with pytest.raises(MlflowException) as refused:
        trainer.create_model_version("boot", "s3://bucket/model")
    assert refused.value.error_code == "PERMISSION_DENIED"
    with pytest.raises(MlflowException):
        trainer.copy_model_version(f"models:/boot-candidates/{made.version}", "boot")
    promoter = client(monkeypatch, PROMOTER)
    copied = promoter.copy_model_version(f"models:/boot-candidates/{made.version}", "boot")
    promoter.set_registered_model_alias("boot", "champion", copied.version)
    promoter.set_registered_model_alias("boot", "previous", copied.version)
    promoter.set_model_version_tag("boot-candidates", made.version, "promotion.verdict", "x")
    trainer = client(monkeypatch, TRAINER)
    with pytest.raises(MlflowException):
        trainer.set_registered_model_alias("boot", "champion", copied.version)
    assert str(trainer.get_model_version_by_alias("boot", "champion").version) == str(copied.version)


def test_the_version_of_a_server_with_logins(
    environment: None, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vlmflow doctor` and `helm test` ask for it as the training identity."""
    import mlflow

    from vlmflow.registry import tracking

    assert tracking.server_version(mlflow_uri) == mlflow.__version__
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(RegistryError, match="401"):
        tracking.server_version(mlflow_uri)


def test_a_part_that_fails_does_not_stop_the_others(environment: None, kfp: Kfp, capsys: Any, monkeypatch: Any) -> None:
    kfp.broken = 503
    assert bootstrap.main(ARGUMENTS) == 6
    said = capsys.readouterr()
    assert "503" in said.err and "store" in said.out and "registry" in said.out
    kfp.broken = 0
    monkeypatch.setenv("VLMFLOW_KFP_TOKEN", "expired")
    assert bootstrap.main(ARGUMENTS) == 6
    assert "token is missing or has expired" in capsys.readouterr().err
    monkeypatch.setenv("VLMFLOW_KFP_TOKEN", "kfp-token")
    monkeypatch.delenv("VLMFLOW_TRAINER_PASSWORD")
    assert bootstrap.main(ARGUMENTS) == 5
    assert "must both be set" in capsys.readouterr().err


def test_the_server_names_settings_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in mlflow_server.NEEDED:
        monkeypatch.setenv(name, "secret-value")
    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD")
    with pytest.raises(ServiceError, match="MLFLOW_AUTH_ADMIN_PASSWORD") as problem:
        mlflow_server.checked()
    assert "secret-value" not in str(problem.value)


def test_a_database_that_cannot_be_opened_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for name in mlflow_server.NEEDED:
        monkeypatch.setenv(name, f"sqlite:///{tmp_path}/file/planted-password.db")
    assert mlflow_server.main(["migrate"]) == 6
    said = capsys.readouterr()
    assert "tracking database" in said.err and "planted-password" not in said.err
