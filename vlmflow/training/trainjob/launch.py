"""The launcher of a cluster: create or adopt the TrainJob of a training, wait for its end, say how it ended.

Killed at any point and started again it finds the TrainJob by name. Told to stop (SIGTERM: the pipeline was cancelled,
or this pod's node is drained) it deletes the TrainJob; its pods write a checkpoint within their grace period, and the
next attempt makes a new one that goes on from there. Deleting and not suspending, because Kueue would start a suspended
job again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vlmflow import storage
from vlmflow.errors import ServiceError, StepFailed, VlmflowError
from vlmflow.training import failure
from vlmflow.training.launch import TrainingPreempted
from vlmflow.training.launchers import LaunchRequest, OnEvent
from vlmflow.training.trainjob import pods, schema, spec
from vlmflow.training.trainjob.client import Api, Refused, Stopped
from vlmflow.training.trainjob.clock import Clock
from vlmflow.training.trainjob.config import TrainJobConfig, from_environment
from vlmflow.training.trainjob.wait import Wait, condition, duration, path_of

POLL_GONE = 2.0  # seconds between looks at a TrainJob that is being deleted
CANCEL_SECONDS = 15.0  # a pod gets 30 s between SIGTERM and SIGKILL unless somebody says otherwise


def launch(
    request: LaunchRequest,
    on_event: OnEvent,
    config: TrainJobConfig | None = None,
    clock: Clock | None = None,
    connect: Callable[[], Any] | None = None,
) -> None:
    """Run a training as a TrainJob.

    Raises:
        RecipeError: the stage's processes do not fill nodes of its pool.
        TrainingPreempted: told to stop; the TrainJob was deleted.
        VlmflowError: what a rank reported, as its own class.
        StepFailed: it failed without a report, was deleted, or ended without a model.
        ServiceError: the cluster refuses (rights, missing Trainer, another job of this name) or stays silent.
    """
    config, clock = config or from_environment(), clock or Clock()
    shape = config.shape(request.stage, request.processes)
    job = spec.train_job(request, config, shape)
    schema.check(job)
    storage.write_json(storage.join(request.folder, "trainjob.json"), job)  # evidence of what was asked for

    def say(text: str) -> None:
        on_event({"event": "note", "text": text})

    api = Api(clock, config.patience_seconds, say, *([connect] if connect else []))
    wait = Wait(api, clock, config.namespace, job["metadata"]["name"], on_event)
    uid = ""
    with _sigterm(clock.stop):
        try:
            uid = _take(api, clock, job, request, wait)
            ended = wait.until_end(uid)
        except Stopped:
            raise _cancel(api, job, uid) from None
    if failed := condition(ended, "Failed"):
        raise _why(request, config, wait, failed)
    if not storage.exists(request.model):
        raise StepFailed(
            f"TrainJob {wait.name} is Complete, but {request.model} does not exist: its pods wrote to another store than this "
            f"one (compare VLMFLOW_S3_ENDPOINT and VLMFLOW_ROOT of both, ConfigMap '{spec.settings.CONFIG_MAP}'), or the model "
            "was deleted since. Run the same command again; it trains anew from the last checkpoint."
        )


def _take(api: Api, clock: Clock, job: dict[str, Any], request: LaunchRequest, wait: Wait) -> str:
    """Create the TrainJob, or adopt the one that does this training already; returns its uid."""
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    waits_since: float | None = None
    while True:
        found = _get(api, namespace, name)
        if found is None:
            failure.clear(request.folder)
            created = _create(api, job)
            if created is not None:
                trainer = job["spec"]["trainer"]
                wait.note(
                    f"TrainJob {namespace}/{name} created: {trainer['numNodes']} nodes with {trainer['numProcPerNode']} "
                    "processes each"
                )
                return created
            continue  # somebody was faster, or our first answer was lost
        _must_be_ours(found, job)
        uid = found["metadata"]["uid"]
        if found["metadata"].get("deletionTimestamp"):
            if waits_since is None:
                waits_since = clock.now()
                wait.note(f"an earlier TrainJob {name} is being deleted; its pods may still write a checkpoint")
            if (waited := clock.now() - waits_since) > api.patience:
                raise ServiceError(
                    f"TrainJob {namespace}/{name} is being deleted since {duration(waited)}, {duration(api.patience)} were "
                    "waited for: a finalizer or a pod holds it. Look at it with kubectl, then run the same command again."
                )
            clock.pause(min(15.0, POLL_GONE + waited / 10))
        elif condition(found, "Failed") or (condition(found, "Complete") and not storage.exists(request.model)):
            how = "Failed" if condition(found, "Failed") else "Complete, its model is gone"
            wait.note(f"an earlier TrainJob {name} ({how}) is deleted; a new one goes on from the newest checkpoint")
            _delete(api, namespace, name, uid)
        else:
            _tell_adopted(found, job, wait)
            return uid
        if clock.stop.is_set():
            raise Stopped


def _get(api: Api, namespace: str, name: str) -> dict[str, Any] | None:
    try:
        return api.json("GET", path_of(namespace, name))
    except Refused as refused:
        if refused.status == 404:
            return None
        raise _explained(refused, namespace) from refused


def _create(api: Api, job: dict[str, Any]) -> str | None:
    """uid of the new TrainJob; None when one of that name exists."""
    namespace = job["metadata"]["namespace"]
    try:
        return api.json("POST", path_of(namespace), body=job)["metadata"]["uid"]
    except Refused as refused:
        if refused.status == 409:
            return None
        raise _explained(refused, namespace) from refused


def _delete(api: Api, namespace: str, name: str, uid: str) -> None:
    try:
        api.json("DELETE", path_of(namespace, name), body=spec.deletion(uid))
    except Refused as refused:
        if refused.status not in (404, 409):  # gone, or another one by now: the next look will tell
            raise _explained(refused, namespace) from refused


def _explained(refused: Refused, namespace: str) -> ServiceError:
    """What to do about a refusal."""
    advice = {
        403: f"Give this pod's service account get, create and delete on trainjobs.{spec.GROUP} in namespace '{namespace}'.",
        404: f"Kubeflow Trainer 2.3 or later must be installed (trainjobs.{spec.GROUP}) and namespace '{namespace}' must exist.",
        422: "The cluster's Trainer does not take what vlmflow writes for 2.3; compare its version.",
    }
    return ServiceError(f"{refused}. {advice.get(refused.status, 'The TrainJob was not created.')}")


def _must_be_ours(found: dict[str, Any], job: dict[str, Any]) -> None:
    labels = found["metadata"].get("labels") or {}
    mine = job["metadata"]["labels"][spec.KEY_LABEL]
    if labels.get(spec.KEY_LABEL) != mine:
        name = f"{job['metadata']['namespace']}/{job['metadata']['name']}"
        raise ServiceError(
            f"a TrainJob {name} exists that is not this training's: its label {spec.KEY_LABEL} is "
            f"{labels.get(spec.KEY_LABEL)!r}, ours is '{mine}'. It is left alone. Rename or delete it, then run the same "
            "command again."
        )


def _tell_adopted(found: dict[str, Any], job: dict[str, Any], wait: Wait) -> None:
    theirs, ours = (obj["metadata"].get("annotations") or {} for obj in (found, job))
    text = (
        f"TrainJob {wait.name} of this training exists already (run {theirs.get('vlmflow.io/run-id')}); waiting for it"
    )
    sizes = [
        tuple((obj.get("spec") or {}).get("trainer", {}).get(field) for field in ("numNodes", "numProcPerNode"))
        for obj in (found, job)
    ]
    if sizes[0] != sizes[1]:
        text += (
            f". It has {sizes[0][0]} nodes x {sizes[0][1]} processes, this run would have {sizes[1][0]} x {sizes[1][1]}"
        )
    if theirs != ours or sizes[0] != sizes[1]:
        wait.note(text)


def _cancel(api: Api, job: dict[str, Any], uid: str) -> TrainingPreempted:
    """Delete the TrainJob if it is ours to delete; says what happened."""
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    try:
        found = api.quickly("GET", path_of(namespace, name), None, CANCEL_SECONDS)
    except Refused as refused:
        if refused.status != 404:
            return TrainingPreempted(f"stopped; TrainJob {namespace}/{name} may go on ({refused})")
        return TrainingPreempted("stopped before a TrainJob was created; run the step again")
    except ServiceError as error:
        return TrainingPreempted(f"stopped; TrainJob {namespace}/{name} could not be looked at and may go on ({error})")
    theirs = (found["metadata"].get("labels") or {}).get(spec.RUN_LABEL)
    if theirs != job["metadata"]["labels"][spec.RUN_LABEL]:
        return TrainingPreempted(
            f"stopped waiting for TrainJob {namespace}/{name}; it belongs to run '{theirs}' and goes on"
        )
    if uid and found["metadata"]["uid"] != uid:
        return TrainingPreempted(f"stopped; TrainJob {namespace}/{name} is another one by now and was left alone")
    try:
        api.quickly("DELETE", path_of(namespace, name), spec.deletion(found["metadata"]["uid"]), CANCEL_SECONDS)
    except Refused as refused:
        if refused.status != 404:
            return TrainingPreempted(f"stopped, but TrainJob {namespace}/{name} goes on: {refused}")
    except ServiceError as error:
        return TrainingPreempted(f"stopped, but TrainJob {namespace}/{name} may go on: {error}")
    return TrainingPreempted(
        f"training stopped on SIGTERM: TrainJob {namespace}/{name} was deleted, its pods write a checkpoint; run the step "
        "again to continue"
    )


def _why(request: LaunchRequest, config: TrainJobConfig, wait: Wait, failed: dict[str, Any]) -> VlmflowError:
    """The error of a failed TrainJob: what a rank reported, else what Kubernetes and the log tell."""
    if reported := failure.read(request.folder):
        return reported[0]
    if wait.reported:
        return failure.restore(wait.reported[0])
    reason, message = failed.get("reason", ""), failed.get("message", "")
    if reason == "DeadlineExceeded":
        return StepFailed(
            f"TrainJob {wait.name} ran longer than {duration(config.deadline_seconds)} and was ended. Its last checkpoint is in "
            "the store: run the same command again to go on, or raise `deadline_seconds` of the installation."
        )
    dead = "".join(f"\n  {death}" for death in pods.deaths(wait.pods))
    tail = "".join(f"\n  {line}" for line in wait.tail) or "\n  (nothing was read of it)"
    return StepFailed(f"TrainJob {wait.name} failed: {reason}: {message}{dead}\nLast lines of its first node:{tail}")


@contextlib.contextmanager
def _sigterm(stop: threading.Event) -> Iterator[None]:
    """SIGTERM sets ``stop``; only the main thread may install handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
