"""The pictures and questions of all benchmarks of a recipe, ready to be asked which of them a sample shows or says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmflow import storage
from vlmflow.curation.words import words
from vlmflow.digest import digest, sha256_file
from vlmflow.errors import DataError, NotFound
from vlmflow.vision import phash
from vlmflow.vision.near import Index, blocks

if TYPE_CHECKING:
    from vlmflow.evaluation.tsv import Question
    from vlmflow.step import Context

VERSION = 1  # of what is stored of a benchmark
HOW = ("image", "image without border", "mirrored image", "words")
COMMON = 5  # a run of words that more questions than this share is boilerplate ("answer with a single word ...")
SHORTEST = 5  # words of a question that says enough to be met as a whole; "what is this?" meets everything
PLACE = "<image>"


@dataclass(frozen=True)
class Match:
    """A sample meets a benchmark item: its place in `Pool.items`, how, and by how many bits (None for words)."""

    item: int
    how: str
    distance: int | None


class Pool:
    """All benchmark items.

    Attributes:
        items: (benchmark, index in its table) of each.
        tables: sha256 of each benchmark's table.
    """

    def __init__(
        self, items: list[tuple[str, str]], hashes: Sequence[Sequence[Sequence[int]]], questions: Sequence[str],
        distance: int, ngram: int, tables: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """`hashes`: per item, per picture (plain, trimmed, mirrored); `questions`: per item."""
        self.items, self.tables, self._ngram = items, tables or {}, ngram
        holders: dict[int, dict[int, int]] = {}  # hash -> item -> the view that has it, plain before the others
        for item, pictures in enumerate(hashes):
            for views in pictures:
                for view, value in enumerate(views):
                    if value != phash.FLAT:
                        holders.setdefault(value, {}).setdefault(item, view)
        values = sorted(holders)
        self._holders = [holders[value] for value in values]
        self._index = Index(np.array(values, dtype=np.uint64), distance)
        self._runs, self._whole = _runs(questions, ngram)

    @staticmethod
    def read(ctx: Context, distance: int, ngram: int) -> Pool:
        """The pool of `evaluation.benchmarks`; hashes of a table's pictures are computed once and found again in the store.

        Raises:
            DataError: a broken table (file, row, column).
        """
        from vlmflow.evaluation.table_file import table_of
        from vlmflow.evaluation.tsv import Table

        items, hashes, questions, tables = [], [], [], {}
        for name, spec in sorted(ctx.recipe.evaluation.benchmarks.items()):
            path = table_of(ctx, spec)
            table = Table(path, spec.kind, name)
            tables[name] = sha256_file(path)
            items += [(name, question.index) for question in table]
            questions += [question.question for question in table]
            hashes += _hashes(ctx, table, tables[name])
        return Pool(items, hashes, questions, distance, ngram, tables)

    def pictures(self, samples: Sequence[tuple[Sequence[int], ...]]) -> dict[int, list[Match]]:
        """Items whose picture a sample shows, by the sample's place.

        Args:
            samples: lists of hashes of each sample's pictures: plain, trimmed, mirrored.
        """
        asked = [
            (value, place, view)
            for place, views in enumerate(samples)
            for view, values in enumerate(views)
            for value in values
            if value != phash.FLAT
        ]
        values = np.array([value for value, _, _ in asked], dtype=np.uint64)
        found: dict[int, dict[int, Match]] = {}
        for part in blocks(self._index.cost(values)):
            for query, near, bits in zip(*(array.tolist() for array in self._index.search(values[part])), strict=True):
                _, place, view = asked[part.start + query]
                for item, its_view in self._holders[near].items():
                    match = Match(item, _how(view, its_view), bits)
                    known = found.setdefault(place, {}).get(item)
                    if known is None or (bits, HOW.index(match.how)) < (known.distance, HOW.index(known.how)):
                        found[place][item] = match
        return {place: list(matches.values()) for place, matches in found.items()}

    def words(self, texts: Iterable[str]) -> list[Match]:
        """Items whose question a sample says: `ngram` of its words in a row, or all of a shorter one as a text or line."""
        met: set[int] = set()
        for text in texts:
            said = words(text.replace(PLACE, " "))
            for run in _grams(said, self._ngram):
                met.update(self._runs.get(run, ()))
            for line in {text, *text.split("\n")}:
                whole = tuple(said) if line is text else tuple(words(line.replace(PLACE, " ")))
                met.update(self._whole.get(whole, ()))
        return [Match(item, "words", None) for item in sorted(met)]


def _how(view: int, other: int) -> str:
    if (view == 2) != (other == 2):
        return "mirrored image"
    return "image" if view == other != 1 else "image without border"


def _runs(questions: Sequence[str], ngram: int) -> tuple[dict[int, list[int]], dict[tuple[str, ...], list[int]]]:
    """Items by run of words (its hash in this process), and by all words where a question is shorter than a run."""
    runs: dict[int, list[int]] = {}
    whole: dict[tuple[str, ...], list[int]] = {}
    wordings: dict[tuple[str, ...], list[int]] = {}
    for item, question in enumerate(questions):
        wordings.setdefault(tuple(words(question.replace(PLACE, " "))), []).append(item)
    shared: dict[int, int] = {}
    for said in wordings:
        for run in set(_grams(said, ngram)):
            shared[run] = shared.get(run, 0) + 1
    for said, items in wordings.items():
        if len(said) < ngram:
            if len(said) >= SHORTEST and len(items) <= COMMON:
                whole[said] = items
            continue
        for run in set(_grams(said, ngram)):
            if shared[run] <= COMMON:
                runs.setdefault(run, []).extend(items)
    return runs, whole


def _grams(said: Sequence[str], size: int) -> Iterator[int]:
    return (hash(tuple(said[i : i + size])) for i in range(len(said) - size + 1))


def _hashes(ctx: Context, table: Any, sha256: str) -> list[list[list[int]]]:
    """Hashes of every item's pictures, in table order."""
    name = digest({"table": sha256, "kind": table.kind, "version": VERSION})[:32]
    uri = storage.join(ctx.root, "benchmarks", f"{name}.json")
    with suppress(NotFound, DataError):  # a damaged one is made again
        return storage.read_json(uri)
    known: dict[tuple[str, int], list[int]] = {}
    found = []
    with ctx.progress(f"hash {table.name}", len(table), "questions") as progress:
        for question in table:
            found.append(_of(question, table, known))
            progress.advance()
    storage.write_json(uri, found)
    return found


def _of(question: Question, table: Any, known: dict[tuple[str, int], list[int]]) -> list[list[int]]:
    """Hashes of one question's pictures; pictures that rows share are decoded once."""
    if any(image not in known for image in question.images):
        for image, picture in zip(question.images, table.images(question), strict=True):
            known[image] = list(phash.hashes(picture))
    return [known[image] for image in question.images]
