"""The score table as plain rows: one model, one benchmark, one split, with chance beside the score.

Registry, gates and model card read scores in this form only, so none of them can show a score without its chance
level or mix up the split that chose a model with the one that reports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmflow.errors import DataError

if TYPE_CHECKING:
    from vlmflow.evaluation.scores import Scores

UNTRAINED = "untrained"  # name of the row of the randomly initialised or merely composed model
SOUP = "soup-"  # the row of soup NAME is soup-NAME; candidates have rows of their own name


@dataclass(frozen=True)
class ScoreRow:
    """Accuracy of model `row` (a share, 0 to 1) over `n` questions; `interval` is the Wilson 95 % interval."""

    row: str
    benchmark: str
    split: str
    score: float
    chance: float
    n: int
    interval: tuple[float, float]


def score_rows(scores: Mapping[str, Scores]) -> list[ScoreRow]:
    """Rows in the order of the mapping, benchmarks sorted.

    Raises DataError when models were scored on different splits: such numbers must not stand in one table.
    """
    splits = {name: each.split for name, each in scores.items()}
    if len(set(splits.values())) > 1:
        raise DataError(f"scores are of different splits and cannot be compared: {splits}; evaluate all on one split")
    return [
        ScoreRow(
            row=name, benchmark=benchmark, split=each.split, score=one.accuracy, chance=one.chance, n=one.n,
            interval=(one.interval[0], one.interval[1]),
        )
        for name, each in scores.items()
        for benchmark, one in sorted(each.benchmarks.items())
    ]  # fmt: skip


def soup_row(soup: str) -> str:
    """Row of a soup in a score table: "greedy" -> "soup-greedy"."""
    return f"{SOUP}{soup}"


def chosen_row(soup: Any) -> str:
    """Row of what the soup step chose, a soup or a candidate; "" without a soup step."""
    if soup is None:
        return ""
    return soup_row(soup.chosen) if soup.chosen in soup.soups else str(soup.chosen)


def final_row(scores: Mapping[str, Scores], weights_sha256: str, chosen: str = "") -> str:
    """Name of the row that holds the scores of these weights. Raises DataError when there is none.

    A soup of one ingredient has its candidate's weights, so several rows may match; `chosen` (see `chosen_row`)
    is taken if it is among them, else the last one.
    """
    found = [name for name, each in scores.items() if each.model_sha == weights_sha256]
    if not found:
        known = {name: each.model_sha[:12] for name, each in scores.items()}
        raise DataError(
            f"no scores belong to the model with weights {weights_sha256[:12]}; there are scores of {known}. "
            "A model is registered and exported with its own scores only: evaluate it first."
        )
    return chosen if chosen in found else found[-1]
