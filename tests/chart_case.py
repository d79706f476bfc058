"""The chart rendered offline, and what the tests ask about the result."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "vlmflow"
MATRIX = sorted(path.stem.removesuffix("-values") for path in (CHART / "ci").glob("*-values.yaml"))
WORKLOADS = {"Deployment", "StatefulSet", "Job", "Pod", "DaemonSet", "CronJob"}

Object = dict[str, Any]


def values(case: str) -> dict[str, Any]:
    """Values of a file of the matrix."""
    return yaml.safe_load((CHART / "ci" / f"{case}-values.yaml").read_text()) or {}


def templates(changes: dict[str, Any]) -> dict[str, str]:
    """Template path -> rendered text."""
    return helm_python.Chart.load(str(CHART)).render(changes, name="v", namespace="ml")


def objects(changes: dict[str, Any]) -> list[Object]:
    """Every rendered object, `helm test` pods and hooks included."""
    found = []
    for path, text in sorted(templates(changes).items()):
        if not path.endswith(".txt"):
            found += [document for document in yaml.safe_load_all(text) if document]
    return found


@cache
def rendered(case: str) -> tuple[Object, ...]:
    """Objects of a file of the matrix."""
    return tuple(objects(values(case)))


def pods(found: tuple[Object, ...] | list[Object]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(kind/name, labels, pod spec) of everything that starts pods; jobs of a TrainingRuntime too."""
    made = []
    for item in found:
        name = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "Pod":
            made.append((name, item["metadata"].get("labels", {}), item["spec"]))
        elif item["kind"] == "TrainingRuntime":
            for job in item["spec"]["template"]["spec"]["replicatedJobs"]:
                template = job["template"]["spec"]["template"]
                made.append((name, template["metadata"]["labels"], template["spec"]))
        elif item["kind"] in WORKLOADS:
            template = item["spec"]["template"]
            made.append((name, template["metadata"]["labels"], template["spec"]))
    return made


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Init and main containers."""
    return [*pod.get("initContainers", []), *pod["containers"]]
