"""Every object of the chart, for every file of the value matrix, against Kubernetes' schemas and our own rules."""

from __future__ import annotations

import re
from typing import Any

import chart_case as chart
import kubernetes_validate
import pytest

VERSIONS = ("1.33", "1.35", "1.36")
# Kinds whose definitions come with an operator and that kubernetes-validate cannot know; other tests look at them.
CUSTOM = {"TrainingRuntime", "ServiceMonitor"}
QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")
DNS = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
# Secrets that the chart never makes: an administrator does, and docs/cluster.md lists them with their keys.
KEYS = {
    "accesskey", "secretkey", "username", "password", "admin-username", "admin-password", "flask-secret-key",
    "webhook-encryption-key", "uri", "auth-uri", "secret", "token", "captionKey",
}  # fmt: skip

every_case = pytest.mark.parametrize("case", chart.MATRIX)


@every_case
@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(case: str, version: str) -> None:
    for item in chart.rendered(case):
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, version, strict=True)


@every_case
def test_names_are_unique_and_legal(case: str) -> None:
    names = [(item["kind"], item["metadata"]["name"]) for item in chart.rendered(case)]
    assert len(names) == len(set(names))
    for _, name in names:
        assert DNS.match(name), name
    assert {item["metadata"]["namespace"] for item in chart.rendered(case)} == {"ml"}


@every_case
def test_a_second_render_is_equal(case: str) -> None:
    assert chart.templates(chart.values(case)) == chart.templates(chart.values(case))


@every_case
def test_images_are_pinned_and_pods_are_restricted(case: str) -> None:
    for name, _, pod in chart.pods(chart.rendered(case)):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert "hostNetwork" not in pod and "hostPID" not in pod, name
        assert not any("hostPath" in volume for volume in pod.get("volumes", [])), name
        for container in chart.containers(pod):
            image = container["image"]
            assert not image.endswith(":latest") and (":" in image.rsplit("/", 1)[-1]), (name, image)
            if case == "production":
                assert re.search(r"@sha256:[0-9a-f]{64}$", image), (name, image)
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["runAsNonRoot"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
            assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"]), name


@every_case
def test_resources_and_probes_are_set(case: str) -> None:
    for name, _, pod in chart.pods(chart.rendered(case)):
        for container in (
            chart.containers(pod) if not name.startswith("TrainingRuntime") else []
        ):  # set by each TrainJob
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), name
            assert "memory" in resources["limits"], name
            for values in resources.values():
                assert all(QUANTITY.match(str(value)) for value in values.values()), (name, values)
        if name.split("/")[0] in ("Deployment", "StatefulSet"):
            for container in pod["containers"]:
                assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container), name


@every_case
def test_volumes_and_mounts_match(case: str) -> None:
    claims: dict[str, set[str]] = {}
    for item in chart.rendered(case):
        for claim in item["spec"].get("volumeClaimTemplates", []) if item["kind"] == "StatefulSet" else []:
            claims.setdefault(f"{item['kind']}/{item['metadata']['name']}", set()).add(claim["metadata"]["name"])
    made = {i["metadata"]["name"] for i in chart.rendered(case) if i["kind"] == "PersistentVolumeClaim"}
    for name, _, pod in chart.pods(chart.rendered(case)):
        volumes = {volume["name"] for volume in pod.get("volumes", [])} | claims.get(name, set())
        used = {mount["name"] for container in chart.containers(pod) for mount in container["volumeMounts"]}
        assert used == volumes, name
        for volume in pod.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in made, name


@every_case
def test_no_wildcard_and_no_cluster_rights(case: str) -> None:
    for item in chart.rendered(case):
        assert item["kind"] not in ("ClusterRole", "ClusterRoleBinding"), item["metadata"]["name"]
        for rule in item.get("rules", []):
            everything = [*rule.get("verbs", []), *rule.get("resources", []), *rule.get("apiGroups", [])]
            assert "*" not in everything, item["metadata"]["name"]
            if "secrets" in rule["resources"]:
                assert rule["verbs"] == ["get"] and rule["resourceNames"], "secrets only by name"


@every_case
def test_only_who_needs_it_has_a_token(case: str) -> None:
    found = chart.rendered(case)
    accounts = {i["metadata"]["name"] for i in found if i["kind"] == "ServiceAccount"}
    bound = {s["name"] for i in found if i["kind"] == "RoleBinding" for s in i["subjects"]}
    assert bound <= accounts
    for item in found:
        if item["kind"] == "ServiceAccount":
            assert item["automountServiceAccountToken"] is False
    for name, _, pod in chart.pods(found):
        account = pod.get("serviceAccountName")
        assert account is None or account in accounts, name
        if pod.get("automountServiceAccountToken"):
            assert account in bound, name


@every_case
def test_secrets_are_named_never_made(case: str) -> None:
    assert not any(item["kind"] == "Secret" for item in chart.rendered(case))
    for name, _, pod in chart.pods(chart.rendered(case)):
        for container in chart.containers(pod):
            for variable in container.get("env", []):
                reference = (variable.get("valueFrom") or {}).get("secretKeyRef")
                if reference:
                    assert reference["name"] and reference["key"] in KEYS, (name, variable)
                else:
                    assert not re.search(r"PASSWORD|SECRET_ACCESS|TOKEN", variable["name"]), (name, variable)


@every_case
def test_policies_cover_every_pod_and_port(case: str) -> None:
    found = chart.rendered(case)
    policies = [item["spec"] for item in found if item["kind"] == "NetworkPolicy"]
    if chart.values(case).get("networkPolicy", {}).get("enabled") is False:
        assert not policies
        return
    for name, labels, pod in chart.pods(found):
        mine = [p for p in policies if p["podSelector"]["matchLabels"].items() <= labels.items()]
        assert len(mine) == 1, (name, len(mine))
        assert mine[0]["policyTypes"] == ["Ingress", "Egress"], name
        opened = {port["port"] for rule in mine[0]["ingress"] for port in rule.get("ports", [])}
        served = {port["containerPort"] for container in chart.containers(pod) for port in container.get("ports", [])}
        assert opened == served, name
        for rule in mine[0]["egress"]:
            for peer in rule.get("to", []):
                if block := peer.get("ipBlock"):
                    assert "169.254.0.0/16" in block["except"], name


@every_case
def test_services_and_budgets_select_pods(case: str) -> None:
    found = chart.rendered(case)
    pods = {name: (labels, pod) for name, labels, pod in chart.pods(found)}
    for item in found:
        if item["kind"] == "Service":
            target = _selected(pods, item["spec"]["selector"], item)
            ports = {port["name"] for container in target["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= ports
        elif item["kind"] in ("PodDisruptionBudget", "ServiceMonitor"):
            _selected(pods, item["spec"]["selector"]["matchLabels"], item)


def _selected(pods: dict[str, Any], selector: dict[str, str], item: dict[str, Any]) -> dict[str, Any]:
    found = [pod for labels, pod in pods.values() if selector.items() <= labels.items()]
    assert len(found) == 1, (item["kind"], item["metadata"]["name"], len(found))
    return found[0]
