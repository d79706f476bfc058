"""Preflight of the TrainJob launcher: each thing that may be missing is named, with its cure; and the clean-up of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import training_world as world
import yaml
from cluster_world import NAMESPACE, TRAINJOBS, Cluster, FakeClock

from vlmflow.errors import RecipeError, ServiceError
from vlmflow.training.trainjob import config as settings
from vlmflow.training.trainjob import spec
from vlmflow.training.trainjob.clean import clean
from vlmflow.training.trainjob.config import TrainJobConfig
from vlmflow.training.trainjob.preflight import check
from vlmflow.training.trainjob.runtime import training_runtime

RUNTIMES = "trainingruntimes.v1alpha1.trainer.kubeflow.org"
QUEUES = "localqueues.v1beta2.kueue.x-k8s.io"


class Installed:
    """A cluster where everything is there, until a test takes something away."""

    def __init__(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster, self.monkeypatch = cluster, monkeypatch
        self.denied: set[str] = set()
        cluster.faults.append(self._review)
        for resource in (RUNTIMES, QUEUES):
            cluster.emulator.resources[resource] = {}
        self.runtime(training_runtime("registry/train:1"))
        cluster.put(QUEUES, {"metadata": {"name": "research"}})
        self.configure(queue="research")

    def runtime(self, made: dict[str, Any]) -> None:
        self.cluster.put(RUNTIMES, made)

    def configure(self, **pool: Any) -> None:
        text = yaml.safe_dump({"namespace": NAMESPACE, "pools": {"default": {"gpus": 8, **pool}}})
        self.monkeypatch.setenv(settings.VARIABLE, text)

    def _review(self, request: Any) -> Any:
        if not str(request.url.path).endswith("selfsubjectaccessreviews"):
            return None
        from aiohttp import web

        asked = request.data["spec"]["resourceAttributes"]
        assert asked["namespace"] == NAMESPACE
        what = f"{asked['verb']} {asked['resource']}" + (f"/{asked['subresource']}" if "subresource" in asked else "")
        return web.json_response({"status": {"allowed": what not in self.denied}}, status=201)

    def check(self, processes: int = 16) -> dict[str, str]:
        recipe = world.recipe(processes=processes, packs=processes)
        return dict(check(recipe, FakeClock(self.cluster), self.cluster.connect))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    cluster = Cluster()
    yield Installed(cluster, monkeypatch)
    cluster.close()


def test_a_complete_installation_passes(installed: Installed) -> None:
    rows = installed.check()
    assert rows["stages fill nodes of their pools"] == "sft: 2 x 8 (default)"
    assert "registry/train:1, 5 restarts" in rows["TrainingRuntime fits"]
    assert rows["Kueue's queue exists"] == "research" and rows["rights on TrainJobs"] == "all"


def test_seven_gpus_of_eight_are_refused_with_the_stage(installed: Installed) -> None:
    with pytest.raises(RecipeError, match=r"stages\.sft\.processes: 7 .*has 8 GPUs.*Use 8 or 16"):
        installed.check(processes=7)


def test_without_trainer(installed: Installed) -> None:
    for resource in (TRAINJOBS, RUNTIMES):
        del installed.cluster.emulator.resources[resource]
    for key in list(installed.cluster.emulator.objects):
        del installed.cluster.emulator.objects[key]
    with pytest.raises(
        ServiceError, match=r"knows no trainjobs\.trainer\.kubeflow\.org/v1alpha1: install Kubeflow Trainer"
    ):
        installed.check()


def test_without_the_runtime(installed: Installed) -> None:
    installed.cluster.vanish(RUNTIMES, "vlmflow-train")
    with pytest.raises(
        ServiceError, match=r"no TrainingRuntime 'vlmflow-train' in namespace 'team-a'; install vlmflow's chart"
    ):
        installed.check()


def test_a_runtime_of_another_kind(installed: Installed) -> None:
    other = training_runtime("x")
    other["spec"]["mlPolicy"] = {"mpi": {}}
    installed.runtime(other)
    with pytest.raises(ServiceError, match=r"has no `mlPolicy\.torch`"):
        installed.check()
    other = training_runtime("x")
    other["spec"]["template"]["spec"]["replicatedJobs"][0]["name"] = "trainer"
    installed.runtime(other)
    with pytest.raises(ServiceError, match="has no replicated job 'node'"):
        installed.check()


def test_a_runtime_without_restarts_is_told(installed: Installed) -> None:
    stock = training_runtime("x")
    del stock["spec"]["template"]["spec"]["failurePolicy"]
    installed.runtime(stock)
    assert "a lost node ends the training" in installed.check()["TrainingRuntime fits"]


def test_without_the_queue_or_kueue(installed: Installed) -> None:
    installed.configure(queue="other")
    with pytest.raises(
        ServiceError, match=r"no LocalQueue 'other' in namespace 'team-a': a TrainJob would wait for ever"
    ):
        installed.check()
    del installed.cluster.emulator.resources[QUEUES]
    del installed.cluster.emulator.objects[QUEUES, NAMESPACE, "research"]
    with pytest.raises(ServiceError, match="the cluster has no Kueue"):
        installed.check()
    installed.configure()
    assert "Kueue's queue exists" not in installed.check()


def test_missing_rights_are_named(installed: Installed) -> None:
    installed.denied = {"create trainjobs", "delete trainjobs"}
    with pytest.raises(ServiceError, match="may not create trainjobs, delete trainjobs in namespace 'team-a'"):
        installed.check()
    installed.denied = {"get pods/log"}
    assert "get pods/log: progress will not be shown" in installed.check()["rights on TrainJobs"]


def test_an_api_that_is_away_is_given_up_soon(installed: Installed) -> None:
    installed.cluster.fail(10**6, 503)
    with pytest.raises(ServiceError, match=r"no usable answer for \d+ s, 30 s were waited for"):
        installed.check()


def test_preflight_asks_only_where_stages_are_trained_there(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from vlmflow import preflight
    from vlmflow.training import launchers

    ctx = world.context(tmp_path, world.recipe(processes=7, packs=7))
    monkeypatch.delenv(launchers.VARIABLE, raising=False)
    assert [what for what, _ in preflight._training(ctx)] == ["sizes of the model's random parts"]
    monkeypatch.setenv(launchers.VARIABLE, "trainjob")
    with pytest.raises(RecipeError, match="has 8 GPUs"):
        preflight._training(ctx)
    monkeypatch.setenv(launchers.VARIABLE, "slurm")
    with pytest.raises(ServiceError, match=r"'slurm'; known launchers are \['local', 'trainjob'\]"):
        preflight._training(ctx)


def test_clean_up_deletes_what_this_run_left_running(installed: Installed) -> None:
    def put(name: str, run: str, kind: str = "", manager: str = "vlmflow") -> None:
        status = {"conditions": [{"type": kind, "status": "True"}]} if kind else {}
        labels = {spec.MANAGED_LABEL: manager, spec.RUN_LABEL: run}
        installed.cluster.put(TRAINJOBS, {"metadata": {"name": name, "uid": name, "labels": labels}, "status": status})

    put("running", "run-1")
    put("done", "run-1", "Complete")
    put("failed", "run-1", "Failed")
    put("of-another-run", "run-2")
    put("of-a-person", "run-1", manager="kubectl")
    config = TrainJobConfig(namespace=NAMESPACE)
    assert clean("run-1", config, FakeClock(installed.cluster), installed.cluster.connect) == ["running"]
    assert clean("run-1", config, FakeClock(installed.cluster), installed.cluster.connect) == []
    assert installed.cluster.trainjob("of-another-run") and installed.cluster.trainjob("of-a-person")
