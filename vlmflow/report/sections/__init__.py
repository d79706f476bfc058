"""The parts of the page, in reading order: (anchor, title, short title for the menu, function).

A function takes a `Page` and gives HTML. It asks for what it needs and says "not run" where that is missing.
"""

from __future__ import annotations

from collections.abc import Callable

from vlmflow.report.html import Safe
from vlmflow.report.page import Page
from vlmflow.report.sections import (
    curation,
    gallery,
    generations,
    lineage,
    perplexity,
    pull,
    registry,
    scores,
    soup,
    timings,
    training,
)

SECTIONS: list[tuple[str, str, str, Callable[[Page], Safe]]] = [
    ("scores", "Scores on held-out data", "Scores", scores.section),
    ("answers", "What the chosen model answers", "Answers", generations.section),
    ("soup", "Model soup", "Soup", soup.section),
    ("pull", "Pull: from URLs to shards", "Pull", pull.section),
    ("curation", "Curation steps", "Curation", curation.section),
    ("samples", "Samples after each curation step", "Samples", gallery.section),
    ("perplexity", "Perplexity filter", "Perplexity", perplexity.section),
    ("training", "Training", "Training", training.section),
    ("registry", "Registry and export", "Registry", registry.section),
    ("timings", "Timings", "Timings", timings.section),
    ("lineage", "Lineage", "Lineage", lineage.section),
]
