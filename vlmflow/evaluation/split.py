"""Two disjoint halves of a benchmark: soups and gates decide by `selection`, the report is read from `report`.

POINTS selects its soup on the very benchmarks that it reports (points.md 0.5); here the reported questions never take
part in a choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from vlmflow.errors import DataError
from vlmflow.evaluation.tsv import Question

SPLITS = ("selection", "report")


def divide(
    questions: Sequence[Question], seed: int, selection_fraction: float, where: str
) -> tuple[dict[str, list[Question]], Literal["column", "hash"]]:
    """Both splits, each in table order, and how they were told apart.

    When the `split` column says selection or report, it decides (then every row must say so). Other values of that
    column, like dev or test, mean something else in VLMEvalKit and are not used. Otherwise a row belongs to selection
    when a hash of (seed, index) falls below `selection_fraction`; rows that share an image share their side, by the
    name of their group, so no image is in both.

    Raises DataError: a row without a side in such a column, or a side without rows; `where` names the table.
    """
    sides: dict[str, list[Question]] = {side: [] for side in SPLITS}
    explicit = any(q.split in SPLITS for q in questions)
    for q in questions:
        if explicit and q.split not in SPLITS:
            raise DataError(
                f"{where}: row {q.index}, column split: {q.split!r}; other rows say selection or report, so "
                "every row must say one of them."
            )
        side = q.split if explicit else _side(q.group, seed, selection_fraction)
        sides[side].append(q)
    for side, rows in sides.items():
        if not rows:
            raise DataError(
                f"{where}: none of the {len(questions)} questions is in the {side} split (selection_fraction "
                f"{selection_fraction}); a score needs at least one. Add questions or a split column."
            )
    return sides, "column" if explicit else "hash"


def _side(group: str, seed: int, fraction: float) -> str:
    value = int.from_bytes(hashlib.sha256(f"{seed}\n{group}".encode()).digest()[:8], "big") / 2**64
    return "selection" if value < fraction else "report"
