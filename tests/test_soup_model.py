"""Soup and evaluation with real (tiny, random) POINTS models: what is averaged loads, answers and scores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from models_tiny import build, picture, tokenizer

from vlmflow.evaluation.run import run as evaluate
from vlmflow.evaluation.tsv import write_table
from vlmflow.models import inference, initial
from vlmflow.models.store import ModelLineage, fetch, publish
from vlmflow.recipe.results import BenchmarkSpec, EvaluationSpec, SoupSpec
from vlmflow.soup.run import run
from vlmflow.step import Context


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    rows = [
        {
            "index": f"{side}{i}",
            "question": "What?",
            "answer": "Yes",
            "split": side,
            "image": picture(i, 70 + 30 * i, 40),
        }
        for i in range(3)
        for side in ("selection", "report")
    ]
    rows[0]["question"] = "What is <|image_pad|>?"
    write_table(tmp_path / "t.tsv", rows)
    benchmark = BenchmarkSpec(table=str(tmp_path / "t.tsv"), kind="yes_no")
    evaluation = EvaluationSpec(benchmarks={"t": benchmark}, max_new_tokens=3, batch=2)
    spec = SoupSpec(stage="sft", candidates={"a": []})
    recipe: Any = SimpleNamespace(name="tiny", seed=1, evaluation=evaluation, soup=spec)
    return Context(recipe, root=str(tmp_path / "root"), scratch=tmp_path / "scratch", run_id="test")


def test_soup_of_real_models(ctx: Context, tmp_path: Path) -> None:
    states, candidates = {}, {}
    for i, name in enumerate("ab"):
        model = build(seed=i)
        states[name] = {k: v.clone() for k, v in model.state_dict().items()}
        initial.save(model, tokenizer(), tmp_path / name)
        lineage = ModelLineage(step="train", stage="sft", ancestor="start")
        candidates[name] = publish(ctx, tmp_path / name, name, lineage, key=name)
    result = run(ctx, candidates)
    soup = result.soups["average"].ref
    assert {f.path for f in soup.files} == {f.path for f in candidates["a"].files}  # nothing is missing to load it
    loaded = inference.load(fetch(soup))
    for name, value in loaded.model.state_dict().items():
        a, b = states["a"][name], states["b"][name]
        expected = ((a.double() + b.double()) / 2).to(a.dtype) if a.is_floating_point() else a
        assert torch.equal(value, expected), name
    score = evaluate(ctx, soup, "selection").benchmarks["t"]
    rows = pq.read_table(score.predictions).to_pylist()
    assert score.n == 3 and score.errors == 1 and "<|image_pad|>" in rows[0]["error"]  # found among the others
    assert rows[1]["reply"] == ask(loaded, 1) and rows[2]["finish"] in ("stop", "length")


def ask(vlm: inference.VLM, i: int) -> str:
    request = inference.Request([picture(i, 70 + 30 * i, 40)], "What?\nPlease answer yes or no.")
    return vlm.generate([request], max_new_tokens=3, batch=1)[0].text


def test_the_tile_limit_of_a_benchmark_reaches_the_model(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial.save(build(), tokenizer(), tmp_path / "m")
    ref = publish(ctx, tmp_path / "m", "m", ModelLineage(step="train"), key="m")
    counts: list[int] = []
    encode = inference.VLM._encode

    def counted(self: inference.VLM, *args: Any) -> Any:
        found = encode(self, *args)
        counts.append(sum(len(tiles) for tiles in found.tiles))
        return found

    monkeypatch.setattr(inference.VLM, "_encode", counted)
    for limit in (1, 3, None):
        spec = ctx.recipe.evaluation.benchmarks["t"]
        ctx.recipe.evaluation.benchmarks["t"] = spec.model_copy(update={"max_tiles": limit})
        counts.clear()
        evaluate(ctx, ref, "report")
        assert max(counts) == (limit or 3) + 1  # the model's own limit is 3; the thumbnail is not counted
