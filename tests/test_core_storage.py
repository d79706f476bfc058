"""file:// objects: whole or absent, errors with their meaning."""

import errno
import os

import pytest

from vlmflow import storage
from vlmflow.errors import AccessDenied, DataError, NoSpace, NotFound, StorageError, Unreachable


def test_round_trip_and_listing(tmp_path):
    root = f"file://{tmp_path}"
    storage.write_bytes(storage.join(root, "a", "b.bin"), b"0123456789")
    assert storage.read_bytes(storage.join(root, "a", "b.bin"), 3, 4) == b"3456"
    assert storage.list_uris(root) == [storage.ObjectInfo(f"{root}/a/b.bin", 10)]
    storage.delete(storage.join(root, "a", "b.bin"))
    storage.delete(storage.join(root, "a", "b.bin"))
    assert storage.list_uris(root) == []
    assert not storage.exists(storage.join(root, "a"))


def test_missing_object_names_the_uri(tmp_path):
    with pytest.raises(NotFound, match="nothing is stored there"):
        storage.read_bytes(f"{tmp_path}/none")


def test_full_disk_leaves_nothing_and_the_old_object_stays(tmp_path, monkeypatch):
    uri = f"{tmp_path}/object"
    storage.write_bytes(uri, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match="disk is full"):
        storage.write_bytes(uri, b"new content")
    monkeypatch.undo()
    assert storage.read_bytes(uri) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["object"]
    storage.write_bytes(uri, b"new content")
    assert storage.read_bytes(uri) == b"new content"


def test_cached_refuses_changed_content(tmp_path):
    storage.write_bytes(f"{tmp_path}/o", b"x")
    with pytest.raises(DataError, match="changed or cut"):
        storage.cached(f"{tmp_path}/o", "0" * 64)


def test_unknown_scheme_and_missing_settings(monkeypatch):
    with pytest.raises(StorageError, match="scheme 'ftp'"):
        storage.read_bytes("ftp://host/x")
    monkeypatch.delenv("VLMFLOW_S3_ENDPOINT", raising=False)
    with pytest.raises(StorageError, match="VLMFLOW_S3_ENDPOINT"):
        storage.read_bytes("s3://b/k")


def test_dead_store_is_unreachable(monkeypatch):
    monkeypatch.setenv("VLMFLOW_S3_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with pytest.raises(Unreachable, match=r"no S3 store answers at http://127\.0\.0\.1:1"):
        storage.size("s3://bucket/key")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(AccessDenied):
        storage.write_bytes(f"{tmp_path}/x", b"")
