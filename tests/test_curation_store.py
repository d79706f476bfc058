"""Tables, pictures, tars and exports in a real S3 server: nothing but objects, and the client that a user has."""

from __future__ import annotations

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_server import picture
from test_curation_adopt import good, tar
from test_curation_pull import context

from vlmflow import storage
from vlmflow.curation import pull
from vlmflow.dataset.export import export
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import NotFound
from vlmflow.storage_s3 import s3_store


@pytest.fixture
def bucket(moto, monkeypatch, tmp_path, request):
    for name, value in moto.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLMFLOW_SCRATCH", str(tmp_path / "scratch"))
    name = "b" + "".join(c for c in request.node.name if c.isalnum())[:40].lower()
    s3_store().make_bucket(name)
    return f"s3://{name}"


def at(bucket, tmp_path, sources, **settings):
    ctx = context(tmp_path, sources, **settings)
    ctx.root = f"{bucket}/root"
    return ctx


def put_parquet(uri: str, rows: list[dict]) -> None:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=3)
    storage.write_bytes(uri, out.getvalue())


def test_stamps_change_with_objects_and_only_then(bucket):
    uri = f"{bucket}/a"
    storage.write_bytes(uri, b"12345")
    first = storage.stamp(uri)
    assert storage.stamp(uri) == first
    storage.write_bytes(uri, b"54321")
    assert storage.stamp(uri) != first
    with pytest.raises(NotFound):
        storage.stamp(f"{bucket}/nope")


def test_every_kind_of_source_in_one_dataset_and_out_again(bucket, tmp_path):
    for number in range(2):
        rows = [
            {"image": {"bytes": picture(n), "path": None}, "text": f"cell {n}"}
            for n in range(number * 5, number * 5 + 5)
        ]
        put_parquet(f"{bucket}/hub/data/train-{number:05d}-of-00002.parquet", rows)
    for number in range(4):
        storage.write_bytes(f"{bucket}/pictures/é {number}.png", picture(50 + number))
    put_parquet(f"{bucket}/list.parquet", [{"file_name": f"é {n}.png", "text": f"file {n}"} for n in range(5)])
    for number in range(2):
        path = tar(tmp_path / f"{number}.tar", good(number * 3, 3))
        storage.put_file(path, f"{bucket}/old/{number:03d}.tar")
    sources = {
        "cells": {"table": f"{bucket}/hub/data/", "image_column": "image"},
        "files": {"table": f"{bucket}/list.parquet", "image_root": f"{bucket}/pictures", "url_column": "file_name"},
        "tars": {"shards": [f"{bucket}/old/{{000..001}}.tar"]},
    }
    ctx = at(bucket, tmp_path, sources, samples_per_shard=4)
    manifest = pull.run(ctx, "web")
    assert [(s.source, s.samples) for s in manifest.shards] == [
        ("cells", 4), ("cells", 4), ("cells", 2), ("files", 4), ("tars", 3), ("tars", 3),
    ]  # fmt: skip
    assert manifest.lineage[0].summary["failed_by_reason"] == {"not_found": 1}
    found = [sample for ref in manifest.shards for sample in ShardReader(ref)]
    assert found[9].images == (picture(9),) and found[13].images == (picture(53),)
    assert found[-1].images == (picture(5, "JPEG"),) and found[-1].meta["text"] == "text 5"
    assert pull.run(ctx, "web") == manifest

    made = export(manifest, f"{bucket}/out", caption="alt", samples_per_file=7)
    assert [f["samples"] for f in made.files] == [7, 7, 6]
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(f"{bucket}/out/web-00002.tar"))) as opened:
        names = opened.getnames()
    assert names[-3:] == ["tars-00001-000002.jpg", "tars-00001-000002.json", "tars-00001-000002.txt"]
    assert export(manifest, f"{bucket}/out", caption="alt", samples_per_file=7).found == 3


def test_our_exports_can_be_adopted(bucket, tmp_path):
    put_parquet(f"{bucket}/t.parquet", [{"image": picture(n), "text": f"cell {n}"} for n in range(5)])
    ctx = at(bucket, tmp_path, {"one": {"table": f"{bucket}/t.parquet", "image_column": "image"}})
    first = pull.run(ctx, "web")
    export(first, f"{bucket}/out", samples_per_file=3)
    second = pull.run(at(bucket, tmp_path, {"two": {"shards": [f"{bucket}/out/web-{{00000..00001}}.tar"]}}), "web")
    ours, theirs = ([s for ref in m.shards for s in ShardReader(ref)] for m in (first, second))
    assert [s.images for s in ours] == [s.images for s in theirs]
    assert [s.meta["text"] for s in ours] == [s.meta["text"] for s in theirs]
    assert [s.meta["id"] for s in theirs] == [s.key for s in ours]
