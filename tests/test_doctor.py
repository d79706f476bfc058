"""`vlmflow doctor` against broken installations: each fault is named with its cure, and nothing else is."""

from __future__ import annotations

import base64
import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kfp_server import Kfp

from vlmflow import compiler, doctor, kfp_api, local_stack, settings

SECRET = base64.b64encode(b"planted-secret").decode()
STORE = "/api/v1/namespaces/ml/secrets/mlpipeline-minio-artifact"
CONFIG = "/api/v1/namespaces/ml/configmaps/vlmflow"
RUNTIME = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/ml/trainingruntimes/v-train"
HEALTHY: dict[str, Any] = {
    "/version": {"major": "1", "minor": "33+"},
    CONFIG: {
        "data": {
            "root": "s3://b", "s3Endpoint": "http://s3", "mlflowTrackingUri": "http://m", "trainLauncher": "trainjob",
            "trainJob": json.dumps({"runtime": "v-train"}),
        }
    },
    STORE: {"data": {"accesskey": SECRET, "secretkey": SECRET}},
    "/apis/trainer.kubeflow.org": {"preferredVersion": {"version": "v1alpha1"}},
    RUNTIME: {"kind": "TrainingRuntime"},
}  # fmt: skip


class Answers:
    """An HTTP server that gives JSON by path, or a status."""

    def __init__(self, objects: dict[str, Any]) -> None:
        self.objects = objects
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                found = answers.objects.get(self.path.split("?")[0], 404)
                data = found.encode() if isinstance(found, str) else json.dumps(found).encode()
                self.send_response(found if isinstance(found, int) else 200)
                self.send_header("content-length", str(len(data)))
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Answers:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def kfp(tmp_path: Path) -> Iterator[Kfp]:
    with Kfp(token="good") as server:
        client = kfp_api.connect(server.endpoint, "good")
        for name in compiler.PIPELINES:
            kfp_api.register(client, name, compiler.compile_pipeline(name).text, tmp_path)
        yield server


@pytest.fixture
def cluster() -> Iterator[Answers]:
    with Answers(copy.deepcopy(HEALTHY)) as server:
        yield server


@pytest.fixture(autouse=True)
def environment(stack: Any, kfp: Kfp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in local_stack.environment(stack).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLMFLOW_CONFIG", str(tmp_path / "none.yaml"))
    monkeypatch.setenv("VLMFLOW_KFP_ENDPOINT", kfp.endpoint)
    monkeypatch.setenv("VLMFLOW_KFP_TOKEN", "good")
    monkeypatch.setenv("VLMFLOW_NAMESPACE", "ml")


def faults(cluster: Answers) -> dict[str, doctor.Finding]:
    from kubernetes import client

    def connect() -> Any:
        return client.ApiClient(client.Configuration(host=cluster.url))

    found = doctor.examine(settings.load(), connect=connect)
    assert not any("planted-secret" in f.detail + f.cure or SECRET in f.detail + f.cure for f in found)
    assert all(f.cure for f in found if f.state == "fault")
    return {f.what: f for f in found if f.state != "ok"}


def test_a_healthy_installation_has_no_fault(cluster: Answers) -> None:
    assert faults(cluster) == {}


def test_a_wrong_endpoint_and_an_expired_token(cluster: Answers, monkeypatch: Any) -> None:
    monkeypatch.setenv("VLMFLOW_KFP_TOKEN", "expired")
    found = faults(cluster)
    assert "VLMFLOW_KFP_TOKEN" in found["Kubeflow Pipelines answers"].cure
    assert found["pipelines are registered"].state == "skipped"
    monkeypatch.setenv("VLMFLOW_KFP_ENDPOINT", "http://127.0.0.1:9")
    assert "port-forward" in faults(cluster)["Kubeflow Pipelines answers"].cure


def test_pipelines_that_are_not_registered(cluster: Answers, kfp: Kfp) -> None:
    kfp.pipelines.clear()
    cure = faults(cluster)["pipelines are registered"].cure
    assert cure.startswith("vlmflow register ") and "points" in cure


def test_a_store_that_refuses_or_lacks_the_bucket(cluster: Answers, monkeypatch: Any) -> None:
    what = "object store takes objects"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    found = faults(cluster)[what]
    assert "AWS_SECRET_ACCESS_KEY" in found.cure
    monkeypatch.undo()


def test_a_bucket_that_is_not_there(cluster: Answers, monkeypatch: Any) -> None:
    monkeypatch.setenv("VLMFLOW_ROOT", "s3://no-such-bucket")
    assert "bucket" in faults(cluster)["object store takes objects"].cure
    monkeypatch.setenv("VLMFLOW_ROOT", "")
    assert "VLMFLOW_ROOT" in faults(cluster)["object store takes objects"].cure
    monkeypatch.setenv("VLMFLOW_ROOT", "s3://vlmflow")
    monkeypatch.setenv("VLMFLOW_S3_ENDPOINT", "http://127.0.0.1:9")
    assert "VLMFLOW_S3_ENDPOINT" in faults(cluster)["object store takes objects"].cure


def test_an_old_or_closed_mlflow(cluster: Answers, monkeypatch: Any) -> None:
    with Answers({"/health": "OK", "/version": "3.9.1"}) as old:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", old.url)
        found = faults(cluster)
        assert "3.9.1 is older than 3.10" in found["MLflow answers, version"].detail
        assert "upgrade" in found["MLflow answers, version"].cure
        old.objects["/health"] = 403
        assert "MLFLOW_SERVER_ALLOWED_HOSTS" in faults(cluster)["MLflow answers, version"].cure


@pytest.mark.parametrize(
    ("change", "what", "cure"),
    [
        ({CONFIG: 404}, "platform configuration", "helm upgrade --install"),
        ({CONFIG: {"data": {"root": "s3://b"}}}, "platform configuration", "platform, objectStore and mlflow"),
        ({STORE: {"data": {"accesskey": SECRET}}}, "secrets and their keys", "edit secret"),
        ({STORE: 404}, "secrets and their keys", "create secret generic mlpipeline-minio-artifact"),
        ({STORE: 403}, "secrets and their keys", "ask for that right"),
        ({"/apis/trainer.kubeflow.org": 404}, "training on the cluster", "install Kubeflow Trainer 2.3"),
        ({RUNTIME: 404}, "training on the cluster", "it makes the runtime"),
        ({"/version": {"major": "1", "minor": "24"}}, "Kubernetes answers, version", "upgrade the cluster"),
        ({"/version": 401}, "Kubernetes answers, version", "log in to the cluster again"),
    ],
)
def test_a_faulty_cluster(cluster: Answers, change: dict[str, Any], what: str, cure: str) -> None:
    cluster.objects.update(change)
    found = faults(cluster)
    assert list(found) == [what] and cure in found[what].cure, found


def test_secrets_have_the_names_of_the_installation(cluster: Answers) -> None:
    """`objectStore.existingSecret` of the chart: the ConfigMap says which secret stands for the library's."""
    cluster.objects[CONFIG]["data"]["trainJob"] = json.dumps({"runtime": "v-train", "secrets": {"mlpipeline-minio-artifact": "our-store"}})  # fmt: skip
    cluster.objects["/api/v1/namespaces/ml/secrets/our-store"] = cluster.objects.pop(STORE)
    assert faults(cluster) == {}
    del cluster.objects["/api/v1/namespaces/ml/secrets/our-store"]
    assert "create secret generic our-store" in faults(cluster)["secrets and their keys"].cure


def test_without_a_cluster_only_its_checks_are_skipped() -> None:
    def connect() -> Any:
        raise OSError("no kubeconfig")

    found = doctor.examine(settings.load(), connect=connect)
    assert {f.state for f in found if "Kube" not in f.what and f.what[0] != "p"} >= {"ok", "skipped"}
    assert not [f for f in found if f.state == "fault"]
