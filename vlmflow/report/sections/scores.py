"""The score table: every model against chance and the untrained one, report split first, selection split apart."""

from __future__ import annotations

from typing import Any

from vlmflow.report import charts
from vlmflow.report.html import Safe, absent, el, join, note, table, tag
from vlmflow.report.numbers import percent
from vlmflow.report.page import UNTRAINED, Page


def reached(page: Page, model: str | None, benchmark: str, times: float) -> bool:
    """Whether a model reaches `times` chance and `times` the untrained model, and is above 0."""
    score, before = page.score(model, benchmark), page.score(UNTRAINED, benchmark)
    if score is None or before is None or score["accuracy"] <= 0:
        return False
    return score["accuracy"] >= times * score["chance"] and score["accuracy"] >= times * before["accuracy"]


def multiples(score: dict[str, Any], before: dict[str, Any] | None) -> Safe:
    """How often chance, how often the untrained model; a division by zero is said, not hidden."""
    parts = [f"{score['accuracy'] / score['chance']:.1f} × chance" if score["chance"] else "chance is 0"]
    if before is not None:
        zero = before["accuracy"] == 0
        parts.append(
            f"untrained has 0 of {before['n']}" if zero else f"{score['accuracy'] / before['accuracy']:.1f} × untrained"
        )
    return el("small", parts[0], *(join([el("br"), part]) for part in parts[1:]))


def section(page: Page) -> Safe:
    if not page.inputs.scores:
        return absent("No model was evaluated.")
    names = page.benchmarks
    head = ["model", *(_head(page, name) for name in names), "mean"]
    rows = [_chance(page, names)]
    missing = []
    for model in page.order():
        if model in page.inputs.scores:
            rows.append(_row(page, model, names))
        else:
            missing.append(page.name(model))
    parts = [
        el("p", "Report split: these questions took no part in any choice. The dot is the accuracy, the bar its 95 % "
           "Wilson interval, the tick the chance level.", cls="lead"),
        el("div", el("table", el("thead", el("tr", *(el("th", h) for h in head))), el("tbody", *rows)), cls="scroll", tabindex="0"),
    ]  # fmt: skip
    if missing:
        parts.append(absent(f"Not evaluated on the report split: {', '.join(missing)}."))
    parts += [_same(page), _zero(page), _parse(page), _selection(page)]
    return join(parts)


def _head(page: Page, name: str) -> Safe:
    score = next(s["benchmarks"][name] for s in page.inputs.scores.values() if name in s.get("benchmarks", {}))
    return join([name, el("br"), el("small", f"{str(score.get('kind', '')).replace('_', ' ')}, n = {score['n']}")])


def _chance(page: Page, names: list[str]) -> Safe:
    levels = [next((s["chance"] for m in page.inputs.scores if (s := page.score(m, name))), None) for name in names]
    known = [level for level in levels if level is not None]
    cells = [el("td", el("span", percent(level), cls="big") if level is not None else "") for level in levels]
    mean = el("td", percent(sum(known) / len(known)) if len(known) == len(names) and known else "")
    return el("tr", el("td", "chance", el("br"), el("small", "guessing among the answers")), *cells, mean)


def _row(page: Page, model: str, names: list[str]) -> Safe:
    chosen = model == page.chosen
    cells = [el("td", page.name(model), *([" ", tag("chosen", "good")] if chosen else []))]
    for name in names:
        score = page.score(model, name)
        if score is None:
            cells.append(el("td", tag("not run")))
            continue
        low, high = score["interval"]
        cells.append(
            el(
                "td",
                el("span", percent(score["accuracy"]), cls="big"),
                el("small", f"  {percent(low)} – {percent(high)}", cls="nowrap"),
                charts.interval(score["accuracy"], low, high, score["chance"]),
                multiples(score, None if model == UNTRAINED else page.score(UNTRAINED, name)),
            )
        )
    mean = page.inputs.scores[model].get("mean")
    cells.append(el("td", el("span", percent(mean), cls="big") if mean is not None else ""))
    return el("tr", *cells, cls="chosen" if chosen else None)


def _same(page: Page) -> Safe:
    """Rows that are one and the same model: a greedy soup that kept one candidate has that candidate's weights."""
    by_sha: dict[str, list[str]] = {}
    for model in page.order():
        sha = (page.inputs.scores.get(model) or {}).get("model_sha")
        if sha:
            by_sha.setdefault(sha, []).append(page.name(model))
    equal = [" = ".join(names) for names in by_sha.values() if len(names) > 1]
    return note(f"Rows with the same weights, hence the same scores: {'; '.join(equal)}.") if equal else Safe("")


def _zero(page: Page) -> Safe:
    zero = [b for b in page.benchmarks if (s := page.score(UNTRAINED, b)) and s["accuracy"] == 0]
    if not zero:
        return Safe("")
    return note(
        f"The untrained model answered nothing right on {', '.join(zero)}: a multiple of 0 does not exist, so there the chance "
        "level is the meaningful comparison."
    )


def _parse(page: Page) -> Safe:
    """How many replies could not be read as an answer, where any could not."""
    found = []
    for model in page.order():
        for name in page.benchmarks:
            score = page.score(model, name)
            if score and (score.get("parsed", 1.0) < 1 or score.get("errors")):
                unread = round((1 - score.get("parsed", 1.0)) * score["n"])
                found.append((page.name(model), name, unread, score.get("errors", 0), score["n"]))
    if not found:
        return Safe("")
    body = table(["model", "benchmark", "replies not read", "questions with errors", "n"], found, numeric=(2, 3, 4))
    return el("details", el("summary", "Replies that could not be read as an answer (they count as wrong)"), body)


def _selection(page: Page) -> Safe:
    """Scores of the split that the soup was chosen on, apart from the others and named as such."""
    entries = {name: e["selection"] for name, e in page.soup_entries.items() if isinstance(e.get("selection"), dict)}
    if not entries:
        return join([el("h3", "Selection split"), absent("No scores on the selection split were handed in.")])
    scored = dict.fromkeys(b for s in entries.values() for b in s.get("benchmarks", {}))
    names = [*(b for b in page.benchmarks if b in scored), *(b for b in scored if b not in page.benchmarks)]
    levels = [
        next((s["benchmarks"][b].get("chance") for s in entries.values() if b in s.get("benchmarks", {})), None)
        for b in names
    ]
    known = [level for level in levels if level is not None]
    mean = percent(sum(known) / len(known)) if known and len(known) == len(names) else ""
    rows: list[list[Any]] = [["chance", *(percent(level) if level is not None else "" for level in levels), mean]]
    for model, scores in entries.items():
        marks = [" ", tag("chosen", "good")] if (page.inputs.soup or {}).get("chosen") == model else []
        cells: list[Any] = [join([model, *marks])]
        for name in names:
            score = scores.get("benchmarks", {}).get(name)
            cells.append(f"{percent(score['accuracy'])} (n = {score['n']})" if score else "")
        rows.append([*cells, percent(scores["mean"]) if scores.get("mean") is not None else ""])
    return join(
        [
            el("h3", "Selection split"),
            note(
                "The soup was chosen by these numbers, so they are too good to report; they stand here for comparison only."
            ),
            table(["model", *names, "mean"], rows, numeric=range(1, len(names) + 2)),
        ]
    )
