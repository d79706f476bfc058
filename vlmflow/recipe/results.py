"""Recipe sections ``soup``, ``evaluation``, ``registry`` and ``export``: from candidates to a model people can use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Name, Section, Share
from vlmflow.recipe.stage import DataUse


class SoupSpec(Section):
    """Candidates that share a start, and how their weights are combined (POINTS 3.3)."""

    stage: Name = Field(description="the stage that is trained once per candidate")
    candidates: dict[Name, list[DataUse]] = Field(
        min_length=1, description="extra data of each candidate, added to the stage's own"
    )
    maximum: int = Field(2, ge=1, description="models in the maximum soup (p; POINTS does not state it)")
    choose: Literal["greedy", "maximum", "average", "best"] = Field(
        "greedy",
        description="which model is registered and exported; best = highest selection score of all soups and candidates",
    )


class BenchmarkSpec(Section):
    """One benchmark in VLMEvalKit's TSV format."""

    table: str = Field(description="URI of the .tsv")
    kind: Literal["reading", "multiple_choice", "yes_no"] = Field(
        description="how replies are judged and which columns are needed"
    )
    suffix: str = Field(
        "",
        description="text after every question: '' = the kind's own, 'none' = nothing, ' text' = as is, 'text' = a last line",
    )
    numbers: bool = Field(False, description="reading: 'seven' and '7' count as equal")
    chance: Share | None = Field(None, description="score of guessing; None = derived from the questions")
    max_tiles: int | None = Field(None, ge=1, description="tile limit at test time; None = the model's")
    max_new_tokens: int | None = Field(
        None, ge=1, description="longest reply in tokens; None = evaluation.max_new_tokens"
    )


class EvaluationSpec(Section):
    """Benchmarks. Soups and gates decide by the selection split; the report reads the other, the report split."""

    benchmarks: dict[Name, BenchmarkSpec] = Field(default_factory=dict, description="benchmarks by name")
    selection_fraction: float = Field(
        0.4, gt=0, lt=1, description="share used for selection where the TSV has no split column"
    )
    max_new_tokens: int = Field(32, ge=1, description="longest reply in tokens (greedy decoding)")
    batch: int = Field(64, ge=1, description="questions generated at a time; does not change replies")


class GatesSpec(Section):
    """What a candidate must show to be promotable, on the selection split: reported questions take part in no choice."""

    floors: dict[Name, Share] = Field(
        default_factory=dict, description="least accuracy (0 to 1) by benchmark, selection split"
    )
    times_chance: dict[Name, float] = Field(default_factory=dict, description="least multiple of chance by benchmark")
    beats_untrained: bool = Field(True, description="every benchmark's score must be above the untrained model's")


class RegistrySpec(Section):
    """Names in the MLflow registry; training writes only NAME-candidates."""

    model: Name = Field(description="registered model NAME; versions go to NAME-candidates")
    experiment: str = Field("vlmflow", min_length=1, description="MLflow experiment")
    gates: GatesSpec = Field(default_factory=GatesSpec, description="what a candidate must show")


class ExportSpec(Section):
    """The Hugging Face folder."""

    licence: str = Field("other", description="licence tag of the model card")
    shard_bytes: int = Field(5_000_000_000, ge=1_000_000, description="largest safetensors file in bytes")
    examples: int = Field(6, ge=1, le=100, description="held-out questions used in the smoke test")

    @model_validator(mode="after")
    def _named(self) -> ExportSpec:
        if not self.licence.strip():
            raise ValueError("licence: give a licence tag, or 'other'")
        return self
