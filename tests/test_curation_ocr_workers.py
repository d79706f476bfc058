"""Worker processes that read text: images that kill their process, for real, and what becomes of the others."""

from __future__ import annotations

import io
import os
import signal
import threading

import pytest
from PIL import Image

from vlmflow.curation import ocr_workers
from vlmflow.curation.ocr_engine import Reader, Settings
from vlmflow.curation.ocr_workers import Workers
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader, describe_shard, write_shard
from vlmflow.digest import sha256_bytes
from vlmflow.errors import ServiceError, StepFailed

CHUNK = ocr_workers.CHUNK["cpu"]
HARMLESS, DEADLY, CRASHES_ONCE, BROKEN = (10, 200, 10), (200, 10, 10), (10, 10, 200), (90, 90, 90)
HANGS = (200, 200, 10)


class Stand(Reader):
    """Reads the colour of an image instead of its text; two colours kill the process, one holds it for ever."""

    def __init__(self, settings):
        from vlmflow.vision import image  # noqa: F401  its libraries are loaded before the clock runs

        self.settings = settings
        self.folder = os.environ["OCR_STAND"]

    def detect(self, images):
        for image in images:
            colour = image.getpixel((0, 0))
            if colour == DEADLY:
                os.kill(os.getpid(), signal.SIGSEGV)
            if colour == CRASHES_ONCE and not os.path.exists(f"{self.folder}/crashed"):
                open(f"{self.folder}/crashed", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if colour == HANGS:
                open(f"{self.folder}/hangs-{os.getpid()}", "w").close()
                threading.Event().wait()
            if colour == BROKEN:
                raise RuntimeError("what a library raises")
        return [[image.getpixel((0, 0))[1]] for image in images]

    def recognise(self, pages):
        return [(f"green {page[0]}", []) if page else ("", []) for page in pages]


class Missing(Stand):
    def __init__(self, settings):
        raise ServiceError("rapidocr holds no model")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OCR_STAND", str(tmp_path))


def shard(tmp_path, colours):
    samples = []
    for number, colour in enumerate(colours):
        out = io.BytesIO()
        Image.new("RGB", (4, 4), colour).save(out, "PNG")
        about = {"sha256": sha256_bytes(out.getvalue()), "width": 4, "height": 4, "format": "png"}
        samples.append(Sample(f"s{number:03}", {"id": "0", "source": "a", "images": [about]}, (out.getvalue(),)))
    path = tmp_path / "0.tar"
    write_shard(path, samples)
    return ShardReader(describe_shard(path, str(path), len(samples), "a"))


def read(tmp_path, colours, count=2, timeout=600):
    with Workers(count, Settings(), 1_000_000, timeout, Stand) as workers:
        return list(workers.read(shard(tmp_path, colours)))


def test_one_deadly_image_costs_its_own_row(tmp_path):
    colours = [HARMLESS] * (2 * CHUNK + 3)
    colours[CHUNK + 5] = DEADLY
    rows = read(tmp_path, colours)
    assert [row["key"] for row in rows] == [f"s{n:03}" for n in range(len(colours))]
    assert [n for n, row in enumerate(rows) if row["error"]] == [CHUNK + 5]
    assert rows[CHUNK + 5]["error"] == "reading it ends the process: killed by SIGSEGV"
    assert {row["text"] for row in rows if not row["error"]} == {"green 200"}


def test_an_image_that_holds_its_process_for_ever_costs_its_own_row(tmp_path):
    rows = read(tmp_path, [HARMLESS, HANGS, HARMLESS], count=1, timeout=6)
    assert [row["error"] for row in rows] == [None, "reading it takes too long: no answer after 6 s", None]
    assert [row["text"] for row in rows] == ["green 200", "", "green 200"]
    held = [int(path.name.removeprefix("hangs-")) for path in tmp_path.glob("hangs-*")]
    assert len(held) == 2  # with its neighbours, then alone
    for pid in held:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_machine_too_slow_for_every_image_stops_the_step(tmp_path):
    with pytest.raises(
        StepFailed, match=r"last \d+ samples each gave no answer within their time.*curation\.ocr\.timeout"
    ):
        read(tmp_path, [HANGS] * 8, timeout=0.2)


def test_a_sample_may_take_the_time_of_all_of_its_images():
    with Workers(1, Settings(), 1, 2.5, Stand) as workers:
        one, three = ("a", {"jpg": [0, 1], "json": [1, 1]}), ("b", {"0.jpg": [], "1.jpg": [], "2.png": [], "json": []})
        none = ("c", {"json": []})
        assert [workers._patience(chunk) for chunk in ([one], [one, three], [none])] == [2.5, 7.5, 2.5]


def test_a_process_that_was_killed_once_loses_nothing(tmp_path):
    rows = read(tmp_path, [HARMLESS, CRASHES_ONCE, HARMLESS], count=1)
    assert os.path.exists(tmp_path / "crashed")
    assert [row["error"] for row in rows] == [None] * 3


def test_a_process_killed_from_outside_is_replaced(tmp_path):
    with Workers(1, Settings(), 1_000_000, 600, Stand) as workers:
        before = list(workers.read(shard(tmp_path, [HARMLESS] * 3)))
        os.kill(workers.start()[0], signal.SIGKILL)
        assert list(workers.read(shard(tmp_path, [HARMLESS] * 3))) == before


def test_what_a_library_raises_is_a_row_with_its_reason(tmp_path):
    rows = read(tmp_path, [HARMLESS, BROKEN])
    assert [row["error"] for row in rows] == [None, "image 0: RuntimeError"]


def test_a_machine_that_kills_everything_stops_the_step(tmp_path):
    with pytest.raises(StepFailed, match=r"last \d+ samples each ended the process.*SIGSEGV.*limit_side"):
        read(tmp_path, [DEADLY] * 8)


def test_a_reader_that_cannot_start_says_why(tmp_path):
    with (
        Workers(1, Settings(), 1_000_000, 600, Missing) as workers,
        pytest.raises(ServiceError, match="rapidocr holds no model"),
    ):
        list(workers.read(shard(tmp_path, [HARMLESS])))
