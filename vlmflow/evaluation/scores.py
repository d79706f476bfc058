"""What an evaluation says: accuracy with its number of questions, interval, chance level and parse rate, per benchmark.

The report prints nothing that is not in here, so a score cannot lose its chance level on the way.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

Split = Literal["selection", "report"]


class BenchmarkScore(BaseModel):
    """One benchmark on one split. Shares are in [0, 1].

    accuracy: right / n. n: questions of the split. parsed: share of replies that could be read. errors: questions that
    could not be asked (broken image); they count as wrong. interval: Wilson 95 % interval of accuracy. chance: expected
    accuracy of guessing. majority: accuracy of always giving the split's most frequent answer. predictions: URI of the Parquet file with every question's reply and verdict.
    """

    model_config = ConfigDict(extra="forbid")
    accuracy: float
    n: int
    chance: float
    majority: float | None = None
    parsed: float
    errors: int
    interval: tuple[float, float]
    kind: str
    table_sha256: str
    split_by: Literal["column", "hash"]
    categories: dict[str, tuple[float, int]] = {}
    predictions: str = ""


class Scores(BaseModel):
    """All benchmarks of one model on one split. mean: plain mean of the accuracies (points.md 7.1: Acc)."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model_sha: str
    split: Split
    benchmarks: dict[str, BenchmarkScore]
    mean: float

    def save(self, path: str | Path) -> None:
        """Write as JSON, to a path or URI (atomic)."""
        from vlmflow import storage

        storage.write_json(str(path), self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        from vlmflow import storage

        return cls.model_validate(storage.read_json(str(path)))


def wilson(right: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a share; z = 1.96 gives 95 %. Honest for few questions and near 0 and 1, where the
    normal interval is not. (Wilson 1927.)"""
    if n == 0:
        return (0.0, 1.0)
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if right == 0 else max(0.0, middle - half), 1.0 if right == n else min(1.0, middle + half))
