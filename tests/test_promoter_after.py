"""What follows a promotion, and logs of a run: against an emulated Kubernetes API and the KFP stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_world import NAMESPACE, Cluster, Request
from kfp_server import Kfp

from services.promoter.__main__ import _after, parser
from services.promoter.after import Serving, followers, point_deployment
from services.promoter.loop import Loop
from vlmflow import compiler, kfp_api, settings
from vlmflow.client import Client
from vlmflow.errors import NotFound, ServiceError
from vlmflow.registry.promote import Outcome

DEPLOYMENTS, PODS = "deployments.v1.apps", "pods.v1"
SERVING = Serving(NAMESPACE, "serve", "model", "MODEL_URI")
OTHER = {"name": "OTHER", "value": "kept"}


def strategic(found: Any, patch: Any) -> Any:
    """Kubernetes' strategic merge, as far as containers and their variables go: lists of named things merge by name."""
    if isinstance(found, dict) and isinstance(patch, dict):
        return found | {key: strategic(found.get(key), value) for key, value in patch.items()}
    if isinstance(found, list) and isinstance(patch, list):
        named = {item["name"]: item for item in found}
        for item in patch:
            named[item["name"]] = strategic(named.get(item["name"]), item)
        return list(named.values())
    return patch


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    made.emulator.resources[DEPLOYMENTS] = {}
    containers = [{"name": "proxy", "image": "p"}, {"name": "model", "image": "m", "env": [OTHER]}]
    spec = {"selector": {"matchLabels": {"app": "serve"}}, "template": {"spec": {"containers": containers}}}
    made.put(DEPLOYMENTS, {"metadata": {"name": "serve", "namespace": NAMESPACE}, "spec": spec})
    made.patches = []  # type: ignore[attr-defined]

    def patched(request: Request) -> Any:
        from aiohttp import web

        if request.method.value.upper() != "PATCH":
            return None
        kind = request._raw_request.headers["Content-Type"]
        assert kind == "application/strategic-merge-patch+json", f"{kind} would replace the list of containers"
        made.patches.append(request.data)  # type: ignore[attr-defined]
        raw = strategic(made._object(DEPLOYMENTS, request.name).raw, request.data)
        made.put(DEPLOYMENTS, raw)
        return web.json_response(raw)

    made.faults.append(patched)
    yield made
    made.close()


def apps(cluster: Cluster) -> Any:
    from kubernetes import client

    return client.AppsV1Api(cluster.connect())


def container(cluster: Cluster, name: str) -> dict[str, Any]:
    spec = cluster._object(DEPLOYMENTS, "serve").raw["spec"]["template"]["spec"]
    return next(each for each in spec["containers"] if each["name"] == name)


def test_a_deployment_gets_the_new_model_and_nothing_else_changes(cluster: Cluster) -> None:
    assert point_deployment(apps(cluster), SERVING, "s3://b/new")
    assert container(cluster, "model") == {
        "name": "model",
        "image": "m",
        "env": [OTHER, {"name": "MODEL_URI", "value": "s3://b/new"}],
    }
    assert container(cluster, "proxy") == {"name": "proxy", "image": "p"}
    assert not point_deployment(apps(cluster), SERVING, "s3://b/new"), "a repeated call starts no rollout"
    assert len(cluster.patches) == 1  # type: ignore[attr-defined]


def test_a_deployment_that_cannot_be_moved_says_why(cluster: Cluster) -> None:
    with pytest.raises(ServiceError, match=r"has no container 'modle'; it has \['model', 'proxy'\]"):
        point_deployment(apps(cluster), Serving(NAMESPACE, "serve", "modle", "MODEL_URI"), "s3://b/new")
    with pytest.raises(ServiceError, match="serve2 cannot be moved to s3://b/new: 404"):
        point_deployment(apps(cluster), Serving(NAMESPACE, "serve2", "model", "MODEL_URI"), "s3://b/new")
    cluster.fail(1, 403, match="PATCH")
    cluster.faults.reverse()
    with pytest.raises(ServiceError, match="403"):
        point_deployment(apps(cluster), SERVING, "s3://b/new")


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kfp]:
    for name in settings.VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLMFLOW_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("VLMFLOW_NAMESPACE", NAMESPACE)
    with Kfp() as server:
        monkeypatch.setenv("VLMFLOW_KFP_ENDPOINT", server.endpoint)
        kfp_api.register(
            kfp_api.connect(server.endpoint, ""), "export", compiler.compile_pipeline("export").text, tmp_path
        )
        yield server


def test_each_champion_is_exported_once_and_served(kfp: Kfp, cluster: Cluster) -> None:
    """The loop as the service runs it, with a Kubernetes API that refuses at first: both actions are repeated, neither twice."""
    export = _after(parser().parse_args(["--model", "m", "--export-pipeline", "export"]))
    after = followers(export, lambda o: point_deployment(apps(cluster), SERVING, f"s3://b/{o.version}") and None)
    champion = {"version": "1"}

    def look(model: str) -> Outcome:
        return Outcome(model, "unchanged", champion["version"], "4", "")

    cluster.fail(1, 503, match="PATCH")
    cluster.faults.reverse()
    loop = Loop(["m"], look, after, period=60)
    assert not loop.round() and loop.state.failures["m"] == 1
    assert loop.round() and loop.round()
    assert [run.display_name for run in kfp.runs.values()] == ["export-m-1"]
    assert container(cluster, "model")["env"][-1] == {"name": "MODEL_URI", "value": "s3://b/1"}
    champion["version"] = "2"
    assert Loop(["m"], look, after, period=60).round(), "a restarted promoter knows nothing of what was done"
    assert Loop(["m"], look, after, period=60).round()
    assert [run.display_name for run in kfp.runs.values()] == ["export-m-1", "export-m-2"]
    (first, second) = (run.runtime_config.parameters for run in kfp.runs.values())
    assert (first["model"], second["model"]) == ("models:/m/1", "models:/m/2")
    assert container(cluster, "model")["env"][-1]["value"] == "s3://b/2" and len(cluster.patches) == 2  # type: ignore[attr-defined]


def test_logs_of_the_pods_that_still_exist(kfp: Kfp, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from kubernetes import client

    from vlmflow import cli

    sdk = Client()
    run_id = sdk.start_once("export", "by-hand", {"model": "models:/m/1"}).run_id
    with pytest.raises(NotFound, match="has no pod of any task"):
        list(sdk.logs(run_id))
    kfp.move(run_id, "RUNNING", export_model="RUNNING", verify="SUCCEEDED")
    cluster.logs["pod-export_model"] = [(cluster.stamp(), "loading"), (cluster.stamp(), "written")]
    monkeypatch.setattr("vlmflow.client._core_api", lambda: client.CoreV1Api(cluster.connect()))
    assert [line.split(" ", 1)[1] for _, line in sdk.logs(run_id, "export model")] == ["loading", "written"]
    with pytest.raises(NotFound, match="pod-verify of task verify is gone"):
        list(sdk.logs(run_id))
    with pytest.raises(NotFound, match="no pod of task 'evaluate'"):
        list(sdk.logs(run_id, "evaluate"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["logs", run_id, "--task", "export model"])
    assert ended.value.code == 0 and "written" in capsys.readouterr().out
