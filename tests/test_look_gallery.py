"""The served gallery and the file: strangers' texts stay text, other sites get nothing, pictures come one by one."""

from __future__ import annotations

import http.client
import io
import re
import threading
from contextlib import contextmanager
from html.parser import HTMLParser
from types import SimpleNamespace

import look_world
import pytest
from PIL import Image

from vlmflow import pages
from vlmflow.dataset import shard as shard_module
from vlmflow.errors import DataError, ServiceError
from vlmflow.look import answers, cards, pictures, query, static, table
from vlmflow.look.gallery import Gallery
from vlmflow.look.samples import Samples
from vlmflow.look.server import GalleryServer


class Markup(HTMLParser):
    """What a browser would make of a page: elements, addresses, handlers, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("href", "src", "action") and value]
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "style"]

    def handle_data(self, data):
        self.words.append(data)


def harmless(text: str, scripts: int) -> Markup:
    found = Markup(text)
    assert found.tags.count("script") == scripts and not found.handlers
    assert not [a for a in found.addresses if re.match(r"\s*(javascript|vbscript|data:text)", a, re.I)]
    return found


@contextmanager
def serving(manifest, folder):
    made = table.open_table(manifest, folder / "scratch")
    gallery = Gallery(manifest, made, Samples(manifest, folder / "scratch"))
    with GalleryServer(gallery) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(30)
            gallery.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    manifest = look_world.small(folder)
    with serving(manifest, folder) as server:
        yield SimpleNamespace(manifest=manifest, server=server, folder=folder)


def get(server, path: str, method: str = "GET", **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": f"127.0.0.1:{server.server_port}", **headers}.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_texts_of_strangers_stay_text(world):
    for path in ("/", "/?q=script", "/?q=%3Cscript%3Ealert(3)%3C/script%3E", "/sample?page=4&per=1", "/?sort=ppl.ppl"):
        status, _, body = get(world.server, path)
        assert status == 200
        found = harmless(body.decode(), scripts=1)
        assert {"/look.js", "/look.css"} <= set(found.addresses)
    page = Markup(get(world.server, "/sample?page=4&per=1")[2].decode())
    assert look_world.HOSTILE in "".join(page.words) and look_world.HOSTILE_URL in "".join(page.words)


def test_answers_forbid_everything_from_elsewhere(world):
    for path in ("/", "/thumb?n=0", "/image?n=0&i=0", "/look.js", "/nowhere", "/?sort=nothing"):
        _, headers, _ = get(world.server, path)
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert (
            headers["X-Content-Type-Options"] == "nosniff" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
        )
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", ""]
)
def test_another_host_name_gets_nothing(world, host):
    status, _, body = get(world.server, "/", Host=host.format(port=world.server.server_port))
    assert status in (400, 421) and b"web-0000" not in body


def test_localhost_is_this_machine_too(world):
    assert get(world.server, "/", Host=f"localhost:{world.server.server_port}")[0] == 200


def test_a_port_that_is_taken_is_said(world):
    with pytest.raises(ServiceError, match="choose another --port"):
        GalleryServer(world.server.gallery, world.server.server_port)


def test_it_listens_on_the_loopback_address_only(world):
    assert world.server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_only_answers_reading(world, method):
    assert get(world.server, "/", method)[0] == 501


def test_head_has_no_body(world):
    status, headers, body = get(world.server, "/", "HEAD")
    assert status == 200 and body == b"" and int(headers["Content-Length"]) > 1000


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/../../etc/passwd", 404), ("/%2e%2e/%2e%2e/etc/passwd", 404), ("/thumb?n=../../etc/passwd", 400), ("/thumb", 400),
        ("/thumb?n=-1", 400), ("/thumb?n=24", 400), ("/thumb?n=99999999999999999999", 400), ("/image?n=0&i=1", 400),
        ("/image?n=0&i=x", 400), ("/?sort=ppl.no", 400), ("/?page=0", 400), ("/sample?page=25", 400), ("/look.py", 404),
    ],
)  # fmt: skip
def test_an_address_that_means_nothing_is_refused(world, path, status):
    found, headers, body = get(world.server, path)
    assert found == status and headers["Content-Type"].startswith("text/plain") and b"root:" not in body


def test_cards_show_key_decision_reason_score_and_texts(world):
    body = get(world.server, "/?sort=ppl.ppl&order=desc&state=dropped")[2].decode()
    shown = re.findall(r'<article class="card (\w+)">', body)
    assert len(shown) == 13 and set(shown) == {"dropped"}
    first = body[body.index("<article") : body.index("</article>")]
    assert "web-00000007" in first and "perplexity 17 is beyond the lowest 50 % (to 13)" in first
    assert "a fused text 7" in first and "alt text 7" in first and "<b>17</b>" in first and "aspect 7.5 &gt; 3" in first
    assert "13 of 24 samples" in body and "<svg" in body


def test_a_facet_takes_a_value_in_and_out_and_the_address_holds_it(world):
    body = get(world.server, "/?sort=ppl.ppl")[2].decode()
    assert 'href="?source=docs&amp;sort=ppl.ppl"' in body
    body = get(world.server, "/?source=docs&sort=ppl.ppl")[2].decode()
    assert re.search(r'href="\?sort=ppl.ppl" class="facet on"', body) and "8 of 24 samples" in body


def test_pages_follow_each_other(world):
    body = get(world.server, "/?per=7&page=2")[2].decode()
    assert "page 2 of 4" in body
    links = dict(re.findall(r'href="([^"]*)" data-go="(\w+)"', body))
    assert links == {
        "?per=7": "prev",
        "?page=3&amp;per=7": "next",
        "?page=4&amp;per=7": "last",
    }  # the first is also before


def test_a_sample_is_found_by_its_place_in_the_question_and_knows_its_neighbours(world):
    body = get(world.server, "/sample?sort=ppl.ppl&order=desc&page=2&per=1")[2].decode()
    assert "<h1>web-00000015 " in body and "2 of 24" in body
    assert (
        "/sample?sort=ppl.ppl&amp;order=desc&amp;page=3&amp;per=1" in body
        and "aspect" not in body.split("Layer clean")[1][:200]
    )


def test_thumbnails_are_small_jpegs_and_pictures_the_stored_bytes(world):
    status, headers, body = get(world.server, "/thumb?n=3")
    assert status == 200 and headers["Content-Type"] == "image/jpeg" and Image.open(io.BytesIO(body)).size == (96, 64)
    status, headers, body = get(world.server, "/image?n=3&i=0")
    assert headers["Content-Type"] == "image/png" and body == look_world.picture(3)


def test_only_the_pictures_that_are_asked_for_are_read(tmp_path, monkeypatch):
    manifest = look_world.small(tmp_path)
    read: list[int] = []
    real = shard_module.ShardReader._bytes
    monkeypatch.setattr(
        shard_module.ShardReader,
        "_bytes",
        lambda self, offset, length: (read.append(length), real(self, offset, length))[1],
    )
    with serving(manifest, tmp_path) as server:
        read.clear()  # the table read the samples' JSON
        assert get(server, "/?per=5")[0] == 200 and read == []
        assert get(server, "/thumb?n=9")[0] == 200 and len(read) == 2  # a JSON and a picture
        assert get(server, "/thumb?n=9")[0] == 200 and len(read) == 2  # held


def test_a_picture_that_is_gone_is_said_on_its_card(tmp_path):
    manifest = look_world.small(tmp_path)
    with serving(manifest, tmp_path) as server:
        (tmp_path / "root" / "shards").rename(tmp_path / "elsewhere")
        status, headers, body = get(server, "/thumb?n=0")
        assert status == 200 and headers["Content-Type"] == "image/svg+xml" and b"cannot be shown" in body
        assert get(server, "/sample?page=1&per=1")[0] == 502
        assert get(server, "/")[0] == 200


def test_the_cache_of_thumbnails_is_bounded():
    made = pictures.Thumbnails(limit=4000, side=32)
    for i in range(20):
        made.make(i, look_world.picture(i, (200, 200)))
    assert made.held <= 4000 and made.found(19) and made.found(0) is None
    made.make(19, look_world.picture(19))
    assert made.held == sum(map(len, made._made.values()))
    with pytest.raises(DataError):
        made.make(99, b"no picture")


def test_only_web_addresses_become_links():
    for url in (
        "javascript:alert(1)",
        " JavaScript:alert(1)",
        "data:text/html,x",
        "vbscript:x",
        "//x",
        "http://[",
        "file:///etc/passwd",
    ):
        assert "href" not in cards.link(url)
    assert 'rel="noopener noreferrer nofollow"' in cards.link("https://pictures.example/a.png")


def test_the_file_shows_both_ends_and_some_of_every_reason_and_nothing_runs(world):
    made = table.open_table(world.manifest, world.folder / "scratch")
    samples = Samples(world.manifest, world.folder / "scratch")
    text = static.page(world.manifest, made, samples, query.Query(), each=3)
    found = harmless(text, scripts=0)
    outside = [a for a in found.addresses if not a.startswith(("data:image/jpeg;base64,", "http://"))]
    assert not outside and "default-src &#x27;none&#x27;" in text
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "Lowest ppl.ppl", "Highest ppl.ppl", "perplexity # is beyond the lowest # % (to #) (11)",
        "perplexity # is in the lowest # % (to #) (11)", "not scored (2)", "failed in fused: the reply has # words (2)",
        "Rows of the tables that became no sample (2)",
    ]  # fmt: skip
    assert text.count("<article") == 3 * 4 + 2 + 2 and text.count("data:image/jpeg") == 16
    assert static.page(world.manifest, made, samples, query.Query(), each=3) == text


def test_the_file_keeps_to_what_was_asked(world):
    made = table.open_table(world.manifest, world.folder / "scratch")
    asked = query.parse([("source", "docs"), ("state", "dropped")], made)
    text = static.page(world.manifest, made, Samples(world.manifest, world.folder / "scratch"), asked)
    assert "docs-00000020" in text and "web-000000" not in text and "source: docs, state: dropped" in text


def test_the_page_of_a_step_shows_what_was_dropped_and_why_and_leaves_no_table(tmp_path):
    manifest = look_world.small(tmp_path)
    ctx = look_world.context(tmp_path)
    text = pages.page("Selection", {"<b>": "<script>"}, pages.preview(ctx, manifest, "keep"))
    harmless(text, scripts=0)
    assert "not scored (2)" in text and "data:image/jpeg" in text and "&lt;script&gt;" in text
    assert not list((tmp_path / "scratch" / "look").glob("*.duckdb"))


def test_the_page_of_a_step_over_many_shards_looks_at_a_few(tmp_path, monkeypatch):
    manifest = look_world.small(tmp_path)
    monkeypatch.setattr(static, "SHARDS", 2)
    text = static.excerpt(manifest, tmp_path / "scratch", "keep")
    assert "Samples of 2 of 3 shards" in text and "web-00000000" in text and "web-00000008" not in text


def test_the_page_of_a_step_does_not_fail_it(tmp_path):
    manifest = look_world.small(tmp_path)
    part = manifest.layers["ppl"].parts[0]
    (tmp_path / "gone.parquet").write_bytes(b"x")
    broken = manifest.layers["ppl"].model_copy(
        update={"parts": [part.model_copy(update={"uri": str(tmp_path / "gone.parquet")})] * 3}
    )
    manifest = manifest.model_copy(update={"layers": {**manifest.layers, "ppl": broken}})
    text = pages.page("Selection", {}, pages.preview(look_world.context(tmp_path), manifest, "keep"))
    assert "cannot be shown" in text


def test_rows_that_became_no_sample_are_listed_with_their_reasons(world):
    assert "2 rows became no sample" in get(world.server, "/")[2].decode()
    body = get(world.server, "/failed")[2].decode()
    found = harmless(body, scripts=1)
    assert (
        "http://gone.example/100.png" in found.addresses
        and "404 Not Found" in body
        and look_world.HOSTILE in "".join(found.words)
    )
    only = get(world.server, "/failed?reason=http_404")[2].decode()
    assert "web-00000100" in only and "web-00000101" not in only and 'class="facet on"' in only
    assert get(world.server, "/failed?host=%27%20OR%201=1")[2].decode().count("web-00000") == 0
    assert get(world.server, "/failed?colour=red")[0] == get(world.server, "/failed?page=0")[0] == 400


def test_cards_show_the_layers_that_are_asked_for(world):
    def first(path):
        body = get(world.server, path)[2].decode()
        return body[body.index("<article") : body.index("</article>")]

    everything, chosen = first("/?page=2&per=1"), first("/?page=2&per=1&show=fused&show=ppl")
    assert "alt text 1" in everything and "aspect 1.5" in everything
    assert (
        "a fused text 1" in chosen
        and "<b>11</b>" in chosen
        and "alt text 1" not in chosen
        and "aspect 1.5" not in chosen
    )
    assert get(world.server, "/?show=nothing")[0] == 400
    assert (
        'href="?show=fused&amp;show=ppl&amp;page=3&amp;per=1"'
        in get(world.server, "/?page=2&per=1&show=fused&show=ppl")[2].decode()
    )


def test_a_search_is_made_once_and_forgotten_in_time(world, monkeypatch):
    made: list[str] = []
    real = answers.search
    monkeypatch.setattr(
        answers, "search", lambda con, table, q, name: (made.append(q.text), real(con, table, q, name))[1]
    )
    gallery = world.server.gallery
    for path in (
        "/?q=text+11",
        "/?q=text+11&sort=ppl.ppl",
        "/sample?q=text+11&page=1&per=1",
        "/?q=text+11&in=fused.text",
    ):
        body = get(world.server, path)[2].decode()
        assert "web-00000011" in body and "web-00000010" not in body
    assert made == ["text 11", "text 11"]
    for i in range(12):
        assert get(world.server, f"/?q=forgotten{i}")[0] == 200
    tables = gallery._con.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name LIKE 'hits%'").fetchall()[0][0]
    assert tables == len(gallery._searches) == 8


def test_a_duplicate_stands_beside_the_sample_that_stays(tmp_path):
    manifest, ctx = look_world.small(tmp_path), look_world.context(tmp_path)
    keys = [row["key"] for row in table_rows(manifest, tmp_path)]
    rows = {key: {"key": key, "of": keys[17] if i == 4 else None, "distance": 3} for i, key in enumerate(keys)}
    manifest = look_world.seal_layer(
        ctx, manifest, "dedup", params={}, version=1, schema={"of": "str", "distance": "int"}, rows=rows
    )
    with serving(manifest, tmp_path) as server:
        body = get(server, "/sample?page=5&per=1")[2].decode()
        assert 'src="/image?n=17&amp;i=0"' in body and f"repeats {keys[17]}, which stays" in body
        assert "which stays" not in get(server, "/sample?page=6&per=1")[2].decode()


def table_rows(manifest, folder):
    with table.open_table(manifest, folder / "scratch").open() as con:
        return answers.rows_of(con, range(24))
