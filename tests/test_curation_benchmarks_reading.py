"""The benchmark parts of reading and decoding in small: their readers agree, and their gates close."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from curation_parts import decode, flips, shards

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


def test_flipped_bits_are_put_into_the_scans_and_all_are_seen_in_a_png(capsys):
    out = io.BytesIO()
    Image.effect_noise((64, 48), 60).save(out, "JPEG", progressive=True)
    data, places = out.getvalue(), set(flips._scans(out.getvalue()))
    scans = data.count(b"\xff\xda")
    assert scans > 1 and len(data) // 4 < len(places) < len(data) - 10 * scans
    assert not any(data[at] == 0xFF and data[at + 1] not in (0, *range(0xD0, 0xD8)) for at in places)
    rows = {row["encoding"]: row for row in flips.run(argparse.Namespace(quick=True))["rows"]}
    assert {row["flips"] for row in rows.values()} == {10} and capsys.readouterr().out.count("%") >= 14
    assert rows["PNG"]["structure"] == rows["PNG"]["decode"] == 1
    assert all(row["structure"] == row["decode"] for row in rows.values()), "neither accepts what the other refuses"
