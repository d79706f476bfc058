"""A promotion asked for by a person or a pipeline: the promoter's gates under the installation's policies.

Policies come from the environment (mounted configuration) or, on a machine without it, from the registered model, where the
promoter writes down what it asks; never from a parameter: who promotes may ask for more than the installation, not for less.
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
PUBLISHED = "vlmflow.policy"  # tag of the registered model NAME, which only the promoter may write (platform.md 4.3)
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


def policy_of(mlflow: Any, model: str, approval_tag: str = "") -> Policy:
    """What this installation asks of a model's candidates, and the approval tag that the caller asks besides.

    Raises:
        ServiceError: the configuration cannot be read or does not name the model.
        RegistryError: MLflow does not answer.
    """
    from vlmflow.registry.policy import Policy

    text = os.environ.get(VARIABLE, "")
    where = VARIABLE if text else f"tag '{PUBLISHED}' of the registered model"
    try:
        known = json.loads(text) if text else {model: json.loads((_tags(mlflow, model) or {}).get(PUBLISHED, "{}"))}
        if model not in known.keys():
            raise ServiceError(
                f"this installation's promoter does not look after '{model}' ({VARIABLE} has {sorted(known)}): nobody said what its "
                "candidates must show. Name it in promoter.models of the chart."
            )
        asked = Policy.model_validate(known[model])
    except (ValueError, AttributeError, ValidationError) as error:
        raise ServiceError(
            f"{where} is not a JSON object of policies ({error}); nothing is promoted while it is unclear what a candidate must "
            "show. Correct the platform configuration."
        ) from error
    if asked.approval_tag and approval_tag not in ("", asked.approval_tag):
        raise ServiceError(
            f"the installation's approval of '{model}' is the tag '{asked.approval_tag}', not '{approval_tag}'; leave --approval-tag out"
        )
    return asked.model_copy(update={"approval_tag": asked.approval_tag or approval_tag})


def _tags(mlflow: Any, model: str) -> dict[str, str] | None:
    """Tags of the registered model NAME; None when there is none yet."""
    from mlflow.exceptions import MlflowException

    with tracking.translated(f"reading the policy of {model}"):
        try:
            return mlflow.get_registered_model(model).tags
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def publish(mlflow: Any, model: str, asked: Policy) -> None:
    """Write down on the registered model what is asked of its candidates; nothing when it stands there already, or when
    there is no model yet.

    Raises:
        RegistryError: MLflow refuses, or does not answer.
    """
    text = json.dumps(asked.model_dump(mode="json"), sort_keys=True)
    tags = _tags(mlflow, model)
    if tags is not None and tags.get(PUBLISHED) != text:
        with tracking.translated(f"publishing the policy of {model}"):
            mlflow.set_registered_model_tag(model, PUBLISHED, text)


def verdict(model: str, candidate: str = "", approval_tag: str = "") -> tuple[str, list[GateResult]]:
    """(version, every gate's result) of a candidate, the newest when none is named; changes nothing.

    Raises:
        RegistryError: there is no such candidate, or MLflow does not answer.
    """
    from vlmflow.registry import promote

    mlflow: Any = tracking.client()
    asked = policy_of(mlflow, model, approval_tag)
    version = candidate or _newest(mlflow, model)
    return version, promote.verdict(mlflow, model, version, asked)


def promote(model: str, candidate: str = "", approval_tag: str = "", by: str = BY) -> Promotion:
    """Promote the candidate, or the newest one that passes.

    Raises:
        RegistryError: a gate fails, the candidate was withdrawn, or MLflow refuses.
    """
    from vlmflow.registry import promote as registry

    mlflow = tracking.client()
    asked = policy_of(mlflow, model, approval_tag)
    if candidate:
        made = registry.promote(mlflow, model, candidate, asked, by)
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
