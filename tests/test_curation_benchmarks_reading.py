"""The benchmark parts of reading and decoding in small: their readers agree, and their gates close."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from curation_parts import decode, shards

from vlmflow.dataset.shard import ShardReader


def test_both_readers_give_the_same_samples_and_a_difference_ends_the_run(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setattr(shards, "PER_SHARD", 8)
    tars = shards.write(tmp_path, 20)
    assert [len(ShardReader(tar)) for tar in tars] == [8, 8, 4]
    shards._equal(tars, 20)
    keys = [key for key, members in shards._ours(tars) if list(members) == ["jpg", "txt", "json"]]
    assert sorted(keys) == [f"{n:09d}" for n in range(20)] != keys, "shuffled over all shards"
    with pytest.raises(SystemExit, match="readers differ: 20 and 20 of 21"):
        shards._equal(tars, 21)
    member = ShardReader(tars[1]).index["000000009"]["txt"]
    monkeypatch.setattr(ShardReader, "raw", lambda self, key: {"txt": self._bytes(*member)})
    with pytest.raises(SystemExit, match="readers differ"):
        shards._equal(tars, 20)


def test_a_picture_of_the_decoder_benchmark_is_a_jpeg_of_about_a_bit_a_pixel():
    data = decode.photo(640, 480, 1)
    assert Image.open(io.BytesIO(data)).size == (640, 480)
    assert 0.4 < 8 * len(data) / (640 * 480) < 4
    assert data == decode.photo(640, 480, 1) != decode.photo(640, 480, 2)
