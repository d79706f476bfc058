"""One contract for s3:// storage, on two servers: rclone (signatures, disk) and moto (MinIO's semantics, in memory)."""

from __future__ import annotations

import http.server
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vlmflow import local_stack, storage
from vlmflow.errors import AccessDenied, NoSpace, NotFound, StorageError, Unreachable
from vlmflow.storage_s3 import s3_store


@pytest.fixture(scope="module")
def rclone(tmp_path_factory):
    state = tmp_path_factory.mktemp("s3") / "state"
    yield local_stack.up(state, services=["s3"])
    local_stack.down(state)


@pytest.fixture(params=["rclone", "moto"])
def root(request, monkeypatch, tmp_path):
    """A fresh bucket's URI on each server, with the environment that leads there."""
    given = request.getfixturevalue(request.param)
    environment = given if request.param == "moto" else local_stack.environment(given)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLMFLOW_SCRATCH", str(tmp_path / "scratch"))
    bucket = "b-" + str(abs(hash(request.node.name)))[:12]
    s3_store().make_bucket(bucket)
    s3_store().make_bucket(bucket)  # a second time is fine
    return f"s3://{bucket}"


def test_write_read_range_size_delete(root):
    uri = storage.join(root, "deep", "er", "object.bin")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, 3, 4) == b"3456"
    assert storage.read_bytes(uri, 7) == b"789"
    assert storage.read_bytes(uri, 8, 40) == b"89"
    assert storage.read_bytes(uri, 10, 4) == b"", "beyond the end, as with a file"
    assert storage.read_bytes(uri, 2, 0) == b""
    assert storage.size(uri) == 10 and storage.exists(uri)
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_stamp_changes_with_the_object(root):
    storage.write_bytes(f"{root}/object", b"one")
    first = storage.stamp(f"{root}/object")
    assert storage.stamp(f"{root}/object") == first
    storage.write_bytes(f"{root}/object", b"another")
    assert storage.stamp(f"{root}/object") != first
    with pytest.raises(NotFound):
        storage.stamp(f"{root}/none")


def test_empty_object(root):
    storage.write_bytes(f"{root}/empty", b"")
    assert storage.read_bytes(f"{root}/empty") == b"" and storage.size(f"{root}/empty") == 0


def test_missing_objects_and_folders_are_not_found(root):
    storage.write_bytes(f"{root}/folder/object", b"x")
    for uri in (f"{root}/none", f"{root}/folder"):
        assert not storage.exists(uri)
        for call in (storage.size, storage.read_bytes):
            with pytest.raises(NotFound, match=uri):
                call(uri)


@pytest.mark.parametrize("key", ["é ü/x y.txt", "plus+and%20percent", "a?b=1#c", "k=v/(1)&2"])
def test_keys_hold_any_character(root, key):
    storage.write_bytes(f"{root}/{key}", key.encode())
    assert storage.read_bytes(f"{root}/{key}") == key.encode()
    assert [o.uri for o in storage.list_uris(root)] == [f"{root}/{key}"]


def test_listing_is_recursive_sorted_and_by_folder(root):
    keys = ["a/1", "a/b/2", "ab/3", "c"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: storage.write_bytes(f"{root}/{key}", key.encode()), reversed(keys)))
    assert storage.list_uris(root) == [storage.ObjectInfo(f"{root}/{key}", len(key)) for key in keys]
    assert [o.uri for o in storage.list_uris(f"{root}/a")] == [f"{root}/a/1", f"{root}/a/b/2"], "not ab/3"
    assert storage.list_uris(f"{root}/nothing") == []


def test_a_listing_of_several_pages_is_whole(rclone, monkeypatch):
    use(monkeypatch, rclone)
    folder = rclone.state_dir / "s3" / "vlmflow" / "pages"
    folder.mkdir()
    for i in range(2050):  # a page holds 1000; files on the server's disk are its objects
        (folder / f"{i:04}").touch()
    assert [o.uri[-4:] for o in storage.list_uris("s3://vlmflow/pages")] == [f"{i:04}" for i in range(2050)]


def test_files_above_the_multipart_size_survive(root, tmp_path):
    source, target = tmp_path / "source", tmp_path / "sub" / "target"
    source.write_bytes(bytes(range(256)) * 4096 * 12)  # 12 MiB
    storage.put_file(source, f"{root}/large")
    storage.get_file(f"{root}/large", target)
    assert target.read_bytes() == source.read_bytes()
    assert storage.read_bytes(f"{root}/large", 10 * 2**20 + 5, 3) == b"\x05\x06\x07"
    with pytest.raises(NotFound):
        storage.get_file(f"{root}/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_cached_object_is_downloaded_once(root, tmp_path):
    storage.write_bytes(f"{root}/o", b"content")
    first = storage.cached(f"{root}/o", scratch=tmp_path)
    storage.delete(f"{root}/o")
    assert storage.cached(f"{root}/o", scratch=tmp_path) == first and first.read_bytes() == b"content"


def test_check_leaves_nothing(root):
    storage.check(root)
    assert storage.list_uris(root) == []


def test_a_missing_bucket_is_not_found(root):
    with pytest.raises(NotFound, match="no such object or bucket"):
        storage.write_bytes("s3://no-such-bucket/x", b"1")
    with pytest.raises(NotFound):
        storage.list_uris("s3://no-such-bucket/x")
    with pytest.raises(NotFound):
        storage.check("s3://no-such-bucket")


def use(monkeypatch, info):
    for name, value in local_stack.environment(info).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_denied_everywhere(rclone, monkeypatch, variable):
    use(monkeypatch, rclone)
    storage.write_bytes("s3://vlmflow/secret", b"x")
    monkeypatch.setenv(variable, "wrong")
    for call in (
        lambda: storage.read_bytes("s3://vlmflow/secret"),
        lambda: storage.size("s3://vlmflow/secret"),
        lambda: storage.exists("s3://vlmflow/secret"),
        lambda: storage.write_bytes("s3://vlmflow/secret", b"y"),
        lambda: storage.list_uris("s3://vlmflow"),
        lambda: storage.delete("s3://vlmflow/secret"),
    ):
        with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            call()
    use(monkeypatch, rclone)
    assert storage.read_bytes("s3://vlmflow/secret") == b"x"


def test_a_full_disk_is_said_and_mended(rclone, monkeypatch, tmp_path):
    """The server may write no more than 1 MiB to a file: what it answers then is what it answers for a full disk."""
    use(monkeypatch, rclone)
    pid = local_stack.status(rclone.state_dir)[0].pid
    data = bytes(6 * 2**20)
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"broke off the write of 6291456 bytes(.|\n)*disk is full") as error:
            storage.write_bytes("s3://vlmflow/large", data)
        assert not isinstance(error.value, NotFound)
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
            with pytest.raises(NoSpace, match=r"1\.0 MiB free, the object needs 6\.0 MiB"):
                storage.write_bytes("s3://vlmflow/large", data)
        assert not storage.exists("s3://vlmflow/large"), "whole or absent"
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    storage.write_bytes("s3://vlmflow/large", data)
    assert storage.size("s3://vlmflow/large") == len(data)


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status and code it is told to."""

    answer = (507, "XMinioStorageFull")

    def respond(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = (
            f"<?xml version='1.0'?><Error><Code>{self.answer[1]}</Code><RequestId>40440304</RequestId></Error>".encode()
        )
        self.send_response(self.answer[0])
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = respond

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("VLMFLOW_S3_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield lambda status, code: monkeypatch.setattr(Refusing, "answer", (status, code))
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (507, "XMinioStorageFull", NoSpace),
        (403, "AccessDenied", AccessDenied),
        (404, "NoSuchBucket", NotFound),
        (400, "InvalidRequest", StorageError),
    ],
)
def test_an_answer_is_understood_by_its_code_and_status_only(refusing, status, code, kind):
    refusing(status, code)
    with pytest.raises(StorageError) as error:
        storage.write_bytes("s3://bucket/key-404-403", b"x")  # key and request id hold misleading digits
    assert type(error.value) is kind


def test_no_server_is_unreachable(monkeypatch):
    monkeypatch.setenv("VLMFLOW_S3_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(Unreachable, match=r"no S3 store answers at http://127.0.0.1:9"):
        storage.read_bytes("s3://bucket/key")
