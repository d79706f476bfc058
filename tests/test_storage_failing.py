"""A store that fails 5 % of the calls, resets, stalls, cuts bodies and says yes to what it lost: the same bytes at the end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from curation_server import serving
from curation_world import MODEL, FakeVLM
from failing_s3 import failing

from vlmflow import local_stack, storage, storage_s3
from vlmflow.curation import caption, clean, dedup, fuse, keep, perplexity, phash, pull
from vlmflow.errors import NotFound, StorageError, Unreachable
from vlmflow.models import inference
from vlmflow.recipe.curation import CurationSpec
from vlmflow.recipe.data import DatasetSpec, PullSpec, SourceSpec
from vlmflow.step import Context
from vlmflow.storage_s3 import s3_store

ROWS = 20


@pytest.fixture(scope="module")
def rclone(tmp_path_factory):
    state = tmp_path_factory.mktemp("s3") / "state"
    yield local_stack.environment(local_stack.up(state, services=["s3"]))
    local_stack.down(state)


@pytest.fixture
def upstream(request):
    """The environment that leads to a server: in memory, or (where a test asks for it) one that checks signatures."""
    return request.getfixturevalue(getattr(request, "param", "moto"))


@pytest.fixture
def bucket(upstream, monkeypatch, request):
    for name, value in upstream.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage_s3, "BACK_OFF", 0.01)
    name = f"s3://failing-{abs(hash(request.node.name))}"
    s3_store().make_bucket(name[5:])
    return name


@pytest.fixture
def through(upstream, monkeypatch):
    """Every later call of this test goes through a proxy with this share of faults."""
    stack = []

    def start(share, seed=0, timeout=3.0):
        manager = failing(upstream["VLMFLOW_S3_ENDPOINT"], share, seed)
        proxy = manager.__enter__()
        stack.append(manager)
        monkeypatch.setenv("VLMFLOW_S3_ENDPOINT", proxy.url)
        monkeypatch.setenv("VLMFLOW_S3_TIMEOUT", str(timeout))
        return proxy

    yield start
    for manager in stack:
        manager.__exit__(None, None, None)


def stored(root: str) -> dict[str, bytes]:
    return {found.uri: storage.read_bytes(found.uri) for found in storage.list_uris(root)}


@pytest.mark.parametrize("upstream", ["moto", "rclone"], indirect=True)
def test_every_call_survives_every_fault(bucket, through, tmp_path):
    proxy = through(0.25, timeout=3.0)
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 4096 * 6)  # 6 MiB: two parts

    def work(number: int) -> None:
        uri = f"{bucket}/{number}"
        storage.write_bytes(uri, uri.encode() * 100)
        assert storage.size(uri) == len(uri) * 100
        assert storage.read_bytes(uri, 3, 50) == (uri.encode() * 100)[3:53]
        storage.get_file(uri, tmp_path / f"got-{number}")
        assert (tmp_path / f"got-{number}").read_bytes() == uri.encode() * 100
        storage.delete(uri)
        assert not storage.exists(uri)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(24)))
    for number in range(4):
        storage.put_file(large, f"{bucket}/large")
        assert storage.size(f"{bucket}/large") == 6 * 2**20
        storage.write_bytes(f"{bucket}/many/{number}", large.read_bytes())
        storage.get_file(f"{bucket}/large", tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == large.read_bytes()
    assert [found.size for found in storage.list_uris(f"{bucket}/many")] == [6 * 2**20] * 4
    assert {kind for kind, times in proxy.faults.items() if times} >= {"slow down", "error", "reset", "cut", "lost"}
    assert not list(tmp_path.glob(".*")), "no partial file stays"


def test_an_upload_that_the_store_lost_after_saying_yes_is_made_again(bucket, through, tmp_path, monkeypatch):
    """The last answer of a multipart upload may be 200 with an error inside, which the client takes for success."""
    proxy = through(1.0)
    monkeypatch.setattr(type(proxy), "_fits", lambda self, kind, *call: kind == "none")

    def draw(method, path):
        proxy.calls += 1
        asked = method == "POST" and "uploadId=" in path
        proxy.faults["completions"] += asked
        return "false success" if asked and proxy.faults["completions"] == 1 else ""

    monkeypatch.setattr(proxy, "draw", draw)
    data = bytes(6 * 2**20)
    storage.write_bytes(f"{bucket}/object", data)
    assert storage.read_bytes(f"{bucket}/object") == data
    assert proxy.faults["completions"] == 2


@pytest.mark.parametrize(
    ("kind", "text"), [("slow down", "failed 6 times in a row"), ("cut", "broke off or stalled.*tried 6 times")]
)
def test_a_store_that_never_recovers_is_named_with_the_number_of_tries(bucket, through, monkeypatch, kind, text):
    storage.write_bytes(f"{bucket}/object", b"content")
    proxy = through(1.0)
    monkeypatch.setattr(proxy, "draw", lambda *_: kind)
    with pytest.raises(StorageError, match=f"(?s)object.*{text}") as error:
        storage.read_bytes(f"{bucket}/object")
    assert not isinstance(error.value, (NotFound, Unreachable))


def test_what_does_not_pass_is_said_at_once(bucket, through):
    proxy = through(0.0)
    with pytest.raises(NotFound):
        storage.read_bytes(f"{bucket}/none")
    assert proxy.calls == 1


def test_a_stall_ends_with_the_timeout(bucket, through, monkeypatch):
    storage.write_bytes(f"{bucket}/object", b"content")
    proxy = through(0.0, timeout=0.3)
    stalls = iter(["stall", "stall", ""])
    monkeypatch.setattr(proxy, "draw", lambda *_: next(stalls, ""))
    assert storage.read_bytes(f"{bucket}/object") == b"content"


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(bucket, monkeypatch, text):
    monkeypatch.setenv("VLMFLOW_S3_TIMEOUT", text)
    with pytest.raises(StorageError, match=f"VLMFLOW_S3_TIMEOUT is '{text}'"):
        storage.exists(f"{bucket}/object")


def test_a_whole_curation_ends_with_the_bytes_of_a_healthy_store(bucket, through, tmp_path, monkeypatch):
    vlm = FakeVLM()
    monkeypatch.setattr(inference, "load", lambda folder: vlm)
    monkeypatch.setattr(caption.store, "fetch", lambda ref, scratch: Path("/nowhere"))
    with serving() as site:
        table = tmp_path / "table.jsonl"
        lines = (f'{{"url": "{site.url(f"/img/{i}")}", "text": "a red square number {i}"}}\n' for i in range(ROWS))
        table.write_text("".join(lines))
        recipe = SimpleNamespace(
            seed=1,
            data={"web": DatasetSpec(sources={"web": SourceSpec(table=str(table))})},
            pull=PullSpec(samples_per_shard=5, allow_hosts=["127.0.0.1"]),
            curation=CurationSpec.model_validate(
                {
                    "caption": {"engine": "model"},
                    "clean": {},
                    "dedup": {},
                    "keep": {"fraction": 0.5},
                }
            ),
        )

        def curate(name: str) -> str:
            ctx = Context(recipe, bucket, tmp_path / name)
            made = caption.run(ctx, pull.run(ctx, "web"), MODEL)
            for step in (fuse, phash, clean, dedup):
                made = step.run(ctx, made)
            return keep.run(ctx, perplexity.run(ctx, made, MODEL)).digest

        digest, healthy = curate("healthy"), stored(bucket)
        for uri in healthy:
            storage.delete(uri)
        fetched = site.images
        proxy = through(0.05, seed=3)
        assert curate("failing") == digest
        assert site.images == 2 * fetched, "no image is fetched again because a store failed"
    assert stored(bucket) == healthy
    assert sum(proxy.faults.values()) > 0.02 * proxy.calls and len(healthy) > 40
