"""Input tables of every kind: files and folders, images in cells, what is refused and how it is said."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_server import picture

from vlmflow import storage
from vlmflow.curation import table_records
from vlmflow.curation.cells import Cells
from vlmflow.curation.table import Columns, check_columns, columns_of, count_rows, localize, read_rows
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError, NotFound
from vlmflow.recipe.data import SourceSpec

ROWS = [{"url": f"http://h/{i}.png", "text": f"tëxt, {i}\nline"} for i in range(7)]


def rows_of(uri, scratch, columns=None, **span):
    columns = columns or Columns(text="text")
    return list(read_rows(localize(str(uri), scratch), columns, "data.web.sources.web", **span))


def parquet(path: Path, rows: list[dict], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def written(path: Path, kind: str) -> Path:
    import csv
    import io

    if kind == "parquet":
        return parquet(path, ROWS, row_group_size=2)
    out = io.StringIO()
    if kind.startswith(("csv", "tsv")):
        writer = csv.DictWriter(out, ["url", "text"], delimiter="," if kind.startswith("csv") else "\t")
        writer.writeheader()
        writer.writerows(ROWS)
        text = out.getvalue()
    else:
        text = (
            json.dumps(ROWS) if kind.startswith("json") and "l" not in kind[4:5] else "\n".join(map(json.dumps, ROWS))
        )
    data = text.encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


KINDS = ["parquet", "csv", "tsv", "jsonl", "ndjson", "json", "csv.gz", "tsv.gz", "jsonl.gz", "json.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows_and_any_span_of_them(tmp_path, kind):
    path = written(tmp_path / f"t.{kind}", kind)
    found = rows_of(path.as_uri(), tmp_path)
    assert [(r.index, r.urls, r.text) for r in found] == [(i, (r["url"],), r["text"]) for i, r in enumerate(ROWS)]
    assert count_rows(localize(str(path), tmp_path)) == 7
    for start, stop in ((0, 3), (3, 5), (1, 2), (4, 99), (7, 9), (2, None), (3, 3)):
        assert rows_of(path, tmp_path, start=start, stop=stop) == found[start:stop]


def test_a_folder_of_parquet_files_is_one_table_in_the_order_of_names(tmp_path):
    names = [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    for name, at in zip(reversed(names), (4, 2, 0), strict=True):
        parquet(tmp_path / "data" / name, ROWS[at : at + 2], row_group_size=1)
    (tmp_path / "data" / ".train-00009-of-00003.parquet.tmp").write_text("half")
    (tmp_path / "data" / "_SUCCESS").write_text("")
    (tmp_path / "data" / "README.md").write_text("words")
    table = localize(f"file://{tmp_path}/data/", tmp_path)
    assert table.found == f"file://{tmp_path}/data/ (3 Parquet files, {names[0]} to {names[2]})"
    found = rows_of(f"{tmp_path}/data/", tmp_path)
    assert [(r.index, r.text) for r in found] == [(i, ROWS[i]["text"]) for i in range(6)]
    assert rows_of(f"{tmp_path}/data/", tmp_path, start=1, stop=5) == found[1:5]
    assert count_rows(table) == 6


def test_splits_are_not_mixed_and_missing_files_are_named(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        parquet(tmp_path / "data" / f"{name}.parquet", ROWS[:1])
    with pytest.raises(DataError, match=r"splits test \(1 files\), train \(1 files\).*test-\*\.parquet"):
        localize(f"{tmp_path}/data/", tmp_path)
    assert len(rows_of(f"{tmp_path}/data/train-*.parquet", tmp_path)) == 1
    with pytest.raises(DataError, match=r"none right in it matches.*there are some in data: name that folder"):
        localize(f"{tmp_path}/", tmp_path)
    parquet(tmp_path / "more" / "train-00002-of-00004.parquet", ROWS[:1])
    with pytest.raises(DataError, match=r"split 'train' has 1 of 4 files; the first that is missing is number 00000"):
        localize(f"{tmp_path}/more/", tmp_path)
    parquet(tmp_path / "other" / "a.parquet", ROWS[:1])
    parquet(tmp_path / "other" / "b.parquet", [{"link": "x"}])
    with pytest.raises(DataError, match=r"b\.parquet has columns \['link'\]"):
        rows_of(f"{tmp_path}/other/", tmp_path)


def test_parquet_in_a_store_is_read_by_ranges_and_never_copied(tmp_path, monkeypatch):
    for number in range(2):
        parquet(tmp_path / f"p-{number}.parquet", ROWS, row_group_size=2)
    objects = {f"s3://b/t/p-{n}.parquet": (tmp_path / f"p-{n}.parquet").read_bytes() for n in range(2)}

    class Store:
        read_of: list[tuple[str, int, int]] = []  # noqa: RUF012

        def size(self, uri):
            if uri not in objects:
                raise NotFound(uri)
            return len(objects[uri])

        def read(self, uri, offset, length):
            self.read_of.append((uri, offset, length))
            return objects[uri][offset:][:length]

        def list(self, uri):
            return [storage.ObjectInfo(name, len(data)) for name, data in objects.items()]

    monkeypatch.setattr("vlmflow.storage_s3.s3_store", Store)
    assert [r.text for r in rows_of("s3://b/t/", tmp_path / "scratch")] == [r["text"] for r in ROWS * 2]
    assert [r.text for r in rows_of("s3://b/t/p-1.parquet", tmp_path / "scratch", start=3, stop=4)] == [ROWS[3]["text"]]
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(NotFound):
        localize("s3://b/t/nope.parquet", tmp_path)


def test_a_json_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(table_records, "_BLOCK", 16)
    path = tmp_path / "t.json"
    path.write_text(" [ " + " ,\n".join(json.dumps(r) for r in ROWS) + " ]\n")
    assert [r.text for r in rows_of(path, tmp_path)] == [r["text"] for r in ROWS]
    for text, message in (
        ('{"url": 1}', "does not hold a JSON list"),
        ('[{"url": "a"}, 5 ]', "record 2 is a JSON int; objects are needed"),
        ('[{"url": "a"}, {"url": ', "record 2: not JSON"),
        ('[{"url": "a"}', "record 1: not JSON .it ends inside the list"),
        ('[{"url": "a"}, nope]', "record 2: not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            rows_of(path, tmp_path, Columns())


def test_images_in_cells_come_as_hashes_and_their_bytes_wait_on_disk(tmp_path):
    a, b = picture(1), picture(2)
    rows = [
        {"image": {"bytes": a, "path": "x/a.png"}, "text": "one", "n": 1, "thumb": b"big"},
        {"image": {"bytes": b, "path": None}, "text": "two", "n": 2, "thumb": b"big"},
        {"image": None, "text": "three", "n": 3, "thumb": None},
        {"image": {"bytes": None, "path": "lost.png"}, "text": "four", "n": 4, "thumb": None},
    ]
    columns = columns_of(SourceSpec(table="t.parquet", image_column="image"))
    table = localize(str(parquet(tmp_path / "t.parquet", rows)), tmp_path)
    cells = Cells(tmp_path / "cells", 10**6)
    found = list(read_rows(table, columns, "f", cells=cells))
    assert [r.urls for r in found] == [(f"cell:{sha256_bytes(a)}",), (f"cell:{sha256_bytes(b)}",), (), ()]
    assert [r.names for r in found] == [("x/a.png",), (None,), (), ()]
    assert [r.extra for r in found] == [{"n": n} for n in (1, 2, 3, 4)]
    assert [r.problem and r.problem[0] for r in found] == [None, None, None, "bad_image"]
    assert "image_root" in found[3].problem[1]
    assert [c.read() for r in found for c in r.cells] == [a, b]
    assert [r.fingerprint for r in read_rows(table, columns, "f")] == [r.fingerprint for r in found]

    async def ask(url):
        async def use(body):
            return body.read()

        return await cells.get(url, use)

    assert asyncio.run(ask(found[0].urls[0])).used == a
    small = Cells(tmp_path / "cells", 10)
    kept = small.add(a)
    cells = small
    assert asyncio.run(ask(kept.url)).reason == "too_large"
    del found, kept
    assert not list((tmp_path / "cells").iterdir())


def test_lists_of_images_with_chats_as_hugging_face_writes_them(tmp_path):
    images = [{"bytes": picture(i), "path": None} for i in range(2)]
    parts = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    rows = [
        {
            "images": images,
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "text", "text": "Both."}]},
            ],
            "texts": [
                {"user": "Which?", "assistant": "Both.", "source": "s"},
                {"user": "Sure?", "assistant": "Yes.", "source": "s"},
            ],
        }
    ]
    uri = parquet(tmp_path / "t.parquet", rows)
    for column, marked in (("messages", "<image>\n<image>\nWhich?"), ("texts", "<image>\n<image>\nWhich?")):
        columns = columns_of(SourceSpec(table="t", image_column="images", conversations_column=column))
        (row,) = rows_of(uri, tmp_path, columns)
        assert row.problem is None and len(row.urls) == 2
        assert row.conversations[:2] == [{"from": "human", "value": marked}, {"from": "gpt", "value": "Both."}]
    assert len(row.conversations) == 4


def test_missing_columns_are_named_with_those_that_there_are(tmp_path):
    path = parquet(tmp_path / "t.parquet", [{"link": "x", "alt": "y"}])
    with pytest.raises(DataError, match=r"no column 'url'; it has \['link', 'alt'\]. Set data.s.url_column"):
        check_columns(localize(str(path), tmp_path), Columns(), "data.s")
    with pytest.raises(DataError, match=r"no column 'picture'.*image_column"):
        check_columns(localize(str(path), tmp_path), Columns(url=None, image="picture"), "data.s")


def test_damaged_parquet_says_where(tmp_path):
    path = parquet(
        tmp_path / "t.parquet", [{"url": f"u{i}", "text": "x" * 50 + str(i)} for i in range(5000)], row_group_size=1000
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged near row"):
        rows_of(path, tmp_path)
    path.write_bytes(data[:500])
    with pytest.raises(DataError, match="is not Parquet"):
        rows_of(path, tmp_path)


def test_text_that_utf8_cannot_hold_is_mended_and_nesting_is_bounded(tmp_path):
    path = tmp_path / "t.jsonl"
    turns = [{"from": "human", "value": "a \ud800"}, {"from": "gpt", "value": "b"}]
    row = {"url": "http://h/1", "text": "x\udfff", "k\ud800": "\ud83d", "chat": turns}
    path.write_text(json.dumps(row) + "\n")
    columns = Columns(text="text", conversations="chat")
    (found,) = rows_of(path, tmp_path, columns)
    assert (found.text, found.extra, found.conversations[0]["value"]) == ("x?", {"k?": "?"}, "a ?")
    assert found.fingerprint
    path.write_text('{"url": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match=r"line 1: not JSON"):
        rows_of(path, tmp_path, Columns())
    path.write_text(json.dumps({"url": "u", "chat": "[" * 100_000}))
    (found,) = rows_of(path, tmp_path, Columns(conversations="chat"))
    assert found.problem[0] == "bad_conversations"
