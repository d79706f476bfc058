"""WebDataset tars that exist already: adopted where they lie, read like our own, refused where they are broken."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from curation_server import picture
from test_curation_pull import context

from vlmflow import storage
from vlmflow.curation import adopt, pull
from vlmflow.curation.pull_shard import read_failures
from vlmflow.curation.tar_stream import expand
from vlmflow.dataset.layer import add_layer
from vlmflow.dataset.shard import ShardReader
from vlmflow.dataset.window import LeasedShard, Window
from vlmflow.errors import DataError, NotFound


def tar(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]], kind: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as out:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                out.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def about(**fields) -> bytes:
    return json.dumps(fields).encode()


def good(first: int, count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for n in range(first, first + count)
        for member in (
            (f"{n:06d}.jpg", picture(n, "JPEG")),
            (f"{n:06d}.txt", f"text {n}".encode()),
            (f"{n:06d}.json", about(url=f"http://h/{n}", licence_of=n)),
        )
    ]


def source(tmp_path: Path, *uris: str, **spec) -> dict:
    return {"old": {"shards": [str(tmp_path / uri) for uri in uris], **spec}}


def samples(manifest):
    return [sample for ref in manifest.shards for sample in ShardReader(ref)]


def test_tars_become_shards_where_they_lie(tmp_path):
    paths = [tar(tmp_path / f"t-{n:05d}.tar", good(n * 5, 5)) for n in range(3)]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}
    ctx = context(tmp_path, source(tmp_path, "t-{00000..00002}.tar", licence="CC0"))
    manifest = pull.run(ctx, "web")
    assert [(s.uri, s.samples) for s in manifest.shards] == [(str(p), 5) for p in paths]
    assert [s.tar_sha256 for s in manifest.shards] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
    found = samples(manifest)
    assert [s.key for s in found] == [f"old-{n:05d}-{i:06d}" for n in range(3) for i in range(5)]
    sample = found[7]
    assert sample.images == (picture(7, "JPEG"),)
    assert {k: sample.meta[k] for k in ("id", "url", "text", "source", "licence", "extra")} == {
        "id": "000007",
        "url": "http://h/7",
        "text": "text 7",
        "source": "old",
        "licence": "CC0",
        "extra": {"licence_of": 7},
    }
    assert (sample.meta["images"][0]["width"], sample.meta["images"][0]["format"]) == (24, "jpg")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths} == before
    assert sorted(p.name for p in tmp_path.glob("t-*")) == [p.name for p in paths]
    assert manifest.lineage[0].summary["samples"] == manifest.lineage[0].summary["rows"] == 15


def test_a_second_run_reads_no_tar_and_a_changed_one_is_read_again(tmp_path, monkeypatch):
    for number in range(2):
        tar(tmp_path / f"t-{number}.tar", good(number * 3, 3))
    ctx = context(tmp_path, source(tmp_path, "t-{0..1}.tar"))
    manifest = pull.run(ctx, "web")
    read: list[str] = []
    whole = adopt.TarStream

    def counted(uri):
        read.append(Path(uri).name)
        return whole(uri)

    monkeypatch.setattr(adopt, "TarStream", counted)
    assert pull.run(ctx, "web") == manifest and read == []
    tar(tmp_path / "t-1.tar", good(90, 3))
    changed = pull.run(ctx, "web")
    assert read == ["t-1.tar"] and changed.shards[0] == manifest.shards[0]
    assert [s.meta["text"] for s in samples(changed)][3:] == ["text 90", "text 91", "text 92"]
    os.utime(tmp_path / "t-0.tar", ns=(1, 1))  # the same bytes under another stamp: the same shard
    assert pull.run(ctx, "web") == changed and read == ["t-1.tar", "t-0.tar"]
    for path in Path(ctx.root, "adopted").glob("*.meta.jsonl"):
        path.write_bytes(path.read_bytes()[:-9])  # what is damaged is made anew
    assert pull.run(ctx, "web") == changed


def test_the_same_tar_with_other_texts_is_another_shard_to_every_layer(tmp_path):
    tar(tmp_path / "t.tar", [("a.jpg", picture(1, "JPEG")), ("a.json", about(text="one", caption="two"))])
    made = [
        pull.run(context(tmp_path, source(tmp_path, "t.tar", text_column=column)), "web")
        for column in ("text", "caption")
    ]
    assert made[0].shards[0].tar_sha256 == made[1].shards[0].tar_sha256
    assert made[0].shards[0].sha256 != made[1].shards[0].sha256

    def compute(reader, upstream):
        return [{"key": key, "said": reader.meta(key)["text"]} for key in reader.keys()]

    ctx = context(tmp_path, source(tmp_path, "t.tar"))
    parts = [
        add_layer(ctx, m, "said", params={}, version=1, schema={"said": "str"}, compute=compute)
        .layers["said"]
        .parts[0]
        .uri
        for m in made
    ]
    assert parts[0] != parts[1]


def test_training_reads_adopted_shards_through_its_window(tmp_path):
    path = tar(tmp_path / "t.tar", good(0, 4))
    (ref,) = pull.run(context(tmp_path, source(tmp_path, "t.tar")), "web").shards
    window = Window(tmp_path / "window")
    lease = window.lease(ref)
    reader = LeasedShard(ref, lease, tmp_path / "scratch")
    assert [s.meta["text"] for s in reader] == [f"text {n}" for n in range(4)]
    assert [s.images[0] for s in reader] == [picture(n, "JPEG") for n in range(4)]
    lease.release()
    path.write_bytes(path.read_bytes()[:-512] + b"\1" * 512)
    with pytest.raises(DataError, match="was changed or cut after it was adopted"):
        ShardReader(ref).read(reader.keys()[0])
    Path(ref.meta).write_bytes(Path(ref.meta).read_bytes().replace(b"text 1", b"text 9"))
    with pytest.raises(DataError, match=r"meta\.jsonl.*not what was written"):
        ShardReader(ref).meta(reader.keys()[1])


def test_what_cannot_become_a_sample_has_its_reason(tmp_path):
    link, hard = tarfile.TarInfo("link.jpg"), tarfile.TarInfo("hard.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "ok.jpg"
    jpeg = picture(1, "JPEG")
    members = [
        ("ok.jpg", jpeg),
        ("ok.cls", b"3"),
        ("page.jpg", b"<!doctype html>"),
        ("cut.jpg", picture(2, "JPEG", (300, 200))[:900]),
        ("big.jpg", jpeg + b"\0" * 9000),
        ("gif.gif", picture(3, "GIF")),
        ("named.jpg", picture(3, "GIF")),
        ("link.jpg", link),
        ("hard.jpg", hard),
        ("../up.jpg", jpeg),
        ("/abs.jpg", jpeg),
        ("twice.jpg", jpeg),
        ("twice.jpg", jpeg),
        ("json.jpg", jpeg),
        ("json.json", b"{oops"),
        ("list.jpg", jpeg),
        ("list.json", b"[1]"),
        ("latin.jpg", jpeg),
        ("latin.txt", "é".encode("latin-1")),
        ("deep.jpg", jpeg),
        ("deep.json", b"[" * 200_000),
        ("none.cls", b"1"),
        ("._ok.jpg", b"apple"),
        ("marks.jpg", jpeg),
        ("marks.json", about(chat=[{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}])),
        ("fine.jpg", jpeg),
        ("fine.json", about(chat=[{"from": "human", "value": "<image>\ud800"}, {"from": "gpt", "value": "x"}])),
        ("ok.jpg", jpeg),
    ]
    tar(tmp_path / "t.tar", members)
    spec = source(tmp_path, "t.tar", conversations_column="chat")
    ctx = context(tmp_path, spec, max_bytes=8192)
    manifest = pull.run(ctx, "web")
    assert [s.meta["id"] for s in samples(manifest)] == ["ok", "fine", "ok"]
    assert samples(manifest)[1].meta["conversations"][0]["value"] == "<image>?"
    failed, counted = read_failures(manifest.shards[0])
    assert {f["url"]: f["reason"] for f in failed} == {
        "page": "not_an_image",
        "cut": "corrupt",
        "big": "too_large",
        "gif": "not_kept",
        "named": "not_kept",
        "link": "bad_member",
        "hard": "bad_member",
        "../up": "bad_member",
        "/abs": "bad_member",
        "twice": "duplicate_member",
        "json": "bad_json",
        "list": "bad_json",
        "latin": "bad_text",
        "deep": "bad_json",
        "none": "blank_row",
        "marks": "image_marks",
    }
    assert counted == {"rows": 19, "ignored": {"(hidden)": 1, "cls": 2, "gif": 1}, "repeated_keys": 1}
    assert manifest.lineage[0].summary["failed"] == 16


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_folders_and_several_images(tmp_path, kind):
    deep = "/".join(["földer" if kind != tarfile.USTAR_FORMAT else "folder"] * 14) + "/sample"
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    members = [
        ("folder", folder),
        (f"{deep}.10.png", picture(10)),
        (f"{deep}.2.png", picture(2)),
        (f"{deep}.json", about(text="two")),
        ("./b.img1.PNG", picture(3)),
        ("./b.mask.png", picture(4)),
        ("./b.caption", b"three"),
    ]
    tar(tmp_path / "t.tar", members, kind)
    two, three = samples(pull.run(context(tmp_path, source(tmp_path, "t.tar")), "web"))
    assert two.meta["id"] == deep and two.images == (picture(2), picture(10))
    assert three.meta["id"] == "b" and three.images == (picture(3),) and three.meta["text"] == "three"


def test_cut_damaged_and_foreign_files_are_errors_that_say_where(tmp_path):
    path = tar(tmp_path / "t.tar", good(0, 4))
    data = path.read_bytes()
    ctx = context(tmp_path, source(tmp_path, "t.tar"))
    with tarfile.open(path) as opened:
        third = opened.getmembers()[7]  # 000002.txt
    for bad, message in (
        (
            data[: third.offset_data + 3],
            r"ends at byte \d+, inside '000002.txt', which has 6 bytes .*The 2 samples before are whole",
        ),
        (data[: third.offset + 100], r"before its end mark .*The 2 samples before are whole"),
        (data[: third.offset], r"before its end mark"),
        (
            data[: third.offset] + b"garbage!" * 64 + data[third.offset + 512 :],
            r"is not the header of a member .*the 2 samples before",
        ),
        (data + data, r"more follows: tars that were put together with cat"),
        (b"", "before its end mark"),
        (b"\x1f\x8b" + data, "is compressed"),
        (b"<html>" * 200, "is not the header of a member"),
    ):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=message):
            pull.run(ctx, "web")
    assert not list(Path(ctx.root).rglob("*.idx.json"))
    path.unlink()
    with pytest.raises(NotFound):
        pull.run(ctx, "web")


def test_any_tar_is_read_to_its_end_or_refused(tmp_path):
    """Whatever one byte of a header becomes: as many samples as tarfile's names promise, or an error; never fewer in silence."""
    import random

    data = bytearray(tar(tmp_path / "o.tar", good(0, 4)).read_bytes())
    path, rng = tmp_path / "t.tar", random.Random(3)
    with tarfile.open(tmp_path / "o.tar") as opened:
        headers = [member.offset for member in opened.getmembers()]
    for number in range(60):
        bad = bytearray(data)
        bad[rng.choice(headers) + rng.randrange(345)] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        ctx = context(tmp_path / str(number), source(tmp_path, "t.tar"))
        try:
            summary = pull.run(ctx, "web").lineage[0].summary
        except DataError:
            continue
        assert summary["rows"] >= 4, number


def test_ranges_and_fields_are_checked_before_anything_is_read(tmp_path):
    tar(tmp_path / "t.tar", good(0, 2))
    assert expand(["s3://b/{00..02}/x-{8..9}.tar"], "f") == [
        f"s3://b/{n:02d}/x-{m}.tar" for n in range(3) for m in (8, 9)
    ]
    with pytest.raises(DataError, match=r"data\.web\.sources\.old\.shards: '\{5\.\.1\}'.* names no tars"):
        pull.run(context(tmp_path, source(tmp_path, "t-{5..1}.tar")), "web")
    with pytest.raises(DataError, match=r"names .*t\.tar twice"):
        pull.run(context(tmp_path, source(tmp_path, "t.tar", "t.tar")), "web")
    with pytest.raises(
        DataError,
        match=r"no sample has a JSON field 'alt'; there are \['licence_of', 'url'\].*text_column of source 'old'",
    ):
        spec = source(tmp_path, "t.tar", text_column="alt")
        tar(tmp_path / "t.tar", [m for m in good(0, 2) if not m[0].endswith("txt")])
        pull.run(context(tmp_path, spec), "web")


def test_groups_of_tars_give_the_same_manifest(tmp_path):
    for number in range(5):
        tar(tmp_path / f"t-{number}.tar", good(number * 2, 2))
    spec = source(tmp_path, "t-{0..4}.tar")
    whole = pull.run(context(tmp_path / "a", spec), "web")
    ctx = context(tmp_path / "b", spec)
    for group in pull.plan_groups(ctx, "web", 3):
        assert pull.run(ctx, "web", group).samples == 2 * group["shards"]
    grouped = pull.run(ctx, "web")
    assert [s.sha256 for s in grouped.shards] == [s.sha256 for s in whole.shards]
    assert grouped.lineage == whole.lineage


def test_a_tar_in_a_store_is_read_once_by_large_ranges(tmp_path, monkeypatch):
    objects = {"s3://b/t.tar": tar(tmp_path / "t.tar", good(0, 30)).read_bytes()}
    reads: list[tuple[int, int]] = []

    class Store:
        def size(self, uri):
            if uri not in objects:
                raise NotFound(uri)
            return len(objects[uri])

        def stamp(self, uri):
            return f"{self.size(uri)}-etag"

        def read(self, uri, offset, length):
            reads.append((offset, length))
            return objects[uri][offset:][:length]

        def get(self, uri, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(objects[uri])

    monkeypatch.setattr("vlmflow.storage_s3.s3_store", Store)
    monkeypatch.setattr("vlmflow.curation.tar_stream.PART", 10_000)
    manifest = pull.run(context(tmp_path, {"old": {"shards": ["s3://b/t.tar"]}}), "web")
    assert manifest.samples == 30
    assert [at for at, _ in reads] == list(range(0, len(objects["s3://b/t.tar"]), 10_000))
    reads.clear()
    assert pull.run(context(tmp_path, {"old": {"shards": ["s3://b/t.tar"]}}), "web") == manifest and not reads
    monkeypatch.setenv("VLMFLOW_SCRATCH", str(tmp_path / "cache"))
    assert samples(manifest)[29].images == (picture(29, "JPEG"),)
    assert storage.exists(manifest.shards[0].index)


def test_preflight_names_a_missing_tar(tmp_path):
    from vlmflow import preflight

    tar(tmp_path / "t-0.tar", good(0, 1))
    preflight._tars([str(tmp_path / "t-{0..0}.tar")], "data.web.sources.old.shards")
    with pytest.raises(DataError, match=r"data\.web\.sources\.old\.shards: there is no tar at .*t-1\.tar"):
        preflight._tars([str(tmp_path / "t-{0..1}.tar")], "data.web.sources.old.shards")


@pytest.mark.parametrize("write", range(5))
def test_killed_between_any_two_writes_and_started_again(tmp_path, monkeypatch, write):
    """Index, metas, failures, record, stamp: whichever was the last to land, the next run ends in the same shard."""
    tar(tmp_path / "t.tar", [*good(0, 3), ("bad.jpg", b"no")])
    spec = source(tmp_path, "t.tar")
    whole = pull.run(context(tmp_path / "whole", spec), "web")
    put, count = storage.write_bytes, [0]

    def dying(uri, data):
        if "/adopted/" in uri:
            count[0] += 1
            if count[0] == write + 1:
                raise KeyboardInterrupt
        put(uri, data)

    ctx = context(tmp_path / "killed", spec)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_bytes", dying)
        with pytest.raises(KeyboardInterrupt):
            pull.run(ctx, "web")
    again = pull.run(ctx, "web")
    assert [(s.sha256, s.samples) for s in again.shards] == [(s.sha256, s.samples) for s in whole.shards]
    assert again.lineage == whole.lineage and len(samples(again)) == 3


def test_a_tar_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tar(tmp_path / "t.tar", good(0, 2))
    finish = adopt._Reading._finish

    def meanwhile(self, group):
        os.utime(path, ns=(5, 5))
        finish(self, group)

    monkeypatch.setattr(adopt._Reading, "_finish", meanwhile)
    with pytest.raises(DataError, match=r"t\.tar was changed while it was read"):
        pull.run(context(tmp_path, source(tmp_path, "t.tar")), "web")
