"""The gallery as a server for one machine's browser: pages of fifty samples out of millions.

It listens on the loopback address, answers GET and HEAD, and writes nothing. A page of another site must not read it: the
Host header has to name this machine (DNS rebinding), the content security policy allows nothing from elsewhere, and
pictures are marked same-origin. A sample is addressed by its number in the dataset, so no part of an address reaches a file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from vlmflow.errors import DataError, VlmflowError
from vlmflow.look import cards, one, query
from vlmflow.look.pictures import Thumbnails
from vlmflow.look.style import CSS, SCRIPT
from vlmflow.report.html import Safe, el, join
from vlmflow.report.numbers import count

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.look.samples import Samples
    from vlmflow.look.table import Table

LOOPBACK = "127.0.0.1"
TIMEOUT = 20.0  # seconds that a connection may be silent
CONNECTIONS = 32
REMEMBERED = 64  # counts and facets of questions
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
TYPES = {"jpeg": "image/jpeg", "jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
Answer = tuple[int, str, bytes]


class Gallery:
    """What the addresses of the server mean."""

    def __init__(self, manifest: Manifest, table: Table, samples: Samples) -> None:
        self.manifest, self.table, self.samples = manifest, table, samples
        self.thumbnails = Thumbnails()
        self._con = table.connect()
        self._known: OrderedDict[query.Query, tuple[int, list[query.Facet]]] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        self._con.close()

    def answer(self, path: str, pairs: list[tuple[str, str]]) -> Answer:
        """Status, content type and body for an address. Raises DataError for a question that makes no sense."""
        if path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", self.index(query.parse(pairs, self.table)).encode()
        if path == "/look.css":
            return HTTPStatus.OK, "text/css; charset=utf-8", CSS.encode()
        if path == "/look.js":
            return HTTPStatus.OK, "text/javascript; charset=utf-8", SCRIPT.encode()
        if path == "/sample":
            return HTTPStatus.OK, "text/html; charset=utf-8", self.sample(_number(pairs, "n")).encode()
        if path == "/thumb":
            return self.thumb(_number(pairs, "n"))
        if path == "/image":
            return self.image(_number(pairs, "n"), _number(pairs, "i"))
        return HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is no such page\n"

    # pages --------------------------------------------------------------------------------------------------------

    def index(self, q: query.Query) -> str:
        total, facets = self._counted(q)
        con = self._con.cursor()
        rows = query.page(con, self.table, q)
        shown = [cards.card(row, self.table, self._picture(row), q.sort, f"/sample?n={row['n']}") for row in rows]
        column = self.table.columns.get(q.sort)
        drawn: Safe | str = ""
        if column and column.kind == "number" and q.sort not in ("n", "shard"):
            made = query.histogram(con, self.table, q, q.sort)
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
            side.append(el("p", el("a", "clear all filters", href=query.Query(sort=q.sort, order=q.order).url())))
        side.append(cards.facet_list(facets, q))
        keys = (("←", ""), ("→", " page  "), ("j", ""), ("k", " card  "), ("Enter", " open  "), ("/", " search"))
        side.append(el("p", *(join([el("kbd", key), does, " "]) for key, does in keys), cls="hint"))
        body = el("main", el("aside", *side, id="filters"), el("div", *results, cls="results"), cls="look")
        return self._page(self.manifest.name, body)

    def sample(self, n: int) -> str:
        row = self._row(n)
        sides = [el("a", "← gallery", href="/", data_go="back")]
        if n > 0:
            sides.append(el("a", "previous", href=f"/sample?n={n - 1}", data_go="prev"))
        if n + 1 < self.table.rows:
            sides.append(el("a", "next", href=f"/sample?n={n + 1}", data_go="next"))
        body = el("main", el("div", *sides, cls="pager"), one.body(self.manifest, row, self.samples, n), cls="one")
        return self._page(row["key"], body)

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
            el("code", manifest.digest[:12], title=manifest.digest),
            cls="top",
        )
        head = join([
            el("meta", charset="utf-8"), el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("title", f"{title} – vlmflow"), el("link", rel="stylesheet", href="/look.css"), el("script", src="/look.js", defer="defer"),
        ])  # fmt: skip
        return f"<!doctype html><html lang='en'><head>{head}</head><body>{top}{body}</body></html>"

    def _counted(self, q: query.Query) -> tuple[int, list[query.Facet]]:
        asked = q.filters()
        with self._lock:
            if asked in self._known:
                self._known.move_to_end(asked)
                return self._known[asked]
        con = self._con.cursor()
        made = query.count(con, self.table, q), query.facets(con, self.table, q)
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
            src=f"/thumb?n={row['n']}&of={self.manifest.digest[:12]}",
            loading="lazy",
            alt=f"picture of {row['key']}",
        )

    def _row(self, n: int) -> dict[str, Any]:
        rows = query.rows_of(self._con.cursor(), [n]) if 0 <= n < self.table.rows else []
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


# --- the server ------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    server: GalleryServer
    timeout = TIMEOUT

    def do_GET(self) -> None:
        allowed = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
        if (self.headers.get("Host") or "").lower() not in allowed:
            return self._send(
                HTTPStatus.MISDIRECTED_REQUEST, "text/plain; charset=utf-8",
                f"this gallery answers as {LOOPBACK}:{self.server.server_port} and localhost only\n".encode(),
            )  # fmt: skip
        try:
            parts = urlsplit(self.path)
            pairs = parse_qsl(parts.query, keep_blank_values=True, max_num_fields=200)
            answer = self.server.gallery.answer(parts.path, pairs)
        except (DataError, ValueError) as error:
            answer = HTTPStatus.BAD_REQUEST, "text/plain; charset=utf-8", f"{error}\n".encode()
        except VlmflowError as error:
            answer = HTTPStatus.BAD_GATEWAY, "text/plain; charset=utf-8", f"{error}\n".encode()
        self._send(*answer)

    do_HEAD = do_GET

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        cached = status == HTTPStatus.OK and kind == "image/jpeg"
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "private, max-age=3600" if cached else "no-store",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "vlmflow"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses hold what a person searches for."""


class GalleryServer(ThreadingHTTPServer):
    """Serves a gallery on the loopback address; `port` 0 takes a free one."""

    daemon_threads = True

    def __init__(self, gallery: Gallery, port: int = 0) -> None:
        self.gallery = gallery
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def url(self) -> str:
        """The address to open."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        self._places.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away while it is answered is no error."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
