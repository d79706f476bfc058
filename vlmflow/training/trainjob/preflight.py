"""What must be there before a stage is trained on the cluster, asked before anything is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlmflow.errors import RecipeError, ServiceError
from vlmflow.training.trainjob import client
from vlmflow.training.trainjob.client import Api, Refused
from vlmflow.training.trainjob.clock import Clock
from vlmflow.training.trainjob.config import TrainJobConfig, from_environment
from vlmflow.training.trainjob.spec import GROUP, NODE, PLURAL, VERSION

if TYPE_CHECKING:
    from vlmflow.recipe import Recipe

PATIENCE = 30.0  # seconds; somebody waits
KUEUE = "kueue.x-k8s.io"
# (group, resource, subresource, verbs): without these nothing can be trained, or nobody sees how it goes.
Right = tuple[str, str, str, tuple[str, ...]]
NEEDED: list[Right] = [(GROUP, PLURAL, "", ("create", "get", "delete"))]
WANTED: list[Right] = [("", "pods", "", ("list",)), ("", "pods", "log", ("get",))]


def check(
    recipe: Recipe, clock: Clock | None = None, connect: Callable[[], Any] = client.connect
) -> list[tuple[str, str]]:
    """(what, found) of everything the TrainJob launcher relies on.

    Raises:
        RecipeError: a stage's processes do not fill nodes of its pool.
        ServiceError: settings, Trainer, runtime, queue or a right is missing; says which and what to do.
    """
    config = from_environment()
    stages = dict(recipe.stages) | ({"bootstrap": recipe.bootstrap} if recipe.bootstrap else {})
    shapes = []
    for name, stage in stages.items():
        try:
            shape = config.shape(name, stage.processes)
        except RecipeError as error:
            raise RecipeError(f"stages.{name}.{error}") from error
        shapes.append(f"{name}: {shape.nodes} x {shape.processes} ({config.pool(name)[0]})")
    api = Api(clock or Clock(), PATIENCE, lambda _: None, connect)
    rows = [("stages fill nodes of their pools", ", ".join(shapes)), _trainer(api), _runtime(api, config)]
    rows += [_queue(api, config, queue) for queue in sorted({config.pool(name)[1].queue for name in stages} - {""})]
    return [*rows, _rights(api, config)]


def _trainer(api: Api) -> tuple[str, str]:
    known = _get(api, f"/apis/{GROUP}/{VERSION}")
    if PLURAL not in {resource["name"] for resource in (known or {}).get("resources", [])}:
        raise ServiceError(
            f"the cluster knows no {PLURAL}.{GROUP}/{VERSION}: install Kubeflow Trainer 2.3 or later, or train with "
            "VLMFLOW_TRAIN_LAUNCHER=local."
        )
    return "Kubeflow Trainer is installed", f"{GROUP}/{VERSION}"


def _runtime(api: Api, config: TrainJobConfig) -> tuple[str, str]:
    namespaced = config.runtime_kind == "TrainingRuntime"
    where = f"namespaces/{config.namespace}/trainingruntimes" if namespaced else "clustertrainingruntimes"
    found = _get(api, f"/apis/{GROUP}/{VERSION}/{where}/{config.runtime}")
    named = f"{config.runtime_kind} '{config.runtime}'" + (f" in namespace '{config.namespace}'" if namespaced else "")
    if found is None:
        raise ServiceError(
            f"there is no {named}; install vlmflow's chart there, or set `runtime` and `runtime_kind` of the TrainJob settings."
        )
    spec = found.get("spec") or {}
    if "torch" not in (spec.get("mlPolicy") or {}):
        raise ServiceError(
            f"{named} has no `mlPolicy.torch`: the training pods would not know their place among the nodes."
        )
    jobset = ((spec.get("template") or {}).get("spec")) or {}
    containers = [
        container
        for job in jobset.get("replicatedJobs") or []
        if job.get("name") == NODE
        for container in job["template"]["spec"]["template"]["spec"].get("containers") or []
        if container.get("name") == NODE
    ]
    if not containers:
        raise ServiceError(
            f"{named} has no replicated job '{NODE}' with a container '{NODE}'; training runs in that one."
        )
    restarts = (jobset.get("failurePolicy") or {}).get("maxRestarts", 0)
    found_text = f"{config.runtime}, image {config.image or containers[0].get('image')}, {restarts} restarts"
    return "TrainingRuntime fits", found_text + ("" if restarts else ": a lost node ends the training")


def _queue(api: Api, config: TrainJobConfig, queue: str) -> tuple[str, str]:
    group = _get(api, f"/apis/{KUEUE}")
    if group is None:
        raise ServiceError(
            f"queue '{queue}' is set, but the cluster has no Kueue ({KUEUE}); install it or leave `queue` empty."
        )
    version = group["preferredVersion"]["version"]
    if _get(api, f"/apis/{KUEUE}/{version}/namespaces/{config.namespace}/localqueues/{queue}") is None:
        raise ServiceError(
            f"there is no LocalQueue '{queue}' in namespace '{config.namespace}': a TrainJob would wait for ever. Create it, or "
            "correct `queue` of the TrainJob settings."
        )
    return "Kueue's queue exists", queue


def _rights(api: Api, config: TrainJobConfig) -> tuple[str, str]:
    if missing := _denied(api, config, NEEDED):
        raise ServiceError(
            f"this pod's service account may not {', '.join(missing)} in namespace '{config.namespace}'; give it a Role with "
            "these rights (vlmflow's chart has one)."
        )
    unseen = _denied(api, config, WANTED)
    return "rights on TrainJobs", f"but not {', '.join(unseen)}: progress will not be shown" if unseen else "all"


def _denied(api: Api, config: TrainJobConfig, rights: list[Right]) -> list[str]:
    denied = []
    for group, resource, subresource, verbs in rights:
        for verb in verbs:
            asked = {"namespace": config.namespace, "verb": verb, "group": group, "resource": resource}
            if subresource:
                asked["subresource"] = subresource
            review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
            body = {**review, "spec": {"resourceAttributes": asked}}
            answer = api.json("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=body)
            if not answer["status"]["allowed"]:
                denied.append(f"{verb} {'/'.join(filter(None, [resource, subresource]))}")
    return denied


def _get(api: Api, path: str) -> dict[str, Any] | None:
    try:
        return api.json("GET", path)
    except Refused as refused:
        if refused.status == 404:
            return None
        raise
