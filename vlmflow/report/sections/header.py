"""The top of the page: the run's name, one sentence that says how it went, and its main figures."""

from __future__ import annotations

from vlmflow.report.html import Safe, el, join, tag, tiles
from vlmflow.report.numbers import count, percent, seconds
from vlmflow.report.page import UNTRAINED, Page
from vlmflow.report.sections.scores import reached

TIMES = 4
"""The demo's own bar: this many times chance and this many times the untrained model."""

SHOWN = 4  # benchmarks above the fold; the table has all of them


def header(page: Page) -> Safe:
    recipe = page.ctx.recipe
    kicker = f"vlmflow run {page.ctx.run_id} · recipe {recipe.name}"
    return el(
        "header",
        el(
            "div",
            el("div", kicker, cls="kicker"),
            el("h1", title(page)),
            el("p", verdict(page), cls="verdict"),
            figures(page),
        ),
        cls="top",
    )


def title(page: Page) -> str:
    return f"Report of {page.ctx.recipe.name}"


def verdict(page: Page) -> Safe:
    """One or two sentences from the measured numbers alone."""
    if not page.inputs.scores or page.chosen is None:
        return join(["No model was chosen in this run: ", tag("not run"), " marks the parts that are missing below."])
    passed = [b for b in page.benchmarks if reached(page, page.chosen, b, TIMES)]
    all_of = page.benchmarks
    kind = "good" if len(passed) >= 2 else "warn"
    text = (
        f"{len(passed)} of {len(all_of)} benchmarks reach {TIMES} times chance and {TIMES} times the untrained model"
        + (f" ({', '.join(passed)})" if passed else "")
        + (f", {', '.join(b for b in all_of if b not in passed)} not" if 0 < len(passed) < len(all_of) else "")
        + ", on held-out questions that took no part in any choice."
    )
    return join(
        [
            "Chosen model: ",
            el("strong", page.name(page.chosen)),
            ". ",
            tag("learned" if kind == "good" else "weak", kind),
            " ",
            text,
        ]
    )


def figures(page: Page) -> Safe:
    items: list[tuple[str, str, str]] = []
    for benchmark in page.benchmarks[:SHOWN]:
        score = page.score(page.chosen, benchmark)
        if score:
            before = page.score(UNTRAINED, benchmark)
            remark = f"chance {percent(score['chance'])}" + (
                f", untrained {percent(before['accuracy'])}" if before else ""
            )
            items.append((f"{benchmark} (n = {score['n']})", percent(score["accuracy"]), remark))
    web = page.curated
    if web is not None:
        keep = web.layers.get("keep")
        kept = keep.summary.get("kept") if keep else None
        remark = f"{count(kept)} kept by perplexity" if isinstance(kept, int) else "perplexity filter not run"
        items.append(("web samples pulled", count(web.samples), remark))
    if page.inputs.registered:
        registered = page.inputs.registered
        gates = registered.get("gates") or {}
        remark = f"{sum(v == 'pass' for v in gates.values())} of {len(gates)} gates passed"
        items.append(
            ("registered", f"version {registered.get('version', '?')}", f"{registered.get('name', '')}; {remark}")
        )
    if page.timings:
        total = sum(timing.seconds for timing in page.timings)
        items.append(("time in steps", seconds(total), f"{len(page.timings)} steps, added up"))
    return tiles(items) if items else Safe("")
