"""The evaluation step around a fake model: splits, counting, caching, and what a rerun does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from evaluation_fake_vlm import Request, install
from PIL import Image

from vlmflow import storage
from vlmflow.errors import DataError, RecipeError
from vlmflow.evaluation.run import chance, run, settings_digest
from vlmflow.evaluation.scores import Scores, wilson
from vlmflow.evaluation.split import divide
from vlmflow.evaluation.tsv import Question, write_table
from vlmflow.models.store import ModelLineage, publish
from vlmflow.recipe.results import BenchmarkSpec, EvaluationSpec
from vlmflow.step import Context


def shade(value: int, copy: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, copy, 0))


def answer(folder: Path, request: Request) -> str:
    """Reads the number that is the image's red value; is always right about choices and says yes."""
    if "letter" in request.prompt:
        return "The answer is B"
    if "yes or no" in request.prompt:
        return "Not sure" if "third" in request.prompt else "Yes"
    return str(request.images[0].getpixel((0, 0))[0])


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    digits = [{"index": i, "question": "Read.", "answer": str(i % 10), "image": shade(i % 10, i)} for i in range(60)]
    choice = [
        {"index": i, "question": "Which?", "A": "x", "B": "y", "C": "z" if i % 2 else "", "answer": "AB"[i % 4 > 0],
         "image": shade(i), "category": f"c{i % 2}", "split": "selection" if i < 8 else "report"}
        for i in range(24)
    ]  # fmt: skip
    yes = [
        {"index": i, "question": "third?" if i % 3 == 0 else "x?", "answer": "Yes", "image": shade(i)}
        for i in range(30)
    ]
    for name, rows in (("digits", digits), ("choice", choice), ("yes", yes)):
        write_table(tmp_path / f"{name}.tsv", rows)
    evaluation = EvaluationSpec(
        benchmarks={
            "digits": BenchmarkSpec(table=str(tmp_path / "digits.tsv"), kind="reading", max_new_tokens=3),
            "choice": BenchmarkSpec(table=str(tmp_path / "choice.tsv"), kind="multiple_choice", max_tiles=12),
            "yes": BenchmarkSpec(table=str(tmp_path / "yes.tsv"), kind="yes_no"),
        },
        batch=2,
    )
    recipe: Any = SimpleNamespace(name="t", seed=17, evaluation=evaluation, soup=None)
    return Context(recipe, root=str(tmp_path / "root"), scratch=tmp_path / "scratch", run_id="test")


def model(ctx: Context, tmp_path: Path, content: bytes = b"weights") -> Any:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return publish(ctx, folder, "m", ModelLineage(step="test", ancestor="a"), key=f"m-{content.hex()[:8]}")


def test_scores(ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch, answer)
    ref = model(ctx, tmp_path)
    scores = run(ctx, ref, "report")
    digits, choice, yes = (scores.benchmarks[n] for n in ("digits", "choice", "yes"))
    assert scores.model_sha == ref.weights_sha256 and scores.split == "report"
    assert digits.accuracy == 1.0 and digits.parsed == 1.0 and digits.chance == pytest.approx(0.1)
    assert choice.n == 16 and choice.accuracy == pytest.approx(12 / 16) and choice.split_by == "column"
    assert choice.chance == pytest.approx((1 / 2 + 1 / 3) / 2) and choice.categories == {"c0": (0.5, 8), "c1": (1.0, 8)}
    assert (yes.majority, choice.majority) == (1.0, 12 / 16)  # always "yes" would be right here: chance alone flatters
    assert yes.chance == 0.5 and yes.accuracy == yes.parsed < 1 and yes.split_by == "hash"
    assert scores.mean == pytest.approx((digits.accuracy + choice.accuracy + yes.accuracy) / 3)
    assert choice.interval[0] < choice.accuracy < choice.interval[1]
    asked = [e for e in log if "n" in e]
    assert {e["max_new_tokens"] for e in asked} == {3, 32}
    assert {e["max_tiles"] for e in asked} == {12, 4} and all(e["n"] <= 16 and e["batch"] == 2 for e in asked)
    scores.save(tmp_path / "s.json")
    assert Scores.load(tmp_path / "s.json") == scores


def test_predictions_are_kept(ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, answer)
    scores = run(ctx, model(ctx, tmp_path), "report")
    rows = pq.read_table(scores.benchmarks["yes"].predictions).to_pylist()
    assert len(rows) == scores.benchmarks["yes"].n
    third = next(r for r in rows if "third" in r["prompt"])
    assert third["reply"] == "Not sure" and third["rule"] == "yesno.unsure" and third["extracted"] is None
    assert third["error"] is None and not third["correct"]


def test_rerun_reads_and_does_not_generate(ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch, answer)
    ref = model(ctx, tmp_path)
    first = run(ctx, ref, "selection")
    files = {o.uri: storage.read_bytes(o.uri) for o in storage.list_uris(ctx.root)}
    log.clear()
    assert run(ctx, ref, "selection") == first
    assert log == []
    run(ctx, model(ctx, tmp_path, b"other"), "selection")  # other weights: asked again
    assert any("load" in e for e in log)
    log.clear()
    spec = ctx.recipe.evaluation.benchmarks["yes"]
    ctx.recipe.evaluation.benchmarks["yes"] = spec.model_copy(update={"suffix": "Say yes or no."})
    run(ctx, ref, "selection")  # one changed setting: that benchmark only
    assert sum(e.get("n", 0) for e in log) == first.benchmarks["yes"].n
    assert all(storage.read_bytes(uri) == data for uri, data in files.items())


def test_killed_and_started_again_gives_the_same_bytes(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = model(ctx, tmp_path)
    whole = Context(ctx.recipe, root=str(tmp_path / "whole"), scratch=ctx.scratch, run_id="test")
    install(monkeypatch, answer)
    expected = run(whole, ref, "report")
    count = 0

    def dies(folder: Path, request: Request) -> str:
        nonlocal count
        count += 1
        if count == 30:
            raise KeyboardInterrupt
        return answer(folder, request)

    install(monkeypatch, dies)
    with pytest.raises(KeyboardInterrupt):
        run(ctx, ref, "report")
    log = install(monkeypatch, answer)
    found = run(ctx, ref, "report")
    assert 0 < sum(e.get("n", 0) for e in log) < sum(b.n for b in expected.benchmarks.values())  # the first was kept

    def content(root: str) -> dict[str, bytes]:
        return {
            o.uri[len(root) :]: storage.read_bytes(o.uri).replace(root.encode(), b"") for o in storage.list_uris(root)
        }

    ours = {k: v for k, v in content(ctx.root).items() if "/models/" not in k}
    assert ours == content(whole.root)
    assert found.mean == expected.mean


def test_a_broken_image_is_counted_and_named(ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, answer)
    rows = [
        {"index": i, "question": "Read.", "answer": str(i), "split": ["report", "selection"][i % 2], "image": shade(i)}
        for i in range(8)
    ]
    rows[2]["image"] = "A" * 200
    write_table(tmp_path / "digits.tsv", rows)
    score = run(ctx, model(ctx, tmp_path), "report").benchmarks["digits"]
    assert (score.n, score.errors, score.accuracy, score.parsed) == (4, 1, 0.75, 0.75)
    broken = next(r for r in pq.read_table(score.predictions).to_pylist() if r["error"])
    assert broken["index"] == "2" and "row 2, column image" in broken["error"] and broken["rule"] == "error"
    for r in rows:
        r["image"] = "A" * 200
    write_table(tmp_path / "digits.tsv", rows)
    with pytest.raises(DataError, match="none of its 4 questions"):
        run(ctx, model(ctx, tmp_path), "report")


def test_a_question_the_model_refuses_costs_no_other(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install(monkeypatch, answer)
    rows = [
        {"index": i, "question": "Read." if i != 4 else "Read <image>.", "answer": str(i), "image": shade(i),
         "split": ["report", "selection"][i % 2]}
        for i in range(8)
    ]  # fmt: skip
    write_table(tmp_path / "digits.tsv", rows)
    score = run(ctx, model(ctx, tmp_path), "report").benchmarks["digits"]
    assert (score.n, score.errors, score.accuracy) == (4, 1, 0.75)
    found = pq.read_table(score.predictions).to_pylist()
    assert [r["reply"] for r in found] == ["0", "2", "", "6"]
    assert "refuses" in found[2]["error"] and [e["n"] for e in log if e.get("max_new_tokens") == 3] == [4, 1, 1, 1, 1]


def test_splits_are_disjoint_whole_and_stable() -> None:
    questions = [Question(str(i), "?", "x", group=str(i // 2)) for i in range(400)]
    first, by = divide(questions, 17, 0.4, "t")
    again, _ = divide(list(reversed(questions)), 17, 0.4, "t")
    sets = {side: {q.index for q in rows} for side, rows in first.items()}
    assert by == "hash" and not sets["selection"] & sets["report"] and len(sets["selection"] | sets["report"]) == 400
    assert sets == {side: {q.index for q in rows} for side, rows in again.items()}
    assert not {q.group for q in first["selection"]} & {q.group for q in first["report"]}  # an image is on one side
    assert 0.3 < len(sets["selection"]) / 400 < 0.5
    assert {q.index for q in divide(questions, 18, 0.4, "t")[0]["selection"]} != sets["selection"]
    grown, _ = divide([*questions, Question("new", "?", "x", group="new")], 17, 0.4, "t")
    assert sets["selection"] <= {q.index for q in grown["selection"]}  # new questions move no old one


def test_split_column() -> None:
    questions = [
        Question(str(i), "?", "x", split=s, group=str(i)) for i, s in enumerate(["selection", "report", "report"])
    ]
    sides, by = divide(questions, 1, 0.4, "t")
    assert by == "column" and [q.index for q in sides["report"]] == ["1", "2"]
    with pytest.raises(DataError, match="row 9, column split: 'dev'"):
        divide([*questions, Question("9", "?", "x", split="dev")], 1, 0.4, "t")
    with pytest.raises(DataError, match="none of the 1 questions is in the report split"):
        divide(questions[:1], 1, 0.4, "t")


def test_chance_and_interval() -> None:
    assert chance([Question("1", "?", "a"), Question("2", "?", "b"), Question("3", "?", "b")], "reading") == 0.5
    alike = [Question("1", "?", "Exit."), Question("2", "?", "exit"), Question("3", "?", '["b", "c"]')]
    assert chance([*alike, Question("4", "?", '["c", "B"]')], "reading") == 0.5, "a guess is matched as a reply is"
    assert chance([Question("1", "?", "?"), Question("2", "?", "!")], "reading") == 0.5
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4)) and wilson(10, 10)[1] == 1.0


def test_refusals(ctx: Context, tmp_path: Path) -> None:
    ref = model(ctx, tmp_path)
    with pytest.raises(RecipeError, match="known splits: selection, report"):
        run(ctx, ref, "test")  # type: ignore[arg-type]
    before = settings_digest(ctx, "report")
    assert before != settings_digest(ctx, "selection")
    ctx.recipe.evaluation.benchmarks.clear()
    with pytest.raises(RecipeError, match="benchmarks is empty"):
        run(ctx, ref, "report")
