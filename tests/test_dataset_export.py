"""Exports are read by the real webdataset and datasets libraries, go on where they stopped, and overwrite nothing."""

from __future__ import annotations

import io
import json

import pytest
from curation_world import png
from PIL import Image

from vlmflow import storage
from vlmflow.dataset import export_files
from vlmflow.dataset.export import export
from vlmflow.dataset.layer import add_layer
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import describe_shard, write_shard
from vlmflow.errors import DataError
from vlmflow.step import Context

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A sqüare."}]


def sample(number: int, images: int) -> Sample:
    about = [{"sha256": "", "width": 8, "height": 6, "format": "png"}] * images
    meta = {"id": f"i{number}", "url": None, "source": "web", "images": about, "extra": {"n": number}}
    meta |= {"conversations": TURNS} if number % 2 else {"text": f"text {number}"}
    return Sample(f"s{number:04d}", meta, tuple(png(number * 10 + i) for i in range(images)))


def world(tmp_path, images=lambda number: 1) -> Manifest:
    shards = []
    for number in range(3):
        path = tmp_path / f"shard-{number}.tar"
        count = write_shard(path, [sample(number * 4 + i, images(number * 4 + i)) for i in range(4)])
        shards.append(describe_shard(path, str(path), count, "web"))
    ctx = Context(None, str(tmp_path / "root"), tmp_path / "scratch")
    manifest = Manifest(name="web", shards=shards)

    def fused(reader, upstream):
        return [{"key": k, "text": f"fused {k}", "lines": [{"box": [1, 2]}], "tags": ["a", "b"]} for k in reader.keys()]

    def keep(reader, upstream):
        return [{"key": k, "keep": int(k[1:]) % 3 != 0, "reason": "third"} for k in reader.keys()]

    schema = {"text": "str", "lines": "json", "tags": "list<str>"}
    manifest = add_layer(ctx, manifest, "fused", params={}, version=1, schema=schema, compute=fused)
    return add_layer(
        ctx, manifest, "keep", params={}, version=1, schema={"keep": "bool", "reason": "str"}, compute=keep
    )


KEPT = [f"s{i:04d}" for i in range(12) if i % 3]


def test_webdataset_reads_images_merged_layers_and_captions(tmp_path):
    wds = pytest.importorskip("webdataset")
    done = []
    made = export(
        world(tmp_path), str(tmp_path / "out"), layers=["fused"], kept_only=True, caption="fused", samples_per_file=3,
        scratch=tmp_path / "scratch", advance=done.append,
    )  # fmt: skip
    assert (made.samples, made.dropped, made.found, done) == (8, 4, 0, [3, 3, 2])
    assert [f["file"] for f in made.files] == ["web-00000.tar", "web-00001.tar", "web-00002.tar"]
    read = list(wds.WebDataset(str(tmp_path / "out" / "web-{00000..00002}.tar"), shardshuffle=False).decode("pil"))
    assert [r["__key__"] for r in read] == KEPT
    for row in read:
        number = int(row["__key__"][1:])
        assert row["png"].getpixel((0, 0)) == (number * 10 % 256, 0, 0)
        assert row["txt"] == f"fused {row['__key__']}"
        assert row["json"]["fused"] == {
            "text": row["txt"],
            "lines": [{"box": [1, 2]}],
            "tags": ["a", "b"],
            "error": None,
        }
        assert row["json"]["extra"] == {"n": number} and row["json"]["key"] == row["__key__"]


def test_hugging_face_datasets_shows_image_columns(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = export(world(tmp_path), str(tmp_path / "out"), "parquet", layers=["fused", "keep"], samples_per_file=5)
    names = [f"data/train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert [f["file"] for f in made.files] == names
    files = [str(tmp_path / "out" / name) for name in names]
    read = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(read.features["image"], datasets.Image) and len(read) == 12
    row = read[7]
    assert row["image"].size == (8, 6) and row["image"].getpixel((0, 0)) == (70, 0, 0)
    assert row["conversations"] == TURNS and row["text"] is None and read[6]["text"] == "text 6"
    assert row["fused_text"] == "fused s0007" and json.loads(row["fused_lines"]) == [{"box": [1, 2]}]
    assert row["fused_tags"] == ["a", "b"] and row["keep_keep"] is True and json.loads(row["extra"]) == {"n": 7}


def test_several_images_and_none_make_a_list_column(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(export_files, "ROWS", 2)
    export(world(tmp_path, images=lambda number: number % 3), str(tmp_path / "out"), "parquet")
    found = str(tmp_path / "out" / "data" / "*.parquet")
    read = datasets.load_dataset("parquet", data_files=found, split="train", cache_dir=str(tmp_path / "cache"))
    assert [len(images) for images in read["images"]] == [number % 3 for number in range(12)]
    assert [image.getpixel((0, 0))[0] for image in read[5]["images"]] == [50, 51]
    assert isinstance(read[5]["images"][0], Image.Image)


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_stopped_exports_go_on_and_end_in_the_same_bytes(tmp_path, monkeypatch, form):
    manifest = world(tmp_path)

    def bytes_of(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    export(manifest, f"file://{tmp_path}/whole", form, samples_per_file=5)
    write, calls = export_files.FORMATS[form].write, []

    def dies(file, items, columns, several):
        calls.append(1)
        write(file, items, columns, several)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setitem(export_files.FORMATS, form, export_files.Format(export_files.FORMATS[form].name, dies))
    with pytest.raises(KeyboardInterrupt):
        export(manifest, str(tmp_path / "part"), form, samples_per_file=5)
    assert len([p for p in bytes_of(tmp_path / "part") if p.suffix != ".json"]) == 1
    made = export(manifest, str(tmp_path / "part"), form, samples_per_file=5)
    assert (made.found, len(calls)) == (1, 4)
    assert bytes_of(tmp_path / "part") == bytes_of(tmp_path / "whole")
    assert export(manifest, str(tmp_path / "part"), form, samples_per_file=5).found == 3


def test_nothing_is_overwritten_and_nothing_unknown_is_begun(tmp_path):
    manifest = world(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(DataError, match=r"1 files that no export wrote, e\.g\. .*mine\.txt; nothing is overwritten"):
        export(manifest, str(out))
    export(manifest, str(tmp_path / "a"))
    with pytest.raises(DataError, match=r"another export: layers \[\] instead of \['fused'\]"):
        export(manifest, str(tmp_path / "a"), layers=["fused"])
    for wrong, message in (
        ({"form": "tfrecord"}, r"'tfrecord' is not known; use one of \['parquet', 'webdataset'\]"),
        ({"layers": ["ocr"]}, r"no layer 'ocr'; it has \['fused', 'keep'\]"),
        ({"caption": "synthetic"}, "no layer 'synthetic'"),
        ({"samples_per_file": 0}, "at least 1"),
    ):
        with pytest.raises(DataError, match=message):
            export(manifest, str(tmp_path / "b"), **wrong)
    assert not (tmp_path / "b").exists()


def test_an_export_to_a_store_holds_one_file_at_a_time(tmp_path, monkeypatch):
    objects: dict[str, bytes] = {}

    class Store:
        def size(self, uri):
            return len(objects[uri])

        def list(self, uri):
            return [storage.ObjectInfo(name, len(data)) for name, data in objects.items() if name.startswith(uri + "/")]

        def write(self, uri, data):
            objects[uri] = data

        def read(self, uri, offset, length):
            return objects[uri][offset:][:length]

        def put(self, path, uri):
            assert len(list((tmp_path / "scratch").glob("export-*"))) == 1
            objects[uri] = path.read_bytes()

    monkeypatch.setattr("vlmflow.storage_s3.s3_store", Store)
    manifest = world(tmp_path)
    made = export(manifest, "s3://b/out/", caption="alt", samples_per_file=5, scratch=tmp_path / "scratch")
    assert sorted(objects) == ["s3://b/out/export.json", *(f"s3://b/out/web-0000{i}.tar" for i in range(3))]
    assert json.loads(objects["s3://b/out/export.json"])["files"] == made.files
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(objects["s3://b/out/web-00000.tar"])) as tar:
        names = tar.getnames()
    assert names[:5] == ["s0000.png", "s0000.json", "s0000.txt", "s0001.png", "s0001.json"]
