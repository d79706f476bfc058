"""What a pull counts, and its verdict."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vlmflow.curation.fetch_limits import is_transient
from vlmflow.curation.pull_shard import Result
from vlmflow.errors import StepFailed

HOSTS = 1000  # hosts with most failures that a manifest names; the others are summed up
COUNTED = 50_000  # hosts that are counted one by one before the rarest half is summed up
OTHERS = "(others)"


class Tally:
    """Rows, samples and failures so far, and the verdict over them. Holds nothing that depends on time or order."""

    def __init__(self, limit: float, total: int):
        self.limit, self.total = limit, total
        self.rows = self.samples = self.failed = 0
        self.counts: dict[str, Counter[str]] = {k: Counter() for k in ("reason", "host", "converted", "source")}
        self.held = 0
        self.dead: set[str] = set()
        self.first: dict[str, str] = {}

    def add(self, result: Result, dead: list[str]) -> None:
        self.rows += result.rows
        self.samples += result.ref.samples
        self.failed += result.failed
        self.held += result.held
        self.dead |= set(dead)
        self.counts["converted"].update(result.converted)
        for failure in result.failures:
            self.counts["reason"][failure["reason"]] += 1
            self.counts["host"][failure["host"]] += 1
            self.counts["source"][failure["source"]] += 1
            self.first.setdefault(failure["reason"], f"{failure['key']} {failure['url'] or ''} ({failure['detail']})")
        result.failures = []  # they lie beside the shard; a table of millions may lose half of its rows
        if len(self.counts["host"]) > COUNTED:
            self.counts["host"] = Counter(_most(self.counts["host"], COUNTED // 2))

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "samples": self.samples,
            "failed": self.failed,
            "failed_by_reason": dict(sorted(self.counts["reason"].items())),
            "failed_by_host": dict(sorted(_most(self.counts["host"], HOSTS).items())),
            "failed_by_source": dict(sorted(self.counts["source"].items())),
            "converted_to_png": dict(sorted(self.counts["converted"].items())),
        }

    def check(self, final: bool = False) -> None:
        """Raise StepFailed once more rows failed than the whole table may lose."""
        if self.failed <= self.limit * self.total and (not final or self.samples):
            return
        histogram = ", ".join(f"{n} x {reason}" for reason, n in self.counts["reason"].most_common())
        examples = "; ".join(f"{reason}: {self.first[reason]}" for reason, _ in self.counts["reason"].most_common(3))
        text = (
            f"pull: {self.failed} of {self.rows} rows failed ({self.failed / max(self.rows, 1):.1%}; {self.total} rows in all), "
            f"pull.failure_limit allows {self.limit:.1%}. By reason: {histogram}. First of each: {examples}."
        )
        if self.dead:
            text += f" No server answers at {', '.join(sorted(self.dead))}: every connection was refused or timed out. Start it or mend the URLs."
        if any(is_transient(reason) for reason in self.counts["reason"]):
            text += f" {self.held} shards with such passing failures were not kept: run the step again to fetch them."
        else:
            text += (
                " Mend the pictures or the table, or raise the limit if this loss is acceptable; the next run fetches the failed "
                "rows again and keeps the others."
            )
        raise StepFailed(text)


def _most(counts: Counter[str], limit: int) -> dict[str, int]:
    """The `limit` largest counts, ties by name, and the sum of the others as one more."""
    ranked = sorted((item for item in counts.items() if item[0] != OTHERS), key=lambda item: (-item[1], item[0]))
    others = counts[OTHERS] + sum(count for _, count in ranked[limit:])
    return {**dict(ranked[:limit]), **({OTHERS: others} if others else {})}
