"""The scratch cache of stored objects: nothing is trusted there that was not verified, or that belongs to something else."""

from __future__ import annotations

import secrets
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmflow import storage, storage_s3
from vlmflow.dataset.manifest import ShardRef
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import INDEX_SUFFIX, ShardReader, describe_shard, write_shard
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError, ModelError
from vlmflow.models import store
from vlmflow.storage_file import FileStore


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket whose objects lie in a folder, so that a test can change them behind the cache's back."""

    class Remote(FileStore):
        def _path(self, uri: str) -> Path:
            return tmp_path / "remote" / uri.partition("://")[2] if uri.startswith("s3://") else Path(uri)

        def put(self, path: Path, uri: str) -> None:
            self.write(uri, path.read_bytes())

    monkeypatch.setattr(storage_s3, "s3_store", Remote)
    return "s3://bucket"


def test_a_kill_between_download_and_check_leaves_nothing_to_trust(remote, tmp_path, monkeypatch) -> None:
    scratch, uri = tmp_path / "scratch", f"{remote}/object"
    storage.write_bytes(uri, b"damaged")
    good = sha256_bytes(b"whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_verify", killed)
        with pytest.raises(KeyboardInterrupt):
            storage.cached(uri, good, scratch)
    assert list((scratch / "objects").iterdir()) == []
    with pytest.raises(DataError, match="changed or cut"):
        storage.cached(uri, good, scratch)
    storage.write_bytes(uri, b"whole")
    assert storage.cached(uri, good, scratch).read_bytes() == b"whole"


def test_a_shard_that_was_pulled_anew_is_not_read_by_the_old_index(remote, tmp_path) -> None:
    """Same address, other content: after the store was emptied, or in another store of the same bucket name."""

    def shard(text: str) -> ShardRef:
        path = tmp_path / "local" / "a.tar"
        path.parent.mkdir(exist_ok=True)
        write_shard(path, [Sample(k, {"images": [], "text": text}) for k in ("a", "b")])
        for name in ("a.tar", "a.tar" + INDEX_SUFFIX):
            storage.put_file(path.with_name(name), f"{remote}/{name}")
        return describe_shard(path, f"{remote}/a.tar", 2, "web")

    for text in ("short", "long " * 500):
        assert ShardReader(shard(text), tmp_path / "scratch").read("b").meta["text"] == text


def test_temporary_names_do_not_depend_on_the_process(tmp_path, monkeypatch) -> None:
    """Two pods on one volume have the same process and thread numbers."""
    drawn: list[str] = []
    original = secrets.token_hex

    def token(n: int) -> str:
        drawn.append(original(n))
        return drawn[-1]

    monkeypatch.setattr(secrets, "token_hex", token)
    for _ in range(2):
        storage.write_bytes(f"{tmp_path}/object", b"x")
    assert len(set(drawn)) == 2
    storage.check(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["object"]


@pytest.mark.parametrize("path", ["../config.json", "/etc/passwd", "a/../../b", "..\\b", ""])
def test_a_model_reference_cannot_write_outside_its_folder(path) -> None:
    with pytest.raises(ValueError, match="does not lie inside"):
        store.FileRef(path=path, sha256="0" * 64, bytes=1)


@pytest.mark.parametrize("root", ["s3", "file"])
def test_a_changed_model_file_says_how_to_mend_it(remote, root, tmp_path) -> None:
    base = remote if root == "s3" else (tmp_path / "root").as_uri()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")

    place: Any = SimpleNamespace(root=base)
    ref = store.publish(place, folder, "m", store.ModelLineage(step="test"), "key")
    storage.write_bytes(f"{ref.uri}/model.safetensors", b"weightS")
    for _ in range(2):  # and again: what was refused is not trusted the next time
        with pytest.raises(ModelError, match=r"model\.safetensors has .*sha256 .* Delete .*/model\.json"):
            store.fetch(ref, tmp_path / "scratch")
    storage.delete(f"{ref.uri}/{store.MARKER}")
    again = store.publish(place, folder, "m", store.ModelLineage(step="test"), "key")
    assert (store.fetch(again, tmp_path / "scratch") / "model.safetensors").read_bytes() == b"weights"
