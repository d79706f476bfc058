"""A pull that is killed again and again asks for nothing that it had, and ends in the bytes of a pull that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from curation_server import serving
from test_curation_pull import context, table

from vlmflow.curation import pull
from vlmflow.curation.pull_shard import read_failures
from vlmflow.curation.spool import IMAGES, KEPT, Spool
from vlmflow.dataset.shard import ShardReader

PROGRAM = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path; from vlmflow.curation import pull; from test_curation_pull import context
pull.run(context(Path(sys.argv[2]), {"web": {"table": sys.argv[3]}}, timeout=60, concurrency=8, samples_per_shard=20), "web")
"""
KILLS = 4


def landed(root: Path) -> set[str]:
    """URLs that a killed pull holds: in finished shards, and in the spools of the others."""
    urls: set[str] = set()
    for tar in (root / "store/shards").glob("*.tar"):
        urls |= {sample.meta["url"] for sample in ShardReader(tar)} | {f["url"] for f in read_failures(str(tar))[0]}
    for images in root.glob(f"scratch/pull/*/*/{IMAGES}"):
        spool = Spool(images.parent)
        urls |= set(spool.found)
        spool.close(done=False)
    return urls


def test_killed_at_random_instants(tmp_path):
    rng = random.Random(11)
    with serving() as server:
        urls = [server.url(f"/img/{i}") for i in range(110)] + [server.url(f"/gone/{i}") for i in range(10)]
        rng.shuffle(urls)
        uri = table(tmp_path / "t.csv", [{"url": url, "text": f"text {i}"} for i, url in enumerate(urls)])
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": str(here.parent), "VLMFLOW_QUIET": "1"}
        had: set[str] = set()
        for kill in range(KILLS):
            server.waiting.clear()
            server.hits.clear()
            server.gate_after = rng.randrange(3, 24)  # images, then it holds its answers back
            process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(here), str(tmp_path), uri], env=environment)
            assert server.waiting.wait(60)
            process.send_signal(signal.SIGKILL)
            process.wait()
            asked = {server.url(path) for path in server.hits}
            assert not asked & had, f"kill {kill}: fetched although it had landed"
            now = landed(tmp_path)
            assert had <= now and len(asked - now) <= 16, "more was lost than the open requests"
            had = now
            server.gate_after = None
            server.released.set()
            server.released = type(server.released)()
        server.hits.clear()
        settings = {"timeout": 60, "concurrency": 8, "samples_per_shard": 20}
        manifest = pull.run(context(tmp_path, {"web": {"table": uri}}, **settings), "web")
        assert not {server.url(path) for path in server.hits} & had
        assert set(server.hits.values()) <= {1}
        assert not list(tmp_path.glob("scratch/pull/*/*")), "nothing is left in scratch"
        other = pull.run(context(tmp_path / "clean", {"web": {"table": uri}}, **settings), "web")
    assert [s.sha256 for s in manifest.shards] == [s.sha256 for s in other.shards]
    assert manifest.lineage == other.lineage and manifest.samples == 110
    for path in (tmp_path / "store/shards").iterdir():
        assert path.read_bytes() == (tmp_path / "clean/store/shards" / path.name).read_bytes()


def test_a_spool_that_was_cut_or_changed_costs_a_fetch_and_no_wrong_byte(tmp_path):
    spool = Spool(tmp_path / "s")
    kept = [spool.keep(f"u{i}", bytes([i]) * 50, {"sha256": _sha(bytes([i]) * 50), "width": 1}) for i in range(4)]
    spool.refuse("gone", "http_404", "status 404")
    assert spool.read(kept[2]) == b"\x02" * 50
    spool.close(done=False)
    images, lines = tmp_path / "s" / IMAGES, tmp_path / "s" / KEPT
    whole, told = images.read_bytes(), lines.read_bytes()
    ends = [told.index(b"]", told.index(f'"u{i}"'.encode())) + 1 for i in range(4)]
    cuts = [(cut, len(told)) for cut in range(0, len(whole), 7)] + [(len(whole), cut) for cut in range(len(told))]
    for cut, end in cuts:
        images.write_bytes(whole[:cut])
        lines.write_bytes(told[:end])
        again = Spool(tmp_path / "s")
        there = {url: image for url, image in again.found.items() if url != "gone"}
        assert there == {f"u{i}": image for i, image in enumerate(kept) if image.offset + 50 <= cut and ends[i] <= end}
        assert again.found["gone"] == ("http_404", "status 404")
        fresh = again.keep("new", b"new", {"sha256": _sha(b"new")})
        again.close(done=False)
        assert Spool(tmp_path / "s").found == {**again.found, "new": fresh}
    flipped = bytearray(whole)
    flipped[kept[1].offset] ^= 1
    images.write_bytes(flipped)
    lines.write_bytes(told)
    assert set(Spool(tmp_path / "s").found) == {"u0", "u2", "u3", "gone"}


def test_what_a_file_held_before_it_was_written_over_counts_for_nothing(tmp_path):
    spare, about = tmp_path / "spare", {"sha256": _sha(b"first" * 5000)}
    first = Spool(tmp_path / "first", spare)
    first.keep("u", b"first" * 5000, about)
    first.close(done=True)
    (left,) = spare.iterdir()
    number = left.stat().st_ino
    second = Spool(tmp_path / "second", spare)
    fresh = second.keep("v", b"second", {"sha256": _sha(b"second")})
    assert (tmp_path / "second" / IMAGES).stat().st_ino == number, "the file was not used again"
    second.close(done=False)
    again = Spool(tmp_path / "second", spare)
    assert again.found == {"v": fresh} and again.read(fresh) == b"second"
    more = [again.keep(f"w{i}", bytes([i]) * 5000, {"sha256": _sha(bytes([i]) * 5000)}) for i in range(9)]
    assert again.read(fresh) == b"second" and all(again.read(m) == bytes([i]) * 5000 for i, m in enumerate(more))
    third = Spool(tmp_path / "third", spare)  # nothing is spare now
    third.keep("u", b"third", about)
    assert (tmp_path / "third" / IMAGES).stat().st_ino != number


def test_two_processes_in_one_folder_do_not_share_a_spool(tmp_path):
    one, other = Spool(tmp_path / "s"), Spool(tmp_path / "s")
    assert one.folder != other.folder
    other.close(done=True)
    one.close(done=True)
    assert not list(tmp_path.iterdir())


def _sha(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
