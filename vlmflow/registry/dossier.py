"""What a candidate brings to its promotion, in one document of its run.

The promoter decides from this alone, without the training pipeline: the model's files and their hashes, its scores on
the split that gates use, beside those of the untrained model, what it was trained on and what its recipe asks for.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlmflow.errors import RegistryError
from vlmflow.models.store import ModelRef
from vlmflow.recipe.results import GatesSpec
from vlmflow.registry.rows import ScoreRow

if TYPE_CHECKING:
    from mlflow import MlflowClient

DOCUMENT = "promotion.json"


class Dossier(BaseModel):
    """One candidate.

    Attributes:
        rows: scores of the rows `final` and `untrained` on the split that gates use.
        tables: benchmark -> sha256 of its table; scores are compared only on equal questions.
        data: digests of the manifests recorded with the run.
        contamination: benchmark -> share of its questions found in the training data; empty = not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: ModelRef
    rows: list[ScoreRow]
    final: str
    untrained: str
    tables: dict[str, str]
    gates: GatesSpec
    data: list[str]
    recipe_digest: str
    contamination: dict[str, float] = Field(default_factory=dict)


def log(mlflow: MlflowClient, run_id: str, dossier: Dossier) -> None:
    """Write the document into the candidate's run."""
    mlflow.log_dict(run_id, dossier.model_dump(mode="json"), DOCUMENT)


def read(mlflow: MlflowClient, run_id: str, version: str) -> Dossier:
    """The document of a candidate. Raises RegistryError when it is missing or not one."""
    import tempfile
    from pathlib import Path

    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="vlmflow-dossier-") as folder:
        try:
            content: Any = json.loads(Path(mlflow.download_artifacts(run_id, DOCUMENT, folder)).read_text())
            return Dossier.model_validate(content)
        except (MlflowException, OSError, ValueError, ValidationError) as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise RegistryError(
                f"candidate {version} has no readable {DOCUMENT} in run {run_id} ({reason}); it was not registered by this "
                "version of vlmflow. Register it again: the step `register` finds the same version and adds it."
            ) from error
