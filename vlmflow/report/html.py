"""HTML without a template engine: elements that escape whatever they are given.

Alt texts, OCR results and model replies come from strangers, so escaping must not depend on anybody's care: only what
`el` and `join` made is `Safe`; every other value is escaped when it becomes a child or an attribute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Safe(str):
    """Text that is HTML already."""


_VOID = {"br", "img", "meta", "hr", "col", "link", "input"}


def safe(value: Any) -> Safe:
    """`value` as HTML: escaped unless it is `Safe`; None is empty."""
    if isinstance(value, Safe):
        return value
    return Safe("" if value is None else escape(str(value), quote=True))


def join(children: Iterable[Any]) -> Safe:
    """Children one after another."""
    return Safe("".join(safe(child) for child in children))


def el(tag: str, *children: Any, **attributes: Any) -> Safe:
    """An element. `cls` is the class; a trailing `_` is dropped and `_` becomes `-` in names; None leaves one out."""
    text = ""
    for name, value in attributes.items():
        if value is not None:
            name = "class" if name == "cls" else name.rstrip("_").replace("_", "-")
            text += f' {name}="{escape(str(value), quote=True)}"'
    return Safe(f"<{tag}{text}>") if tag in _VOID else Safe(f"<{tag}{text}>{join(children)}</{tag}>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], cls: str = "", numeric: Iterable[int] = ()) -> Safe:
    """A table that scrolls sideways when it is wider than the page. `numeric`: columns to align right."""
    right = set(numeric)

    def cell(tag: str, i: int, value: Any) -> Safe:
        if isinstance(value, Safe) and value.startswith(f"<{tag}"):
            return value
        return el(tag, value, cls="num" if i in right else None)

    header = el("thead", el("tr", *(cell("th", i, value) for i, value in enumerate(head))))
    body = el("tbody", *(el("tr", *(cell("td", i, value) for i, value in enumerate(row))) for row in rows))
    return el("div", el("table", header, body, cls=cls or None), cls="scroll", tabindex="0")


def facts(rows: Iterable[tuple[Any, Any]]) -> Safe:
    """Names and values, one a line."""
    return el(
        "div",
        el("table", el("tbody", *(el("tr", el("th", k), el("td", v)) for k, v in rows)), cls="facts"),
        cls="scroll",
    )


def note(*children: Any) -> Safe:
    return el("p", *children, cls="note")


def absent(what: str) -> Safe:
    """Says that a part of the run is not there; a report never fills such a gap."""
    return el("p", el("span", "not run", cls="tag"), " ", what, cls="absent")


def tag(text: Any, kind: str = "") -> Safe:
    """A small label; kind: good, bad, warn or nothing."""
    return el("span", text, cls=f"tag {kind}".strip())


def tiles(items: Iterable[tuple[Any, Any, Any]]) -> Safe:
    """A row of figures: (label, value, remark)."""
    return el(
        "div",
        *(
            el(
                "div",
                el("div", label, cls="label"),
                el("div", value, cls="value"),
                el("div", remark, cls="remark"),
                cls="tile",
            )
            for label, value, remark in items
        ),
        cls="tiles",
    )


def code(text: Any, keep: int = 12) -> Safe:
    """A hash, shortened, whole in its tooltip."""
    text = str(text or "")
    return el("code", text[:keep] if len(text) > keep + 4 else text, title=text) if text else Safe("")
