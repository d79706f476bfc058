"""Markup of the gallery: cards, facets, the plot of the sorted column. Served and static pages are made of the same.

Every text comes from strangers; `el` escapes whatever it is given, and only http and https addresses become links.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from vlmflow.curation.inputs import UPSTREAM
from vlmflow.look.answers import Facet
from vlmflow.look.build import FIXED, SAMPLE
from vlmflow.look.query import RANDOM, Query
from vlmflow.look.table import Table
from vlmflow.report.charts import binned, legend
from vlmflow.report.html import Safe, el, join, tag
from vlmflow.report.numbers import count, short

MOST_CHARS = 1200  # of a text on a card; the sample's own page has all of it
MOST_SCORES = 10
_BADGES = {"kept": "good", "dropped": "bad", "undecided": ""}
_BARS = {"kept": "kept", "dropped": "gone", "undecided": "undecided"}
NOISE = ("_tokens", ".tokens", ".nll", ".finish")  # for the sample's own page and for sorting
_UNSHOWN = {
    "sample.id",
    "sample.url",
    "sample.sha256",
    "sample.images",
    "sample.format",
    "sample.aspect",
    "keep.reason",
    "keep.keep",
    "keep.rank",
}


def link(url: Any) -> Safe:
    """An address as a link when it is http or https, else as the text it is."""
    text = str(url or "")
    try:
        safe = urlsplit(text).scheme in ("http", "https")
    except ValueError:
        safe = False
    return el("a", text, href=text, rel="noopener noreferrer nofollow", target="_blank") if safe else el("span", text)


def card(row: Mapping[str, Any], table: Table, picture: Safe | None, asked: Query, to: str | None = None) -> Safe:
    """One sample. `picture` is its image element, None for text alone; `to` the address of its own page."""
    sort = asked.sort
    words: list[Safe] = []
    scores: list[tuple[str, Any]] = []
    for name, column in table.columns.items():
        value = row.get(name)
        if value is None or value == [] or name in FIXED or name in _UNSHOWN:
            continue
        if asked.show and column.layer not in asked.show and name != sort:
            continue
        if name.endswith(".error"):
            if str(value).startswith(UPSTREAM):  # told by the layer that failed
                continue
            words.append(el("div", tag(f"{column.layer}: {_cut(str(value))}", "warn wrap")))
        elif column.kind in ("text", "json", "list"):
            text = _cut(_words(value, column.kind))
            if (
                text
                and text != row.get("reason")
                and not (column.kind == "json" and f"{column.layer}.text" in table.columns)
            ):
                words.append(el("div", el("b", _title(name)), el("div", text, cls="clamp")))
        elif column.kind in ("number", "flag", "category") and column.layer != SAMPLE and not name.endswith(NOISE):
            scores.append((name, value))
    size = (row.get("sample.width"), row.get("sample.height"))
    scores.sort(key=lambda item: item[0] != sort)
    chips = [tag(join([f"{_title(name)} ", el("b", short(value))])) for name, value in scores[:MOST_SCORES]]
    if all(size):
        chips.append(tag(f"{size[0]}×{size[1]} {row.get('sample.format') or ''}".strip()))
    state, key = str(row["state"]), str(row["key"])
    name = el("a", key, href=to, cls="key") if to else el("span", key, cls="key")
    badge = tag(state, _BADGES.get(state, "")) if state != "undecided" else ""
    many = row.get("sample.images") or 0
    frame: Safe | str = ""
    if picture is not None:
        pic = [picture, tag(f"1 of {many}") if many > 1 else ""]
        frame = el("a", *pic, href=to, cls="pic", tabindex="-1") if to else el("div", *pic, cls="pic")
    body: list[Any] = [el("div", name, badge, cls="head")]
    if row.get("reason"):
        body.append(el("p", row["reason"], cls="why"))
    if row.get("sample.url") and (not asked.show or SAMPLE in asked.show):
        words.append(el("div", link(row["sample.url"]), cls="from", title=row["sample.url"]))
    body += [el("div", *words, cls="words") if words else "", el("div", tag(row["source"]), *chips, cls="scores")]
    return el("article", frame, el("div", *body, cls="in"), cls=f"card {state}")


def _title(name: str) -> str:
    """How a column is named on a card: `fused.text` is the fused text, `ppl.ppl` the ppl."""
    layer, _, column = name.partition(".")
    if name == "sample.text":
        return "alt text"
    if name == "sample.talk":
        return "conversation"
    if layer == SAMPLE or column == layer:
        return column
    return layer if column == "text" else f"{layer} {column}"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + " …"


def _words(value: Any, kind: str) -> str:
    """Text of a cell; of JSON the strings in it, so that questions and answers can be read."""
    if kind == "list":
        return "; ".join(str(item) for item in value)
    if kind == "json":
        try:
            return "\n".join(_strings(json.loads(value)))
        except ValueError:
            return str(value)
    return str(value)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return []


def facet_list(facets: Sequence[Facet], query: Query) -> Safe:
    """Facets with counts; a click takes a value in or out."""
    parts = []
    for facet in facets:
        chosen = query.values(facet.parameter)
        entries = [
            el(
                "a",
                el("span", value or "(none)"),
                el("span", count(number), cls="n"),
                href=query.toggled(facet.parameter, value).url(),
                cls="facet on" if value in chosen else "facet",
                aria_current="true" if value in chosen else None,
            )
            for value, number in facet.entries
        ]
        parts += [el("h3", {"error": "failed in"}.get(facet.title, facet.title)), *entries]
    return join(parts)


def layer_list(table: Table, query: Query) -> Safe:
    """Layers whose texts and scores cards show; a click takes one in or out."""
    entries = []
    for layer in table.layers:
        on = layer in query.show
        shown = tuple(name for name in query.show if name != layer) if on else (*query.show, layer)
        title = "alt text, URL" if layer == SAMPLE else layer
        cls = "facet on" if on else "facet"
        entries.append(
            el("a", el("span", title), href=query.url(show=shown), cls=cls, aria_current="true" if on else None)
        )
    return join([el("h3", "show on cards" if query.show else "show on cards (all)"), *entries])


def search_form(table: Table, query: Query) -> Safe:
    """Search in texts and a value range; other filters travel as hidden fields."""
    texts = [c.name for c in table.columns.values() if c.kind in ("text", "category", "json") and c.name not in FIXED]
    numbers = [c.name for c in table.columns.values() if c.kind == "number" and c.name not in ("n", "shard")]
    sorted_by = query.sort if query.sort in numbers else ""
    fields = [
        el(
            "input",
            type="search",
            name="q",
            value=query.text,
            placeholder="search the texts",
            aria_label="search the texts",
        ),
        _select(
            "in", [("", "in any text"), *((name, f"in {name}") for name in texts)], query.within, "where to search"
        ),
    ]
    if sorted_by:
        bounds = {"min": dict(query.least).get(sorted_by), "max": dict(query.most).get(sorted_by)}
        fields.append(el("div", *(
            el("input", name=f"{end}.{sorted_by}", value="" if bound is None else f"{bound:g}", inputmode="decimal",
               placeholder=f"{end} {_title(sorted_by)}", aria_label=f"{end} {sorted_by}")
            for end, bound in bounds.items()), cls="range"))  # fmt: skip
    drop = {"q", "in", "page", f"min.{sorted_by}", f"max.{sorted_by}"}
    return el("form", *hidden(query, drop), *fields, el("button", "Search", type="submit"), method="get", action="/")


def order_form(table: Table, query: Query) -> Safe:
    """Sort column and direction."""
    sortable = [c.name for c in table.columns.values() if c.kind in ("number", "flag") and c.name not in ("n", "shard")]
    columns = [("n", "order of the dataset"), (RANDOM, "random"), *((name, name) for name in sortable)]
    if query.sort not in dict(columns):
        columns.append((query.sort, query.sort))
    return el(
        "form", *hidden(query, {"sort", "order", "page"}), el("label", "sort ", _select("sort", columns, query.sort, "sort by", now=True)),
        _select("order", [("asc", "lowest first"), ("desc", "highest first")], query.order, "direction", now=True),
        el("noscript", el("button", "Sort", type="submit")), method="get", action="/",
    )  # fmt: skip


def _select(name: str, options: Sequence[tuple[str, str]], chosen: str, label: str, now: bool = False) -> Safe:
    made = [
        el("option", title, value=value, selected="selected" if value == chosen else None) for value, title in options
    ]
    return el("select", *made, name=name, aria_label=label, data_now="1" if now else None)


def hidden(query: Query, without: set[str]) -> list[Safe]:
    """The question as hidden fields of a form."""
    from urllib.parse import parse_qsl

    pairs = parse_qsl(query.url()[1:], keep_blank_values=True)
    return [el("input", type="hidden", name=name, value=value) for name, value in pairs if name not in without]


def active(query: Query) -> Safe:
    """What is filtered by, each with a link that takes it away."""
    chips = [
        el(
            "a",
            tag(f"{name.removeprefix('is.')}: {value or '(none)'} ✕"),
            href=query.toggled(name, value).url(),
            title="remove this filter",
        )
        for name, values in query.equal
        for value in values
    ]
    for attribute, sign in (("least", "≥"), ("most", "≤")):
        bounds = getattr(query, attribute)
        chips += [
            el(
                "a",
                tag(f"{name} {sign} {short(value)} ✕"),
                href=query.url(page=1, **{attribute: tuple(b for b in bounds if b[0] != name)}),
            )
            for name, value in bounds
        ]
    if query.text:
        chips.append(
            el(
                "a",
                tag(f"“{query.text}” in {query.within or 'any text'} ✕"),
                href=query.url(page=1, text="", within=""),
            )
        )
    return el("div", *chips, cls="chips") if chips else Safe("")


def plot(made: Mapping[str, Any], href: Callable[[float, float], str] | None = None) -> Safe:
    """A histogram of `answers.histogram` with what stands beside it; a bar is a link to its range."""
    states = [state for state in _BARS if state in made["counts"]]
    notes = [f"{made['column']}: {count(made['count'])} values"]
    if made["missing"]:
        notes.append(f"{count(made['missing'])} without")
    if made["log"]:
        notes.append("logarithmic axis")
    classes = [_BARS[state] for state in states]
    key = legend(states, classes) if states != ["undecided"] else ""
    series = [(state, _BARS[state], made["counts"][state]) for state in states]
    drawn = binned(made["edges"], series, made["column"], made["log"], href)
    return el("div", el("div", el("span", ", ".join(notes), cls="dim"), key, cls="bar"), drawn)
