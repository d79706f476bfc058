"""What the pods of a TrainJob tell about it: why they wait, which were taken away, how one died."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlmflow.training.trainjob.spec import NODE

JOBSET_LABEL, REPLICATED_LABEL = "jobset.sigs.k8s.io/jobset-name", "jobset.sigs.k8s.io/replicatedjob-name"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
# Reasons a container waits that no patience cures.
STUCK = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError"}


def selector(job: str) -> str:
    """Label selector of a TrainJob's training pods."""
    return f"{JOBSET_LABEL}={job},{REPLICATED_LABEL}={NODE}"


def first_node(pods: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest pod of the first node, if its container has begun to write."""
    mine = [pod for pod in pods if _labels(pod).get(INDEX_LABEL, "0") == "0"]
    mine.sort(key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", pod["metadata"].get("name", "")))
    return mine[-1] if mine and _phase(mine[-1]) in ("Running", "Succeeded", "Failed") else None


def remarks(pods: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(key, text) of what a person should know; the key stays the same while the matter does."""
    for pod in pods:
        name, uid = pod["metadata"]["name"], pod["metadata"].get("uid", pod["metadata"]["name"])
        status = pod.get("status") or {}
        for condition in status.get("conditions") or []:
            kind, true = condition.get("type"), condition.get("status") == "True"
            if kind == "DisruptionTarget" and true:
                yield (
                    f"{uid} lost",
                    f"pod {name} is taken away: {_why(condition)}; training restarts from its checkpoint",
                )
            if kind == "PodScheduled" and not true and condition.get("reason") == "Unschedulable":
                yield f"{uid} unschedulable", f"pod {name} finds no node: {condition.get('message', '')}"
        if status.get("reason") == "Evicted":
            yield f"{uid} lost", f"pod {name} was evicted: {status.get('message', '')}"
        for container in status.get("containerStatuses") or []:
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in STUCK:
                text = f"{waiting['reason']}: {waiting.get('message', '')}".strip(": ")
                yield f"{uid} {waiting['reason']}", f"pod {name} cannot start: {text}"
            if death := _death(container):
                yield f"{uid} dead", f"pod {name} {death}"


def deaths(pods: list[dict[str, Any]]) -> list[str]:
    """How containers ended that did not end well."""
    return [
        f"pod {pod['metadata']['name']} {death}"
        for pod in pods
        for container in (pod.get("status") or {}).get("containerStatuses") or []
        if (death := _death(container))
    ]


def _death(container: dict[str, Any]) -> str:
    ended = (container.get("state") or {}).get("terminated") or {}
    code = ended.get("exitCode")
    if not code:
        return ""
    hint = " (it used more memory than the pool's memory_gib allows)" if ended.get("reason") == "OOMKilled" else ""
    return f"ended with exit code {code}, {ended.get('reason', 'Error')}{hint}"


def _why(condition: dict[str, Any]) -> str:
    return f"{condition.get('reason', '')} {condition.get('message', '')}".strip()


def _labels(pod: dict[str, Any]) -> dict[str, str]:
    return pod["metadata"].get("labels") or {}


def _phase(pod: dict[str, Any]) -> str:
    return (pod.get("status") or {}).get("phase", "")
