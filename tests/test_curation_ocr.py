"""Reading text in images: real PP-OCR models on rendered text, and the order of boxes."""

from __future__ import annotations

import io
from types import SimpleNamespace

import onnxruntime
import pytest
from PIL import Image, ImageDraw, ImageFont

from vlmflow.curation import ocr, ocr_engine, ocr_workers
from vlmflow.curation.ocr_text import language
from vlmflow.curation.reading_order import lines_in_order
from vlmflow.dataset.layer import read_layer
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import describe_shard, write_shard
from vlmflow.digest import sha256_bytes
from vlmflow.errors import ServiceError
from vlmflow.recipe.curation import CurationSpec, OcrSpec
from vlmflow.recipe.data import PullSpec
from vlmflow.step import Context

LEFT = ["The quick brown fox", "jumps over the lazy", "dog near the river", "bank every morning"]
RIGHT = ["A second column has", "its own sentences to", "be read after all of", "the first one ended"]


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def column(x, width, count, top=100, step=30):
    return [box(x, top + i * step, x + width, top + i * step + 20) for i in range(count)]


def order(polygons):
    return [i for line in lines_in_order(polygons) for i in line]


def test_lines_go_down_and_boxes_of_a_line_go_right():
    assert lines_in_order([box(200, 12, 300, 32), box(10, 50, 90, 70), box(10, 10, 150, 30)]) == [[2, 0], [1]]
    assert lines_in_order([]) == []


def test_two_columns_are_not_interleaved_and_a_title_comes_first():
    polygons = [*column(350, 250, 5, top=107), *column(50, 260, 5), box(60, 40, 590, 70), box(60, 300, 590, 320)]
    assert order(polygons) == [10, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 11]


def test_three_columns():
    polygons = column(440, 180, 4) + column(240, 180, 4) + column(40, 180, 4)
    assert order(polygons) == [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]


def test_a_band_of_columns_between_two_titles():
    upper, lower = column(50, 250, 3) + column(350, 250, 3), column(50, 250, 3, top=250) + column(350, 250, 3, top=250)
    polygons = [*lower, *upper, box(60, 60, 590, 80), box(60, 210, 590, 230)]
    assert order(polygons) == [12, 6, 7, 8, 9, 10, 11, 13, 0, 1, 2, 3, 4, 5]


def test_a_table_of_short_cells_is_read_by_rows():
    polygons = column(50, 70, 4) + column(300, 50, 4)
    assert lines_in_order(polygons) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_skewed_page_keeps_its_lines():
    def tilt(polygon):
        return [[x - 0.08 * y, y + 0.08 * x] for x, y in polygon]

    rows = [box(x, y, x + 180, y + 20) for y in (100, 130, 160) for x in (50, 240, 430)]
    assert lines_in_order([tilt(p) for p in rows]) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def draw(size, texts, font_size=24):
    image = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(font_size)
    for place, text in texts:
        pen.text(place, text, fill=(20, 20, 20), font=font)
    return image


@pytest.fixture(scope="module")
def reader():
    return ocr_engine.Reader()


def test_reads_a_sentence(reader):
    text, lines = reader.read(draw((420, 60), [((12, 14), "Reading is quiet work 2026")]))
    assert text == "Reading is quiet work 2026"
    assert lines[0]["score"] > 0.9 and 0 <= lines[0]["box"][0][0] < 30


def test_reads_two_columns_one_after_the_other(reader):
    texts = [((20, 60 + 40 * i), t) for i, t in enumerate(LEFT)] + [
        ((360, 60 + 40 * i), t) for i, t in enumerate(RIGHT)
    ]
    text, _ = reader.read(draw((640, 260), [*texts, ((150, 8), "A title across both of the columns")]))
    assert text.splitlines() == ["A title across both of the columns", *LEFT, *RIGHT]


@pytest.mark.parametrize("word", ["river", "green", "4817"])
def test_reads_small_pictures(reader, word):
    assert reader.read(draw((112, 56), [((16, 12), word)], 26))[0] == word


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (3000, 2), (40, 40), (2200, 30)])
def test_odd_sizes_without_text_are_empty(reader, size):
    assert reader.read(Image.new("RGB", size, "white")) == ("", [])


def test_short_or_doubtful_lines_are_left_out():
    picture = draw((300, 120), [((20, 10), "ok"), ((20, 60), "sentence")])
    assert ocr_engine.Reader(ocr_engine.Settings(min_chars=3)).read(picture)[0] == "sentence"
    assert ocr_engine.Reader(ocr_engine.Settings(min_score=1.0)).read(picture)[0] == ""


def test_what_is_read_in_a_picture_does_not_depend_on_its_neighbours(reader):
    pictures = [
        draw((420, 60), [((12, 14), "Reading is quiet work 2026")]),
        draw((112, 56), [((16, 12), "river")], 26),
        draw((112, 56), [((16, 12), "4817")], 26),
        Image.new("RGB", (64, 64), "white"),
        draw((640, 260), [((20, 20 + 60 * i), t) for i, t in enumerate(LEFT)]),
        *[draw((112, 56), [((12, 12), f"ab{n}cd")], 26) for n in range(5)],
    ]
    alone = [reader.read(picture) for picture in pictures]
    assert alone[1][0] == "river" and alone[4][0].splitlines() == LEFT and alone[3] == ("", [])
    assert reader.read_many(pictures) == alone
    assert reader.read_many(pictures[::-1]) == alone[::-1]


def test_text_is_that_of_rapidocr(reader):
    import numpy as np
    from rapidocr import RapidOCR

    plain = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Det.limit_type": "max",
            "Det.limit_side_len": 960,
        }
    )
    picture = draw((640, 260), [((20, 20 + 60 * i), t) for i, t in enumerate(LEFT)])
    found = plain(np.asarray(picture)[:, :, ::-1])
    text, lines = reader.read(picture)
    assert text.splitlines() == list(found.txts) == LEFT
    assert [line["box"] for line in lines] == np.rint(found.boxes).astype(int).tolist()


def test_cuda_that_is_asked_and_missing_is_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert ocr_engine.choose_provider("auto") == ocr_engine.choose_provider("cpu") == "cpu"
    manifest = dataset(tmp_path, [[()]])
    with pytest.raises(
        ServiceError, match=r"curation\.ocr\.provider is cuda.*only CPUExecutionProvider.*onnxruntime-gpu"
    ):
        ocr.run(context(tmp_path, provider="cuda"), manifest)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert ocr_engine.choose_provider("cpu") == "cpu" and ocr_engine.choose_provider("cuda") == "cuda"


def test_the_shapes_of_cuda_give_the_same_text(reader, monkeypatch):
    """Full batches of few shapes, here run on the CPU: padding and filling must not be read."""
    session = ocr_engine._session
    monkeypatch.setattr(ocr_engine, "_session", lambda path, provider: session(path, "cpu"))
    batched = ocr_engine.Reader(ocr_engine.Settings(provider="cuda"))
    assert batched.pictures == 4
    pictures = [
        draw((420, 60), [((12, 14), "Reading is quiet work 2026")]),
        draw((640, 260), [((20, 20 + 60 * i), t) for i, t in enumerate(LEFT)]),
        Image.new("RGB", (300, 200), "white"),
        draw((330, 100), [((20, 14), "first"), ((20, 56), "second text")]),
        draw((350, 110), [((20, 14), "another"), ((20, 56), "of its shape")]),
    ]
    assert [text for text, _ in batched.read_many(pictures)] == [text for text, _ in reader.read_many(pictures)]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_start_is_an_error_not_a_slow_cpu():
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ServiceError, match="could not start it and runs on CPUExecutionProvider"):
        ocr_engine.Reader(ocr_engine.Settings(provider="cuda"))


def test_shapes_on_cuda_are_few_and_hold_every_width():
    reader = object.__new__(ocr_engine.Reader)
    reader.settings = ocr_engine.Settings(provider="cuda")
    buckets = {width: reader._bucket(width) for width in range(1, 2000)}
    assert all(width <= bucket <= max(32, 1.25 * width + 32) for width, bucket in buckets.items())
    assert len(set(buckets.values())) < 40


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Reading is quiet work", "en"),
        ("你好,世界 OCR", "zh"),
        ("日本語のテキストです", "ja"),
        ("ｶﾀｶﾅ", "ja"),
        ("안녕하세요 世界", "ko"),
        ("Привет, мир", "ru"),
        ("مرحبا", "ar"),
        ("4817 / 42", None),
        ("", None),
    ],
)
def test_language_by_script(text, code):
    assert language(text) == code


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def dataset(tmp_path, contents):
    shards = []
    for number, group in enumerate(contents):
        path = tmp_path / f"{number}.tar"
        samples = []
        for i, images in enumerate(group):
            about = [{"sha256": sha256_bytes(b), "width": 1, "height": 1, "format": "png"} for b in images]
            samples.append(Sample(f"s{number}-{i}", {"id": str(i), "source": "a", "images": about}, tuple(images)))
        write_shard(path, samples)
        shards.append(describe_shard(path, str(path), len(samples), "a"))
    return Manifest(name="web", shards=shards)


def context(tmp_path, **settings):
    curation = CurationSpec(ocr=OcrSpec(**settings))
    return Context(
        SimpleNamespace(curation=curation, pull=PullSpec()), str(tmp_path / "store"), tmp_path / "scratch", "test"
    )


def test_the_layer_over_shards_in_processes(tmp_path, capfd, monkeypatch):
    one, two = png(draw((200, 60), [((20, 14), "first text")])), png(draw((200, 60), [((20, 14), "second text")]))
    empty = png(Image.new("RGB", (64, 64), "white"))
    manifest = dataset(tmp_path, [[(one,), (empty,), ()], [(one, two), (b"\x89PNG\r\n\x1a\nbroken",)]])
    ctx = context(tmp_path, workers=2, failure_limit=0.5)
    sealed = ocr.run(ctx, manifest)
    rows = read_layer(sealed, "ocr")
    assert [rows[key]["text"] for key in rows] == ["first text", "", "", "first text\nsecond text", ""]
    assert [bool(row["error"]) for row in rows.values()] == [False] * 4 + [True]
    assert rows["s0-0"]["score"] > 0.9 and rows["s0-1"]["score"] is None
    assert [row["language"] for row in rows.values()] == ["en", None, None, "en", None]
    assert [line["image"] for line in rows["s1-0"]["lines"]] == [0, 1]
    layer = sealed.layers["ocr"]
    assert layer.summary["with_text"] == 2 and layer.summary["languages"] == {"en": 2}
    assert set(layer.params["models"]) == {"det", "rec"} and "timeout" not in layer.params
    assert capfd.readouterr() == ("", "")

    single = context(tmp_path / "other", workers=1, failure_limit=0.5)
    assert ocr.run(single, manifest).layers["ocr"].parts[0].sha256 == layer.parts[0].sha256

    monkeypatch.setattr(ocr_workers._Worker, "start", None)  # finished parts are found: no process is started again
    assert ocr.run(ctx, manifest) == sealed
    for changed in ({"min_score": 0.6}, {"timeout": 900}):  # what was given up under another limit is tried again
        with pytest.raises(TypeError):
            ocr.run(context(tmp_path, workers=2, failure_limit=0.5, **changed), manifest)
