"""Benchmarks as VLMEvalKit TSV files, because that is the format teams already have their private benchmarks in.

Columns: `index`, `question`, `answer`; optional `hint`, the options `A`..`Z`, `category`, `l2-category`, `split` and
`image`. An image is base64; a value of at most 64 characters is the index of another row whose image is meant; several
images are a JSON list of either. (spec: data-eval-soup 7.2.)

A benchmark of a gigabyte must not be held in memory: `Table` reads the file once, keeps the text columns and the byte
range of every record, and reads an image again only when it is asked for.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import json
import string
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vlmflow.errors import DataError
from vlmflow.evaluation.groups import REFERENCE_CHARS, ImageGroups
from vlmflow.evaluation.pictures import decode_image, encode_image
from vlmflow.storage_file import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = ("reading", "multiple_choice", "yes_no")
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """One row without its pixels. `images` holds, per image, the index of the row that stores it and the place in that
    row's list; `group` names the rows that share a picture with this one (see groups)."""

    index: str
    question: str
    answer: str
    hint: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    category: str = ""
    l2_category: str = ""
    split: str = ""
    images: tuple[tuple[str, int], ...] = ()
    group: str = ""

    @property
    def answers(self) -> tuple[str, ...]:
        """The accepted answers: the value itself, or its items when it is a JSON list of strings or numbers."""
        return tuple(_as_list(self.answer) or [self.answer])


class Table:
    """Rows of one TSV file in file order. `len`, iteration and `[i]` give `Question`s; `images(question)` decodes
    pixels.

    Raises DataError, always with the file, row index and column: missing column, duplicate index, empty answer, an
    answer that names no option, a reference to a row that is not there, bad base64, an image that does not decode.
    """

    def __init__(self, path: str | Path, kind: str, name: str = "") -> None:
        if kind not in KINDS:
            raise DataError(f"benchmark kind {kind!r} is not known; known kinds: {', '.join(KINDS)}")
        self.path, self.kind, self.name = Path(path), kind, name or Path(path).stem
        self.columns, self.questions, self._ranges = _scan(self.path, kind)

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)

    def __getitem__(self, i: int) -> Question:
        return self.questions[i]

    def images(self, question: Question) -> list[Image]:
        """The decoded RGB images of a question. Raises DataError naming row and column."""
        found = []
        for index, place in question.images:
            values = _image_values(self._cell(index))
            found.append(decode_image(values[place], f"{self.path}: row {index}, column image"))
        return found

    def _cell(self, index: str) -> str:
        start, stop = self._ranges[index]
        with open(self.path, "rb") as f:
            f.seek(start)
            text = f.read(stop - start).decode("utf-8")
        with _wide_fields():
            row = next(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
        return row[self.columns.index("image")]


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a VLMEvalKit TSV, atomically. A PIL image under `image` (or a list of them) is encoded as PNG; a
    string is taken as it stands (base64 or another row's index). Columns: the union over the rows, in the usual order.
    The bytes depend on the rows only."""
    rows = [dict(row) for row in rows]
    names = {name for row in rows for name in row}
    usual = ["index", "question", "hint", *LETTERS, "answer", "category", "l2-category", "split"]
    columns = [c for c in usual if c in names] + sorted(names - set(usual) - {"image"})
    columns += ["image"] if "image" in names else []
    path = Path(path)

    def fill(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_image_text(row.get(c, "")) if c == "image" else row.get(c, "") for c in columns])
        text.detach()

    write_atomically(path, fill)


def _image_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return json.dumps([v if isinstance(v, str) else encode_image(v) for v in value])
    return encode_image(value)


def _as_list(value: str) -> list[str] | None:
    """JSON or Python list text -> its items as text; None when the value is not a list."""
    value = value.strip()
    if not (value.startswith("[") and value.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):  # VLMEvalKit writes Python lists
        try:
            items = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(items, list) and items and all(isinstance(i, str | int | float) for i in items):
            return [str(i) for i in items]
    return None


def _image_values(cell: str) -> list[str]:
    return _as_list(cell) or [cell.strip()]


@contextlib.contextmanager
def _wide_fields() -> Iterator[None]:
    """csv's field limit (128 KiB) is far below an image; the limit is global, so it is put back."""
    old = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(old)


class _Records:
    """csv records with their byte ranges: csv pulls whole lines, so the bytes pulled when a record ends are its end."""

    def __init__(self, f: Iterable[bytes], path: Path) -> None:
        self.f, self.path, self.pulled, self.lines = iter(f), path, 0, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.f:
            self.lines += 1
            bom = self.lines == 1 and line.startswith(b"\xef\xbb\xbf")
            self.pulled += len(line)
            try:
                yield line.decode("utf-8-sig" if bom else "utf-8")
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{self.path}: line {self.lines} is not UTF-8 ({e}). Save the table as UTF-8."
                ) from None


def _scan(path: Path, kind: str) -> tuple[list[str], list[Question], dict[str, tuple[int, int]]]:
    if not path.is_file():
        raise DataError(f"{path}: no such benchmark table")
    raw: list[tuple[dict[str, str], list[str]]] = []  # text columns; image references ("" = stored in this row)
    ranges: dict[str, tuple[int, int]] = {}
    groups = ImageGroups()
    with open(path, "rb") as f, _wide_fields():
        records = _Records(f, path)
        reader = csv.reader(iter(records), delimiter="\t", strict=True)
        try:
            columns = [c.strip() for c in next(reader, [])]
            _check_columns(path, columns, kind)
            start = records.pulled
            for cells in reader:
                stop = records.pulled
                if cells:
                    row = _row(path, columns, cells, records.lines)
                    if row["index"] in ranges:
                        raise DataError(
                            f"{path}: row {row['index']}, column index: this index is used twice "
                            f"(second time on line {records.lines}). Indices must be unique."
                        )
                    ranges[row["index"]] = (start, stop)
                    groups.add(row["index"], _image_values(row["image"]) if "image" in row else [])
                    raw.append((row, _references(path, row)))
                start = stop
        except csv.Error as e:
            raise DataError(
                f"{path}: line {records.lines}: not a tab-separated table ({e}). A cell that begins with a "
                "quote must end with one, and quotes inside it are doubled."
            ) from None
    if not raw:
        raise DataError(f"{path}: the table has no rows, so there is nothing to score")
    stored = {row["index"]: refs for row, refs in raw}
    return columns, [_question(path, row, refs, stored, groups, kind) for row, refs in raw], ranges


def _check_columns(path: Path, columns: Sequence[str], kind: str) -> None:
    needed = ["index", "question", "answer"] + (["A", "B"] if kind == "multiple_choice" else [])
    missing = [c for c in needed if c not in columns]
    if missing:
        raise DataError(
            f"{path}: column {', '.join(missing)} is missing for a {kind} benchmark; "
            f"found: {', '.join(columns) or 'nothing'}. Needed: {', '.join(needed)}."
        )
    double = sorted({c for c in columns if columns.count(c) > 1})
    if double:
        raise DataError(f"{path}: column {', '.join(double)} appears twice in the header")


def _row(path: Path, columns: Sequence[str], cells: Sequence[str], line: int) -> dict[str, str]:
    if len(cells) != len(columns):
        raise DataError(
            f"{path}: row {cells[0][:40]!r} (ends on line {line}) has {len(cells)} cells, "
            f"the header has {len(columns)} columns. A tab inside a text must be quoted."
        )
    row = dict(zip(columns, cells, strict=True))
    row["index"] = row["index"].strip()
    if not row["index"]:
        raise DataError(f"{path}: line {line}, column index: empty. Every row needs an index.")
    return row


def _references(path: Path, row: dict[str, str]) -> list[str]:
    """What each image of the row is: "" = stored here, otherwise another row's index. Drops the pixels from `row`."""
    if "image" not in row:
        return []
    cell = row.pop("image")
    if not cell.strip():
        raise DataError(
            f"{path}: row {row['index']}, column image: empty. Give base64 or another row's index, "
            "or leave the column out of a table without images."
        )
    return ["" if len(v) > REFERENCE_CHARS else v for v in _image_values(cell)]


def _question(
    path: Path,
    row: dict[str, str],
    refs: list[str],
    stored: Mapping[str, list[str]],
    groups: ImageGroups,
    kind: str,
) -> Question:
    index, images = row["index"], []
    for place, ref in enumerate(refs):
        if not ref:
            images.append((index, place))
            continue
        target = stored.get(ref)
        if target is None:
            raise DataError(
                f"{path}: row {index}, column image: {ref!r} has at most {REFERENCE_CHARS} characters, so "
                "it is another row's index, but no row has that index. Base64 images are longer."
            )
        if any(target):
            raise DataError(
                f"{path}: row {index}, column image: refers to row {ref}, which is itself a reference "
                "(or refers to itself). A reference must point at a row that holds the image."
            )
        images += [(ref, i) for i in range(len(target))]
    options = {c: row[c].strip() for c in LETTERS if row.get(c, "").strip() not in ("", "nan")}
    answer = row["answer"].strip()
    _check_answer(path, index, kind, answer, options)
    optional = {name: row.get(name, "").strip() for name in ("hint", "category", "l2-category", "split")}
    optional = {k: "" if v == "nan" else v for k, v in optional.items()}
    return Question(
        index,
        row["question"].strip(),
        answer,
        optional["hint"],
        options if kind == "multiple_choice" else {},
        optional["category"],
        optional["l2-category"],
        optional["split"],
        tuple(images),
        groups.of(index),
    )


def _check_answer(path: Path, index: str, kind: str, answer: str, options: Mapping[str, str]) -> None:
    where = f"{path}: row {index}, column answer"
    if not answer:
        raise DataError(f"{where}: empty. An empty answer would match every empty reply.")
    if kind == "multiple_choice":
        if len(options) < 2:
            raise DataError(
                f"{where}: the row has {len(options)} options; multiple choice needs at least 2 (A, B, ...)."
            )
        if answer.upper() not in options:
            raise DataError(f"{where}: {answer!r} is not among the row's options {', '.join(options)}.")
    if kind == "yes_no" and answer.casefold() not in ("yes", "no"):
        raise DataError(f"{where}: {answer!r}; a yes_no benchmark needs Yes or No.")
