"""The TrainJob launcher against a real API server, with the token of the pipelines' own account: what it sends is taken
whole, an existing TrainJob is adopted, deletion takes its pods along and spares a successor. Trainer's controller is
played by the test; the kinds are Trainer's (crds.py)."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import chart_case as chart
import helm_python
import pytest
import training_world as world
import yaml
from place import RELEASE, Place

from vlmflow import storage
from vlmflow.errors import ServiceError, StepFailed
from vlmflow.training.launch import TrainingPreempted
from vlmflow.training.launchers import LaunchRequest
from vlmflow.training.trainjob import client, launch, pods, preflight, spec, wait
from vlmflow.training.trainjob import config as settings
from vlmflow.training.trainjob.clean import clean
from vlmflow.training.trainjob.clock import Clock
from vlmflow.training.trainjob.config import TrainJobConfig

COUNT = itertools.count(1)
NOW = "2026-01-01T00:00:00Z"
SECURITY = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
REQUESTS = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}
Json = dict[str, Any]


class Scene:
    """One training, launched as the pipelines' account would."""

    def __init__(self, here: Place, root: Path, name: str) -> None:
        self.here, self.events, self.clock = here, [], Clock()
        data = here.get(f"/api/v1/namespaces/{here.namespace}/configmaps/vlmflow")["data"]
        asked = json.loads(data["trainJob"]) | {"namespace": here.namespace}
        asked["pools"]["default"]["queue"] = ""
        asked["pools"] = {"default": asked["pools"]["default"]}
        self.config = TrainJobConfig.model_validate(asked)
        self.token = here.plane.account_token(here.namespace, f"{RELEASE}-pipelines")
        self.request = LaunchRequest(
            folder=f"file://{root}/training/{name}",
            model=f"file://{root}/models/{name}/model.json",
            key=name * 8,
            label="sft-b",
            stage="sft",
            processes=16,
            threads=4,
            run_id=f"run-{name}",
            scratch=root / "scratch",
        )
        self.name = spec.name_of(self.request)
        self.path = wait.path_of(here.namespace, self.name)

    def connect(self) -> Any:
        return self.here.plane.client(self.token)

    def launch(self, **changes: Any) -> None:
        request = LaunchRequest(**{**vars(self.request), **changes})
        launch.launch(request, self.events.append, self.config, self.clock, self.connect)

    def started(self, **changes: Any) -> tuple[threading.Thread, list[BaseException]]:
        """The launch in a thread, and where its error will be."""
        problems: list[BaseException] = []

        def run() -> None:
            try:
                self.launch(**changes)
            except BaseException as problem:
                problems.append(problem)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread, problems

    def job(self) -> Json | None:
        found = self.here.get(wait.path_of(self.here.namespace))["items"]
        return next((each for each in found if each["metadata"]["name"] == self.name), None)

    def appears(self) -> Json:
        self.here.until(self.job, f"TrainJob {self.name}")
        found = self.job()
        assert found is not None
        return found

    def said(self, words: str) -> bool:
        return any(words in event.get("text", "") for event in list(self.events))

    def condition(self, kind: str, reason: str) -> None:
        """What Trainer's controller reports, through the status of the real kind."""
        job = self.appears()
        made = {"type": kind, "status": "True", "reason": reason, "message": "by the test", "lastTransitionTime": NOW}
        job["status"] = {"conditions": [made]}
        self.here.call("PUT", f"{self.path}/status", job)

    def pod(self, job: Json) -> str:
        """A pod that belongs to the TrainJob, as JobSet makes it."""
        owner = {key: job["metadata"][key] for key in ("name", "uid")}
        owner |= {"apiVersion": job["apiVersion"], "kind": job["kind"], "controller": True, "blockOwnerDeletion": True}
        labels = {pods.JOBSET_LABEL: self.name, pods.REPLICATED_LABEL: spec.NODE, pods.INDEX_LABEL: "0"}
        name = f"{self.name}-node-0-0"
        container = {"name": spec.NODE, "image": "train", "securityContext": CONTAINER, "resources": REQUESTS}
        content = {"securityContext": SECURITY, "containers": [container], "automountServiceAccountToken": False}
        metadata = {"name": name, "labels": labels, "ownerReferences": [owner]}
        self.here.call("POST", f"/api/v1/namespaces/{self.here.namespace}/pods", {"metadata": metadata, "spec": content})  # fmt: skip
        return name


@pytest.fixture
def scene(production: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(wait, "POLL_RUNNING", 0.3)
    monkeypatch.setattr(wait, "POLL_QUEUED", 0.3)
    return Scene(production, tmp_path, f"key{next(COUNT)}")


def lost(sent: Any, kept: Any, path: str = "") -> list[str]:
    """What the API server dropped or changed of an object."""
    if isinstance(sent, dict) and isinstance(kept, dict):
        return [each for key, value in sent.items() for each in lost(value, kept.get(key), f"{path}.{key}")]
    if isinstance(sent, list) and isinstance(kept, list) and len(sent) == len(kept):
        return [each for n, (a, b) in enumerate(zip(sent, kept, strict=True)) for each in lost(a, b, f"{path}[{n}]")]
    return [] if sent == kept else [f"{path}: {sent!r} became {kept!r}"]


def test_nothing_of_what_is_sent_is_dropped(scene: Scene) -> None:
    thread, problems = scene.started()
    kept = scene.appears()
    sent = storage.read_json(f"{scene.request.folder}/trainjob.json")
    assert lost(sent, kept) == []
    runtime = scene.here.get(
        f"/apis/{spec.GROUP}/{spec.VERSION}/namespaces/{scene.here.namespace}/trainingruntimes/{scene.config.runtime}"
    )
    rendered = scene.here.helm.render(helm_python.Chart.load(str(chart.CHART)), chart.values("production"), name=RELEASE, namespace=scene.here.namespace)  # fmt: skip
    wanted = next(yaml.safe_load(text) for path, text in rendered.items() if path.endswith("trainingruntime.yaml"))
    assert lost(wanted, runtime) == []
    storage.write_json(scene.request.model, {})
    scene.condition("Complete", "JobsCompleted")
    thread.join(120)
    assert not thread.is_alive() and not problems


def test_a_second_run_adopts_the_trainjob_and_both_end(scene: Scene) -> None:
    first, wrong = scene.started()
    uid = scene.appears()["metadata"]["uid"]
    second, failed = scene.started(run_id="run-later")
    scene.here.until(lambda: scene.said("exists already"), "the second launch adopts")
    scene.pod(scene.appears())
    storage.write_json(scene.request.model, {})
    scene.condition("Complete", "JobsCompleted")
    for thread in (first, second):
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong and not failed and scene.appears()["metadata"]["uid"] == uid


def test_a_failed_trainjob_is_replaced_when_its_pods_are_gone(scene: Scene) -> None:
    thread, problems = scene.started()
    old = scene.appears()
    pod = scene.pod(old)
    scene.condition("Failed", "FailedJobs")
    thread.join(120)
    assert isinstance(problems[0], StepFailed) and "FailedJobs" in str(problems[0])
    thread, problems = scene.started()
    scene.here.until(lambda: scene.said("created") and (scene.job() or old)["metadata"]["uid"] != old["metadata"]["uid"], "a new one")  # fmt: skip
    assert ("Pod", pod) not in scene.here.everything(), "the garbage collector took the old one's pods first"
    storage.write_json(scene.request.model, {})
    scene.condition("Complete", "JobsCompleted")
    thread.join(120)
    assert not problems


def test_deletion_spares_a_successor_and_takes_the_pods(scene: Scene) -> None:
    scene.started()
    job = scene.appears()
    pod = scene.pod(job)
    api = client.Api(scene.clock, 60.0, lambda _: None, scene.connect)
    with pytest.raises(client.Refused) as refused:
        api.json("DELETE", scene.path, body=spec.deletion("00000000-0000-0000-0000-000000000000"))
    assert refused.value.status == 409 and scene.job() is not None
    assert clean("run-of-nobody", scene.config, connect=scene.connect) == []
    assert clean(scene.request.run_id, scene.config, connect=scene.connect) == [scene.name]
    scene.here.until(lambda: scene.job() is None, "the TrainJob goes")
    assert ("Pod", pod) not in scene.here.everything()


def test_a_cancelled_run_takes_its_trainjob_along(scene: Scene) -> None:
    thread, problems = scene.started()
    scene.pod(scene.appears())
    scene.clock.stop.set()
    thread.join(120)
    assert isinstance(problems[0], TrainingPreempted) and "was deleted" in str(problems[0])
    scene.here.until(lambda: scene.job() is None, "the TrainJob goes")


def test_preflight_with_the_rights_of_the_chart(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scene.config.model_dump()
    made["pools"]["default"]["queue"] = "vision"
    monkeypatch.setenv(settings.VARIABLE, json.dumps(made))
    recipe = world.recipe(processes=16, packs=16)
    with pytest.raises(ServiceError, match="no LocalQueue 'vision'"):
        preflight.check(recipe, connect=scene.connect)
    path = f"/apis/{preflight.KUEUE}/v1beta1/namespaces/{scene.here.namespace}/localqueues"
    scene.here.call("POST", path, {"apiVersion": f"{preflight.KUEUE}/v1beta1", "kind": "LocalQueue", "metadata": {"name": "vision"}})  # fmt: skip
    rows = dict(preflight.check(recipe, connect=scene.connect))
    assert rows["rights on TrainJobs"] == "all" and rows["Kueue's queue exists"] == "vision"
    assert scene.config.runtime in rows["TrainingRuntime fits"]
    stranger = scene.here.plane.account_token(scene.here.namespace, f"{RELEASE}-training")
    with pytest.raises(ServiceError, match="403"):
        preflight.check(recipe, connect=lambda: scene.here.plane.client(stranger))
