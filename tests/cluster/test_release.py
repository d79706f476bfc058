"""The chart through real Helm on a real API server: installed, upgraded, rolled back, uninstalled, for every file of the
value matrix, in a namespace that enforces Pod Security *restricted* and a quota."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import chart_case as chart
import helm_python
import pytest
import yaml
from place import RELEASE, Place

every_case = pytest.mark.parametrize("case", chart.MATRIX)
# What `helm uninstall` leaves on purpose: MLflow's database and the bundled store's data.
KEPT = {
    "evaluation": {("PersistentVolumeClaim", "vlmflow-mlflow"), ("PersistentVolumeClaim", "data-vlmflow-store-0")},
    "minio": {("PersistentVolumeClaim", "data-vlmflow-store-0")},
}


def values(case: str, period: int = 300) -> dict[str, Any]:
    found = copy.deepcopy(chart.values(case))
    found.setdefault("promoter", {})["period"] = period
    found["promoter"].setdefault("models", ["points-tiny"])
    return found


@every_case
def test_every_object_is_taken_strictly(place: Callable[..., Place], case: str) -> None:
    here = place(f"strict-{case}")
    for path, text in here.helm.render(_chart(), values(case), name=RELEASE, namespace=here.namespace).items():
        if path.endswith(".txt"):
            continue
        for each in yaml.safe_load_all(text):
            if each:
                _dry_run(here, each)


def test_the_namespace_refuses_what_the_chart_must_not_do(place: Callable[..., Place]) -> None:
    """Pod Security and the quota are in force, and `refusals` sees it: the next test could fail."""
    here = place("refusing")
    for name, security in (
        ("open", {}),
        ("greedy", {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}),
    ):
        container = {"name": "c", "image": "i"}
        if security:
            container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        template = {
            "metadata": {"labels": {"app": name}},
            "spec": {"securityContext": security, "containers": [container]},
        }
        spec = {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": template}
        here.apps.create_namespaced_deployment(here.namespace, {"metadata": {"name": name}, "spec": spec})
    for words in ('violates PodSecurity "restricted', "failed quota: quota: must specify"):
        here.until(lambda words=words: any(words in each for each in here.refusals()), words)


@every_case
def test_install_upgrade_rollback_uninstall(place: Callable[..., Place], case: str) -> None:
    here = place(f"release-{case}")
    assert here.install(values(case))["status"] == "deployed"
    assert here.refusals() == []
    first = _promoter(here)
    assert "--period=300" in first
    assert here.upgrade(values(case, 600))["revision"] == 2
    assert "--period=600" in _promoter(here)
    here.rollback(1)
    assert _promoter(here) == first
    assert [each["revision"] for each in here.helm.history(RELEASE)] == [1, 2, 3]
    assert here.refusals() == []
    here.uninstall()
    here.until(lambda: here.left() == KEPT.get(case, set()), f"only what is meant to stay; now {sorted(here.left())}")


def test_an_installation_grows_and_shrinks(place: Callable[..., Place]) -> None:
    """The matrix as upgrades of one release: nothing immutable is in the way, and what is no longer wanted goes."""
    here = place("growing")
    here.install(values("default"))
    smallest = here.everything() - {each for each in here.everything() if each[0] in ("Secret", "Pod", "ReplicaSet", "EndpointSlice")}  # fmt: skip
    for case in ("minio", "evaluation", "production"):
        here.upgrade(values(case))
    assert here.refusals() == []
    here.upgrade(values("default"))
    kept = KEPT["evaluation"]
    here.until(lambda: {each for each in here.left() if each[0] in {kind for kind, _ in smallest}} <= smallest | kept, "the smallest again")  # fmt: skip
    here.uninstall()
    here.until(lambda: here.left() == kept, "only the volumes")


def _chart() -> Any:
    return helm_python.Chart.load(str(chart.CHART))


def _promoter(here: Place) -> list[str]:
    return here.apps.read_namespaced_deployment(f"{RELEASE}-promoter", here.namespace).spec.template.spec.containers[0].args  # fmt: skip


def _dry_run(here: Place, each: dict[str, Any]) -> None:
    group, _, version = each["apiVersion"].rpartition("/")
    base = f"/apis/{group}/{version}" if group else f"/api/{version}"
    plural = next(k["name"] for k in here.get(base)["resources"] if k["kind"] == each["kind"] and "/" not in k["name"])
    here.call("POST", f"{base}/namespaces/{here.namespace}/{plural}", each, dryRun="All", fieldValidation="Strict")
