"""A plan in numbers and pictures for people: what it shows over the training, and what padding would have cost."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmflow.report import charts
from vlmflow.report.html import Safe, el, facts, join, note, table
from vlmflow.report.style import CSS
from vlmflow.training.plan import Plan

Ints = NDArray[np.int64]
PERIODS = 10  # of a training, over which its mixture is shown
MEGABATCH = 50  # batches whose samples are sorted by length, as Hugging Face's length-grouped sampler does
BINS = 24


def padding(plan: Plan, tokens: int) -> dict[str, float]:
    """Share of pad tokens that the same samples would need in batches of as many real tokens as a pack of this budget.

    Returns:
        ``batches``: random batches, each padded to its longest; ``buckets``: samples of similar length together.
    """
    lengths = plan.items["tokens"].astype(np.int64)
    size = max(1, round(tokens / float(lengths.mean())))
    shuffled = lengths[np.argsort(np.random.Generator(np.random.PCG64(0)).random(len(lengths)), kind="stable")]
    window = size * MEGABATCH
    bucketed = np.concatenate([np.sort(shuffled[i : i + window]) for i in range(0, len(shuffled), window)])
    return {"batches": round(_padded(shuffled, size), 4), "buckets": round(_padded(bucketed, size), 4)}


def _padded(lengths: Ints, size: int) -> float:
    starts = np.arange(0, len(lengths), size)
    longest = np.maximum.reduceat(lengths, starts)
    area = int((longest * np.diff([*starts, len(lengths)])).sum())
    return 1.0 - int(lengths.sum()) / area


def over_time(plan: Plan) -> list[dict[str, Any]]:
    """Of each tenth of the steps: share of text-only samples, tokens a step, largest tile limit."""
    edges = np.unique(np.linspace(0, plan.steps, min(PERIODS, plan.steps) + 1).round().astype(np.int64))
    rows = []
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        packs = plan.step_start[[first, end]]
        items = plan.items[plan.pack_start[packs[0]] : plan.pack_start[packs[1]]]
        rows.append(
            {
                "from_step": first,
                "text_share": round(float((items["tiles"] == 0).mean()), 4),
                "tokens_a_step": round(float(items["tokens"].sum() / (end - first))),
                "max_tiles": int(items["max_tiles"].max()),
            }
        )
    return rows


def summary(plan: Plan, tokens: int, processes: int) -> dict[str, Any]:
    """The plan's report, with what a person asks beside it.

    Args:
        tokens: budget of a pack.
        processes: ranks that the packs of a step are dealt to.
    """
    return {
        **plan.report,
        "digest": plan.digest(),
        "padding_of": padding(plan, tokens),
        "processes": processes,
        "imbalance": round(plan.imbalance(processes), 4),
        "over_time": over_time(plan),
        "filtered": plan.examples["filtered"],
        "failed": plan.examples["failed"],
        "reasons": [*plan.report["dropped_reasons"], *plan.examples["reasons"]],
    }


def page(title: str, plans: dict[str, tuple[Plan, dict[str, Any]]]) -> str:
    """One HTML document: of each stage its numbers, lengths of samples, fill of packs and the mixture over time."""
    body = [el("section", el("h2", name), _stage(plan, numbers), id=name) for name, (plan, numbers) in plans.items()]
    head = el("head", el("meta", charset="utf-8"), el("title", title), el("style", Safe(CSS)))
    return "<!doctype html>\n" + el("html", head, el("body", el("main", el("h1", title), *body)), lang="en")


def _stage(plan: Plan, numbers: dict[str, Any]) -> Safe:
    plain = [(name.replace("_", " "), v) for name, v in numbers.items() if not isinstance(v, list | dict)]
    waste = numbers["padding_of"]
    parts = [
        facts(plain),
        note(
            f"Padding: none in packs; {waste['batches']:.1%} in random batches of the same samples, {waste['buckets']:.1%} in batches "
            "of similar length."
        ),
        _histogram(plan.items["tokens"], "samples by tokens"),
        _histogram(plan.pack_tokens, "packs by tokens"),
        _histogram(plan.pack_tiles, "packs by tiles"),
        _rows(numbers["ingredients"]),
        _rows(numbers["over_time"]),
        _rows(numbers["reasons"]),
    ]
    shares = [(float(row["from_step"]), row["text_share"]) for row in numbers["over_time"]]
    if len({share for _, share in shares}) > 1:
        parts.insert(4, charts.lines({"text-only samples": shares}, "share of text-only samples over the steps"))
    return join(parts)


def _rows(rows: list[dict[str, Any]]) -> Safe:
    if not rows:
        return Safe("")
    names = list(rows[0])
    return table([name.replace("_", " ") for name in names], [[str(row[name]) for name in names] for row in rows])


def _histogram(values: Ints, label: str) -> Safe:
    counts, edges = np.histogram(values, bins=min(BINS, max(1, int(np.ptp(values)))))
    bars = [
        (f"{round(a)} to {round(b)}", float(count), "s0")
        for count, a, b in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    return join([el("h3", label), charts.bars(bars)])
