"""Reading one shard: stored bytes as they are, one descriptor, any number of threads."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from curation_world import png, sample

from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader, write_shard
from vlmflow.errors import DataError

ABOUT = {"sha256": "", "width": 8, "height": 6, "format": "png"}


@pytest.fixture
def shard(tmp_path):
    two = Sample("pair", {"text": "two", "images": [ABOUT, ABOUT]}, (png(1), png(2)))
    write_shard(tmp_path / "a.tar", [*(sample(f"s{i:03d}", f"text {i}", png(i)) for i in range(64)), two])
    return tmp_path / "a.tar"


def descriptors(path):
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return found.count(str(path))


def test_raw_gives_the_stored_bytes_in_their_order(shard):
    reader = ShardReader(shard)
    raw = reader.raw("pair")
    assert list(raw) == ["0.png", "1.png", "json"] and (raw["0.png"], raw["1.png"]) == (png(1), png(2))
    assert json.loads(raw["json"]) == reader.meta("pair")
    assert reader.raw("s007")["png"] == reader.read("s007").images[0] == png(7)


def test_one_descriptor_serves_all_threads_and_goes_with_the_reader(shard):
    reader = ShardReader(shard)
    assert descriptors(shard) == 0, "keys need the index alone"
    order = [f"s{i % 64:03d}" for i in range(2000)]
    random.Random(3).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.raw, order))
    assert all(raw["png"] == png(int(key[1:])) for key, raw in zip(order, found, strict=True))
    assert descriptors(shard) == 1
    del reader, found
    assert descriptors(shard) == 0


def test_a_tar_that_is_cut_below_its_index_is_named(shard):
    reader = ShardReader(shard)
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(DataError, match=r"sample pair, member 0\.png: 0 bytes read, .* indexed; the shard is cut"):
        reader.raw("pair")
