"""What a soup search found: every soup and candidate with its selection score, the greedy trace, and the choice."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vlmflow import storage
from vlmflow.evaluation.scores import Scores
from vlmflow.models.store import ModelRef
from vlmflow.soup.choose import TraceStep


class SoupEntry(BaseModel):
    """A model of the search: its reference, the candidate names it is the mean of, its scores on the selection
    split."""

    model_config = ConfigDict(extra="forbid")
    ref: ModelRef
    ingredients: list[str]
    selection: Scores


class SoupResult(BaseModel):
    """soups: "maximum", "average", "greedy"; candidates: the models that went in; chosen: a name of either; trace: the
    decisions of the greedy search in order."""

    model_config = ConfigDict(extra="forbid")
    soups: dict[str, SoupEntry]
    candidates: dict[str, SoupEntry]
    chosen: str
    trace: list[TraceStep]

    @property
    def entries(self) -> dict[str, SoupEntry]:
        """Soups and candidates by name (a candidate cannot have a soup's name)."""
        return {**self.candidates, **self.soups}

    @property
    def model(self) -> ModelRef:
        """The chosen model."""
        return self.entries[self.chosen].ref

    def save(self, path: str | Path) -> None:
        """Write as JSON, to a path or URI (atomic)."""
        storage.write_json(str(path), self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: str | Path) -> SoupResult:
        return cls.model_validate(storage.read_json(str(path)))
