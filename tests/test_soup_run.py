"""The soup search around a fake model: the three procedures, what is remembered, what is refused."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation_fake_vlm import Request, install
from PIL import Image
from safetensors.torch import load_file, save_file

from vlmflow import storage
from vlmflow.errors import ModelError, RecipeError
from vlmflow.evaluation.tsv import write_table
from vlmflow.models.store import ModelLineage, ModelRef, fetch, publish
from vlmflow.recipe.results import BenchmarkSpec, EvaluationSpec, SoupSpec
from vlmflow.soup.choose import greedy, maximum, ranking
from vlmflow.soup.result import SoupResult
from vlmflow.soup.run import run
from vlmflow.step import Context


def answer(folder: Path, request: Request) -> str:
    """Right when the first weight is near the number in the image: a model of skill w reads the numbers up to w."""
    value = request.images[0].getpixel((0, 0))[0]
    skill = load_file(folder / "model.safetensors")["w"][0].item()
    return str(value) if value <= skill else "?"


def context(tmp_path: Path, choose: str = "greedy", p: int = 2) -> Context:
    rows = [
        {
            "index": f"{side}{i}",
            "question": "Read.",
            "answer": str(i),
            "split": side,
            "image": Image.new("RGB", (4, 4), (i, 0, 0)),
        }
        for i in range(1, 11)
        for side in ("selection", "report")
    ]
    write_table(tmp_path / "t.tsv", rows)
    evaluation = EvaluationSpec(benchmarks={"t": BenchmarkSpec(table=str(tmp_path / "t.tsv"), kind="reading")})
    spec = SoupSpec(stage="sft", candidates={"a": []}, maximum=p, choose=choose)  # type: ignore[arg-type]
    recipe: Any = SimpleNamespace(name="tiny", seed=1, evaluation=evaluation, soup=spec)
    return Context(recipe, root=str(tmp_path / "root"), scratch=tmp_path / "scratch", run_id="test")


def candidate(ctx: Context, tmp_path: Path, name: str, skill: float, ancestor: str = "start", **extra: Any) -> ModelRef:
    folder = tmp_path / "local" / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.tensor([skill, *map(float, name.encode())][:2]), **extra}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    lineage = ModelLineage(step="train", stage="sft", ancestor=ancestor, data=[f"data-{name}"])
    return publish(ctx, folder, name, lineage, key=f"candidate-{name}")


def weights(ref: ModelRef) -> float:
    return load_file(fetch(ref) / "model.safetensors")["w"][0].item()


def test_three_soups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, answer)
    ctx = context(tmp_path)
    skills = {"a": 4.0, "b": 10.0, "c": 8.0, "d": 9.5}  # accuracy 0.4, 1.0, 0.8, 0.9
    candidates = {n: candidate(ctx, tmp_path, n, s) for n, s in skills.items()}
    result = run(ctx, candidates)
    assert {n: e.selection.mean for n, e in result.candidates.items()} == {"a": 0.4, "b": 1.0, "c": 0.8, "d": 0.9}
    assert result.soups["maximum"].ingredients == ["b", "d"] and weights(result.soups["maximum"].ref) == 9.75
    assert result.soups["average"].ingredients == ["a", "b", "c", "d"] and weights(result.soups["average"].ref) == 7.875
    assert result.soups["greedy"].ingredients == ["b"]  # every mean is below 10
    assert result.soups["greedy"].ref == candidates["b"]  # one ingredient: its own weights
    assert [(t.candidate, t.before, t.after, t.accepted) for t in result.trace] == [
        ("b", None, 1.0, True), ("d", 1.0, 0.9, False), ("c", 1.0, 0.9, False), ("a", 1.0, 0.7, False),
    ]  # fmt: skip
    assert result.soups["average"].selection.mean == 0.7 and result.soups["average"].selection.split == "selection"
    assert result.chosen == "greedy" and result.model == candidates["b"]
    soup = result.soups["average"].ref
    assert soup.lineage.ancestor == "start" and soup.lineage.step == "soup" and soup.lineage.stage == "sft"
    assert sorted(soup.lineage.parents) == sorted(c.weights_sha256 for c in candidates.values())
    assert soup.lineage.data == ["data-a", "data-b", "data-c", "data-d"]
    result.save(tmp_path / "soup.json")
    assert SoupResult.load(tmp_path / "soup.json") == result


def test_equal_accuracy_is_accepted_and_ties_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, answer)
    ctx = context(tmp_path)
    result = run(ctx, {n: candidate(ctx, tmp_path, n, s) for n, s in {"c": 7.0, "a": 7.5, "b": 7.2, "d": 1.0}.items()})
    assert [t.candidate for t in result.trace] == ["a", "b", "c", "d"]
    assert result.soups["greedy"].ingredients == ["a", "b", "c"]
    assert [t.accepted for t in result.trace] == [True, True, True, False]
    assert weights(result.soups["greedy"].ref) == pytest.approx(21.7 / 3)
    assert result.soups["maximum"].ingredients == ["a", "b"]


def test_rerun_neither_averages_nor_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch, answer)
    ctx = context(tmp_path)
    candidates = {n: candidate(ctx, tmp_path, n, s) for n, s in {"a": 5.0, "b": 6.0, "c": 6.4}.items()}
    first = run(ctx, candidates)
    # {a}, {b}, {c}, {bc}, {abc}: each set once, though maximum = {bc} and average = {abc} are also greedy's trials
    assert sum("load" in e for e in log) == 5
    log.clear()
    monkeypatch.setattr("vlmflow.soup.run.average", None)
    assert run(ctx, dict(reversed(candidates.items()))) == first
    assert log == []
    assert not list((tmp_path / "scratch" / "soups").iterdir())


def test_killed_search_continues_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(tmp_path)
    candidates = {n: candidate(ctx, tmp_path, n, s) for n, s in {"a": 5.0, "b": 6.0, "c": 6.4}.items()}
    whole = Context(ctx.recipe, root=str(tmp_path / "whole"), scratch=ctx.scratch, run_id="test")
    install(monkeypatch, answer)
    expected = run(whole, candidates)
    count = 0

    def dies(folder: Path, request: Request) -> str:
        nonlocal count
        count += 1
        if count == 35:  # in the fourth evaluation
            raise KeyboardInterrupt
        return answer(folder, request)

    install(monkeypatch, dies)
    with pytest.raises(KeyboardInterrupt):
        run(ctx, candidates)
    log = install(monkeypatch, answer)
    found = run(ctx, candidates)
    assert sum("load" in e for e in log) == 2
    assert [t.model_dump() for t in found.trace] == [t.model_dump() for t in expected.trace]
    for name, entry in expected.soups.items():
        assert found.soups[name].ref.weights_sha256 == entry.ref.weights_sha256
        assert found.soups[name].ingredients == entry.ingredients


def test_weights_do_not_depend_on_names_or_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, answer)
    ctx = context(tmp_path)
    a, b, c = (candidate(ctx, tmp_path, n, s) for n, s in (("a", 1.1), ("b", 2.3), ("c", 3.7)))
    one = run(ctx, {"a": a, "b": b, "c": c}).soups["average"].ref
    other = Context(ctx.recipe, root=str(tmp_path / "other"), scratch=tmp_path / "s2", run_id="test")
    assert run(other, {"x": c, "y": a, "z": b}).soups["average"].ref.weights_sha256 == one.weights_sha256


def test_single_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch, answer)
    ctx = context(tmp_path)
    only = candidate(ctx, tmp_path, "a", 5.0)
    result = run(ctx, {"a": only})
    assert {n: e.ref for n, e in result.soups.items()} == {"maximum": only, "average": only, "greedy": only}
    assert len(result.trace) == 1 and sum("load" in e for e in log) == 1
    assert not any("soup-" in o.uri for o in storage.list_uris(ctx.root))


@pytest.mark.parametrize(
    ("choose", "skills", "chosen"),
    [
        ("average", {"a": 1.0, "b": 9.0}, "average"),
        ("maximum", {"a": 1.0, "b": 9.0}, "maximum"),
        ("best", {"a": 1.0, "b": 9.0}, "greedy"),  # greedy = b, preferred to the equal candidate b
        ("best", {"a": 9.0, "b": 9.0}, "greedy"),
    ],
)
def test_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choose: str, skills: dict, chosen: str) -> None:
    install(monkeypatch, answer)
    ctx = context(tmp_path, choose)
    assert run(ctx, {n: candidate(ctx, tmp_path, n, s) for n, s in skills.items()}).chosen == chosen


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch, answer)
    ctx = context(tmp_path)
    a = candidate(ctx, tmp_path, "a", 1.0)
    stranger = candidate(ctx, tmp_path, "b", 2.0, ancestor="elsewhere")
    with pytest.raises(ModelError, match="candidate a was tuned from start, candidate b from elsewhere"):
        run(ctx, {"a": a, "b": stranger})
    orphan = candidate(ctx, tmp_path, "o", 2.0, ancestor="")
    with pytest.raises(ModelError, match="unknown start"):
        run(ctx, {"p": orphan, "q": orphan})
    other = candidate(ctx, tmp_path, "c", 2.0, extra=torch.zeros(1))
    with pytest.raises(ModelError, match="tensor extra is in c"):
        run(ctx, {"a": a, "c": other})
    sick = candidate(ctx, tmp_path, "n", float("nan"))
    with pytest.raises(ModelError, match="tensor w of n holds nan at"):
        run(ctx, {"a": a, "n": sick})
    with pytest.raises(RecipeError, match=r"soup.candidates.greedy: this name is taken"):
        run(ctx, {"greedy": a})
    with pytest.raises(RecipeError, match="at least one"):
        run(ctx, {})
    assert log == []  # nothing was evaluated before the refusal
    ctx.recipe.soup = None  # type: ignore[misc]
    with pytest.raises(RecipeError, match="no soup section"):
        run(ctx, {"a": a})


def test_greedy_against_a_reference_on_random_tables() -> None:
    """All accuracies of all subsets drawn from few values, so ties are common; the reference follows points.md 7.1."""
    rng = random.Random(5)
    for _ in range(200):
        names = list("abcde")[: rng.randint(1, 5)]
        table = {
            frozenset(s): rng.choice([0.1, 0.2, 0.3, 0.4])
            for k in range(1, 6)
            for s in itertools.combinations(names, k)
        }
        accuracy = {n: table[frozenset([n])] for n in names}
        asked: list[frozenset[str]] = []

        def pooled(group: tuple[str, ...], table: dict = table, asked: list[frozenset[str]] = asked) -> float:
            asked.append(frozenset(group))
            return table[frozenset(group)]

        pool, trace = greedy(accuracy, pooled)
        expected: list[str] = []
        for name in sorted(sorted(names), key=lambda n: accuracy[n], reverse=True):
            if not expected or table[frozenset([*expected, name])] >= table[frozenset(expected)]:
                expected.append(name)
        assert pool == expected and [t.candidate for t in trace if t.accepted] == expected
        assert len(asked) == len(names) - 1 and all(len(group) > 1 for group in asked)
        assert table[frozenset(pool)] >= max(accuracy.values())


def test_ranking_and_maximum() -> None:
    accuracy = {"b": 0.5, "a": 0.5, "c": 0.9}
    assert ranking(accuracy) == ["c", "a", "b"]
    assert maximum(accuracy, 2) == ["c", "a"] and maximum(accuracy, 9) == ["c", "a", "b"]
