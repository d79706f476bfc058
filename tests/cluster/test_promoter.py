"""What the promoter may do to a serving Deployment, with its own account and its own arguments; and what doctor sees."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from place import RELEASE, Place

from services.promoter.__main__ import _after, parser
from services.promoter.after import Serving, point_deployment
from vlmflow import doctor, settings
from vlmflow.errors import ServiceError
from vlmflow.registry import tracking
from vlmflow.registry.promote import Outcome

OTHER = {"name": "OTHER", "value": "kept"}
CLUSTER = ("Kubernetes answers, version", "platform configuration", "secrets and their keys", "training on the cluster")


def serving(here: Place, name: str) -> None:
    containers = [{"name": "proxy", "image": "p"}, {"name": "server", "image": "m", "env": [OTHER]}]
    template = {"metadata": {"labels": {"app": name}}, "spec": {"containers": containers}}
    content = {"replicas": 0, "selector": {"matchLabels": {"app": name}}, "template": template}
    here.apps.create_namespaced_deployment(here.namespace, {"metadata": {"name": name}, "spec": content})


def deployment(here: Place, name: str) -> Any:
    return here.apps.read_namespaced_deployment(name, here.namespace)


def test_a_promotion_moves_the_named_deployment_and_no_other(
    production: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes import client
    from kubernetes.config import incluster_config

    for name in ("points-serving", "other"):
        serving(production, name)
    token = production.plane.account_token(production.namespace, f"{RELEASE}-promoter")
    (tmp_path / "token").write_text(token)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(production.plane.authority))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(production.plane.port))
    uri = SimpleNamespace(get_model_version_download_uri=lambda model, version: f"s3://b/{model}/{version}")
    monkeypatch.setattr(tracking, "client", lambda: uri)
    (container,) = deployment(production, f"{RELEASE}-promoter").spec.template.spec.containers
    after = _after(parser().parse_args([arg for arg in container.args if "export" not in arg]))
    after(Outcome("points-9b", "promoted", "7", "3", ""))
    moved = deployment(production, "points-serving")
    proxy, server = moved.spec.template.spec.containers
    assert {each.name: each.value for each in server.env} == {"OTHER": "kept", "MODEL_URI": "s3://b/points-9b/7"}
    assert (proxy.image, proxy.env, server.image) == ("p", None, "m")
    after(Outcome("points-9b", "unchanged", "7", "3", ""))
    assert deployment(production, "points-serving").metadata.generation == moved.metadata.generation, (
        "no second rollout"
    )
    theirs = client.AppsV1Api(production.plane.client(token))
    with pytest.raises(ServiceError, match="403"):
        point_deployment(theirs, Serving(production.namespace, "other", "server", "MODEL_URI"), "s3://b/x")
    assert len(deployment(production, "other").spec.template.spec.containers[1].env) == 1


def test_doctor_finds_the_installation_whole(
    production: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLMFLOW_CONFIG", str(tmp_path / "none.yaml"))
    monkeypatch.setenv("VLMFLOW_NAMESPACE", production.namespace)
    monkeypatch.setenv("VLMFLOW_KFP_ENDPOINT", "http://127.0.0.1:9")
    found = {each.what: each for each in doctor.examine(settings.load(), connect=production.plane.client)}
    assert [found[what].state for what in CLUSTER] == ["ok"] * 4, found
    assert "vlmflow-store (accesskey, secretkey)" in found["secrets and their keys"].detail
    assert "vlmflow-train" in found["training on the cluster"].detail
    token = production.plane.account_token(production.namespace, f"{RELEASE}-training")
    refused = {
        each.what: each for each in doctor.examine(settings.load(), connect=lambda: production.plane.client(token))
    }
    assert "may not read configmaps" in refused["platform configuration"].detail
