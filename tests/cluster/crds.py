"""Definitions of the custom kinds that the chart and the launcher use.

Kubeflow Trainer's own are taken where VLMFLOW_TRAINER_CRDS names the folder of its manifests/base/crds; otherwise they
are made from the closed schema that the launcher checks TrainJobs by, which comes from Trainer's generated models.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import yaml

from vlmflow.training.trainjob import schema

VARIABLE = "VLMFLOW_TRAINER_CRDS"
PLURALS = {"TrainJob": "trainjobs", "TrainingRuntime": "trainingruntimes"}
ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
QUANTITY = {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
Json = dict[str, Any]


def definition(group: str, version: str, kind: str, plural: str, content: Json) -> Json:
    """A CustomResourceDefinition with a status of its own."""
    served = {
        "name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": content},
        "subresources": {"status": {}},
    }  # fmt: skip
    names = {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {"group": group, "names": names, "scope": "Namespaced", "versions": [served]},
    }


def structural(node: Json, known: Json) -> Json:
    """A JSON schema of pydantic as Kubernetes wants it: references resolved, null left out."""
    if reference := node.get("$ref"):
        name = reference.rpartition("/")[2]
        if name in schema.SCALARS:
            return QUANTITY
        if name.endswith("MetaV1ObjectMeta"):
            return {"type": "object", "properties": {key: {"type": "object", "additionalProperties": {"type": "string"}} for key in ("labels", "annotations")}}  # fmt: skip
        return structural(known[name], known)
    if options := [each for each in node.get("anyOf", []) if each.get("type") != "null"]:
        return structural(options[0], known)
    kind = node.get("type", "object")
    made: Json = {"type": kind}
    if kind == "array":
        made["items"] = structural(node["items"], known)
    elif node.get("properties"):
        made["properties"] = {key: structural(value, known) for key, value in node["properties"].items()}
        made |= {"required": node["required"]} if node.get("required") else {}
    elif isinstance(values := node.get("additionalProperties"), dict):
        made["additionalProperties"] = structural(values, known)
    elif kind == "object":
        return ANYTHING
    return made


def trainer() -> list[Json]:
    """Kubeflow Trainer's kinds."""
    if folder := os.environ.get(VARIABLE):
        files = [path for path in sorted(Path(folder).glob("*.yaml")) if path.name != "kustomization.yaml"]
        return [each for path in files for each in yaml.safe_load_all(path.read_text()) if each]
    made = []
    for kind, plural in PLURALS.items():
        closed = schema.closed_schema(kind)
        properties = {
            key: structural(value, closed["$defs"])
            for key, value in closed["properties"].items()
            if key in ("spec", "status")
        }
        group, _, version = schema.API_VERSION.partition("/")
        made.append(definition(group, version, kind, plural, {"type": "object", "properties": properties}))
    return made


def others() -> list[Json]:
    """Kinds of other operators that are only written or only reported to: their content is not looked at."""
    found = [
        ("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors"),
        ("argoproj.io", "v1alpha1", "WorkflowTaskResult", "workflowtaskresults"),
        ("kueue.x-k8s.io", "v1beta1", "LocalQueue", "localqueues"),
    ]
    return [definition(*names, ANYTHING) for names in found]


def install(api: Any, definitions: list[Json]) -> None:
    """Make the kinds known, and wait until the API serves them."""
    from kubernetes import client

    extensions = client.ApiextensionsV1Api(api)
    for each in definitions:
        extensions.create_custom_resource_definition(each, _preload_content=False)
    deadline = time.monotonic() + 120
    for each in definitions:
        name = each["metadata"]["name"]
        while True:
            found = extensions.read_custom_resource_definition(name).status.conditions or []
            state = {condition.type: condition.status for condition in found}
            if state.get("Established") == "True":
                break
            assert time.monotonic() < deadline, (name, found)
            time.sleep(0.2)
        spec = each["spec"]
        path = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
        while not _listed(api, path):  # its storage is made after it is established: 429 until then
            assert time.monotonic() < deadline, name
            time.sleep(0.2)


def _listed(api: Any, path: str) -> bool:
    from kubernetes.client.exceptions import ApiException

    try:
        api.call_api(path, "GET", response_type="object", auth_settings=["BearerToken"], _request_timeout=30)
    except ApiException as error:
        if error.status in (404, 429):
            return False
        raise
    return True
