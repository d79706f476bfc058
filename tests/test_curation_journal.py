"""Journals: what was paid for survives kills, other writers and other machines, and is gone once it is in a layer."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from vlmflow import storage
from vlmflow.curation import journal
from vlmflow.curation.journal import Journal, sweep
from vlmflow.errors import StorageError

NAME = "fused/aaaa/ssss"


@pytest.fixture
def ctx(tmp_path):
    return SimpleNamespace(root=str(tmp_path / "store"), scratch=tmp_path / "scratch")


def local(ctx):
    return next(ctx.scratch.rglob("*.jsonl"))


def chunks(ctx):
    return storage.list_uris(storage.join(ctx.root, "journal"))


def test_an_answer_is_there_for_the_next_attempt_and_gone_when_the_part_is(ctx):
    first = Journal(ctx, NAME)
    first.add("k1", {"text": "zwei\nZeilen – ä"})
    first.add("k2", None)
    assert Journal(ctx, NAME).found() == {"k1": {"text": "zwei\nZeilen – ä"}, "k2": None}  # first was never closed
    assert Journal(ctx, "fused/bbbb/ssss").found() == {}
    first.close(done=True)
    assert Journal(ctx, NAME).found() == {} and not chunks(ctx) and not list(ctx.scratch.rglob("*.jsonl"))


@pytest.mark.parametrize("torn", [b'["k9", {"text": "ha', b'["k9"', b"[", b"\xff\xfe", b'"k9"', b'{"k9": 1}'])
def test_a_torn_last_line_is_ignored_and_spoils_no_later_one(ctx, torn):
    Journal(ctx, NAME).add("k1", 1)
    with local(ctx).open("ab") as file:
        file.write(torn)
    assert Journal(ctx, NAME).found() == {"k1": 1}
    again = Journal(ctx, NAME)
    again.add("k2", 2)
    assert again.found() == {"k1": 1, "k2": 2}


def test_two_writers_lose_nothing_here_or_in_the_store(ctx, monkeypatch):
    monkeypatch.setattr(journal, "CHUNK", 3)
    one, two = Journal(ctx, NAME), Journal(ctx, NAME)
    for number in range(7):
        one.add(f"one-{number}", number)
        two.add(f"two-{number}", number)
    one.close(done=False)
    two.close(done=False)
    everything = {f"{who}-{n}": n for who in ("one", "two") for n in range(7)}
    assert Journal(ctx, NAME).found() == everything
    local(ctx).unlink()
    assert Journal(ctx, NAME).found() == everything  # another machine


def test_another_machine_finds_full_chunks_although_the_first_never_said_goodbye(ctx, monkeypatch):
    monkeypatch.setattr(journal, "CHUNK", 4)
    gone = Journal(ctx, NAME)
    for number in range(9):
        gone.add(str(number), number)
    gone._uploads.shutdown(wait=True)
    elsewhere = SimpleNamespace(root=ctx.root, scratch=ctx.scratch / "other")
    assert Journal(elsewhere, NAME).found() == {str(n): n for n in range(8)}


def test_slow_answers_reach_the_store_by_time(ctx, monkeypatch):
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    slow = Journal(ctx, NAME)
    slow.add("only", 1)
    slow._uploads.shutdown(wait=True)
    assert len(chunks(ctx)) == 1


def test_a_store_that_refuses_is_told(ctx, monkeypatch):
    def refuse(uri, data):
        raise StorageError(f"{uri}: down")

    monkeypatch.setattr(journal.storage, "write_bytes", refuse)
    book = Journal(ctx, NAME)
    book.add("k", 1)
    with pytest.raises(StorageError, match="down"):
        book.close(done=False)
    assert Journal(ctx, NAME).found() == {"k": 1}


def test_sweep_removes_the_journal_of_a_finished_part_alone(ctx):
    for name in (NAME, "fused/aaaa/open", "judge/aaaa/ssss"):
        Journal(ctx, name).add("k", 1)
        book = Journal(ctx, name)
        book.add("j", 2)
        book.close(done=False)
    storage.write_bytes(storage.join(ctx.root, "layers", NAME + ".parquet"), b"rows")
    storage.write_bytes(storage.join(ctx.root, "layers", "judge/aaaa/ssss.parquet"), b"rows")
    assert sweep(ctx, "fused") == 1
    assert Journal(ctx, NAME).found() == {}
    assert Journal(ctx, "fused/aaaa/open").found() == Journal(ctx, "judge/aaaa/ssss").found() == {"k": 1, "j": 2}
    assert len(chunks(ctx)) == 2


def test_two_stores_share_a_scratch_folder_without_meeting(ctx):
    Journal(ctx, NAME).add("k", 1)
    assert Journal(SimpleNamespace(root=ctx.root + "2", scratch=ctx.scratch), NAME).found() == {}


def test_sigkill_costs_no_answer_that_was_added(ctx):
    work = textwrap.dedent(
        """
        import sys
        from types import SimpleNamespace
        from vlmflow.curation.journal import Journal
        book = Journal(SimpleNamespace(root=sys.argv[1], scratch=sys.argv[2]), sys.argv[3])
        n = len(book.found())
        while True:
            book.add(f"k{n}", "x" * 100)
            print(n, flush=True)
            n += 1
        """
    )
    told = -1
    for stop in (1, 300, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", work, ctx.root, str(ctx.scratch), NAME], stdout=subprocess.PIPE, text=True
        )
        for _ in range(stop):
            told = max(told, int(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = Journal(ctx, NAME).found()
        assert set(found) >= {f"k{i}" for i in range(told + 1)} and set(found.values()) == {"x" * 100}


def test_the_local_file_is_for_this_user_alone(ctx):
    Journal(ctx, NAME).add("k", 1)
    assert os.stat(local(ctx)).st_mode & 0o077 == 0
    assert [json.loads(line) for line in local(ctx).read_text().splitlines()] == [["k", 1]]


@pytest.fixture
def bucket(monkeypatch):
    from moto.server import ThreadedMotoServer

    from vlmflow.storage_s3 import s3_store

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("VLMFLOW_S3_ENDPOINT", f"http://{host}:{port}")
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s" * 8, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    s3_store().make_bucket("answers")
    yield "s3://answers/deep/root"
    server.stop()


def test_an_object_store_brings_answers_to_another_machine_and_is_left_clean(tmp_path, bucket):
    here = SimpleNamespace(root=bucket, scratch=tmp_path / "here")
    there = SimpleNamespace(root=bucket, scratch=tmp_path / "there")
    for number, name in enumerate((NAME, NAME + "x", "fused/aaaa/open")):
        book = Journal(here, name)
        book.add("k", number)
        book.close(done=False)
    assert Journal(there, NAME).found() == {"k": 0}
    storage.write_bytes(storage.join(bucket, "layers", NAME + ".parquet"), b"rows")
    assert sweep(there, "fused") == 1
    assert Journal(there, NAME).found() == {} and Journal(there, NAME + "x").found() == {"k": 1}
    assert sweep(here, "fused") == 1 and Journal(here, NAME).found() == {}  # its own file is still there
    assert len(storage.list_uris(storage.join(bucket, "journal"))) == 2
