"""The evaluation step: every benchmark of the recipe, one split, one model -> Scores.

Each finished benchmark lies in the store under a digest of everything that decides its replies (model files, table,
split, prompt and generation settings, matcher version), so a rerun, a second step or a soup search that meets the same
model again reads it instead of generating. A killed run loses at most the benchmark it was in.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vlmflow import storage
from vlmflow.digest import digest, sha256_file
from vlmflow.errors import DataError, RecipeError
from vlmflow.evaluation import prompts
from vlmflow.evaluation.ask import Generates, ask
from vlmflow.evaluation.match import MATCHER_VERSION, clean, normalise
from vlmflow.evaluation.scores import BenchmarkScore, Scores, Split, wilson
from vlmflow.evaluation.split import divide
from vlmflow.evaluation.table_file import table_of
from vlmflow.evaluation.tsv import Question, Table
from vlmflow.models import store

if TYPE_CHECKING:
    from vlmflow.step import Context

VERSION = 2  # of this file and of how pictures are decoded: what is stored and how it is counted
CHUNK = 8  # batches whose images are held in memory at once


@dataclass(frozen=True)
class _Plan:
    """One benchmark to score: its recipe entry, file, and the digest of all that decides the result."""

    name: str
    spec: Any
    path: Path
    sha256: str
    settings: dict[str, Any]
    uri: str


def run(ctx: Context, model: store.ModelRef, split: Split) -> Scores:
    """Score `model` on one split ("selection" or "report") of every benchmark in `recipe.evaluation`.

    The same model, tables and settings are answered from the store without loading the model. Raises RecipeError for an
    unknown split or an evaluation without benchmarks, DataError for a broken table (file, row, column).
    """
    return evaluate(ctx, model.files, model.weights_sha256, lambda: store.fetch(model, ctx.scratch), split)


def evaluate(
    ctx: Context, files: Sequence[store.FileRef], weights_sha256: str, folder: Callable[[], Path], split: Split
) -> Scores:
    """`run` for a model that need not be published: its file hashes, its weight hash, and a way to get its folder."""
    if split not in get_args(Split):
        raise RecipeError(f"split {split!r} is not known; known splits: {', '.join(get_args(Split))}")
    plans = [_plan(ctx, name, files, split) for name in sorted(ctx.recipe.evaluation.benchmarks)]
    if not plans:
        raise RecipeError("evaluation.benchmarks is empty; a score needs at least one benchmark")
    results: dict[str, BenchmarkScore] = {}
    vlm: Generates | None = None
    for plan in plans:
        marker = storage.join(plan.uri, "score.json")
        if (known := storage.read_finished(marker, BenchmarkScore)) is not None:
            results[plan.name] = known
            continue
        if vlm is None:
            vlm = _load(folder())
        results[plan.name] = _score(ctx, plan, vlm, split)
        storage.write_json(marker, results[plan.name].model_dump(mode="json"))
    mean = sum(r.accuracy for r in results.values()) / len(results)
    return Scores(model_sha=weights_sha256, split=split, benchmarks=results, mean=mean)


def settings_digest(ctx: Context, split: Split) -> str:
    """Digest of all that decides a score except the model: tables, split, settings, versions. Caches of scores that are
    keyed by something else than model files (ingredient sets) need it in their key."""
    return digest([_plan(ctx, name, [], split).uri for name in sorted(ctx.recipe.evaluation.benchmarks)])


def _load(folder: Path) -> Generates:
    from vlmflow.models import inference

    return inference.load(folder)


def _plan(ctx: Context, name: str, files: Sequence[store.FileRef], split: Split) -> _Plan:
    evaluation = ctx.recipe.evaluation
    spec = evaluation.benchmarks[name]
    path = table_of(ctx, spec)
    sha256 = sha256_file(path)
    settings = {
        "kind": spec.kind,
        "suffix": spec.suffix,
        "numbers": spec.numbers,
        "max_tiles": spec.max_tiles,
        "max_new_tokens": spec.max_new_tokens or evaluation.max_new_tokens,
        "chance": spec.chance,
        "selection_fraction": evaluation.selection_fraction,
        "seed": ctx.recipe.seed,
    }
    key = digest(
        [store.behaviour_digest(files), sha256, split, settings, MATCHER_VERSION, prompts.PROMPT_VERSION, VERSION]
    )
    return _Plan(name, spec, path, sha256, settings, storage.join(ctx.root, "scores", key[:32]))


def _score(ctx: Context, plan: _Plan, vlm: Generates, split: Split) -> BenchmarkScore:
    table = Table(plan.path, plan.spec.kind, plan.name)
    sides, split_by = divide(table.questions, ctx.recipe.seed, ctx.recipe.evaluation.selection_fraction, str(plan.path))
    questions = sides[split]
    rows: list[dict[str, Any]] = []
    with ctx.progress(f"evaluate {plan.name}", len(questions), "questions") as progress:
        for chunk in _chunks(questions, ctx.recipe.evaluation.batch * CHUNK):
            rows += ask(vlm, table, chunk, plan.settings, ctx.recipe.evaluation.batch, progress.advance)
            progress.note(f"accuracy {sum(r['correct'] for r in rows) / len(rows):.3f}")
    if all(r["error"] for r in rows):
        first = rows[0]["error"]
        raise DataError(f"benchmark {plan.name}: none of its {len(rows)} questions could be asked; first: {first}")
    predictions = storage.join(plan.uri, "predictions.parquet")
    storage.write_bytes(predictions, _parquet(rows))
    right, n = sum(r["correct"] for r in rows), len(rows)
    return BenchmarkScore(
        accuracy=right / n,
        n=n,
        chance=chance(questions, plan.spec.kind) if plan.spec.chance is None else plan.spec.chance,
        majority=max(Counter(q.answer.casefold() for q in questions).values()) / n,
        parsed=sum(r["extracted"] is not None for r in rows) / n,
        errors=sum(bool(r["error"]) for r in rows),
        interval=wilson(right, n),
        kind=plan.spec.kind,
        table_sha256=plan.sha256,
        split_by=split_by,
        categories=_categories(rows),
        predictions=predictions,
    )


def chance(questions: Sequence[Question], kind: str) -> float:
    """Expected accuracy of guessing: yes_no 1/2; multiple_choice the mean of 1 / options; reading 1 / distinct gold
    answers of these questions, compared as replies are (a guesser who knows the answers but not the images)."""
    if kind == "yes_no":
        return 0.5
    if kind == "multiple_choice":
        return sum(1 / len(q.options) for q in questions) / len(questions)
    return 1 / len({frozenset(normalise(answer) or clean(answer) for answer in q.answers) for q in questions})


def _categories(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    found: dict[str, list[bool]] = {}
    for row in rows:
        if row["category"]:
            found.setdefault(row["category"], []).append(row["correct"])
    return {name: (sum(right) / len(right), len(right)) for name, right in sorted(found.items())}


def _chunks(items: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = ("index", "category", "prompt", "answer", "reply", "finish", "extracted", "rule", "error")
    schema = pa.schema([(name, pa.bool_() if name == "correct" else pa.string()) for name in (*text, "correct")])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return buffer.getvalue()
