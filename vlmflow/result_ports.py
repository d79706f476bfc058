"""Between Kubeflow artifacts and what a run ends in: which models are scored, their scores, the report.

Beside `vlmflow/ports.py`, which carries recipes, datasets, models and soups.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlmflow import ports, storage
from vlmflow.errors import RecipeError
from vlmflow.ports import Port
from vlmflow.registry.rows import UNTRAINED, chosen_row, soup_row

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.evaluation.scores import Scores, Split
    from vlmflow.models.store import ModelRef
    from vlmflow.soup.result import SoupResult
    from vlmflow.step import Context

SOUPS = tuple(map(soup_row, ("maximum", "average", "greedy")))  # in the order of the score table


def lineup(
    ctx: Context, untrained: Port, bootstrap: Port | None, candidates: list[Port], soup: Port, evaluators: int
) -> list[dict[str, Any]]:
    """Models to evaluate, dealt into at most `evaluators` groups: `name` ("1", "2", ...) and `models`, which maps model
    name to the URI of its folder (KFP does not keep the order of a dictionary, hence the name).

    A soup of one candidate has that candidate's weights: both names get a row and share a group, where the second is
    answered from the first's finished scores.
    """
    models = {UNTRAINED: ports.get_model(untrained)}
    if ctx.recipe.bootstrap and bootstrap is not None:
        models["bootstrap"] = ports.get_model(bootstrap)
    models |= ports.get_candidates(ctx, candidates)
    models |= {soup_row(name): entry.ref for name, entry in ports.get_soup(soup).soups.items()}
    return deal(models, evaluators)


def contestants(
    ctx: Context, addresses: list[str], evaluators: int, opened: Port | None = None
) -> list[dict[str, Any]]:
    """Models that a person names by URI or registered version, and one that is open, dealt into groups as `lineup` does.

    A row bears the model's name; models of one name also the beginning of their weights' hash.

    Raises:
        RecipeError: none is named.
    """
    from collections import Counter

    from vlmflow.registry import address

    named = [*map(address.find, addresses), *([ports.get_model(opened)] if opened is not None else [])]
    if not named:
        raise RecipeError("models: the list is empty; name at least one model by URI or registered version")
    refs = {ref.weights_sha256 + ref.uri: ref for ref in named}.values()
    often = Counter(ref.name for ref in refs)
    models = {ref.name if often[ref.name] == 1 else f"{ref.name}-{ref.weights_sha256[:8]}": ref for ref in refs}
    return deal(models, evaluators)


def deal(models: Mapping[str, ModelRef], evaluators: int) -> list[dict[str, Any]]:
    """Models (row name -> model) in at most `evaluators` groups; those of equal weights share one."""
    alike: dict[str, dict[str, str]] = {}
    for name, ref in models.items():
        alike.setdefault(ref.weights_sha256, {})[name] = ref.uri
    count = max(1, min(int(evaluators), len(alike)))
    groups: list[dict[str, str]] = [{} for _ in range(count)]
    for index, members in enumerate(alike.values()):
        groups[index % count] |= members
    return [{"name": str(index), "models": members} for index, members in enumerate(groups, start=1)]


def evaluate(ctx: Context, models: dict[str, str], split: str = "report") -> dict[str, Scores]:
    """Scores on one split of models given as name -> URI. Raises RecipeError for an unknown split."""
    from vlmflow.evaluation import run
    from vlmflow.models.store import MARKER, load_ref

    return {
        name: run.run(ctx, load_ref(storage.join(uri, MARKER)), cast("Split", split))
        for name, uri in sorted(models.items())
    }


def put_scores(scores: dict[str, Scores], out: Port, page: Port, metrics: Port) -> None:
    """Write the scores of a group: an object of score objects."""
    plain = {name: score.model_dump(mode="json") for name, score in scores.items()}
    storage.write_json(out.path, plain)
    rows = [
        {"model": name, "mean": s.mean} | {b: v.accuracy for b, v in s.benchmarks.items()} for name, s in scores.items()
    ]
    values = {str(row["model"]): {k: v for k, v in row.items() if k != "model"} for row in rows}
    splits = ", ".join(sorted({each.split for each in scores.values()}))
    ports.show(f"Scores on the {splits} split", values, page, metrics, table=rows)


def put_scoreboard(ctx: Context, scores: dict[str, Scores], out: Port, page: Port, metrics: Port) -> None:
    """Write all groups' scores as one table, and `summary.json` of the run to the store."""
    put_scores(scores, out, page, metrics)
    storage.write_json(storage.join(ctx.root, "runs", ctx.run_id, "summary.json"), _score_summary(scores))


def _score_summary(scores: Mapping[str, Scores]) -> dict[str, Any]:
    return {
        "scores": {n: {b: r.accuracy for b, r in s.benchmarks.items()} | {"mean": s.mean} for n, s in scores.items()},
        "chance": {b: r.chance for s in list(scores.values())[:1] for b, r in s.benchmarks.items()},
        "models": list(scores),  # JSON objects are stored with sorted keys; this is the order of the table
    }


def get_scores(ctx: Context, scored: list[Port]) -> dict[str, Scores]:
    """All groups' scores by model name: untrained, bootstrap, candidates, soups, others."""
    from vlmflow.evaluation.scores import Scores

    found = {name: Scores.model_validate(s) for port in scored for name, s in storage.read_json(port.path).items()}
    order = [UNTRAINED, "bootstrap", *(ctx.recipe.soup.candidates if ctx.recipe.soup else ())]
    known = [name for name in order if name in found]
    return {name: found[name] for name in [*known, *sorted(set(found) - set(known), key=_soup_order)]}


def _soup_order(name: str) -> tuple[int, str]:
    return (SOUPS.index(name) if name in SOUPS else len(SOUPS), name)


def judged_scores(ctx: Context, untrained: ModelRef, soup: SoupResult) -> dict[str, Scores]:
    """Selection-split scores that the gates decide by: the chosen model's, which the soup step measured, and those of the
    untrained model."""
    from vlmflow.evaluation import run

    return {
        UNTRAINED: run.run(ctx, untrained, "selection"),
        chosen_row(soup): soup.entries[soup.chosen].selection,
    }


def put_report(
    ctx: Context,
    datasets: dict[str, Manifest],
    models: dict[str, ModelRef],
    scores: dict[str, Scores],
    soup: Port,
    registered: Port,
    exported: Port,
    page: Port,
) -> None:
    """Write the report page, and `report.html` and `summary.json` of the run to the store for whoever started it."""
    from vlmflow.report import run

    results = {
        name: storage.read_json(port.path) for name, port in (("registered", registered), ("exported", exported))
    }
    searched = ports.get_soup(soup)
    inputs = run.ReportInputs(datasets=datasets, models=models, scores=scores, soup=searched, **results)
    text = run.run(ctx, inputs)
    Path(page.path).parent.mkdir(parents=True, exist_ok=True)
    Path(page.path).write_text(text, encoding="utf-8")
    folder = storage.join(ctx.root, "runs", ctx.run_id)
    summary = {
        **_score_summary(scores),
        "chosen": searched.chosen,
        "registered": {key: results["registered"].get(key) for key in ("name", "version", "url")},
        "exported": {key: results["exported"].get(key) for key in ("uri",)},
    }
    storage.write_bytes(storage.join(folder, "report.html"), text.encode())
    storage.write_json(storage.join(folder, "summary.json"), summary)
