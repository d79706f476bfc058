"""Refuse a TrainJob or TrainingRuntime that the cluster would misread.

The API server drops fields it does not know, and the generated models accept them; a node selector under a field that
was renamed would vanish without a word. So the models' schema is closed (no unknown field anywhere) and checked before
anything is sent, together with the rules that only Trainer's admission webhook knows.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from vlmflow.errors import ServiceError

MODELS = {
    "TrainJob": "TrainerV1alpha1TrainJob",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "ClusterTrainingRuntime": "TrainerV1alpha1ClusterTrainingRuntime",
}
API_VERSION = "trainer.kubeflow.org/v1alpha1"
# What the generated models wrap in a class of their own, as it is written in JSON.
SCALARS = {
    "IoK8sApimachineryPkgApiResourceQuantity": {
        "type": ["string", "integer"],
        "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$",
    },
    "IoK8sApimachineryPkgUtilIntstrIntOrString": {"type": ["string", "integer"]},
}
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
NAME = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
LONGEST_NAME = 51  # NAME-node-0-0000 is a host name of at most 63 characters
MANAGER = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9._-]+$")


@cache
def closed_schema(kind: str) -> dict[str, Any]:
    """JSON schema of a kind in which every object refuses unknown fields."""
    try:
        from kubeflow_trainer_api import models
    except ImportError as error:
        raise ServiceError(
            "the package kubeflow_trainer_api is not installed; the TrainJob launcher checks what it sends by it. "
            "Install vlmflow[cluster]."
        ) from error

    schema = getattr(models, MODELS[kind]).model_json_schema(by_alias=True)
    for name, definition in schema["$defs"].items():
        if name in SCALARS:
            definition.clear()
            definition.update(SCALARS[name])
        elif definition.get("properties"):
            definition["additionalProperties"] = False
    schema["additionalProperties"] = False
    return schema


def check(obj: dict[str, Any]) -> None:
    """Raises ServiceError listing every field that the cluster would drop or refuse."""
    kind = obj.get("kind")
    if kind not in MODELS:
        raise ServiceError(f"'{kind}' is not one of {list(MODELS)}")
    from jsonschema import Draft202012Validator

    found = map(_deepest, Draft202012Validator(closed_schema(kind)).iter_errors(obj))
    problems = [f"{'.'.join(map(str, error.absolute_path)) or '(top)'}: {error.message[:300]}" for error in found]
    problems += _rules(obj)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        name = obj.get("metadata", {}).get("name")
        raise ServiceError(f"{kind} '{name}' does not fit {API_VERSION}; it was not sent:{listed}")


def _deepest(error: Any) -> Any:
    """The most telling part of a failed anyOf (optional fields are `anyOf: [X, null]`)."""
    while error.context:
        error = max(error.context, key=lambda e: (len(e.absolute_path), e.validator == "additionalProperties"))
    return error


def _rules(obj: dict[str, Any]) -> list[str]:
    """Rules of Trainer's webhook and of name lengths."""
    problems = []
    name = obj.get("metadata", {}).get("name", "")
    if not NAME.match(name) or len(name) > LONGEST_NAME:
        problems.append(f"metadata.name: '{name}' must be a DNS label of at most {LONGEST_NAME} characters")
    if obj.get("apiVersion") != API_VERSION:
        problems.append(f"apiVersion: '{obj.get('apiVersion')}' is not {API_VERSION}")
    spec = obj.get("spec") or {}
    if obj["kind"] != "TrainJob":
        return problems
    trainer = spec.get("trainer") or {}
    if "numNodes" not in trainer or "numProcPerNode" not in trainer:
        problems.append("spec.trainer: numNodes and numProcPerNode must be given; Trainer would guess from CPU cores")
    if taken := sorted(RESERVED & {entry.get("name") for entry in trainer.get("env") or []}):
        problems.append(f"spec.trainer.env: {taken} are set by Trainer itself")
    for patch in spec.get("runtimePatches") or []:
        if not MANAGER.match(patch.get("manager", "")):
            problems.append(f"spec.runtimePatches.manager: '{patch.get('manager')}' is not of the form domain/name")
        for container in _patched_containers(patch):
            if container.get("env"):
                problems.append(
                    f"spec.runtimePatches: container '{container.get('name')}' has env; use spec.trainer.env"
                )
    return problems


def _patched_containers(patch: dict[str, Any]) -> list[dict[str, Any]]:
    template = ((patch.get("trainingRuntimeSpec") or {}).get("template") or {}).get("spec") or {}
    found: list[dict[str, Any]] = []
    for job in template.get("replicatedJobs") or []:
        pod = (((job.get("template") or {}).get("spec") or {}).get("template") or {}).get("spec") or {}
        found += pod.get("containers") or []
    return found
