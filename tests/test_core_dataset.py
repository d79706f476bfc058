"""Shards, layers and manifests: byte-equal, resumable, nothing lost."""

import io
import tarfile

import pytest
from PIL import Image

from vlmflow import storage
from vlmflow.dataset import layer as layers
from vlmflow.dataset.manifest import Manifest, load, save
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader, describe_shard, write_shard
from vlmflow.errors import DataError, StepFailed
from vlmflow.step import Context


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int, images: int = 1) -> Sample:
    about = [{"sha256": "", "width": 8, "height": 6, "format": "png"}] * images
    return Sample(
        f"s{number:04d}", {"text": f"text {number}", "images": about}, tuple(png(number) for _ in range(images))
    )


@pytest.fixture
def dataset(tmp_path):
    shards = []
    for number in range(3):
        path = tmp_path / f"shard-{number}.tar"
        count = write_shard(path, [sample(number * 10 + i, images=i % 3) for i in range(4)])
        shards.append(describe_shard(path, str(path), count, "web"))
    return Manifest(name="web", shards=shards)


@pytest.fixture
def ctx(tmp_path):
    return Context(None, str(tmp_path / "root"), tmp_path / "scratch")


def test_shard_bytes_depend_on_samples_alone_and_tar_tools_read_them(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(1), sample(2, images=2)])
    write_shard(tmp_path / "b.tar", [sample(1), sample(2, images=2)])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = tar.getnames()
    assert names == ["s0001.png", "s0001.json", "s0002.0.png", "s0002.1.png", "s0002.json"]
    assert list(ShardReader(tmp_path / "a.tar")) == [sample(1), sample(2, images=2)]


def test_webdataset_reads_our_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    write_shard(tmp_path / "a.tar", [sample(1), sample(2)])
    read = list(wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [r["__key__"] for r in read] == ["s0001", "s0002"]
    assert read[0]["png"] == png(1)


@pytest.mark.parametrize("key", ["a.b", "a/b", ""])
def test_bad_keys_are_refused_and_leave_no_file(tmp_path, key):
    with pytest.raises(DataError, match="unique plain key"):
        write_shard(tmp_path / "a.tar", [Sample(key, {"images": []})])
    assert list(tmp_path.iterdir()) == []


def test_cut_shard_is_named(tmp_path, dataset):
    shard = dataset.shards[0]
    path = tmp_path / "shard-0.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="changed or cut"):
        ShardReader(shard).read("s0000")


def test_manifest_round_trip_and_digest(ctx, dataset):
    uri = save(dataset, ctx.root)
    assert load(uri) == dataset
    assert dataset.digest in uri
    assert dataset.select(["web"]) == dataset
    with pytest.raises(DataError, match="it has \\['web'\\]"):
        dataset.select(["other"])


def run(ctx, dataset, calls, fail=(), limit=0.0, **params):
    def compute(reader, upstream):
        calls.append(reader.uri)
        for s in reader:
            yield {
                "key": s.key,
                "n": len(s.images),
                "about": {"b": 1, "a": [s.key]},
                "error": "bad" if s.key in fail else None,
            }

    return layers.add_layer(
        ctx,
        dataset,
        "count",
        params=params,
        version=1,
        schema={"n": "int", "about": "json"},
        compute=compute,
        failure_limit=limit,
    )


def test_layer_is_found_again_and_a_changed_parameter_makes_a_new_one(ctx, dataset):
    calls = []
    first = run(ctx, dataset, calls, p=1)
    assert len(calls) == 3
    assert run(ctx, dataset, calls, p=1) == first
    assert len(calls) == 3
    assert run(ctx, dataset, calls, p=2).layers["count"].digest != first.layers["count"].digest
    assert len(calls) == 6
    rows = layers.read_layer(first, "count")
    assert rows["s0012"] == {"key": "s0012", "n": 2, "about": {"a": ["s0012"], "b": 1}, "error": None}


def test_damaged_part_is_computed_again_with_equal_bytes(ctx, dataset):
    calls = []
    first = run(ctx, dataset, calls)
    uri = first.layers["count"].parts[1].uri
    storage.write_bytes(uri, storage.read_bytes(uri)[:50])
    assert run(ctx, dataset, calls) == first
    assert len(calls) == 4


def test_failures_are_counted_and_stop_the_step_above_the_limit(ctx, dataset):
    assert sum(p.failed for p in run(ctx, dataset, [], fail={"s0001"}, limit=0.1).layers["count"].parts) == 1
    with pytest.raises(StepFailed, match=r"1 of 12 samples failed \(8.3%\).*First: sample s0001"):
        run(ctx, dataset, [], fail={"s0001"}, limit=0.01, other=1)


def test_a_skipped_sample_is_an_error(ctx, dataset):
    with pytest.raises(DataError, match="3 of 4 samples have no row"):
        layers.add_layer(
            ctx, dataset, "x", params={}, version=1, schema={}, compute=lambda r, u: [{"key": r.keys()[0]}]
        )


@pytest.mark.parametrize(
    "name", ["a.json", "web-00000012.0.jpg", "x" * 99, "x" * 100, "y" * 120 + "/" + "x" * 50, "ä.json"]
)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1])
def test_tar_headers_are_those_of_the_standard_library(name, size):
    import tarfile

    from vlmflow.dataset.shard import _header

    entry = tarfile.TarInfo(name)
    entry.size = size
    assert _header(name, size) == entry.tobuf(tarfile.USTAR_FORMAT)
