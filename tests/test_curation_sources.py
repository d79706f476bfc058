"""Images that are there already: in the table's cells or under a root of the store; pulled, checked, resumed like URLs."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_server import picture
from test_curation_pull import context, failures, table

from vlmflow.curation import bucket, pull
from vlmflow.curation.accept import Rejected
from vlmflow.dataset import fetch
from vlmflow.dataset.shard import ShardReader
from vlmflow.digest import sha256_bytes
from vlmflow.errors import NotFound, Unreachable


def samples(manifest):
    return [sample for ref in manifest.shards for sample in ShardReader(ref)]


def parquet(path: Path, rows: list[dict], **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def test_a_hugging_face_image_table_becomes_shards(tmp_path):
    rows = [{"image": {"bytes": picture(i), "path": f"{i}.png"}, "text": f"t{i}", "label": i % 3} for i in range(25)]
    rows[3]["image"]["bytes"] = b"<html>no</html>"
    rows[4]["image"] = None
    rows[5]["image"]["bytes"] = b""
    for number in range(2):
        part = tmp_path / "data" / f"train-{number:05d}-of-00002.parquet"
        parquet(part, rows[number * 13 : number * 13 + 13], row_group_size=4)
    spec = {"table": f"{tmp_path}/data/", "image_column": "image"}
    manifest = pull.run(context(tmp_path, {"web": spec}), "web")
    found = samples(manifest)
    assert [s.key for s in found] == [f"web-{i:08d}" for i in range(25) if i not in (3, 5)]
    assert found[3].images == () and found[3].meta["text"] == "t4" and found[3].meta["url"] is None
    last = found[-1]
    assert last.images == (picture(24),) and last.meta["url"] == "24.png" and last.meta["extra"] == {"label": 0}
    assert last.meta["images"][0]["sha256"] == sha256_bytes(picture(24))
    assert manifest.lineage[0].summary["failed_by_reason"] == {"empty": 1, "not_an_image": 1}
    assert pull.run(context(tmp_path, {"web": spec}), "web") == manifest
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file() and p.stat().st_size]


def test_lists_of_images_in_cells_keep_their_order_and_share_their_bytes(tmp_path):
    rows = [
        {"images": [{"bytes": picture(i % 4), "path": None}, {"bytes": picture(9), "path": "n"}]} for i in range(12)
    ]
    spec = {"table": parquet(tmp_path / "t.parquet", rows), "image_column": "images", "text_column": None}
    manifest = pull.run(context(tmp_path, {"web": spec}), "web")
    for number, sample in enumerate(samples(manifest)):
        assert sample.images == (picture(number % 4), picture(9))
        assert [image["url"] for image in sample.meta["images"]] == [None, "n"]


def test_large_cells_do_not_pile_up_in_memory(tmp_path):
    """The rows of a shard are planned at once; their bytes wait on disk."""
    import subprocess
    import sys

    noise = os.urandom(400_000)
    rows = [{"image": picture(i) + b"\0" * 64 + noise + bytes([i])} for i in range(250)]
    parquet(tmp_path / "t.parquet", rows, row_group_size=250, compression="none")
    del rows
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_curation_pull import context
from vlmflow.curation import pull
import vlmflow.curation.accept, pyarrow.parquet, PIL.Image
spec = {{"table": {str(tmp_path / "t.parquet")!r}, "image_column": "image", "text_column": None}}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
manifest = pull.run(context(Path({str(tmp_path)!r}), {{"web": spec}}, samples_per_shard=250), "web")
assert manifest.samples == 250, manifest
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 90  # MiB; the table has 100


def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    for number in range(4):
        (root / "deep" / f"{number} #?%20.png").write_bytes(picture(number))
    (root / "empty.png").write_bytes(b"")
    (root / "big.png").write_bytes(picture(1) + b"\0" * 5000)
    (tmp_path / "secret.png").write_bytes(picture(7))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inner.png").symlink_to(root / "deep" / "0 #?%20.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_images_under_a_root_are_read_there_and_nothing_outside(tmp_path, scheme):
    root = folder(tmp_path)
    good = [f"deep/{i} #?%20.png" for i in range(3)] + ["./deep//3 #?%20.png", f"{scheme}{root}/inner.png", "inner.png"]
    if scheme == "":
        good[4] = "inner.png"
    bad = {
        "../secret.png": "outside_root",
        "deep/../../secret.png": "outside_root",
        f"{tmp_path}/secret.png": "outside_root",
        f"file://{tmp_path}/secret.png": "outside_root",
        f"file://{root}/../secret.png": "outside_root",
        f"{root}-other/a.png": "outside_root",
        "s3://other/a.png": "outside_root",
        "http://h/a.png": "outside_root",
        "link.png": "outside_root",
        "deep\\..\\..\\secret.png": "outside_root",
        "nope.png": "not_found",
        "deep": "not_found",
        "pipe.png": "not_found",
        "x" * 300: "not_found",
        "big.png": "too_large",
        "empty.png": "empty",
    }
    rows = [{"file_name": name, "text": f"text {n}"} for n, name in enumerate([*good, *bad])]
    spec = {"table": table(tmp_path / "metadata.csv", rows), "image_root": f"{scheme}{root}", "url_column": "file_name"}
    ctx = context(tmp_path, {"web": spec}, max_bytes=4096)
    manifest = pull.run(ctx, "web")
    assert [s.images for s in samples(manifest)] == [(picture(i),) for i in (0, 1, 2, 3, 0, 0)]
    assert samples(manifest)[0].meta["url"] == good[0]
    assert {url: reason for url, (reason, _) in failures(ctx).items()} == bad
    assert pull.run(ctx, "web") == manifest


def test_another_root_is_another_shard(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture(ord(name)))
    uri = table(tmp_path / "t.csv", [{"url": "1.png", "text": "x"}])
    made = [pull.run(context(tmp_path, {"web": {"table": uri, "image_root": str(tmp_path / n)}}), "web") for n in "ab"]
    assert [samples(m)[0].images for m in made] == [(picture(97),), (picture(98),)]


def test_keys_of_a_bucket_stay_below_their_prefix():
    root = "s3://b/data/"
    assert bucket.inside(root, "x/y.png") == bucket.inside(root, "s3://b/data/x/./y.png") == "s3://b/data/x/y.png"
    for cell in (
        "s3://b/database/x.png",
        "s3://c/data/x.png",
        "../x.png",
        "/x.png",
        "x/../../y",
        "s3://b/data/../x.png",
    ):
        with pytest.raises(Rejected) as refusal:
            bucket.inside(root, cell)
        assert refusal.value.reason == "outside_root"


def test_a_store_that_is_down_stops_the_step_and_a_missing_object_does_not(tmp_path, monkeypatch):
    objects = {f"s3://b/r/{i}.png": picture(i) for i in range(3)}
    down = [False]

    class Store:
        def size(self, uri):
            if down[0]:
                raise Unreachable(f"{uri}: no store answers")
            if uri not in objects:
                raise NotFound(uri)
            return len(objects[uri])

        def read(self, uri, offset, length):
            return objects[uri][offset:][:length]

    monkeypatch.setattr("vlmflow.storage_s3.s3_store", Store)
    monkeypatch.setattr(fetch, "BACK_OFF", 0.0)
    uri = table(tmp_path / "t.csv", [{"url": f"{i}.png", "text": "x"} for i in range(4)])
    ctx = context(tmp_path, {"web": {"table": uri, "image_root": "s3://b/r"}})
    down[0] = True
    with pytest.raises(Unreachable, match=r"no store answers \(tried 6 times"):
        pull.run(ctx, "web")
    down[0] = False
    manifest = pull.run(ctx, "web")
    assert manifest.samples == 3 and manifest.lineage[0].summary["failed_by_reason"] == {"not_found": 1}
