"""A namespace as docs/cluster.md has an administrator prepare it, real Helm in it, and what lies there."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chart_case
import helm_python
from control_plane import ControlPlane
from node import Node

RELEASE = "vlmflow"
TIMEOUT = 600  # seconds for an action of Helm
# "Ten commands" of docs/cluster.md, and what helm/vlmflow/README.md asks for where a value names one more secret.
SECRETS: dict[str, dict[str, str]] = {
    "mlpipeline-minio-artifact": {"accesskey": "key", "secretkey": "secret"},
    "vlmflow-store": {"accesskey": "key", "secretkey": "secret"},
    "vlmflow-store-ca": {"ca.crt": "-----BEGIN CERTIFICATE-----"},
    "vlmflow-kfp": {"token": "kfp-token"},
    "vlmflow-mlflow-admin": {
        "admin-username": "admin",
        "admin-password": "adm1n-Passw0rd%",
        "flask-secret-key": "flask",
        "webhook-encryption-key": "ZmFrZS1rZXktZm9yLXRlc3RzLW9ubHktMzItYnl0ZXM=",
    },
    "vlmflow-mlflow": {"username": "trainer", "password": "tr4iner-Passw0rd"},
    "vlmflow-mlflow-db": {"uri": "postgresql://db/mlflow", "auth-uri": "postgresql://db/auth"},
    "vlmflow-promoter": {"username": "promoter", "password": "prom0ter-Passw0rd"},
    "vlmflow-webhook": {"secret": "whsec-planted"},
    "hub-token": {"token": "hub"},
}
# Every container must say what it requests, or this quota refuses its pod.
QUOTA = {"requests.cpu": "100", "requests.memory": "500Gi", "limits.memory": "500Gi", "pods": "50"}
PASSING = {"Event", "Lease"}  # the cluster's own notes
Json = dict[str, Any]


class Place:
    """A namespace, its node and its releases.

    Attributes:
        before: what was there before the first release.
    """

    def __init__(
        self, plane: ControlPlane, namespace: str, folder: Path, secrets: Json | None = None, **node: Any
    ) -> None:
        from kubernetes import client

        self.plane, self.namespace = plane, namespace
        folder.mkdir(parents=True)
        self.api = plane.client()
        self.core, self.apps = client.CoreV1Api(self.api), client.AppsV1Api(self.api)
        self.secrets = SECRETS | (secrets or {})
        self.node = Node(plane, namespace, folder, **node)
        self.helm = helm_python.Config(kubeconfig_path=plane.kubeconfig, namespace=namespace)

    def start(self) -> Place:
        level = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
        self.core.create_namespace({"metadata": {"name": self.namespace, "labels": level}})
        self.core.create_namespaced_resource_quota(
            self.namespace, {"metadata": {"name": "quota"}, "spec": {"hard": QUOTA}}
        )
        for name, content in self.secrets.items():
            self.core.create_namespaced_secret(self.namespace, {"metadata": {"name": name}, "stringData": content})
        login = base64.b64encode(json.dumps({"auths": {}}).encode()).decode()
        self.core.create_namespaced_secret(
            self.namespace,
            {"metadata": {"name": "registry"}, "type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": login}},
        )  # fmt: skip
        self.until(lambda: {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt")} <= self.everything(), "the namespace's own objects")  # fmt: skip
        self.before = self.everything()
        self.node.__enter__()
        return self

    def end(self) -> None:
        self.node.__exit__()
        self.helm.close()

    # Helm

    def install(self, values: Json, wait: str = "legacy") -> Json:
        return self.helm.install(str(chart_case.CHART), RELEASE, values, namespace=self.namespace, timeout=TIMEOUT, wait=wait)  # fmt: skip

    def upgrade(self, values: Json) -> Json:
        return self.helm.upgrade(str(chart_case.CHART), RELEASE, values, namespace=self.namespace, timeout=TIMEOUT, wait="legacy")  # fmt: skip

    def rollback(self, revision: int) -> None:
        self.helm.rollback(RELEASE, version=revision, timeout=TIMEOUT, wait="legacy")

    def uninstall(self) -> None:
        self.helm.uninstall(RELEASE, timeout=TIMEOUT, wait="legacy")

    # what is there

    def get(self, path: str, token: str = "") -> Json:
        return self.call("GET", path, api=self.plane.client(token) if token else self.api)

    def call(self, method: str, path: str, body: Any = None, api: Any = None, **query: str) -> Json:
        """One request, the administrator's unless another client is given."""
        return (api or self.api).call_api(
            path,
            method,
            query_params=list(query.items()),
            body=body,
            auth_settings=["BearerToken"],
            response_type="object",
            _return_http_data_only=True,
            _request_timeout=60,
        )

    def everything(self) -> set[tuple[str, str]]:
        """(kind, name) of every object in the namespace."""
        groups = ["/api/v1"]
        groups += [f"/apis/{group['preferredVersion']['groupVersion']}" for group in self.get("/apis")["groups"]]
        found = set()
        for group in groups:
            for kind in self.get(group)["resources"]:
                if kind["namespaced"] and "list" in kind["verbs"] and kind["kind"] not in PASSING:
                    listed = self.get(f"{group}/namespaces/{self.namespace}/{kind['name']}")["items"]
                    found |= {(kind["kind"], each["metadata"]["name"]) for each in listed}
        return found

    def left(self) -> set[tuple[str, str]]:
        """What a release added and nobody removed."""
        return self.everything() - self.before

    def refusals(self) -> list[str]:
        """What controllers could not create."""
        events = self.get(f"/api/v1/namespaces/{self.namespace}/events")["items"]
        return [event["message"] for event in events if event["reason"] in ("FailedCreate", "FailedScheduling")]

    def until(self, true: Callable[[], Any], what: str, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s; left {sorted(self.everything())}"
            time.sleep(0.3)
