"""The statistics as one HTML page with plots; nothing in it runs or is loaded."""

from __future__ import annotations

from typing import Any

from vlmflow.look import cards
from vlmflow.look.style import CSS
from vlmflow.report.charts import bars
from vlmflow.report.html import Safe, el, facts, join, table, tiles
from vlmflow.report.numbers import count, percent, short, size

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(made: dict[str, Any]) -> str:
    """The page of `stats.stats`."""
    head = join([
        el("meta", charset="utf-8"), el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"), el("title", f"Statistics of {made['name']}"),
        Safe(f"<style>{CSS}</style>"),
    ])  # fmt: skip
    top = el("header", el("h1", f"Statistics of {made['name']}"), el("span", f"{count(made['samples'])} samples", cls="dim"),
             el("code", made["digest"][:12], title=made["digest"]), cls="top")  # fmt: skip
    parts = [_overview(made)]
    layers: dict[str, list[Safe]] = {}
    for name, column in made["columns"].items():
        layers.setdefault(name.partition(".")[0], []).append(_column(name, column, made["samples"]))
    names = {"sample": "The samples themselves"}
    parts += [el("section", el("h2", names.get(layer, f"Layer {layer}")), *shown) for layer, shown in layers.items()]
    if not made["with_samples"]:
        parts.append(
            el(
                "p",
                "Alt texts, URLs and image sizes were not read: their shards are not on this machine (--samples fetches them).",
                cls="note",
            )
        )
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{top}<main>{join(parts)}</main></body></html>\n"


def _overview(made: dict[str, Any]) -> Safe:
    total = made["samples"]
    figures = [
        ("samples", count(total), ""),
        *((state, count(n), percent(n / total)) for state, n in made["state"].items() if state != "undecided"),
    ]
    figures += [(f"duplicate {what}", count(n), percent(n / total)) for what, n in made["duplicates"].items()]
    kept = any("kept" in s for s in made["sources"].values())
    head = ["source", "samples", "shards", "size", "with a failure", *(["kept", "share kept"] if kept else [])]
    rows = [
        [
            name,
            count(s["samples"]),
            count(s["shards"]),
            size(s["bytes"]),
            count(s["failed"]),
            *([count(s["kept"]), percent(s["share"])] if kept else []),
        ]
        for name, s in made["sources"].items()
    ]
    parts = [el("h2", "Overview"), tiles(figures), table(head, rows, numeric=range(1, 7))]
    if made["reasons"]:
        parts += [el("h3", "Why samples are kept or dropped"), _bars(made["reasons"], "bar")]
    if made["failed"]:
        parts += [el("h3", "What failed"), _bars(made["failed"], "bad")]
    if made["not_pulled"]["reasons"]:
        parts += [el("h3", "Rows of the tables that became no sample"), _bars(made["not_pulled"]["reasons"], "bad")]
        parts += [el("h3", "Their hosts"), _bars(made["not_pulled"]["hosts"], "bad")]
    return el("section", *parts)


def _bars(values: dict[str, int], cls: str) -> Safe:
    """Bars with their names in a table: reasons are too long for a plot's margin."""
    most = max(values.values(), default=1)
    rows = [
        (
            value or "others",
            count(n),
            el(
                "svg",
                el("rect", x="0", y="2", width=f"{n / most * 300:.1f}", height="10", cls=cls),
                viewBox="0 0 300 14",
                width="300",
                height="14",
            ),
        )
        for value, n in values.items()
    ]
    return table(["value", "samples", ""], rows, numeric=[1])


def _column(name: str, c: dict[str, Any], total: int) -> Safe:
    parts: list[Any] = [el("h3", name)]
    if "quantiles" in c:
        if c["min"] == c["max"]:
            return join([*parts, el("p", f"always {short(c['min'])}", cls="note")])
        parts.append(cards.plot(c["histogram"]))
        q = c["quantiles"]
        parts.append(table(["mean", "deviation", "lowest", *(f"{float(p):.0%}" for p in q), "highest"],
                           [[short(v) for v in (c["mean"], c["deviation"], c["min"], *q.values(), c["max"])]], numeric=range(11)))  # fmt: skip
        if len(c["by_source"]) > 1:
            rows = [[s, count(v["count"]), short(v["mean"]), short(v["median"])] for s, v in c["by_source"].items()]
            parts.append(table(["source", "values", "mean", "median"], rows, numeric=[1, 2, 3]))
    elif "characters" in c:
        q = c["characters"]["quantiles"]
        parts.append(facts([
            ("texts", count(c["filled"])), ("characters", f"mean {short(c['characters']['mean'])}, median {short(q['0.5'])}, 95 % up to {short(q['0.95'])}, longest {count(c['characters']['max'])}"),
            ("words", f"mean {short(c['words']['mean'])}"), ("repeat another", f"{count(c['repeated'])} ({percent(c['repeated'] / c['filled'])})"), ("empty", count(c["empty"])),
        ]))  # fmt: skip
        if c["scripts"]:
            parts += [
                el("p", "texts with letters of a script", cls="note"),
                bars([(script, n, "bar") for script, n in c["scripts"].items()]),
            ]
    elif values := c.get("values") or c.get("items"):
        parts.append(_bars(values, "bar"))
    else:
        parts.append(el("p", f"{count(c['filled'])} filled", cls="note"))
    if c["missing"]:
        parts.append(el("p", f"{count(c['missing'])} of {count(total)} without", cls="note"))
    return join(parts)
