"""VLMEvalKit tables: what is read back, what is refused and how it is said."""

from __future__ import annotations

import base64
import csv
import functools
import http.server
import os
import threading
from pathlib import Path

import pytest
from PIL import Image

from vlmflow.errors import AccessDenied, DataError, NotFound, Unreachable
from vlmflow.evaluation import prompts, table_file
from vlmflow.evaluation.pictures import encode_image
from vlmflow.evaluation.tsv import Question, Table, write_table

HERE = ["127.0.0.1"]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (9, 7), (shade, 0, 255 - shade))


ROWS = [
    {"index": "1", "question": "Which\nanimal?", "A": "cat", "B": 'a "big" dog', "answer": "B", "image": picture(10)},
    {"index": "2", "question": "tab\there", "A": "x", "B": "y", "C": "z", "answer": "c", "image": "1", "category": "k"},
    {
        "index": "3",
        "question": "哪个?",
        "A": "1",
        "B": "2",
        "answer": "A",
        "image": [picture(20), picture(30)],
        "hint": "h",
    },
]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    write_table(path, ROWS)
    table = Table(path, "multiple_choice")
    assert [q.index for q in table] == ["1", "2", "3"]
    assert table[0].question == "Which\nanimal?" and table[0].options == {"A": "cat", "B": 'a "big" dog'}
    assert table[1].question == "tab\there" and table[1].category == "k" and list(table[1].options) == ["A", "B", "C"]
    assert [q.group for q in table] == ["1", "1", "3"]
    assert table.images(table[1])[0].getpixel((0, 0)) == (10, 0, 245)  # the image of row 1
    assert [i.getpixel((0, 0))[0] for i in table.images(table[2])] == [20, 30]


def test_equal_copies_of_an_image_belong_together(tmp_path: Path) -> None:
    images = [picture(1), picture(2), picture(1), "b", [picture(2), picture(3)]]
    rows = [{"index": i, "question": "?", "answer": "x", "image": m} for i, m in zip("abcde", images, strict=True)]
    write_table(tmp_path / "t.tsv", rows)
    assert [q.group for q in Table(tmp_path / "t.tsv", "reading")] == ["a", "b", "a", "b", "b"]


def test_no_picture_of_a_row_is_on_the_other_side_of_the_split(tmp_path: Path) -> None:
    """Also its second picture, one that is only referred to, and rows joined by a third."""
    images = [picture(1), [picture(2), picture(1)], picture(3), picture(4), [picture(4), picture(3)], "d", picture(5)]
    rows = [{"index": i, "question": "?", "answer": "x", "image": m} for i, m in zip("abcdefg", images, strict=True)]
    write_table(tmp_path / "t.tsv", rows)
    assert [q.group for q in Table(tmp_path / "t.tsv", "reading")] == ["a", "a", "c", "c", "c", "c", "g"]


def test_equal_rows_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / name, ROWS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_reads_what_pandas_style_writers_make(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    """Byte order mark, CRLF, a Python list of images, a data URL, columns in any order, "nan" for empty."""
    image = encode_image(picture(1))
    path = tmp_path / "t.tsv"
    with open(path, "w", encoding="utf-8-sig", newline="") as f:
        writer = csv.writer(f, delimiter="\t")
        writer.writerow(["image", "answer", "question", "index", "hint", "odd"])
        writer.writerow([str([image, image]), "7", "what?", "10", "nan", ""])
        writer.writerow(["data:image/png;base64," + image, "8", "what?", "11", "", ""])
    table = Table(path, "reading")
    assert [len(table.images(q)) for q in table] == [2, 1]
    assert table[0].hint == ""
    assert csv.field_size_limit() == before  # the global limit is untouched


def test_text_only_table_has_no_images(tmp_path: Path) -> None:
    write_table(tmp_path / "t.tsv", [{"index": 1, "question": "2+2?", "answer": "4"}])
    table = Table(tmp_path / "t.tsv", "reading")
    assert table.images(table[0]) == []


def row(**change: object) -> dict[str, object]:
    return {"index": "5", "question": "?", "A": "x", "B": "y", "answer": "A", "image": picture(0)} | change


@pytest.mark.parametrize(
    ("rows", "kind", "words"),
    [
        ([row(answer="D")], "multiple_choice", ["row 5", "column answer", "'D'", "A, B"]),
        ([row(answer="")], "multiple_choice", ["row 5", "column answer", "empty"]),
        ([row(B="")], "multiple_choice", ["row 5", "1 options", "at least 2"]),
        ([row(), row()], "multiple_choice", ["row 5", "column index", "twice", "line 3"]),
        ([row(image="77")], "multiple_choice", ["row 5", "column image", "'77'", "no row"]),
        ([row(image="5")], "multiple_choice", ["row 5", "column image", "itself"]),
        ([row(image="")], "multiple_choice", ["row 5", "column image", "empty"]),
        ([row(index="")], "multiple_choice", ["line 2", "column index", "empty"]),
        ([row(answer="maybe")], "yes_no", ["row 5", "column answer", "'maybe'", "Yes or No"]),
        ([{"index": 1, "question": "?"}], "reading", ["column answer is missing", "index, question"]),
        ([{"index": 1, "question": "?", "answer": "A"}], "multiple_choice", ["column A, B is missing"]),
        ([], "reading", ["column index, question, answer is missing"]),
    ],
)
def test_refusals_name_row_and_column(tmp_path: Path, rows: list, kind: str, words: list[str]) -> None:
    write_table(tmp_path / "bad.tsv", rows)
    with pytest.raises(DataError) as error:
        Table(tmp_path / "bad.tsv", kind)
    for word in ["bad.tsv", *words]:
        assert word in str(error.value)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("index\tquestion\tanswer\n1\ta\tb\tc\n")
    with pytest.raises(DataError, match=r"row '1'.*4 cells.*3 columns"):
        Table(path, "reading")
    path.write_text('index\tquestion\tanswer\n1\t"open\tb\n2\tc\td\n')
    with pytest.raises(DataError, match=r"line 3: not a tab-separated table.*quote"):
        Table(path, "reading")
    path.write_bytes(b"index\tquestion\tanswer\n1\t\xff\tb\n")
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        Table(path, "reading")
    path.write_text("index\tquestion\tanswer\n")
    with pytest.raises(DataError, match="no rows"):
        Table(path, "reading")
    with pytest.raises(DataError, match="no such benchmark table"):
        Table(tmp_path / "none.tsv", "reading")
    with pytest.raises(DataError, match="known kinds: reading"):
        Table(path, "essay")


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    cut = base64.b64encode(base64.b64decode(encode_image(Image.effect_noise((64, 64), 50)))[:900]).decode()
    junk = base64.b64encode(b"x" * 300).decode()
    rows = [row(index=str(i), image=v) for i, v in enumerate(["*" * 80, "AAAAA" * 20 + "A", junk, cut])]
    write_table(tmp_path / "t.tsv", rows)
    table = Table(tmp_path / "t.tsv", "multiple_choice")
    for question, words in zip(table, ["not base64", "not base64", "do not decode", "do not decode"], strict=True):
        with pytest.raises(DataError, match=f"row {question.index}, column image.*{words}"):
            table.images(question)


def test_enormous_image_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmflow.evaluation.pictures.MAX_PIXELS", 60)
    write_table(tmp_path / "t.tsv", [row()])
    table = Table(tmp_path / "t.tsv", "multiple_choice")
    with pytest.raises(DataError, match="9x7 = 63 pixels, over the limit of 60"):
        table.images(table[0])


def test_memory_holds_no_pixels(tmp_path: Path) -> None:
    import tracemalloc

    noise = Image.effect_noise((256, 256), 90)
    write_table(tmp_path / "t.tsv", [row(index=str(i), image=noise) for i in range(60)])
    size = (tmp_path / "t.tsv").stat().st_size
    tracemalloc.start()
    table = Table(tmp_path / "t.tsv", "multiple_choice")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 60 and peak < size / 5


def test_prompts() -> None:
    options = {"A": "cat", "B": "dog"}
    choice = Question("1", "Which?", "A", hint="Look.", options=options)
    assert prompts.build(choice, "multiple_choice") == (
        "Look.\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert prompts.build(Question("1", "哪个?", "A", options=options), "multiple_choice").endswith(
        "\n请直接回答选项字母。"
    )
    assert prompts.build(Question("1", "Cat?", "Yes"), "yes_no") == "Cat?\nPlease answer yes or no."
    assert prompts.build(Question("1", "Cat?", "Yes"), "yes_no", " Yes or no?") == "Cat? Yes or no?"
    assert prompts.build(Question("1", "Cat?", "Yes"), "yes_no", "none") == "Cat?"
    assert prompts.build(Question("1", "Read.", "7"), "reading", "") == "Read."
    assert prompts.build(Question("1", "Read.", "7"), "reading", "One word.") == "Read.\nOne word."


def test_table_over_http_follows_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, scratch = tmp_path / "served", tmp_path / "scratch"
    served.mkdir()
    (served / "a.tsv").write_text("one")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}/a.tsv"
    try:
        assert table_file.local_table(uri, scratch, HERE).read_text() == "one"
        monkeypatch.setattr(table_file, "_fetched", {})  # a new process: the server says 304
        assert table_file.local_table(uri, scratch, HERE).read_text() == "one"
        (served / "a.tsv").write_text("three")
        os.utime(served / "a.tsv", (2e9, 2e9))
        monkeypatch.setattr(table_file, "_fetched", {})
        assert table_file.local_table(uri, scratch, HERE).read_text() == "three"
        with pytest.raises(NotFound, match="404"):
            table_file.local_table(uri + ".gone", scratch, HERE)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(AccessDenied, match=r"127\.0\.0\.1 is 127\.0\.0\.1.*pull\.allow_hosts"):
        table_file.local_table(uri + "?private", scratch)
    with pytest.raises(Unreachable, match="3 attempts"):
        table_file.local_table(uri + "?other", scratch, HERE)
    assert table_file.local_table(str(served / "a.tsv"), scratch) == served / "a.tsv"
    with pytest.raises(NotFound, match=r"none\.tsv"):
        table_file.local_table(str(tmp_path / "none.tsv"), scratch)
