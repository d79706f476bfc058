"""Data as other tools write it: Hugging Face datasets and webdataset, by those libraries themselves."""

from __future__ import annotations

import io
import json

import pytest
from curation_server import picture
from PIL import Image
from test_curation_pull import context

from vlmflow.curation import pull
from vlmflow.dataset.export import export
from vlmflow.dataset.shard import ShardReader


def samples(manifest):
    return [sample for ref in manifest.shards for sample in ShardReader(ref)]


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


def test_parquet_that_datasets_wrote(datasets, tmp_path):
    chat = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A square."}]}]  # fmt: skip
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
                }
            ),
            "source": datasets.Value("string"),
        }
    )
    rows = {
        "images": [[Image.open(io.BytesIO(picture(n)))] for n in range(6)],
        "messages": [chat] * 6,
        "source": ["s"] * 6,
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "data").mkdir()
    for number in range(2):
        made.shard(2, number).to_parquet(tmp_path / "data" / f"train-{number:05d}-of-00002.parquet")
    spec = {"table": f"{tmp_path}/data/", "image_column": "images", "conversations_column": "messages"}
    found = samples(pull.run(context(tmp_path, {"hub": spec}), "web"))
    assert [Image.open(io.BytesIO(s.images[0])).getpixel((0, 0))[0] for s in found] == list(range(6))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    assert all(s.meta["conversations"] == turns and s.meta["extra"] == {"source": "s"} for s in found)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_imagefolder_with_its_metadata(datasets, tmp_path, kind):
    root = tmp_path / "folder"
    root.mkdir()
    rows = [{"file_name": f"{n}.png", "text": f"bird {n}"} for n in range(4)]
    for number in range(4):
        (root / f"{number}.png").write_bytes(picture(number))
    text = "".join(json.dumps(r) + "\n" for r in rows) if kind == "jsonl" else "file_name,text\n" + "".join(
        f"{r['file_name']},{r['text']}\n" for r in rows
    )  # fmt: skip
    (root / f"metadata.{kind}").write_text(text)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache"))
    spec = {"table": str(root / f"metadata.{kind}"), "image_root": str(root), "url_column": "file_name"}
    ours = samples(pull.run(context(tmp_path, {"birds": spec}), "web"))
    assert [s.meta["text"] for s in ours] == theirs["text"] == [r["text"] for r in rows]
    assert [s.images[0] for s in ours] == [picture(n) for n in range(4)]


def test_an_exported_folder_is_a_dataset_and_a_table_again(datasets, tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(5):
        (root / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "t.csv").write_text("url,text\n" + "".join(f"{n}.png,text {n}\n" for n in range(5)))
    spec = {"table": str(tmp_path / "t.csv"), "image_root": str(root)}
    first = pull.run(context(tmp_path, {"web": spec}), "web")
    export(first, str(tmp_path / "out"), "parquet", caption="alt", samples_per_file=2)
    read = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(read.features["image"], datasets.Image) and read["caption"] == [f"text {n}" for n in range(5)]
    spec = {"table": f"{tmp_path}/out/data/", "image_column": "image", "text_column": "caption"}
    again = samples(pull.run(context(tmp_path / "again", {"web": spec}), "web"))
    assert [(s.images, s.meta["text"]) for s in again] == [(s.images, s.meta["text"]) for s in samples(first)]


def test_tars_that_webdataset_wrote(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a-000000.tar")) as sink:
        for number in range(4):
            image = Image.open(io.BytesIO(picture(number)))
            sink.write(
                {"__key__": f"n{number:03d}", "png": image, "json": {"caption": f"text {number}"}, "cls": number}
            )
    spec = {"shards": [str(tmp_path / "a-{000000..000000}.tar")], "text_column": "caption"}
    found = samples(pull.run(context(tmp_path, {"old": spec}), "web"))
    assert [(s.meta["id"], s.meta["text"]) for s in found] == [(f"n{n:03d}", f"text {n}") for n in range(4)]
    assert [Image.open(io.BytesIO(s.images[0])).getpixel((0, 0))[0] for s in found] == list(range(4))
