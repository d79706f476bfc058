"""Builds the page. One HTML file with everything in it: it can be mailed, archived, or opened offline in ten years."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import vlmflow
from vlmflow.report.html import Safe, absent, el, join
from vlmflow.report.inputs import ReportInputs
from vlmflow.report.page import READ_ERRORS, Page
from vlmflow.report.sections import SECTIONS
from vlmflow.report.sections.header import header, title
from vlmflow.report.style import CSS

if TYPE_CHECKING:
    from vlmflow.step import Context

__all__ = ["ReportInputs", "run"]

# Nothing may be fetched and no script run, whatever text a sample brought along.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def run(ctx: Context, inputs: ReportInputs) -> str:
    """The report of a run as one HTML document.

    A part that is missing is shown as "not run"; a part that cannot be read (a deleted log, a cut layer) is shown with
    the reason, and the rest of the page stands. No number is computed here that the inputs do not hold or imply.
    """
    page = Page(ctx, inputs)
    with ctx.progress("report", len(SECTIONS) + 1, "sections") as progress:
        top = _guarded(header, page)
        progress.advance()
        body = []
        for anchor, heading, _, section in SECTIONS:
            body.append(el("section", el("h2", heading), _guarded(section, page), id=anchor))
            progress.advance()
    menu = el(
        "nav",
        el("div", *(el("a", short, href=f"#{anchor}") for anchor, _, short, _ in SECTIONS)),
        aria_label="sections",
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("title", title(page)),
        el("style", Safe(CSS)),
    )
    foot = el(
        "footer", f"vlmflow {vlmflow.__version__}. Every figure on this page is read from the run's own artifacts."
    )
    return "<!doctype html>\n" + el("html", head, el("body", top, menu, el("main", *body, foot)), lang="en")


def _guarded(section: Callable[[Page], Safe], page: Page) -> Safe:
    try:
        return section(page)
    except READ_ERRORS as error:
        return join([absent(f"This part cannot be shown: {type(error).__name__}: {error}")])
