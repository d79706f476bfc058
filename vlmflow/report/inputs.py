"""What a pipeline hands to the report. Every part may be missing: the page then says that it was not run."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlmflow.dataset.manifest import Manifest
from vlmflow.models.store import ModelRef


class Timing(BaseModel):
    """Wall time of one step. `started`: seconds since any common start, or None when only durations are known."""

    model_config = ConfigDict(extra="ignore")
    step: str
    seconds: float
    started: float | None = None


class ReportInputs(BaseModel):
    """The parts of a run.

    Attributes:
        datasets: manifests by name with all their layers (`seed`, `web`, `sft`).
        models: references by name: `untrained`, `bootstrap` (model P), `ocr`, `align`, the candidates by their names.
        scores: report-split `Scores` (as dicts or objects) by model name; soups are called `soup-NAME`.
        soup: `SoupResult` as a dict or object: soups and candidates with their selection scores, chosen, trace.
        registered, exported: results of the registry and export steps, as dicts or objects.
        timings: wall times; None = read from the run's records in the store.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    datasets: dict[str, Manifest] = Field(default_factory=dict)
    models: dict[str, ModelRef] = Field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = Field(default_factory=dict)
    soup: dict[str, Any] | None = None
    registered: dict[str, Any] | None = None
    exported: dict[str, Any] | None = None
    timings: list[Timing] | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """Results may come as pydantic objects or dataclasses; the sections read dicts."""
        if not isinstance(values, dict):
            return values
        found = dict(values)
        for name in ("soup", "registered", "exported"):
            if name in found:
                found[name] = plain(found[name])
        if isinstance(found.get("scores"), dict):
            found["scores"] = {name: plain(score) for name, score in found["scores"].items()}
        return found


def plain(value: Any) -> Any:
    """A pydantic object or dataclass as a dict; anything else as it is."""
    from dataclasses import asdict, is_dataclass

    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
