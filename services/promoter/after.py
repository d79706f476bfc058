"""What follows a promotion: an export run in Kubeflow Pipelines, or a serving Deployment that gets the new model.

Both are repeated after a restart of the promoter, so both look first: a run is named by the promoted version, and a
patch that changes nothing starts no rollout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmflow.errors import ServiceError
from vlmflow.registry.promote import Outcome

log = logging.getLogger("vlmflow.promoter")


@dataclass(frozen=True)
class Serving:
    """A Deployment that serves the champion: where its model's address is written."""

    namespace: str
    name: str
    container: str
    variable: str


def point_deployment(api: Any, serving: Serving, uri: str) -> bool:
    """Set the container's variable to the model's URI; True when that changed something.

    Args:
        api: `kubernetes.client.AppsV1Api`.

    Raises:
        ServiceError: the Deployment or container does not exist, or may not be changed.
    """
    from kubernetes.client.exceptions import ApiException

    try:
        found = api.read_namespaced_deployment(serving.name, serving.namespace)
        containers = {container.name: container for container in found.spec.template.spec.containers}
        if serving.container not in containers:
            raise ServiceError(
                f"deployment {serving.namespace}/{serving.name} has no container '{serving.container}'; it has {sorted(containers)}"
            )
        current = {v.name: v.value for v in containers[serving.container].env or []}.get(serving.variable)
        if current == uri:
            return False
        env = [{"name": serving.variable, "value": uri}]
        patch = {"spec": {"template": {"spec": {"containers": [{"name": serving.container, "env": env}]}}}}
        api.patch_namespaced_deployment(serving.name, serving.namespace, patch)
    except ApiException as error:
        raise ServiceError(
            f"deployment {serving.namespace}/{serving.name} cannot be moved to {uri}: {error.status} {error.reason}"
        ) from error
    log.info("deployment %s/%s now serves %s", serving.namespace, serving.name, uri)
    return True


def followers(
    export: Callable[[Outcome], None] | None, serve: Callable[[Outcome], None] | None
) -> Callable[[Outcome], None]:
    """One function that does all that was asked for, in this order."""

    def after(outcome: Outcome) -> None:
        for action in (export, serve):
            if action is not None:
                action(outcome)

    return after
