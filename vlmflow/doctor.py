"""What is wrong with an installation, and what to do about it.

Every check looks at one thing and gives one finding; a check that cannot run because an earlier one failed says so. The
checks change nothing but a probe object in the store, which they delete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmflow import kfp_api
from vlmflow.errors import AccessDenied, NotFound, StorageError, Unreachable, VlmflowError
from vlmflow.settings import Settings

MLFLOW_LEAST, KUBERNETES_LEAST = (3, 10), (1, 30)
CONFIG_MAP, CONFIG_KEYS = "vlmflow", ("root", "s3Endpoint", "mlflowTrackingUri")
SECRETS = {"mlpipeline-minio-artifact": ("accesskey", "secretkey")}
OPTIONAL_SECRETS = {"vlmflow-endpoints": ("captionKey", "fuseKey")}


@dataclass(frozen=True)
class Finding:
    """One check: state is ok, fault or skipped; a fault has a cure."""

    what: str
    state: str
    detail: str
    cure: str = ""


class Fault(Exception):
    """A check failed: what was found, and what to do."""

    def __init__(self, detail: str, cure: str) -> None:
        super().__init__(detail)
        self.detail, self.cure = detail, cure


def examine(settings: Settings, kubernetes: bool = True, connect: Callable[[], Any] | None = None) -> list[Finding]:
    """All checks, in the order in which their faults should be cured.

    Args:
        connect: gives `kubernetes.client.ApiClient`; None = kubeconfig or the pod's account.
    """
    kfp: list[Any] = []  # the client, once it is connected
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Kubeflow Pipelines answers", lambda: _kfp(settings, kfp)),
        ("pipelines are registered", lambda: _pipelines(kfp)),
        ("object store takes objects", lambda: _store(settings)),
        ("MLflow answers, version", _mlflow),
        ("MLflow lets this identity in", _mlflow_identity),
    ]
    if kubernetes:
        cluster = _Cluster(settings, connect)
        checks += [
            ("Kubernetes answers, version", cluster.version),
            ("platform configuration", cluster.config_map),
            ("secrets and their keys", cluster.secrets),
            ("training on the cluster", cluster.trainer),
        ]
    found: list[Finding] = []
    for what, check in checks:
        try:
            found.append(Finding(what, "ok", check()))
        except Fault as fault:
            found.append(Finding(what, "fault" if fault.cure else "skipped", fault.detail, fault.cure))
        except VlmflowError as error:
            found.append(Finding(what, "fault", str(error), "see the message"))
    return found


def _kfp(settings: Settings, connected: list[Any]) -> str:
    try:
        connected.append(kfp_api.connect(settings.endpoint, settings.token, settings.namespace))
    except VlmflowError as error:
        text = str(error)
        if " 401" in text:
            raise Fault(
                text, "get a new token and set VLMFLOW_KFP_TOKEN (or `token` in the configuration file)"
            ) from error
        if " 403" in text:
            raise Fault(text, f"ask for a role in namespace {settings.namespace}") from error
        raise Fault(
            text, "set VLMFLOW_KFP_ENDPOINT; from outside: kubectl -n kubeflow port-forward svc/ml-pipeline 8888:8888"
        ) from error
    return settings.endpoint


def _pipelines(connected: list[Any]) -> str:
    from vlmflow.compiler import PIPELINES

    if not connected:
        raise Fault("Kubeflow Pipelines could not be asked", "")
    with kfp_api.translated("looking for the pipelines"):
        missing = [name for name in PIPELINES if connected[0].get_pipeline_id(name) is None]
    if missing:
        raise Fault(
            f"not registered: {', '.join(missing)}",
            f"vlmflow register {' '.join(missing)}, or run the chart's bootstrap job again",
        )
    return ", ".join(PIPELINES)


def _store(settings: Settings) -> str:
    from vlmflow import storage

    root = settings.root
    if not root:
        raise Fault("VLMFLOW_ROOT is not set", "set VLMFLOW_ROOT=s3://BUCKET, as in the ConfigMap vlmflow")
    try:
        storage.check(root)
    except AccessDenied as error:
        raise Fault(
            str(error), "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that this key may write the bucket"
        ) from error
    except NotFound as error:
        raise Fault(str(error), f"make the bucket of {root}, or run the chart's bootstrap job again") from error
    except Unreachable as error:
        raise Fault(
            str(error), "check VLMFLOW_S3_ENDPOINT, and that a network policy lets this pod reach it"
        ) from error
    except StorageError as error:
        raise Fault(
            str(error),
            "set VLMFLOW_S3_ENDPOINT, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; then look at the store's log",
        ) from error
    return f"{root} at {os.environ.get('VLMFLOW_S3_ENDPOINT', 'its endpoint')}"


def _mlflow() -> str:
    from vlmflow.registry import tracking

    try:
        uri = tracking.tracking_uri()
        tracking.check_answers(uri)
        version = tracking.server_version(uri)
    except VlmflowError as error:
        text = str(error)
        cure = "set MLFLOW_TRACKING_URI to the server, and start it"
        if "403" in text:
            cure = "add this host name to the server's MLFLOW_SERVER_ALLOWED_HOSTS (the chart: mlflow.allowedHosts)"
        if "401" in text:
            cure = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of an identity that exists"
        raise Fault(text, cure) from error
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found < MLFLOW_LEAST:
        least = ".".join(map(str, MLFLOW_LEAST))
        raise Fault(
            f"MLflow {version} is older than {least}", f"upgrade MLflow to {least} or newer, and migrate its database"
        )
    return f"{version} at {tracking.shown_uri()}"


def _mlflow_identity() -> str:
    from vlmflow.registry import tracking

    try:
        mlflow = tracking.client()
        with tracking.translated("searching experiments"):
            mlflow.search_experiments(max_results=1)
    except VlmflowError as error:
        text = str(error)
        if "401" in text or "not authenticated" in text.lower() or "permission" in text.lower():
            raise Fault(
                text, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of an identity that exists"
            ) from error
        raise Fault("MLflow could not be asked", "") from error
    return os.environ.get("MLFLOW_TRACKING_USERNAME") or "without a login"


class _Cluster:
    """Checks of the Kubernetes API."""

    def __init__(self, settings: Settings, connect: Callable[[], Any] | None) -> None:
        self.settings, self.connect = settings, connect
        self._api: Any = None

    def api(self) -> Any:
        """The API, or a Fault that is told once."""
        if self._api is None:
            try:
                from kubernetes import client, config

                if self.connect is not None:
                    self._api = self.connect()
                else:
                    config.load_config()
                    self._api = client.ApiClient()
            except Exception as error:
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                raise Fault(f"no cluster is configured here ({reason})", "") from error
        return self._api

    def get(self, path: str) -> tuple[int, Any]:
        """(status, object) of one GET; 0 when nobody answers."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            found = self.api().call_api(
                path, "GET", response_type="object", auth_settings=["BearerToken"], _request_timeout=10
            )
            return 200, found[0]
        except ApiException as error:
            return int(error.status or 0), None
        except (HTTPError, OSError):
            return 0, None

    def version(self) -> str:
        """The API server's version."""
        status, found = self.get("/version")
        if status == 401:
            raise Fault(
                "the Kubernetes API does not accept the credentials",
                "log in to the cluster again, or renew the kubeconfig",
            )
        if status != 200:
            raise Fault(
                f"the Kubernetes API answers {status or 'nothing'}", "check the kubeconfig's server and the network"
            )
        number = (
            int("".join(c for c in found["major"] if c.isdigit())),
            int("".join(c for c in found["minor"] if c.isdigit())),
        )
        if number < KUBERNETES_LEAST:
            raise Fault(
                f"Kubernetes {number[0]}.{number[1]} is older than {KUBERNETES_LEAST[0]}.{KUBERNETES_LEAST[1]}",
                "upgrade the cluster",
            )
        return f"{number[0]}.{number[1]}"

    def config_map(self) -> str:
        """The ConfigMap that every task reads."""
        namespace = self.settings.namespace
        status, found = self.get(f"/api/v1/namespaces/{namespace}/configmaps/{CONFIG_MAP}")
        self._readable(status, f"configmaps in {namespace}")
        if status == 404:
            raise Fault(
                f"ConfigMap {namespace}/{CONFIG_MAP} does not exist",
                f"install the chart: helm upgrade --install vlmflow helm/vlmflow -n {namespace}",
            )
        data = found.get("data") or {}
        if missing := [key for key in CONFIG_KEYS if not data.get(key)]:
            raise Fault(
                f"ConfigMap {namespace}/{CONFIG_MAP} lacks {', '.join(missing)}",
                "set the chart's values platform, objectStore and mlflow",
            )
        return f"{data['root']}, {data['s3Endpoint']}, {data['mlflowTrackingUri']}"

    def secrets(self) -> str:
        """Secrets of the tasks, by the names of their keys; values are not looked at."""
        namespace, said = self.settings.namespace, []
        names = self._names()
        for ours, keys in {**SECRETS, **OPTIONAL_SECRETS}.items():
            name = names.get(ours, ours)
            status, found = self.get(f"/api/v1/namespaces/{namespace}/secrets/{name}")
            self._readable(status, f"secrets in {namespace}")
            if status == 404:
                if ours in OPTIONAL_SECRETS:
                    continue
                literals = " ".join(f"--from-literal={key}=..." for key in keys)
                raise Fault(
                    f"Secret {namespace}/{name} does not exist",
                    f"kubectl -n {namespace} create secret generic {name} {literals}",
                )
            if missing := [key for key in keys if key not in (found.get("data") or {})]:
                raise Fault(
                    f"Secret {namespace}/{name} lacks the keys {', '.join(missing)}",
                    f"add them: kubectl -n {namespace} edit secret {name}",
                )
            said.append(f"{name} ({', '.join(keys)})")
        return ", ".join(said)

    def _data(self) -> dict[str, str]:
        """The ConfigMap's content; nothing where there is none."""
        _, found = self.get(f"/api/v1/namespaces/{self.settings.namespace}/configmaps/{CONFIG_MAP}")
        return (found or {}).get("data") or {}

    def _names(self) -> dict[str, str]:
        """Name of a secret in the library -> its name in this installation."""
        return json.loads(self._data().get("trainJob") or "{}").get("secrets") or {}

    def trainer(self) -> str:
        """What the TrainJob launcher needs, where the installation chose it."""
        namespace, data = self.settings.namespace, self._data()
        if data.get("trainLauncher", "local") != "trainjob":
            return "in the pipelines' own pods (training.launcher: local)"
        status, groups = self.get("/apis/trainer.kubeflow.org")
        if status == 404:
            raise Fault(
                "the cluster has no TrainJobs (trainer.kubeflow.org)",
                "install Kubeflow Trainer 2.3 or newer, or set training.launcher: local",
            )
        if status != 200:
            raise Fault(f"trainer.kubeflow.org answers {status or 'nothing'}", "look at the rights of this identity")
        runtime = json.loads(data.get("trainJob") or "{}").get("runtime", "vlmflow-train")
        version = groups["preferredVersion"]["version"]
        status, _ = self.get(f"/apis/trainer.kubeflow.org/{version}/namespaces/{namespace}/trainingruntimes/{runtime}")
        if status == 404:
            raise Fault(
                f"TrainingRuntime {namespace}/{runtime} does not exist",
                "upgrade the chart with training.launcher: trainjob; it makes the runtime",
            )
        self._readable(status, f"trainingruntimes in {namespace}")
        return f"TrainJobs {version}, runtime {runtime}"

    def _readable(self, status: int, what: str) -> None:
        if status in (401, 403):
            raise Fault(
                f"this identity may not read {what}",
                "run the check as the chart's `helm test` does, or ask for that right",
            )
        if status not in (200, 404):
            raise Fault(
                f"the Kubernetes API answers {status or 'nothing'} for {what}",
                "check the kubeconfig's server and the network",
            )
