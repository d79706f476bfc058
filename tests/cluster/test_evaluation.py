"""The evaluation installation with its own services running: MLflow, bootstrap, promoter and `helm test` are the commands
of their pods, with what the API gives them. Object store and Kubeflow Pipelines are the local stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import chart_case as chart
import mlflow
import pytest
from kfp_server import Kfp
from place import RELEASE, SECRETS, Place

from vlmflow.compiler import PIPELINES


@pytest.mark.parametrize("wait", ["legacy", "hookOnly"], ids=["wait", "no-wait"])
def test_an_evaluation_installation_works(
    wait: str, place: Callable[..., Place], stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Helm's --wait the bootstrap comes after all pods are ready; without, it starts before MLflow and repeats itself."""
    namespace = f"evaluation-{wait.lower()}"
    values = chart.values("evaluation")
    values["bootstrap"]["activeDeadlineSeconds"] = 3600  # a slow machine
    store = {"accesskey": stack.access_key, "secretkey": stack.secret_key}
    with Kfp() as kfp:
        addresses = {
            f"{RELEASE}-store.{namespace}:9000": urlsplit(stack.s3_endpoint).netloc,
            "ml-pipeline.kubeflow:8888": urlsplit(kfp.endpoint).netloc,
        }
        here = place(namespace, secrets={"mlpipeline-minio-artifact": store}, real=True, addresses=addresses)
        assert here.install(values, wait)["status"] == "deployed"
        assert {pipeline.display_name for pipeline in kfp.pipelines.values()} == set(PIPELINES)
        versions = len(kfp.versions)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "trainer")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["vlmflow-mlflow"]["password"])
        server = mlflow.MlflowClient(f"http://{here.node.addresses[f'{RELEASE}-mlflow.{namespace}:5000']}")
        assert {model.name for model in server.search_registered_models()} == {"points-tiny", "points-tiny-candidates"}
        told = here.helm.test(RELEASE, timeout=600)
        assert told["release"]["status"] == "deployed"
        assert here.upgrade(values)["revision"] == 2 and len(kfp.versions) == versions, (
            "bootstrap found all as it left it"
        )
        failed = {pod.rsplit("-", 1)[0] for pod, _ in here.node.failures}
        assert failed <= ({f"{RELEASE}-bootstrap"} if wait == "hookOnly" else set()) and here.refusals() == []
