"""What the addresses of the served gallery mean: pages of samples, one sample, thumbnails and pictures.

A sample is addressed by its number in the dataset or by its place in a question, so no part of an address reaches a file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vlmflow.errors import DataError, VlmflowError
from vlmflow.look import answers, cards, failed, one, query
from vlmflow.look.pictures import Thumbnails
from vlmflow.look.style import CSS, SCRIPT
from vlmflow.report.html import Safe, el, join
from vlmflow.report.numbers import count

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.look.samples import Samples
    from vlmflow.look.table import Table

SEARCHES = 8  # whose hits are held, at most 8 bytes a sample
REMEMBERED = 64  # counts and facets of questions
TYPES = {"jpeg": "image/jpeg", "jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
Answer = tuple[int, str, bytes]


class Gallery:
    """What the addresses of the server mean."""

    def __init__(self, manifest: Manifest, table: Table, samples: Samples) -> None:
        self.manifest, self.table, self.samples = manifest, table, samples
        self.digest = manifest.digest  # of a large dataset it takes a while
        self.thumbnails = Thumbnails()
        self._con = table.connect()
        self._failed = failed.total(self._con)
        self._known: OrderedDict[Any, Any] = OrderedDict()
        self._searches: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._made = 0
        self._lock, self._search = threading.Lock(), threading.Lock()

    def close(self) -> None:
        self._con.close()

    def answer(self, path: str, pairs: list[tuple[str, str]]) -> Answer:
        """Status, content type and body for an address. Raises DataError for a question that makes no sense."""
        if path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", self.index(query.parse(pairs, self.table)).encode()
        if path == "/failed":
            body = failed.body(self._con.cursor(), pairs)
            return HTTPStatus.OK, "text/html; charset=utf-8", self._page("rows that failed", body).encode()
        if path == "/look.css":
            return HTTPStatus.OK, "text/css; charset=utf-8", CSS.encode()
        if path == "/look.js":
            return HTTPStatus.OK, "text/javascript; charset=utf-8", SCRIPT.encode()
        if path == "/sample":
            return HTTPStatus.OK, "text/html; charset=utf-8", self.sample(query.parse(pairs, self.table)).encode()
        if path == "/thumb":
            return self.thumb(_number(pairs, "n"))
        if path == "/image":
            return self.image(_number(pairs, "n"), _number(pairs, "i"))
        return HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is no such page\n"

    # pages --------------------------------------------------------------------------------------------------------

    def index(self, q: query.Query) -> str:
        q = self._narrowed(q)
        total, facets = self._counted(q)
        con = self._con.cursor()
        rows = answers.page(con, self.table, q)
        first = (q.page - 1) * q.per + 1
        shown = [
            cards.card(row, self.table, self._picture(row), q, "/sample" + q.url(page=first + i, per=1))
            for i, row in enumerate(rows)
        ]
        column = self.table.columns.get(q.sort)
        drawn: Safe | str = ""
        if column and column.kind == "number" and q.sort not in ("n", "shard"):
            made = self._histogram(q)
            least, most = dict(q.least), dict(q.most)
            drawn = el("div", cards.plot(made, lambda low, high: q.url(
                page=1, least=tuple(sorted({**least, q.sort: low}.items())), most=tuple(sorted({**most, q.sort: high}.items()))
            )), cls="plot")  # fmt: skip
        pager = _pager(q, total)
        bar = el(
            "div",
            el("a", "filters ↓", href="#filters", cls="to-filters"),
            el("b", f"{count(total)} of {count(self.table.rows)} samples"),
            cards.order_form(self.table, q),
            el("span", cls="grow"),
            pager,
            cls="bar",
        )
        results = [cards.active(q), bar, drawn]
        results.append(
            el("div", *shown, cls="cards") if shown else el("p", "No sample fits these filters.", cls="empty")
        )
        if total > q.per:
            results.append(el("div", el("span", cls="grow"), pager, cls="bar"))
        side = [cards.search_form(self.table, q)]
        if q.filters() != query.Query():
            side.append(
                el("p", el("a", "clear all filters", href=query.Query(sort=q.sort, order=q.order, show=q.show).url()))
            )
        side += [cards.facet_list(facets, q), cards.layer_list(self.table, q)]
        keys = (("←", ""), ("→", " page  "), ("j", ""), ("k", " card  "), ("Enter", " open  "), ("/", " search"))
        side.append(el("p", *(join([el("kbd", key), does, " "]) for key, does in keys), cls="hint"))
        body = el("main", el("aside", *side, id="filters"), el("div", *results, cls="results"), cls="look")
        return self._page(self.manifest.name, body)

    def sample(self, q: query.Query) -> str:
        """The page of one sample: the gallery's page of one."""
        q = self._narrowed(replace(q, per=1))
        total, _ = self._counted(q)
        rows = answers.page(self._con.cursor(), self.table, q)
        if not rows:
            raise DataError(f"there is no sample {q.page} among the {total} of this question")
        row = rows[0]
        sides = [
            el(
                "a",
                "← gallery",
                href="/" + q.url(page=(q.page - 1) // query.PER_PAGE + 1, per=query.PER_PAGE),
                data_go="back",
            )
        ]
        if q.page > 1:
            sides.append(el("a", "previous", href="/sample" + q.url(page=q.page - 1), data_go="prev"))
        if q.page < total:
            sides.append(el("a", "next", href="/sample" + q.url(page=q.page + 1), data_go="next"))
        sides.append(el("span", f"{count(q.page)} of {count(total)}", cls="dim"))
        body = el(
            "main",
            el("div", *sides, cls="pager"),
            one.body(self.manifest, row, self.samples, self._repeated(row)),
            cls="one",
        )
        return self._page(row["key"], body)

    def _repeated(self, row: dict[str, Any]) -> Safe | str:
        """The sample that stays in place of a duplicate, to be compared with it."""
        key = row.get("dedup.of")
        found = self._con.cursor().execute("SELECT n FROM rows WHERE key = ?", [key]).fetchall() if key else []
        if not found:
            return ""
        picture = el("img", src=f"/image?n={found[0][0]}&i=0", alt=f"picture of {key}")
        return el("a", picture, el("div", f"repeats {key}, which stays"), href=f"/sample?page={found[0][0] + 1}&per=1")

    def _page(self, title: str, body: Safe) -> str:
        manifest = self.manifest
        notes = [
            f"{count(manifest.samples)} samples",
            f"{len(manifest.shards)} shards",
            f"layers {', '.join(manifest.layers) or 'none'}",
        ]
        if not self.table.with_samples:
            notes.append("alt texts and URLs stand on each sample's own page")
        top = el(
            "header",
            el("h1", manifest.name),
            *(el("span", note, cls="dim") for note in notes),
            el("a", f"{count(self._failed)} rows became no sample", href="/failed", cls="dim") if self._failed else "",
            el("code", self.digest[:12], title=self.digest),
            cls="top",
        )
        head = join([
            el("meta", charset="utf-8"), el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("title", f"{title} – vlmflow"), el("link", rel="stylesheet", href="/look.css"), el("script", src="/look.js", defer="defer"),
        ])  # fmt: skip
        return f"<!doctype html><html lang='en'><head>{head}</head><body>{top}{body}</body></html>"

    def _narrowed(self, q: query.Query) -> query.Query:
        """The question with its text looked for: pages, counts and facets share the hits."""
        if not q.text:
            return q
        asked = (q.text, q.within)
        with self._search:
            if asked not in self._searches:
                self._made += 1
                answers.search(self._con, self.table, q, f"hits{self._made}")
                self._searches[asked] = f"hits{self._made}"
            self._searches.move_to_end(asked)
            while len(self._searches) > SEARCHES:
                self._con.execute(f"DROP TABLE {self._searches.popitem(last=False)[1]}")
            return replace(q, hits=self._searches[asked])

    def _counted(self, q: query.Query) -> tuple[int, list[answers.Facet]]:
        def measure(con: Any) -> tuple[int, list[answers.Facet]]:
            return answers.count(con, self.table, q), answers.facets(con, self.table, q)

        return self._remembered(q.filters(), measure)

    def _histogram(self, q: query.Query) -> dict[str, Any]:
        return self._remembered((q.filters(), q.sort), lambda con: answers.histogram(con, self.table, q, q.sort))

    def _remembered(self, asked: Any, measure: Callable[[Any], Any]) -> Any:
        """What was counted for a question before: turning a page counts nothing again."""
        with self._lock:
            if asked in self._known:
                self._known.move_to_end(asked)
                return self._known[asked]
        made = measure(self._con.cursor())
        with self._lock:
            self._known[asked] = made
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return made

    # pictures -----------------------------------------------------------------------------------------------------

    def _picture(self, row: dict[str, Any]) -> Safe | None:
        if row.get("sample.images") == 0:
            return None
        return el(
            "img",
            src=f"/thumb?n={row['n']}&of={self.digest[:12]}",
            loading="lazy",
            alt=f"picture of {row['key']}",
        )

    def _row(self, n: int) -> dict[str, Any]:
        rows = answers.rows_of(self._con.cursor(), [n]) if 0 <= n < self.table.rows else []
        if not rows:
            raise DataError(f"there is no sample number {n}; the dataset has {self.table.rows}, from 0")
        return rows[0]

    def thumb(self, n: int) -> Answer:
        made = self.thumbnails.found(n)
        if made is None:
            row = self._row(n)
            try:
                images = self.samples.images(row["shard"], row["key"])
                if not images:
                    return HTTPStatus.OK, "image/svg+xml", _sign("no picture")
                made = self.thumbnails.make(n, images[0])
            except VlmflowError as error:
                return HTTPStatus.OK, "image/svg+xml", _sign(f"cannot be shown: {error}")
        return HTTPStatus.OK, "image/jpeg", made

    def image(self, n: int, i: int) -> Answer:
        row = self._row(n)
        images = self.samples.images(row["shard"], row["key"])
        if not 0 <= i < len(images):
            raise DataError(f"sample {row['key']} has no image {i}; it has {len(images)}, from 0")
        about = self.samples.meta(row["shard"], row["key"])["images"][i]
        return HTTPStatus.OK, TYPES.get(about["format"], "application/octet-stream"), images[i]


def _number(pairs: list[tuple[str, str]], name: str) -> int:
    text = dict(pairs).get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise DataError(f"{name}: '{text[:40]}' is not a whole number")
    return int(text)


def _sign(text: str) -> bytes:
    """A picture that says why there is none."""
    words, lines = text.split(), [""]
    for word in words:
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 34 else [*lines, word[:34]]
    shown = [el("text", line, x="10", y=str(24 + 16 * i)) for i, line in enumerate(lines[:8])]
    svg = el(
        "svg",
        *shown,
        xmlns="http://www.w3.org/2000/svg",
        width="240",
        height="160",
        font_family="sans-serif",
        font_size="12",
        fill="#888",
    )
    return svg.encode()


def _pager(q: query.Query, total: int) -> Safe:
    pages = max(1, -(-total // q.per))

    def step(title: str, page: int, go: str) -> Safe:
        inside = 1 <= page <= pages and page != q.page
        return el("a", title, href=q.url(page=page), data_go=go, rel=go) if inside else el("span", title, cls="off")

    return el(
        "div", step("« first", 1, "first"), step("‹ back", q.page - 1, "prev"), el("span", f"page {count(q.page)} of {count(pages)}"),
        step("next ›", q.page + 1, "next"), step("last »", pages, "last"), cls="pager", role="navigation", aria_label="pages",
    )  # fmt: skip
