"""The benchmark of OCR: its pages, its error rate, and the gate before any time counts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("curation_parts.ocr"), importlib.import_module("curation_parts.ocr_pages")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_pages_are_mixed_and_the_same_every_time(parts):
    _, made = parts
    one, other = made.pages(1, seed=4), made.pages(1, seed=4)
    assert [page.jpeg for page in one] == [page.jpeg for page in other] and one != made.pages(1, seed=5)
    assert {page.kind: len(page.lines) for page in one} == {k.name: k.lines * k.columns for k in made.KINDS}
    assert len(one) == sum(kind.share for kind in made.KINDS)


@pytest.mark.parametrize(
    ("truth", "read", "edits"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("same", "same", 0),
        ("a  b\nc", "a b c", 0),
        ("ab", "ba", 2),
    ],
)
def test_character_error_rate(parts, truth, read, edits):
    _, made = parts
    assert made.character_error_rate([(truth, read), ("x" * 10, "x" * 10)]) == pytest.approx(
        edits / (len(" ".join(truth.split())) + 10)
    )


def test_no_time_counts_when_texts_differ(parts):
    part, _ = parts
    truth = ["a line of text\nand another one"] * 20
    same = part._gate({"texts": truth}, {"texts": truth}, truth)
    assert same == {"lines": 40, "identical": 40, "cer": 0.0, "cer_rapidocr": 0.0}
    worse = [truth[0].replace("another", "an other"), truth[0].replace("line", "lime"), *truth[2:]]
    with pytest.raises(SystemExit, match="equality gate: 38 of 40 lines identical"):
        part._gate({"texts": worse}, {"texts": truth}, truth)
