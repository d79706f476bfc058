"""A promotion asked for by a person or a pipeline: the promoter's gates under the installation's policies.

Policies come from the environment (mounted configuration), never from a parameter: who starts a run must not be able to
lower what the installation asks.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmflow.errors import RegistryError, ServiceError
from vlmflow.registry import tracking

if TYPE_CHECKING:
    from vlmflow.registry.gates import GateResult
    from vlmflow.registry.policy import Policy

VARIABLE = "VLMFLOW_PROMOTION_POLICIES"  # JSON: registered model -> policy
BY = "pipeline promote"  # in the audit record


class Promotion(BaseModel):
    """What a promotion did: `action` promoted | unchanged | waiting, `version` of NAME that is champion now, `candidate` it
    is a copy of or that waits, `detail` the gates."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    action: str
    version: str
    candidate: str
    detail: str


def policy_of(model: str) -> Policy:
    """What this installation asks of a model's candidates. Raises ServiceError when the configuration
    cannot be read or does not name the model."""
    from vlmflow.registry.policy import Policy

    text = os.environ.get(VARIABLE, "")
    try:
        known = json.loads(text) if text else {model: {}}
        if model not in known.keys():
            raise ServiceError(
                f"this installation's promoter does not look after '{model}' ({VARIABLE} has {sorted(known)}): nobody said what its "
                "candidates must show. Name it in promoter.models of the chart."
            )
        return Policy.model_validate(known[model])
    except (ValueError, AttributeError, ValidationError) as error:
        raise ServiceError(
            f"{VARIABLE} is not a JSON object of policies by registered model ({error}); nothing is promoted while it is unclear "
            "what a candidate must show. Correct the platform configuration."
        ) from error


def verdict(model: str, candidate: str = "") -> tuple[str, list[GateResult]]:
    """(version, every gate's result) of a candidate, the newest when none is named; changes nothing.

    Raises:
        RegistryError: there is no such candidate, or MLflow does not answer.
    """
    from vlmflow.registry import promote

    asked = policy_of(model)
    mlflow: Any = tracking.client()
    version = candidate or _newest(mlflow, model)
    return version, promote.verdict(mlflow, model, version, asked)


def promote(model: str, candidate: str = "") -> Promotion:
    """Promote the candidate, or the newest one that passes.

    Raises:
        RegistryError: a gate fails, the candidate was withdrawn, or MLflow refuses.
    """
    from vlmflow.registry import promote as registry

    asked = policy_of(model)
    mlflow = tracking.client()
    if candidate:
        made = registry.promote(mlflow, model, candidate, asked, BY)
    else:
        made = registry.reconcile(mlflow, model, asked)
    return Promotion(
        model=made.model, action=made.action, version=made.version, candidate=made.candidate, detail=made.detail
    )


def _newest(mlflow: Any, model: str) -> str:
    from vlmflow.registry import promote

    name = promote.candidates_of(model)
    with tracking.translated(f"reading the candidates of {model}"):
        found = mlflow.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    if not found:
        raise RegistryError(
            f"{name} has no version, so there is nothing to promote; a run of the pipeline points or soup registers one"
        )
    return str(found[0].version)
