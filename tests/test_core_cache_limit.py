"""The scratch cache keeps its limit: oldest use goes first, what is held or was just asked for stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmflow import storage, storage_cache
from vlmflow.errors import RecipeError


def fill(folder: Path, *sizes: int) -> list[Path]:
    """Files that were asked for one after the other, the last an hour ago."""
    made = []
    for number, size in enumerate(sizes):
        made.append(folder / f"file{number}")
        made[-1].write_bytes(b"x" * size)
        os.utime(made[-1], (1_000_000 + number, 1_000_000 + number))
    return made


def test_the_oldest_use_goes_first_until_the_limit_is_kept(tmp_path: Path) -> None:
    fill(tmp_path, 100, 100, 100, 100)
    storage_cache.touch(tmp_path / "file0")
    assert storage_cache.trim(tmp_path, limit=250) == ["file1", "file2"]
    assert storage_cache.trim(tmp_path, limit=250) == []
    assert storage_cache.trim(tmp_path, limit=0) == ["file3"], "file0 was asked for just now"
    assert storage_cache.trim(tmp_path, limit=0, grace=-1) == ["file0"]


def test_a_held_file_stays_whichever_process_holds_it(tmp_path: Path) -> None:
    mine, theirs, free = fill(tmp_path, 10, 10, 10)
    descriptor = storage_cache.hold(mine)
    code = "import sys; from vlmflow import storage_cache; storage_cache.hold(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(theirs)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    assert storage_cache.trim(tmp_path, limit=0) == [free.name]
    other.communicate("")
    os.close(descriptor)
    assert storage_cache.trim(tmp_path, limit=0) == [mine.name, theirs.name]


def test_what_arrives_is_no_part_of_the_cache_yet(tmp_path: Path) -> None:
    (tmp_path / ".arriving.tmp").write_bytes(b"x" * 100)
    assert storage_cache.trim(tmp_path, limit=0, grace=-1) == []


@pytest.mark.parametrize(("text", "size"), [("", None), ("4096", 4096), ("3Gi", 3 << 30), ("1 Ti", 1 << 40)])
def test_the_limit_is_a_size(monkeypatch: pytest.MonkeyPatch, text: str, size: int | None) -> None:
    monkeypatch.setenv(storage_cache.VARIABLE, text)
    assert storage_cache.stated_limit() == size


def test_a_limit_that_is_no_size_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage_cache.VARIABLE, "200GB")
    with pytest.raises(RecipeError, match="VLMFLOW_SCRATCH_LIMIT is '200GB'"):
        storage_cache.stated_limit()


def test_a_full_cache_makes_room_before_the_next_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cached` of a stored object, with the store's download replaced by a file."""
    monkeypatch.setenv(storage_cache.VARIABLE, "250")
    (tmp_path / "objects").mkdir()
    monkeypatch.setattr(storage, "get_file", lambda uri, path: Path(path).write_bytes(uri[-1].encode() * 100))
    paths = [storage.cached(f"s3://b/{name}", None, tmp_path) for name in "abc"]
    assert all(path.exists() for path in paths), "asked for within the last minutes: a reader may be about to open it"
    for age, path in enumerate(paths):
        os.utime(path, (1_000_000 + age, 1_000_000 + age))
    storage.cached("s3://b/a", None, tmp_path)  # asked for again
    storage.cached("s3://b/d", None, tmp_path)
    assert [path.exists() for path in paths] == [True, False, True]
