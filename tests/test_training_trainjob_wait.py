"""The TrainJob launcher against an emulated Kubernetes API: every way a training on a cluster can go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_world import NAMESPACE, TRAINJOBS, Cluster, FakeClock

from vlmflow import storage
from vlmflow.errors import DataError, ServiceError, StepFailed
from vlmflow.training import failure
from vlmflow.training.job import EVENT
from vlmflow.training.launch import TrainingPreempted
from vlmflow.training.launchers import LaunchRequest
from vlmflow.training.trainjob import spec
from vlmflow.training.trainjob.config import Pool, TrainJobConfig
from vlmflow.training.trainjob.launch import launch

HOUR = 3600.0
CONFIG = TrainJobConfig(namespace=NAMESPACE, pools={"default": Pool(gpus=8)})
QUEUED = TrainJobConfig(namespace=NAMESPACE, pools={"default": Pool(gpus=8, queue="gpu-queue")})


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


class Scene:
    """One training launched at an API server whose controller is played by the test."""

    def __init__(self, cluster: Cluster, root: Path) -> None:
        self.cluster, self.root, self.config = cluster, root, CONFIG
        self.clock = FakeClock(cluster)
        self.events: list[dict[str, Any]] = []
        self.request = LaunchRequest(
            folder=f"file://{root}/training/k1",
            model=f"file://{root}/models/k1/model.json",
            key="k1" * 32,
            label="sft-b",
            stage="sft",
            processes=16,
            threads=4,
            run_id="run-1",
            scratch=root / "scratch",
        )
        self.name = spec.name_of(self.request)

    def launch(self, **changes: Any) -> None:
        request = LaunchRequest(**{**vars(self.request), **changes})
        launch(request, self.events.append, self.config, self.clock, self.cluster.connect)

    def at(self, when: float, *actions: Callable[[], Any]) -> None:
        self.clock.at(when, *actions)

    def publish(self) -> None:
        storage.write_json(self.request.model, {})

    def complete(self) -> None:
        self.publish()
        self.cluster.condition("Complete", "JobsCompleted")

    def step(self, pod: str, number: int) -> None:
        self.cluster.write(pod, EVENT + json.dumps({"event": "step", "step": number}), nanos=f".{number:09d}")

    def existing(self, **changes: Any) -> dict[str, Any]:
        """Put the TrainJob that this launch would create, as an earlier attempt left it."""
        job = spec.train_job(self.request, self.config, self.config.shape("sft", 16))
        job["metadata"] |= {"uid": "uid-earlier", **changes.pop("metadata", {})}
        job |= changes
        self.cluster.put(TRAINJOBS, job)
        self.cluster.created.append(job)
        return job

    def notes(self) -> str:
        return "\n".join(event["text"] for event in self.events if event["event"] == "note")

    def steps(self) -> list[int]:
        return [event["step"] for event in self.events if event["event"] == "step"]


@pytest.fixture
def scene(server: Cluster, tmp_path: Path) -> Iterator[Scene]:
    yield Scene(server, tmp_path)
    server.faults.clear()
    server.created.clear()
    server.deleted.clear()
    server.logs.clear()
    server.slow_deletion = False
    for resource, namespace, name in list(server.emulator.objects):
        del server.emulator.objects[resource, namespace, name]


def ended(reason: str, message: str = "") -> dict[str, Any]:
    return {"status": {"conditions": [{"type": "Failed", "status": "True", "reason": reason, "message": message}]}}


def test_created_run_and_complete(scene: Scene) -> None:
    scene.at(10, lambda: scene.cluster.pod("p0"), lambda: scene.step("p0", 1))
    scene.at(20, lambda: scene.step("p0", 2), lambda: scene.step("p0", 3))
    scene.at(30, lambda: scene.step("p0", 4), scene.complete)
    scene.launch()
    assert scene.steps() == [1, 2, 3, 4]
    [created] = scene.cluster.created
    assert created["metadata"]["name"] == scene.name
    assert (created["spec"]["trainer"]["numNodes"], created["spec"]["trainer"]["numProcPerNode"]) == (2, 8)
    kept = storage.read_json(f"{scene.request.folder}/trainjob.json")
    assert kept["spec"] == created["spec"]


def test_an_hour_in_the_queue_is_waited_for_and_told(scene: Scene) -> None:
    scene.config = QUEUED
    scene.at(HOUR + 5, scene.cluster.admit)
    scene.at(HOUR + 30, scene.complete)
    scene.launch()
    assert scene.clock.now() > HOUR
    told = scene.notes()
    assert "waits in queue 'gpu-queue'\n" in told and "for 30 min now" in told and "admitted after 60 min" in told
    assert told.count("waits in queue") < 8, "reminders thin out"


def test_preempted_by_the_queue_and_admitted_again(scene: Scene) -> None:
    scene.config = QUEUED
    scene.at(30, scene.cluster.admit)
    scene.at(60, scene.cluster.suspend)
    scene.at(1000, scene.cluster.admit)
    scene.at(1040, scene.complete)
    scene.launch()
    assert "was stopped by the queue and waits again" in scene.notes()
    assert scene.notes().count("was admitted") == 2


def test_a_retry_of_the_same_run_finds_its_training(scene: Scene) -> None:
    scene.existing()
    scene.at(10, scene.complete)
    scene.launch()
    assert scene.notes() == "" and not scene.cluster.deleted
    assert len(scene.cluster.created) == 1


def test_another_run_waits_for_the_same_training(scene: Scene) -> None:
    scene.existing()
    scene.at(10, scene.complete)
    scene.launch(run_id="run-2")
    assert "exists already (run run-1); waiting for it" in scene.notes() and not scene.cluster.deleted


def test_a_lost_answer_to_create_is_no_second_job(scene: Scene) -> None:
    def lose(request: Any) -> Any:
        if request.method.value == "POST":
            scene.cluster.faults.remove(lose)
            request.data["metadata"] |= {"uid": "uid-lost"}
            scene.cluster.put(TRAINJOBS, request.data)
            scene.cluster.created.append(request.data)
            request._raw_request.transport.abort()
            raise ConnectionResetError
        return None

    scene.cluster.faults.append(lose)
    scene.at(10, scene.complete)
    scene.launch()
    assert len(scene.cluster.created) == 1


def test_a_foreign_job_of_this_name_is_left_alone(scene: Scene) -> None:
    scene.existing(metadata={"labels": {"app": "theirs"}})
    with pytest.raises(ServiceError, match=r"not this training's: its label vlmflow.io/train-key is None"):
        scene.launch()
    assert not scene.cluster.deleted and scene.cluster.trainjob(scene.name)


def test_a_failed_attempt_makes_room_for_the_next(scene: Scene) -> None:
    failure.write(scene.request.folder, "node-0", StepFailed("of the earlier attempt"))
    scene.existing(**ended("JobsFailed"))
    scene.at(10, scene.complete)
    scene.launch()
    assert scene.cluster.deleted == [scene.name] and len(scene.cluster.created) == 2
    assert "an earlier TrainJob" in scene.notes() and failure.read(scene.request.folder) == []


def test_the_next_attempt_waits_until_the_pods_of_the_last_are_gone(scene: Scene) -> None:
    scene.existing(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["foregroundDeletion"]})
    scene.at(300, lambda: scene.cluster.vanish(TRAINJOBS, scene.name))
    scene.at(400, scene.complete)
    scene.launch()
    assert "is being deleted; its pods may still write a checkpoint" in scene.notes()
    assert len(scene.cluster.created) == 2


def test_a_deletion_that_never_ends_is_an_error(scene: Scene) -> None:
    scene.config = CONFIG.model_copy(update={"patience_seconds": 100.0})
    scene.existing(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["stuck"]})
    with pytest.raises(ServiceError, match=r"is being deleted since 2 min.*a finalizer or a pod holds it"):
        scene.launch()


def test_complete_without_its_model_is_trained_anew(scene: Scene) -> None:
    scene.existing(status={"conditions": [{"type": "Complete", "status": "True"}]})
    scene.at(10, scene.complete)
    scene.launch()
    assert "(Complete, its model is gone) is deleted" in scene.notes() and len(scene.cluster.created) == 2


def test_complete_but_no_model_is_a_clear_error(scene: Scene) -> None:
    scene.at(10, lambda: scene.cluster.condition("Complete"))
    with pytest.raises(
        StepFailed, match=r"is Complete, but file://.*model.json does not exist: its pods wrote to another"
    ):
        scene.launch()


@pytest.mark.parametrize("status", [500, 503, 429, 0])
def test_storms_of_api_errors_are_sat_out(scene: Scene, status: int) -> None:
    scene.cluster.fail(4, status, "POST")
    scene.at(8, lambda: scene.cluster.pod("p0"), lambda: scene.step("p0", 1))
    scene.at(12, lambda: scene.cluster.fail(12, status))
    scene.at(300, lambda: scene.step("p0", 2), scene.complete)
    scene.launch()
    assert scene.steps() == [1, 2] and len(scene.cluster.created) == 1
    assert "has not answered for" in scene.notes() and "answers again" in scene.notes()
    assert max(scene.clock.sleeps) <= 30


def test_throttling_is_obeyed(scene: Scene) -> None:
    scene.cluster.fail(1, 429, "POST", {"Retry-After": "17"})
    scene.at(60, scene.complete)
    scene.launch()
    assert scene.clock.sleeps[0] == 17


def test_an_api_that_stays_away_is_given_up_after_the_patience(scene: Scene) -> None:
    scene.at(10, lambda: scene.cluster.fail(10**6, 503))
    with pytest.raises(
        ServiceError, match=r"no usable answer for 36\d\d s, 3600 s were waited for .*running the same command"
    ):
        scene.launch()
    assert scene.cluster.trainjob(scene.name) and not scene.cluster.deleted


def test_rotated_credentials_are_read_anew_and_wrong_ones_named(scene: Scene) -> None:
    clients = []
    connect = scene.cluster.connect
    scene.cluster.fail(2, 401)
    scene.at(10, scene.complete)
    launch(scene.request, scene.events.append, CONFIG, scene.clock, lambda: clients.append(1) or connect())
    assert len(clients) == 3
    scene.cluster.fail(10**6, 401)
    with pytest.raises(ServiceError, match=r"does not know us .*401, 5 times"):
        scene.launch()


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (403, "Give this pod's service account get, create"),
        (404, "Kubeflow Trainer 2.3 or later"),
        (422, "compare its version"),
    ],
)
def test_a_refusal_says_what_to_do(scene: Scene, status: int, advice: str) -> None:
    scene.cluster.fail(1, status, "POST")
    with pytest.raises(ServiceError, match=advice):
        scene.launch()


def test_the_log_is_read_once_over_broken_answers(scene: Scene) -> None:
    scene.at(6, lambda: scene.cluster.pod("p0"))
    for second in range(8, 60, 4):
        scene.at(second, lambda n=second: scene.step("p0", n), lambda n=second: scene.step("p0", n + 1))
    scene.at(21, lambda: scene.cluster.fail(2, 0, "/log"))
    scene.at(41, lambda: scene.cluster.fail(2, 500, "/log"))
    scene.at(90, scene.complete)
    scene.launch()
    expected = [n for second in range(8, 60, 4) for n in (second, second + 1)]
    assert scene.steps() == expected


def test_a_restart_goes_on_in_the_new_pods_log(scene: Scene) -> None:
    scene.at(6, lambda: scene.cluster.pod("p0"), lambda: scene.step("p0", 1))
    scene.at(20, lambda: scene.cluster.pod("p0", "Failed"), lambda: scene.cluster.pod("p0-again"))
    scene.at(21, lambda: scene.step("p0-again", 2))
    scene.at(40, scene.complete)
    scene.launch()
    assert scene.steps() == [1, 2]
    assert "training was restarted; pod p0-again goes on" in scene.notes()


def test_an_evicted_pod_and_a_death_by_memory_are_told(scene: Scene) -> None:
    taken = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "node drained"}
    killed = {"name": "node", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    stuck = {"name": "node", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    nowhere = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    pod = scene.cluster.pod
    scene.at(
        6,
        lambda: pod("p1", "Pending", 1, conditions=[nowhere]),
        lambda: pod("p2", "Pending", 2, containerStatuses=[stuck]),
    )
    scene.at(
        20, lambda: pod("p0", "Failed", conditions=[taken]), lambda: pod("p1", "Failed", 1, containerStatuses=[killed])
    )
    scene.at(60, scene.complete)
    scene.launch()
    told = scene.notes()
    for text in (
        "EvictionByEvictionAPI node drained",
        "137, OOMKilled (it used more memory",
        "no such image",
        "0/3 nodes",
    ):
        assert told.count(text) == 1, text


def test_a_failed_rank_speaks_for_itself(scene: Scene) -> None:
    def fail() -> None:
        failure.write(scene.request.folder, "node-1", DataError("shard web-00007.tar has no index"))
        failure.write(scene.request.folder, "node-0", StepFailed("another rank failed"))
        scene.cluster.condition("Failed", "JobsFailed", "jobset failed")

    scene.at(30, fail)
    with pytest.raises(DataError, match=r"^shard web-00007.tar has no index$"):
        scene.launch()


def test_a_rank_that_reached_only_the_log_speaks_too(scene: Scene) -> None:
    error = EVENT + json.dumps({"event": "error", "kind": "DataError", "message": "the store is gone"})
    scene.at(6, lambda: scene.cluster.pod("p0"), lambda: scene.cluster.write("p0", error))
    scene.at(20, lambda: scene.cluster.condition("Failed", "JobsFailed"))
    with pytest.raises(DataError, match="the store is gone"):
        scene.launch()


def test_a_silent_death_is_told_with_the_last_lines(scene: Scene) -> None:
    killed = {"name": "node", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    scene.at(6, lambda: scene.cluster.pod("p0"), lambda: scene.cluster.write("p0", "CUDA says goodbye"))
    scene.at(20, lambda: scene.cluster.pod("p0", "Failed", containerStatuses=[killed]))
    scene.at(
        21, lambda: scene.cluster.condition("Failed", "FailedJobs", "jobset failed due to one or more job failures")
    )
    with pytest.raises(
        StepFailed, match=r"(?s)FailedJobs: jobset failed.*pod p0 ended with exit code 137.*CUDA says goodbye"
    ):
        scene.launch()


def test_the_deadline_names_the_setting(scene: Scene) -> None:
    scene.at(30, lambda: scene.cluster.condition("Failed", "DeadlineExceeded", "TrainJob exceeded its active deadline"))
    with pytest.raises(StepFailed, match=r"ran longer than 336\.0 h.*raise `deadline_seconds`"):
        scene.launch()


def test_deleted_by_somebody_else(scene: Scene) -> None:
    scene.at(30, lambda: scene.cluster.vanish(TRAINJOBS, scene.name))
    with pytest.raises(
        StepFailed, match=r"was deleted while it was waited for .it is gone.*run the same command again"
    ):
        scene.launch()


def test_cancelled_deletes_the_job_and_the_next_run_goes_on(scene: Scene) -> None:
    scene.cluster.slow_deletion = True
    scene.at(30, scene.clock.stop.set)
    with pytest.raises(TrainingPreempted, match="was deleted, its pods write a checkpoint") as stopped:
        scene.launch()
    assert stopped.value.exit_code == 75 and scene.cluster.deleted == [scene.name]
    assert scene.cluster.trainjob(scene.name)["metadata"]["deletionTimestamp"], "its pods have not ended yet"

    scene.clock = FakeClock(scene.cluster)
    scene.at(60, lambda: scene.cluster.vanish(TRAINJOBS, scene.name))
    scene.at(90, scene.complete)
    scene.launch()
    assert len(scene.cluster.created) == 2


def test_cancelled_while_the_api_is_away(scene: Scene) -> None:
    scene.at(30, lambda: scene.cluster.fail(10**6, 503))
    scene.at(60, scene.clock.stop.set)
    with pytest.raises(TrainingPreempted, match="may go on"):
        scene.launch()
    assert scene.clock.now() < 120, "a pod has 30 s to end"


def test_cancelled_leaves_the_job_of_another_run(scene: Scene) -> None:
    scene.existing()
    scene.at(30, scene.clock.stop.set)
    with pytest.raises(TrainingPreempted, match="it belongs to run 'run-1' and goes on"):
        scene.launch(run_id="run-2")
    assert not scene.cluster.deleted


def test_without_the_right_to_see_pods_training_goes_on(scene: Scene) -> None:
    scene.cluster.fail(10**6, 403, "/pods")
    scene.at(60, scene.complete)
    scene.launch()
    assert scene.notes().count("pods cannot be seen, so progress is not shown") == 1


def test_nothing_is_sent_for_processes_that_fill_no_node(scene: Scene) -> None:
    from vlmflow.errors import RecipeError

    with pytest.raises(RecipeError, match=r"processes: 7 .*has 8 GPUs and is given whole.*Use 8 or 16"):
        scene.launch(processes=7)
    assert scene.cluster.created == []
