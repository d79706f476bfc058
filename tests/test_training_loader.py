"""The loader over a real HTTP store: same batches in the same order whatever fails, bounded disk, errors with names."""

from __future__ import annotations

import contextlib
import http.server
import random
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from training_world import dataset, sample

from vlmflow.dataset import fetch
from vlmflow.dataset.manifest import Manifest, ShardRef
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.window import LIMIT_ENV, Window
from vlmflow.errors import DataError, NoSpace, NotFound
from vlmflow.training import loader as loading
from vlmflow.training.examples import Part
from vlmflow.training.loader import Loader, Micro
from vlmflow.training.plan import Item
from vlmflow.vision.image import decode

SHARDS, ROWS = 6, 4


class Store(http.server.ThreadingHTTPServer):
    """Objects over HTTP as S3 answers ranged GETs, with faults by chance: 503, and connections reset inside a body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.objects: dict[str, bytes] = {}
        self.gets: Counter[tuple[str, str]] = Counter()
        self.faults = Counter[str]()
        self.chance = random.Random(5)
        self.unavailable = self.reset = 0.0
        self.guard = threading.Lock()

    def fault(self) -> str:
        with self.guard:
            drawn = self.chance.random()
            kind = "503" if drawn < self.unavailable else "reset" if drawn < self.unavailable + self.reset else ""
            self.faults[kind] += 1
            return kind

    def handle_error(self, *_: Any) -> None:
        pass


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_GET(self, body: bool = True) -> None:
        path = unquote(urlsplit(self.path).path)
        wanted = self.headers.get("Range", "")
        with self.server.guard:
            self.server.gets[path, wanted] += body
        fault = self.server.fault() if body else ""
        data = self.server.objects.get(path)
        if fault == "503" or data is None:
            status, code = (503, "SlowDown") if fault else (404, "NoSuchKey")
            text = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
        else:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            text = data[int(first or 0) : int(last) + 1 if last else None]
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", '"x"')
            self.send_header("Last-Modified", "Fri, 20 Nov 2026 10:00:00 GMT")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if not body:
            return
        if fault == "reset":
            self.wfile.write(text[: len(text) // 2])
            self.close_connection = True
        else:
            self.wfile.write(text)

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = Store()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("VLMFLOW_S3_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(fetch, "BACK_OFF", 0.001)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Six shards of four samples on disk; every fifth sample is text alone."""
    samples = [sample(i, images=int(i % 5 > 0) + i % 2) for i in range(SHARDS * ROWS)]
    return dataset(tmp_path_factory.mktemp("loader"), samples, shard_size=ROWS)


def uploaded(store: Store, local: Manifest) -> list[ShardRef]:
    """The same shards in the store."""
    shards = []
    for shard in local.shards:
        path = Path(shard.uri.removeprefix("file://"))
        for suffix in ("", ".idx.json"):
            store.objects[f"/data/{path.name}{suffix}"] = Path(f"{path}{suffix}").read_bytes()
        shards.append(shard.model_copy(update={"uri": f"s3://data/{path.name}"}))
    return shards


def plan(shards: list[ShardRef], packs: int = 12, per_step: int = 2) -> Any:
    """Packs of two samples, in a shuffled order that stays near the order of the shards."""
    order = sorted(range(len(shards) * ROWS), key=lambda i: i // (2 * ROWS) * 100 + (i * 7) % 16)

    def items_of(pack: int) -> list[Item]:
        rows = order[2 * pack : 2 * pack + 2]
        return [Item(0, i // ROWS, i % ROWS, -1, -1, 2, 3, 1, 1, 9) for i in rows]

    def deal(step: int, world: int) -> list[list[int | None]]:
        mine: list[int | None] = list(range(step * per_step, min(packs, (step + 1) * per_step)))
        return [mine[rank::world] for rank in range(world)]

    entries = [SimpleNamespace(shard=shard, text=None) for shard in shards]
    return SimpleNamespace(steps=-(-packs // per_step), deal=deal, items_of=items_of, shards=entries)


def encode(item: Item, found: Sample, row: Any) -> list[Part]:
    ids = np.frombuffer(found.meta["text"].encode(), dtype=np.uint8).astype(np.int32)
    return [Part(ids, np.ones(len(ids), dtype=bool), [1] * len(found.images))]


def tile(data: bytes, max_tiles: int) -> np.ndarray:
    return np.asarray(decode(data).resize((8, 8)))[None]


def loader(made: Any, scratch: Path, **options: Any) -> Loader:
    positions = lambda ids: np.arange(len(ids))  # noqa: E731
    return Loader(
        made, options.pop("encoder", encode), options.pop("tile", tile), positions, [1, 2], 8, scratch, **options
    )


def read(made: Loader) -> list[tuple[int, list[Micro]]]:
    try:
        return list(made.steps())
    finally:
        made.close()


def same(left: list[tuple[int, list[Micro]]], right: list[tuple[int, list[Micro]]]) -> bool:
    def flat(found: list[tuple[int, list[Micro]]]) -> list[Any]:
        return [
            (step, m.keys, m.tokens, m.images, {k: np.asarray(v).tolist() for k, v in m.batch.items()})
            for step, micros in found
            for m in micros
        ]

    return flat(left) == flat(right)


@pytest.fixture(scope="module")
def expected(local: Manifest, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, list[Micro]]]:
    """All batches, read from local files by one thread."""
    return read(loader(plan(local.shards), tmp_path_factory.mktemp("expected")))


def test_every_sample_once_in_the_order_of_the_plan(expected: list[tuple[int, list[Micro]]], local: Manifest) -> None:
    assert [step for step, _ in expected] == list(range(6)) and {len(m) for _, m in expected} == {2}
    keys = [key for _, micros in expected for m in micros for key in m.keys]
    assert sorted(keys) == [f"k{i:03d}" for i in range(24)] and keys != sorted(keys)
    texts = [micro for _, micros in expected for micro in micros if not micro.images]
    assert all(len(m.batch["pixel_values"]) == 1 and not m.batch["pixel_values"].any() for m in texts), "the dummy"


def test_batches_do_not_depend_on_threads_or_store(
    store: Store, local: Manifest, expected: list[tuple[int, list[Micro]]], tmp_path: Path
) -> None:
    """Packs finish in another order than they are given out: each tile waits for a later one, where there is one."""
    shards = uploaded(store, local)
    turn, waiting = threading.Condition(), []

    def uneven(data: bytes, max_tiles: int) -> np.ndarray:
        with turn:
            waiting.append(object())
            mine = len(waiting)
            turn.notify_all()
            turn.wait_for(lambda: len(waiting) > mine, timeout=0.02)
        return tile(data, max_tiles)

    assert same(read(loader(plan(shards), tmp_path, workers=4, tile=uneven)), expected)


def test_a_store_that_fails_and_resets_gives_the_same_batches(
    store: Store,
    local: Manifest,
    expected: list[tuple[int, list[Micro]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = uploaded(store, local)
    store.unavailable, store.reset = 0.05, 0.15
    monkeypatch.setattr(loading, "Window", partial(Window, part=2_000))
    assert same(read(loader(plan(shards), tmp_path, workers=2)), expected)
    assert store.faults["503"] and store.faults["reset"]


def test_the_disk_holds_no_more_than_the_limit(
    store: Store,
    local: Manifest,
    expected: list[tuple[int, list[Micro]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = uploaded(store, local)
    limit = sum(sorted(shard.bytes for shard in shards)[-3:])
    monkeypatch.setenv(LIMIT_ENV, str(limit))
    monkeypatch.setattr(loading, "WINDOW", 2)
    monkeypatch.setattr(loading, "FETCH_AHEAD", 2)
    made, found, most = loader(plan(shards), tmp_path), [], 0
    for step in made.steps():
        found.append(step)
        most = max(most, sum(p.stat().st_size for p in (tmp_path / "shards").glob("*.[tp]*")))
    made.close()
    assert same(found, expected) and 0 < most <= limit


def test_a_limit_below_a_window_is_refused_before_anything_is_read(
    store: Store, local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = uploaded(store, local)
    total = sum(shard.bytes for shard in shards)
    monkeypatch.setenv(LIMIT_ENV, str(total - 1))
    with pytest.raises(NoSpace, match=rf"the 6 shards .* are {total} bytes, .* may hold {total - 1}"):
        loader(plan(shards), tmp_path)
    assert not store.gets


def test_two_ranks_of_a_machine_read_the_store_once(store: Store, local: Manifest, tmp_path: Path) -> None:
    shards = uploaded(store, local)
    found: dict[int, list[tuple[int, list[Micro]]]] = {}

    def rank(number: int) -> None:
        found[number] = read(loader(plan(shards), tmp_path, rank=number, world=2))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [len(found[number]) for number in range(2)] == [6, 6]
    tars = {path: count for (path, _), count in store.gets.items() if path.endswith(".tar")}
    assert len(tars) == SHARDS and set(tars.values()) == {1}


def test_a_shard_deleted_while_training_is_named(
    store: Store, local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "FETCH_AHEAD", 2)
    shards = uploaded(store, local)
    made = loader(plan(shards), tmp_path)
    steps = made.steps()
    next(steps)
    name = shards[-1].uri.removeprefix("s3://")
    del store.objects[f"/{name}"]
    with pytest.raises(NotFound, match=rf"{name}.*deleted after its dataset was made"):
        list(steps)
    made.close()


def test_errors_of_workers_name_the_sample(local: Manifest, tmp_path: Path) -> None:
    def broken(data: bytes, max_tiles: int) -> np.ndarray:
        raise ValueError("cannot cut")

    with pytest.raises(DataError, match=r"sample k\d+ of file://.*cannot be prepared: ValueError: cannot cut"):
        read(loader(plan(local.shards), tmp_path, tile=broken))

    def refuses(item: Item, found: Sample, row: Any) -> list[Part]:
        raise DataError("no answer")

    with pytest.raises(DataError, match=r"sample k\d+ of file://.*: no answer"):
        read(loader(plan(local.shards), tmp_path, encoder=refuses))


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    torn = sample(3)
    data = dataset(tmp_path, [Sample(torn.key, torn.meta, (torn.images[0][:40],)), *(sample(i) for i in (4, 5, 6))])
    with pytest.raises(DataError, match=r"sample k003 of .*cannot decode the image \(40 bytes\)"):
        read(loader(plan(data.shards, packs=2), tmp_path))


def test_waiting_is_measured_around_the_wait_alone(
    local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr(loading, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    made = loader(plan(local.shards), tmp_path)
    assert len(read(made)) == 6 and made.waited == 12, "one tick for each micro-batch"


def test_closing_does_not_wait_for_a_store_that_hangs(
    store: Store, local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = uploaded(store, local)
    asked, hang, answered = threading.Event(), threading.Event(), threading.Event()

    def fault() -> str:
        asked.set()
        hang.wait(30)
        answered.set()
        return ""

    monkeypatch.setattr(store, "fault", fault)
    made = loader(plan(shards), tmp_path)

    def read_until_closed() -> None:
        with contextlib.suppress(Exception):  # whatever a read of a closed loader ends with
            list(made.steps())

    reading = threading.Thread(target=read_until_closed, daemon=True)
    reading.start()
    assert asked.wait(30)
    made.close()
    assert not answered.is_set(), "close came back while the store still hangs"
    hang.set()
    reading.join(30)
    assert not reading.is_alive(), "the reader ends once the store answers"
